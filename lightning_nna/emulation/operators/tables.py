"""Tables of functions of 8- and 16-bit integers, clipped and scaled before they are looked up.

What an operator does after its arithmetic (clip, scale, note what was clipped) is done once for the
entries, and not with every call for all elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.device_tables import on_device_of
from lightning_nna.emulation.kernels import definitions as kernels
from lightning_nna.emulation.kernels.library import runs_kernel
from lightning_nna.emulation.program import Activation
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
    """A table and what it is read with: the result of an operator before it is clipped.

    Args:
        table: Table, of the integers of one operand, or of pairs of integers of 8 bits, the first
            operand's most significant.
        operands: Activations of shapes that broadcast.
    """

    table: Table
    operands: tuple[Activation, ...]

    def clipped(self, y: QParams, keep: bool) -> tuple[Tensor, Tensor | None]:
        """Return the result, and what was clipped of it.

        Args:
            y: Quantization parameters that the table was made for.
            keep: Whether a backward needs the clipped elements.

        Returns:
            Real values, float32, of the shape that the operands broadcast to, and the second value
            of :func:`.clip`.
        """
        first = self.operands[0].value
        entries, mask = self.table.on(first.device, fused_relu=y.fused_relu)
        mask = mask if keep else None
        name = "look_up" if len(self.operands) == 1 else "look_up_pair"
        if runs_kernel(name, first):
            values, clipped = self._by_kernel(entries, mask)
            return values, None if mask is None else clipped
        index = self._index()
        return look_up(entries, index), None if mask is None else look_up(mask, index)

    def _index(self) -> Tensor:
        """Positions in the table, int32."""
        if len(self.operands) == 1:
            (x,) = self.operands
            return x.integers().sub_(x.qparams.bounds[0]).int()
        a, b = self.operands
        lowest = 256 * a.qparams.bounds[0] + b.qparams.bounds[0]
        return torch.add(b.integers(), a.integers(), alpha=256).sub_(lowest).int()

    def _by_kernel(self, entries: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if len(self.operands) == 1:
            (x,) = self.operands
            scale, lowest = x.qparams.scale, x.qparams.bounds[0]
            return kernels.look_up(x.value.detach(), entries, mask, scale=scale, first=lowest)
        a, b = self.operands
        first, second = (on_device_of(entries, x.value).detach() for x in (a, b))
        return kernels.look_up_pair(
            first,
            second,
            entries,
            mask,
            scale_a=a.qparams.scale,
            first_a=a.qparams.bounds[0],
            scale_b=b.qparams.scale,
            first_b=b.qparams.bounds[0],
        )


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a table of one axis at indices of any shape; the result is no view."""
    result = table.new_empty(index.shape)
    torch.index_select(table, 0, index.flatten(), out=result.view(-1))
    return result
