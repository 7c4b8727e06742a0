"""What a zero of each weight saves on a device, for ``prices`` of pruning methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_nna.pruning.masks import MatrixLayout
from lightning_nna.pruning.sparsity_pattern import SparsityPattern
from lightning_nna.weights.price import Price
from lightning_nna.weights.selection import Sparsities, candidates_of


@torch.no_grad()
def prices_of_zeros(
    module: nn.Module,
    price: Price,
    sparsity: float,
    *,
    pattern: str | SparsityPattern = "unstructured",
    targets: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> dict[str, float]:
    """Measure what a zero of each weight saves, on average up to a sparsity.

    The least weights of each tensor alone are zeroed; one warning lists tensors whose zeros cost
    more than they save.

    Args:
        module: Trained module, which stays unchanged.
        price: What the device pays for a weight: :class:`lightning_nna.deploy.VelaPrice`, for
            example. Asked twice for each tensor.
        sparsity: Fraction of zeros, above 0 and below 1.
        pattern: Pattern of the zeros, see :class:`.PruningMethod`.
        targets: Patterns of the selected weights, see :class:`.PruningMethod`.
        exclude: Patterns of weights that are left out.

    Returns:
        Saving of one zero by name, in the unit of ``price``, at least 0: ``prices`` of every
        pruning method.

    Raises:
        ValueError: If the sparsity is out of range, a pattern matches nothing, or the pattern of
            zeros does not divide a weight.

    Example:
        >>> class NonzeroBytes:
        ...     unit = "bytes"
        ...     def __call__(self, name, weight, grid=None):
        ...         return float(weight.count_nonzero())
        >>> prices_of_zeros(nn.Linear(8, 4), NonzeroBytes(), 0.5)
        {'weight': 1.0}
    """
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity must be above 0 and below 1, got {sparsity}")
    zeros, parameters = SparsityPattern.of(pattern), candidates_of(module)
    saved, dearer = {}, {}
    for name in Sparsities(sparsity, targets, exclude=exclude).of(module):
        weight = parameters[name]
        layout = MatrixLayout.of(module.get_submodule(name.rpartition(".")[0]), weight)
        zeros.require_fit(layout.matrix_shape, name)
        scores = zeros.importance_scores(layout.to_matrix(weight).float())
        mask = layout.from_matrix(zeros.mask(scores, sparsity, layout.matrix_shape))
        dense, sparse = price(name, weight.detach()), price(name, weight.detach() * mask)
        saved[name] = max(0.0, dense - sparse) / max(1, int((~mask).sum()))
        if sparse > dense:
            dearer[name] = f"{name} ({dense:.0f} -> {sparse:.0f})"
    if dearer:
        rank_zero_warn(
            f"zeros of pattern {zeros.name!r} make these dearer, in {price.unit}: "
            f"{', '.join(dearer.values())}; exclude them, or choose a pattern that the device "
            f"expects, as 2:4 for convolutions on an Ethos-U85"
        )
    return saved
