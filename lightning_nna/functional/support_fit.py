r"""What a weight on a support can do: the least-squares fit of its survivors, and what is left.

With the second moment :math:`M = E[a a^T]` of a layer's inputs, a row :math:`w` and a support
:math:`S`, the fit solves :math:`M_{SS}\, x_S = (M w)_S`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Of the mean of the diagonal; makes Cholesky possible.
_LEAST_RIDGE = 1e-9
# Entries of the batch of Gram matrices that are solved at a time.
_BATCH = 8_000_000


@torch.no_grad()
def refit_on_support(
    weight: Float[Tensor, "rows columns"],
    second_moment: Float[Tensor, "columns columns"],
    mask: Bool[Tensor, "rows columns"],
) -> Float[Tensor, "rows columns"]:
    """Least squares of every row on its own support, by Cholesky, some rows at a time.

    Args:
        weight: Dense.
        second_moment: Of the inputs.
        mask: True where weights are fitted; elsewhere they are zero.

    Returns:
        float64.

    Example:
        >>> moment = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        >>> refit_on_support(torch.tensor([[1.0, 1.0]]), moment, torch.tensor([[True, False]]))
        tensor([[1.5000, 0.0000]], dtype=torch.float64)
    """
    moment = second_moment.double()
    ridge = float(_LEAST_RIDGE * moment.diagonal().mean().clamp_min(1e-300))
    target = weight.double() @ moment
    result = torch.zeros_like(target)
    counts = mask.sum(1)
    # Rows of like support are solved together; what one has more than another is padded.
    order = counts.argsort(dim=0, stable=True)
    done = 0
    while done < len(order):
        size = _batch_size(counts, order, done)
        rows = order[done : done + size]
        done += size
        most = int(counts[rows].max())
        if most == 0:
            continue
        columns = (~mask[rows]).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        held = torch.arange(most, device=mask.device) < counts[rows, None]
        gram = moment[columns[:, :, None], columns[:, None, :]]
        gram *= held[:, :, None] & held[:, None, :]
        gram.diagonal(dim1=1, dim2=2).add_(torch.where(held, 0.0, 1.0))
        right = target[rows[:, None], columns] * held
        factor = _cholesky(gram, ridge)
        found = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
        result[rows[:, None], columns] = found * held
    return result


def measurement_nmse(
    dense: Float[Tensor, "rows columns"],
    sparse: Float[Tensor, "rows columns"],
    second_moment: Float[Tensor, "columns columns"] | None = None,
) -> float:
    """Error of a layer's output over the output's power; 0 for a layer without power.

    Example:
        >>> measurement_nmse(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]]))
        0.36
    """
    w, away = dense.double(), sparse.double() - dense.double()
    if second_moment is None:
        error, power = float(away.square().sum()), float(w.square().sum())
    else:
        moment = second_moment.double()
        error, power = float(((away @ moment) * away).sum()), float(((w @ moment) * w).sum())
    return max(error, 0.0) / power if power > 0 else 0.0


def _cholesky(gram: Tensor, ridge: float) -> Tensor:
    """Factors of Gram matrices, with as little of a ridge as makes all of them positive."""
    gram.diagonal(dim1=1, dim2=2).add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    while bool(failed.any()):
        gram.diagonal(dim1=1, dim2=2).add_(9 * ridge)
        ridge *= 10
        factor, failed = torch.linalg.cholesky_ex(gram)
    return factor


def _batch_size(counts: Tensor, order: Tensor, done: int) -> int:
    """How many of the next rows are solved together."""
    remaining = order[done:]
    sizes = counts[remaining].double()
    entries = torch.arange(1, len(sizes) + 1, device=sizes.device) * sizes.square()
    return max(1, int((entries <= _BATCH).sum()))
