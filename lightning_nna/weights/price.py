"""``Price``: what a device pays for a weight, as allocation and pruning ask for it.

A price is any function of a parameter's name, its weight and the integers that it is made of: a
closed form, a table, or a measurement such as :class:`lightning_nna.deploy.VelaPrice`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_nna.weights.pipeline import WeightGrid


@runtime_checkable
class Price(Protocol):
    """Price of one weight of a module, in a unit in which the prices of all weights add up.

    Example:
        >>> import torch
        >>> class NonzeroBytes:
        ...     unit = "bytes"
        ...     def __call__(self, name, weight, grid=None):
        ...         return float(weight.count_nonzero())
        >>> isinstance(NonzeroBytes(), Price), NonzeroBytes()("head.weight", torch.eye(3))
        (True, 3.0)
    """

    @property
    def unit(self) -> str:
        """Unit of the prices, in the plural: ``"cycles"``, ``"bytes"``."""

    def __call__(self, name: str, weight: Tensor, grid: WeightGrid | None = None) -> float:
        """Return the price of a weight.

        Args:
            name: Name of the parameter.
            weight: Weight that the device would have, in the shape of the parameter.
            grid: Scales with which ``weight`` is integers; None for those of the accelerator.
        """
