"""Errors of weights that are not finite: they name the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def require_finite_weights(weights: Mapping[str, Tensor]) -> None:
    """Raise unless all of some weights are finite.

    Other weights would index outside of a table, or become a centroid. Sums are tested, which is
    ten times as fast as to test every weight; on a GPU the host waits once for all of them.

    Args:
        weights: Weights by name, float, any shapes.

    Raises:
        FloatingPointError: If a weight is not finite; names it.

    Example:
        >>> require_finite_weights({"head.weight": torch.tensor([1.0, float("inf")])})
        Traceback (most recent call last):
        FloatingPointError: head.weight has weights that are not finite: ...
    """
    if not weights:
        return
    with torch.no_grad():
        sums = [weight.sum(dtype=torch.float32) for weight in weights.values()]
        if bool(torch.stack([total.to(sums[0].device) for total in sums]).isfinite().all()):
            return
        # Sums of very large weights may exceed float32.
        wrong = [name for name, weight in weights.items() if not bool(weight.isfinite().all())]
    if wrong:
        raise FloatingPointError(
            f"{', '.join(wrong)} has weights that are not finite: look for the batch or the "
            f"learning rate that caused it"
        )
