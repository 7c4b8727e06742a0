r"""``L1Pruning``: weights shrink towards zero by a proximal step, and the least are pruned.

Reference:
    Parikh and Boyd, "Proximal algorithms", Foundations and Trends in Optimization 1(3), 2014.
"""

from __future__ import annotations

from typing import Any

from torch.nn.functional import softshrink
from typing_extensions import override

from lightning_nna.pruning.magnitude_pruning import MagnitudePruning


class L1Pruning(MagnitudePruning):
    r"""Threshold weights softly after every step, with the masks of :class:`.MagnitudePruning`.

    .. math:: w \leftarrow \mathrm{sign}(w) \max(|w| - \eta \lambda, 0)

    with the learning rate :math:`\eta` of the weight's own group, until masks freeze.

    Args:
        sparsity: See :class:`.PruningMethod`.
        strength: Threshold :math:`\lambda` per learning rate, not negative.
        settings: Other arguments of :class:`.PruningMethod`.

    Logs ``nna/l1_pruning/sparsity``.

    Raises:
        ValueError: As :class:`.MagnitudePruning`, or if ``strength`` is negative.

    Example:
        >>> L1Pruning(0.8, strength=0.01).strength
        0.01
    """

    method = "l1_pruning"

    def __init__(self, sparsity: float, *, strength: float = 0.01, **settings: Any) -> None:
        super().__init__(sparsity, **settings)
        if strength < 0:
            raise ValueError(f"strength must not be negative, got {strength}")
        self.strength = strength

    @override
    def stepped(self) -> None:
        if not self._is_frozen():
            # Schedulers step later: this is the learning rate of the step.
            groups = [group for one in self._optimizers for group in one.param_groups]
            rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
            for parameter in self._parameters.values():
                threshold = rates.get(id(parameter), 0.0) * self.strength
                parameter.copy_(softshrink(parameter, threshold))
        super().stepped()
