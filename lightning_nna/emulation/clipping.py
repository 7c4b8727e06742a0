"""The end of every operator: whole numbers are clipped to the grid of its output."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.rescaling import Rescaler
from lightning_nna.emulation.ranges import QParams

# Accumulators that are requantized at a time, so that they stay in the cache.
_BLOCK = 2**15


def clip(rounded: Tensor, qparams: QParams, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Clip whole numbers to a grid.

    Args:
        rounded: Integers less the zero point, float; overwritten.
        qparams: The grid.
        keep: Whether the backward needs to know what was clipped.

    Returns:
        Integers less the zero point as float32, and what :func:`inside` needs: None where nothing
        was clipped, else on a CPU the flat indices of the few that were, elsewhere a mask.
    """
    low, high = qparams.bounds
    # Every grid lies where float32 holds all integers, and half the bytes take half the time.
    rounded = rounded.float()
    if qparams.fused_relu:
        rounded = rounded.clamp_min_(low)
    if not rounded.is_cpu:
        clipped = rounded.clamp(low, high)
        return clipped, (clipped == rounded if keep else None)
    # Comparisons are slow there, and most often nothing is clipped.
    if not rounded.numel() or _within(rounded, low, high):
        return rounded, None
    if not keep:
        return rounded.clamp_(low, high), None
    clipped = rounded.clamp(low, high)
    return clipped, rounded.sub_(clipped).flatten().nonzero().squeeze(1)


def inside(grad: Tensor, clipped: Tensor | None) -> Tensor:
    """A gradient where nothing was clipped, zero elsewhere; see :func:`clip`."""
    if clipped is None:
        return grad
    if clipped.dtype == torch.bool:
        return grad * clipped
    return grad.flatten().index_fill(0, clipped, 0).view(grad.shape)


class Clipped:
    """Note clipped elements of a tensor that is computed block by block.

    Args:
        keep: Whether the backward needs to know.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self._found: list[Tensor] = []

    def clip(self, rounded: Tensor, qparams: QParams, first: int) -> Tensor:
        """Clip a block whose first element has the flat index ``first``, see :func:`clip`."""
        centered, clipped = clip(rounded, qparams, self.keep)
        if clipped is not None:
            # A mask is that of the only block.
            self._found.append(clipped if clipped.dtype == torch.bool else clipped + first)
        return centered

    def joined(self) -> Tensor | None:
        """Return what :func:`inside` needs of all blocks."""
        if not self._found:
            return None
        return self._found[0] if len(self._found) == 1 else torch.cat(self._found)


def rescale_rows(
    sums: Tensor, rescaler: Rescaler, y: QParams, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Requantize accumulators to a grid, block by block.

    Args:
        sums: Whole numbers, any dtype, shape ``(rows, columns)``.
        rescaler: With factors and offset of shape ``(columns,)`` or of none.
        y: The grid.
        keep: Whether the backward needs to know what was clipped.

    Returns:
        Values on the grid, float32, and what was clipped, see :func:`clip`.
    """
    if not sums.is_cpu:
        centered, clipped = clip(rescaler(sums.to(rescaler.dtype)), y, keep)
        return centered.mul_(y.scale), clipped
    columns = sums.shape[1]
    step = max(1, _BLOCK // max(columns, 1))
    room = torch.empty(min(step, len(sums)), columns, dtype=rescaler.dtype)
    values, blocks = torch.empty(sums.shape), Clipped(keep)
    for first in range(0, len(sums), step):
        block = sums[first : first + step]
        centered = blocks.clip(rescaler(room[: len(block)].copy_(block)), y, first * columns)
        torch.mul(centered, y.scale, out=values[first : first + step])
    return values, blocks.joined()


def _within(x: Tensor, low: int, high: int) -> bool:
    least, greatest = torch.aminmax(x)
    return float(least) >= low and float(greatest) <= high
