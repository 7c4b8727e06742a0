r"""``L1Pruning``: weights shrink towards zero by a proximal step, and the least of them go.

Reference:
    Parikh and Boyd, "Proximal algorithms", Foundations and Trends in Optimization 1(3), 2014.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_nna.callbacks.magnitude_pruning import MagnitudePruning


class L1Pruning(MagnitudePruning):
    r"""Soft thresholding after every optimiser step, and masks as :class:`.MagnitudePruning` has.

    .. math:: w \leftarrow \mathrm{sign}(w) \max(|w| - \eta \lambda, 0)

    with the learning rate :math:`\eta` of the weight's own group, until masks freeze.

    Args:
        sparsity: See :class:`.PruningMethod`.
        strength: :math:`\lambda`.
        settings: The other arguments of :class:`.PruningMethod`.

    Logs ``nna/l1/sparsity``.

    Raises:
        ValueError: As :class:`.MagnitudePruning`, or if ``strength`` is negative.

    Example:
        >>> L1Pruning(0.8, strength=0.01).strength
        0.01
    """

    method = "l1"

    def __init__(self, sparsity: float, *, strength: float = 0.01, **settings: Any) -> None:
        super().__init__(sparsity, **settings)
        if strength < 0:
            raise ValueError(f"strength must not be negative, got {strength}")
        self.strength = strength
        self._thresholds: dict[int, float] = {}

    @override
    def step_begins(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._thresholds[id(parameter)] = float(group["lr"]) * self.strength

    @override
    def stepped(self) -> None:
        if not self._is_frozen():
            for parameter in self._parameters.values():
                _shrink(parameter, self._thresholds.get(id(parameter), 0.0))
        super().stepped()


@torch.no_grad()
def _shrink(weight: Tensor, threshold: float) -> None:
    weight.copy_(weight.sign() * (weight.abs() - threshold).clamp_min_(0))
