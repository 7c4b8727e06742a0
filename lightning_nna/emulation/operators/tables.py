"""Tables of functions of 8- and 16-bit integers, clipped and scaled before they are looked up.

What an operator does after its arithmetic (clip, scale, note what was clipped) is done once for the
entries, and not with every call for all elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nna.emulation.ranges import QParams


class Table:
    """Results of a function for all integers of its operands.

    Args:
        entries: Integers of the result less its zero point, not clipped, float, one axis.
        y: Quantization parameters of the result.

    Attributes:
        values: Real values of the clipped integers, float32.
    """

    def __init__(self, entries: Tensor, y: QParams) -> None:
        low, high = y.bounds
        # float32 holds all integers between the bounds exactly.
        self.values = entries.float().clamp(low, high).mul_(y.scale)
        below, above = entries < low, entries > high
        # By whether a ReLU follows, whose backward handles what was clipped at 0.
        self._clipped = {
            fused: mask if bool(mask.any()) else None
            for fused, mask in ((False, below | above), (True, above))
        }
        self._on_devices: dict[tuple[torch.device, bool], tuple[Tensor, Tensor | None]] = {}

    def on(self, device: torch.device, *, fused_relu: bool) -> tuple[Tensor, Tensor | None]:
        """Return the values, and which of them were clipped, bool; None if none was."""
        key = device, fused_relu
        known = self._on_devices.get(key)
        if known is None:
            mask = self._clipped[fused_relu]
            moved = None if mask is None else mask.to(device)
            known = self._on_devices[key] = self.values.to(device), moved
        return known


@dataclass(frozen=True, eq=False)
class LookedUp:
    """A table and where it is read: the result of an operator before it is clipped.

    Args:
        table: Table.
        index: Positions in it, int32, any shape.
    """

    table: Table
    index: Tensor

    def clipped(self, y: QParams, keep: bool) -> tuple[Tensor, Tensor | None]:
        """Return the result, and what was clipped of it.

        Args:
            y: Quantization parameters that the table was made for.
            keep: Whether a backward needs the clipped elements.

        Returns:
            Real values, float32, in the shape of the index, and the second value of :func:`.clip`.
        """
        entries, mask = self.table.on(self.index.device, fused_relu=y.fused_relu)
        clipped = None if mask is None or not keep else look_up(mask, self.index)
        return look_up(entries, self.index), clipped


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a table of one axis at indices of any shape; the result is no view."""
    result = table.new_empty(index.shape)
    torch.index_select(table, 0, index.flatten(), out=result.view(-1))
    return result
