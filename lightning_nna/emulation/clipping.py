"""Clip the results of operators to the integers of their outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.on_host import on_host
from lightning_nna.emulation.arithmetic.rescaling import Rescaler, RoundingKind
from lightning_nna.emulation.kernels import definitions as kernels
from lightning_nna.emulation.ranges import QParams

# Number of accumulators in a block that is requantized at once; a block fits the cache.
_BLOCK = 2**15


def clip(rounded: Tensor, qparams: QParams, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Clip integers to the range of quantization parameters.

    Args:
        rounded: Integers less the zero point, float, any shape; overwritten.
        qparams: Quantization parameters of the result.
        keep: Whether a backward needs the clipped elements.

    Returns:
        Integers less the zero point, float32, of the same shape, and a value for :func:`inside`:
        None if no element was clipped; else flat indices of the clipped elements, int64, shape
        ``(clipped,)``, or a mask of them in the shape of the integers.
    """
    low, high = qparams.bounds
    # float32 holds all integers between the bounds exactly, and takes half the time of float64.
    rounded = rounded.float()
    if qparams.fused_relu:
        rounded = rounded.clamp_min_(low)
    if not on_host(rounded):
        clipped = rounded.clamp(low, high)
        return clipped, (clipped != rounded if keep else None)
    # Comparisons are slow on a CPU, and most often nothing is clipped.
    if not rounded.numel() or _within(rounded, low, high):
        return rounded, None
    if not keep:
        return rounded.clamp_(low, high), None
    clipped = rounded.clamp(low, high)
    return clipped, rounded.sub_(clipped).flatten().nonzero().squeeze(1)


def inside(grad: Tensor, clipped: Tensor | None) -> Tensor:
    """Set a gradient to zero where the result was clipped.

    Args:
        grad: Gradient of the result, float32, any shape.
        clipped: Second value that :func:`clip` has returned.

    Returns:
        The gradient, of the same shape.
    """
    if clipped is None:
        return grad
    if clipped.dtype == torch.bool:
        return grad.masked_fill(clipped.reshape(grad.shape), 0)
    return grad.flatten().index_fill(0, clipped, 0).view(grad.shape)


class Clipped:
    """Collect the clipped elements of a tensor that is computed block by block.

    Args:
        keep: Whether a backward needs the clipped elements.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self._blocks: list[Tensor] = []

    def clip(self, rounded: Tensor, qparams: QParams, first: int) -> Tensor:
        """Clip a block, see :func:`clip`.

        Args:
            rounded: Integers less the zero point, float, any shape; overwritten.
            qparams: Quantization parameters of the result.
            first: Flat index of the block's first element in the tensor.

        Returns:
            Integers less the zero point, float32, of the same shape.
        """
        centered, clipped = clip(rounded, qparams, self.keep)
        if clipped is not None:
            # There is a mask only if one block is the whole tensor.
            self._blocks.append(clipped if clipped.dtype == torch.bool else clipped + first)
        return centered

    def joined(self) -> Tensor | None:
        """Return the value for :func:`inside`: flat indices, shape ``(clipped,)``, or a mask."""
        if not self._blocks:
            return None
        return self._blocks[0] if len(self._blocks) == 1 else torch.cat(self._blocks)


def rescale_rows(
    sums: Tensor, rescaler: Rescaler, y: QParams, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Requantize accumulators, block by block.

    Args:
        sums: Accumulators, whole numbers of any dtype, shape ``(rows, columns)``; may be
            overwritten.
        rescaler: Rescaler with factors and offset of shape ``(columns,)`` or ``()``.
        y: Quantization parameters of the result.
        keep: Whether a backward needs the clipped elements.

    Returns:
        Real values of the result, float32, shape ``(rows, columns)``, and the second value of
        :func:`clip`.
    """
    height, columns = sums.shape
    rows = max(1, _BLOCK // max(columns, 1))
    if not on_host(sums) or height <= rows:
        centered, clipped = clip(rescaler(sums.to(rescaler.dtype)), y, keep)
        return centered.mul_(y.scale), clipped
    buffer = torch.empty(rows, columns, dtype=rescaler.dtype)
    values, blocks = torch.empty(sums.shape), Clipped(keep)
    for first in range(0, height, rows):
        block = sums[first : first + rows]
        centered = blocks.clip(rescaler(buffer[: block.shape[0]].copy_(block)), y, first * columns)
        torch.mul(centered, y.scale, out=values[first : first + rows])
    return values, blocks.joined()


def requantize_by_kernel(
    sums: Tensor,
    y: QParams,
    *,
    rounding: RoundingKind,
    scale_before: float,
    scale_after: float = 1.0,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """Requantize and clip accumulators by a kernel.

    Args:
        sums: Accumulators, whole numbers of any dtype and shape.
        y: Quantization parameters of the result.
        rounding: Rounding of the kernel.
        scale_before: See :func:`.kernels.definitions.requantize`, as the other settings.
        scale_after: See there.
        settings: Other arguments of that function.

    Returns:
        Real values of the result, float32, and a value for :func:`inside`, a mask or None; both
        of the shape of ``sums``.
    """
    low, high = y.bounds
    return kernels.requantize(
        sums,
        scale_before=scale_before,
        scale_after=scale_after,
        out_scale=y.scale,
        rounding=rounding,
        zero_point=y.zero_point,
        low=low,
        high=high,
        fused_relu=y.fused_relu,
        **settings,
    )


def output_in_blocks(
    x: Tensor, compute: Callable[[Tensor], Tensor], y: QParams, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute a result from some samples at a time, which fit the cache, and clip it.

    Args:
        x: Tensor of shape ``(samples, ...)``.
        compute: Function that takes some samples of ``x`` and returns integers of the result less
            the zero point, not clipped, float, a new tensor of their shape.
        y: Quantization parameters of the result.
        keep: Whether a backward needs the clipped elements.

    Returns:
        Real values of the result, float32, in the shape of ``x``, and the second value of
        :func:`clip`.
    """
    size = x[0].numel() if len(x) else 0
    samples = max(1, _BLOCK // max(size, 1))
    if not on_host(x) or len(x) <= samples:
        centered, clipped = clip(compute(x), y, keep)
        return centered.mul_(y.scale), clipped
    values, blocks = torch.empty_like(x, dtype=torch.float32), Clipped(keep)
    for first in range(0, len(x), samples):
        centered = blocks.clip(compute(x[first : first + samples]), y, first * size)
        torch.mul(centered, y.scale, out=values[first : first + samples])
    return values, blocks.joined()


def _within(x: Tensor, low: int, high: int) -> bool:
    smallest, largest = torch.aminmax(x)
    return float(smallest) >= low and float(largest) <= high
