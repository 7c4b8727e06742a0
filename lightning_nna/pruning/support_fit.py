r"""The least-squares fit of a weight on a support, and its error.

With the second moment :math:`M = E[a a^T]` of a layer's inputs, a row :math:`w` and a support
:math:`S`, the fit solves :math:`M_{SS}\, x_S = (M w)_S`. If fewer weights go than
stay, the same fit follows from those that go, :math:`P`, and :math:`H = M^{-1}`:

.. math:: x = w - H_{:P}\, (H_{PP})^{-1} w_P .

Reference:
    Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon",
    NeurIPS 1992 (the second form).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Of the mean of the diagonal; makes Cholesky possible.
_LEAST_RIDGE = 1e-9
# Entries of the batch of Gram matrices that are solved at a time.
_BATCH = 8_000_000
# A moment with a greater spread of pivots is not inverted: too few digits would be left.
_MOST_SPREAD = 1e7


@torch.no_grad()
def refit_on_support(
    weight: Float[Tensor, "rows columns"],
    second_moment: Float[Tensor, "columns columns"],
    mask: Bool[Tensor, "rows columns"],
) -> Float[Tensor, "rows columns"]:
    """Least squares of every row on its own support, by Cholesky, some rows at a time.

    Args:
        weight: Dense weight, shape ``(rows, columns)``.
        second_moment: Second moment of the inputs, shape ``(columns, columns)``.
        mask: True where weights are fitted; elsewhere they are zero.

    Returns:
        float64.

    Example:
        >>> moment = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        >>> refit_on_support(torch.tensor([[1.0, 1.0]]), moment, torch.tensor([[True, False]]))
        tensor([[1.5000, 0.0000]], dtype=torch.float64)
    """
    moment = second_moment.double()
    dense = weight.double()
    counts = mask.sum(1)
    # Rows of like support are solved together; what one has more than another is padded.
    order = counts.argsort(dim=0, stable=True)
    inverse = None
    if 2 * int(counts.sum()) > mask.numel():
        inverse = _inverse(moment)
    if inverse is None:
        return _solved(moment, dense @ moment, mask, counts, order)
    pruned = ~mask
    multipliers = _solved(inverse, dense, pruned, pruned.sum(1), order.flip(0))
    return (dense - multipliers @ inverse).masked_fill_(pruned, 0.0)


def _solved(matrix: Tensor, target: Tensor, mask: Tensor, counts: Tensor, order: Tensor) -> Tensor:
    """Solve the part of ``matrix`` that each row's mask chooses; zeros elsewhere."""
    ridge = float(_LEAST_RIDGE * matrix.diagonal().mean().clamp_min(1e-300))
    result = torch.zeros_like(target)
    done = 0
    while done < len(order):
        size = _batch_size(counts, order, done)
        rows = order[done : done + size]
        done += size
        most = int(counts[rows].max())
        if most == 0:
            continue
        columns = (~mask[rows]).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        is_used = torch.arange(most, device=mask.device) < counts[rows, None]
        gram = matrix[columns[:, :, None], columns[:, None, :]]
        gram *= is_used[:, :, None] & is_used[:, None, :]
        gram.diagonal(dim1=1, dim2=2).add_(torch.where(is_used, 0.0, 1.0))
        right = target[rows[:, None], columns] * is_used
        factor = _cholesky(gram, ridge)
        solved = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
        result[rows[:, None], columns] = solved * is_used
    return result


def _inverse(moment: Tensor) -> Tensor | None:
    """The inverse of a moment; None if it is too near to being singular."""
    factor, failed = torch.linalg.cholesky_ex(moment)
    if bool(failed):
        return None
    pivots = factor.diagonal().square()
    if float(pivots.max()) > _MOST_SPREAD * float(pivots.min()):
        return None
    return torch.cholesky_inverse(factor)


@torch.no_grad()
def descend_on_support(
    weight: Float[Tensor, "rows columns"],
    second_moment: Float[Tensor, "columns columns"],
    mask: Bool[Tensor, "rows columns"],
    *,
    iterations: int,
    start: Float[Tensor, "rows columns"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """Towards the fit of :func:`refit_on_support`, by conjugate gradients of all rows at once.

    A step is one product of matrices and lowers the error of every row, or leaves it; well
    conditioned inputs need few.

    Args:
        weight: Dense weight, shape ``(rows, columns)``.
        second_moment: Second moment of the inputs, shape ``(columns, columns)``.
        mask: True where weights are fitted; elsewhere they are zero.
        iterations: Steps.
        start: What the steps begin at, zero where the mask is False; None for the dense weight on
            the mask.

    Returns:
        float32.

    Example:
        >>> moment = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        >>> mask = torch.tensor([[True, False]])
        >>> descend_on_support(torch.tensor([[1.0, 1.0]]), moment, mask, iterations=1)
        tensor([[1.5000, 0.0000]])

    Reference:
        Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", J. Res.
        Natl. Bur. Stand. 49(6), 1952; preconditioned by the diagonal.
    """
    moment, dense = second_moment.float(), weight.float()
    diagonal = moment.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    support = mask.view(torch.uint8).to(dense.dtype)
    x = dense * support if start is None else start.clone()
    residual = ((dense - x) @ moment).mul_(support)
    direction = residual * inverse
    power = (residual * direction).sum(1, keepdim=True)
    for _ in range(iterations):
        product = (direction @ moment).mul_(support)
        curvature = (direction * product).sum(1, keepdim=True)
        step = torch.where(curvature > 0, power / curvature, 0.0)
        x.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        scaled = residual * inverse
        before, power = power, (residual * scaled).sum(1, keepdim=True)
        direction = scaled.addcmul_(torch.where(before > 0, power / before, 0.0), direction)
    return x


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
    """Count the next rows that are solved together."""
    remaining = order[done:]
    sizes = counts[remaining].double()
    entries = torch.arange(1, len(sizes) + 1, device=sizes.device) * sizes.square()
    return max(1, int((entries <= _BATCH).sum()))
