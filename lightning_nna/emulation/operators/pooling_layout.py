"""Windows of a pooling, and its form in the schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.convolution_layout import (
    SAME,
    VALID,
    channels_last,
    each_axis,
    record_padding,
)
from lightning_nna.emulation.program import Activation, Stored
from lightning_nna.emulation.ranges import QParams


@dataclass(frozen=True)
class Windows:
    """Windows of a pooling along one axis.

    Args:
        size: Number of elements of the input.
        taps: Number of elements of a window.
        stride: Distance from one window to the next.
        padding: Padding before the first element.
        dilation: Distance between the elements of a window.
        outputs: Number of windows.
    """

    size: int
    taps: int
    stride: int
    padding: int = 0
    dilation: int = 1
    outputs: int = 1

    @classmethod
    def of(
        cls, size: int, taps: int, stride: int, padding: int, dilation: int, *, ceil_mode: bool
    ) -> Windows:
        """Count the windows as PyTorch does: with ``ceil_mode`` the last may reach beyond the end.

        Example:
            >>> Windows.of(6, 3, 2, 0, 1, ceil_mode=True).outputs
            3
        """
        reach = dilation * (taps - 1) + 1
        steps = size + 2 * padding - reach
        outputs = (-(-steps // stride) if ceil_mode else steps // stride) + 1
        # No window begins in the padding at the end.
        outputs -= ceil_mode and (outputs - 1) * stride >= size + padding
        return cls(size, taps, stride, padding, dilation, outputs)

    @property
    def end(self) -> int:
        """End of the last window, in elements from the first padding on."""
        return (self.outputs - 1) * self.stride + self.dilation * (self.taps - 1) + 1

    @property
    def sides(self) -> tuple[int, int]:
        """Padding before and after that lets every window be full."""
        return self.padding, max(self.end - self.size - self.padding, 0)

    @property
    def is_valid(self) -> bool:
        """Tell whether the kernel's ``VALID`` has these windows."""
        return self.sides == (0, 0)

    @property
    def is_same(self) -> bool:
        """Tell whether the kernel's ``SAME``, ceil(size / stride) windows, has these."""
        total = max(self.end - self.size, 0)
        return self.outputs == -(-self.size // self.stride) and self.padding == total // 2

    def elements(self) -> list[int]:
        """Return the number of elements of the input in each window."""
        return [min(end, self.size) - max(start, 0) for start, end in self._bounds()]

    def divisors(self, *, count_padding: bool) -> list[int]:
        """Return the number that PyTorch divides each window's sum by."""
        if not count_padding:
            return self.elements()
        return [min(end, self.size + self.padding) - start for start, end in self._bounds()]

    def _bounds(self) -> list[tuple[int, int]]:
        """First element and end of each window, undilated."""
        starts = [index * self.stride - self.padding for index in range(self.outputs)]
        return [(start, start + self.taps) for start in starts]


def image(x: Tensor, axes: int) -> Tensor:
    """Return a view with a batch, channels, height and width.

    Args:
        x: Shape ``(N, C, L)`` or ``(N, C, H, W)`` by ``axes``, or without the first axis.
        axes: Number of axes that windows go along, 1 or 2.

    Returns:
        View of shape ``(N, C, H, W)``; the height is 1 for one axis.
    """
    batched = x if x.dim() == axes + 2 else x.unsqueeze(0)
    return batched.unsqueeze(2) if axes == 1 else batched


def without_image(y: Tensor, like: Tensor, axes: int) -> Tensor:
    """Undo :func:`image`.

    Args:
        y: Shape ``(N, C, H, W)``.
        like: Tensor that has been the argument of :func:`image`.
        axes: As for :func:`image`.

    Returns:
        Tensor with the axes of ``like``.
    """
    flat = y.squeeze(2) if axes == 1 else y
    return flat if like.dim() == axes + 2 else flat.squeeze(0)


def windows_of(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    *,
    ceil_mode: bool,
    axes: int,
) -> tuple[Windows, Windows]:
    """Return the windows along height and width.

    Args:
        x: Input, shape ``(N, C, H, W)``.
        kernel_size: Number of elements of a window.
        stride: Distance from window to window; None for windows that lie next to one another.
        padding: Padding at both ends.
        dilation: Distance between elements of a window.
        ceil_mode: Whether a last window may reach beyond the end.
        axes: Number of axes of the function.
    """
    steps = kernel_size if stride is None or stride == () or stride == [] else stride
    neutral = (1, 1, 0, 1)
    values = zip(neutral, (kernel_size, steps, padding, dilation), strict=True)
    pairs = [(*[default] * (2 - axes), *each_axis(value, axes)) for default, value in values]
    height, width = (
        Windows.of(size, *arguments, ceil_mode=bool(ceil_mode))
        for size, *arguments in zip(x.shape[2:], *pairs, strict=True)
    )
    return height, width


def record_average(call: Call, x: Activation, y: Activation, windows: Sequence[Windows]) -> None:
    """Report an AVERAGE_POOL_2D, after a PAD where the kernel has no such windows.

    Args:
        call: The call.
        x: Input, shape ``(N, C, H, W)``.
        y: Output, of the same quantization parameters.
        windows: Windows along height and width.
    """
    operand = channels_last(x.stored())
    padding = kernel_padding(windows)
    if padding is None:
        operand, padding = record_padding(call, operand, [w.sides for w in windows]), VALID
    _record_pool(call, "AVERAGE_POOL_2D", operand, channels_last(y.stored()), windows, padding)


def record_maximum(call: Call, x: Activation, y: Activation, windows: Sequence[Windows]) -> None:
    """Report a MAX_POOL_2D, or the maxima of slices where windows are dilated.

    Args:
        call: The call.
        x: Input, shape ``(N, C, H, W)``.
        y: Output, of the same quantization parameters.
        windows: Windows along height and width.
    """
    operand, result = channels_last(x.stored()), channels_last(y.stored())
    padding = kernel_padding(windows)
    if any(w.dilation > 1 and w.taps > 1 for w in windows):
        _record_maxima(call, _surrounded(call, operand, x.qparams, windows), result, windows)
        return
    if padding is None:
        operand, padding = _surrounded(call, operand, x.qparams, windows), VALID
    _record_pool(call, "MAX_POOL_2D", operand, result, windows, padding)


def kernel_padding(windows: Sequence[Windows]) -> int | None:
    """Return the padding by which the kernel has these windows; None if it has not.

    Args:
        windows: Windows along height and width.
    """
    if all(w.is_valid for w in windows):
        return VALID
    return SAME if all(w.is_same for w in windows) else None


def _record_pool(
    call: Call, kernel: str, x: Stored, y: Stored, windows: Sequence[Windows], padding: int
) -> None:
    height, width = windows
    call.record(
        kernel,
        [x],
        [y],
        padding=padding,
        strideH=height.stride,
        strideW=width.stride,
        filterHeight=height.taps,
        filterWidth=width.taps,
    )


def _surrounded(call: Call, x: Stored, qparams: QParams, windows: Sequence[Windows]) -> Stored:
    """An image with the lowest integer around it, which no maximum prefers to its elements."""
    if all(w.is_valid for w in windows):
        return x
    if qparams.low == qparams.zero_point:  # As after a ReLU.
        return record_padding(call, x, [w.sides for w in windows])
    for axis, each in enumerate(windows, start=1):
        parts = [_filled(x, axis, count, qparams.low) for count in each.sides]
        present = [part for part in (parts[0], x, parts[1]) if part.integers.shape[axis]]
        if len(present) > 1:
            integers = torch.cat([part.integers for part in present], axis)
            # The forward never holds it.
            joined = replace(x, integers=integers, source=torch.empty(integers.shape))
            call.record("CONCATENATION", present, [joined], axis=axis)
            x = joined
    return x


def _filled(x: Stored, axis: int, count: int, value: int) -> Stored:
    """A constant like an image, with so many elements along an axis."""
    shape = list(x.integers.shape)
    shape[axis] = count
    integers = torch.full(shape, value)
    return replace(x, integers=integers, constant=True, source=torch.empty(shape))


def _record_maxima(call: Call, x: Stored, y: Stored, windows: Sequence[Windows]) -> None:
    """Report a maximum over windows, along one axis after the other, as maxima of slices."""
    moving = [w for w in windows if w.taps > 1]
    for axis, each in enumerate(windows, start=1):
        slices = [_slice(x, axis, each, tap) for tap in range(each.taps)]
        result = slices[0]
        for position, other in enumerate(slices[1:], start=2):
            is_last = position == each.taps and each is moving[-1]
            integers = torch.maximum(result.integers, other.integers)
            between = replace(x, integers=integers, source=torch.empty(integers.shape))
            maximum = y if is_last else between
            call.record("MAXIMUM", [result, other], [maximum])
            result = maximum
        x = result


def _slice(x: Stored, axis: int, windows: Windows, tap: int) -> Stored:
    """One element of every window along an axis."""
    first = tap * windows.dilation
    index: tuple[Any, ...] = (slice(None),) * axis
    index += (slice(first, first + (windows.outputs - 1) * windows.stride + 1, windows.stride),)
    assert x.source is not None
    return replace(x, integers=x.integers[index], source=x.source[index])


def maxima(x: Tensor, windows: Sequence[Windows]) -> Tensor:
    """Compute the maxima of windows over what lies inside of the image.

    Args:
        x: Shape ``(N, C, H, W)``.
        windows: Windows along height and width.

    Returns:
        Tensor of shape ``(N, C, *outputs)``.
    """
    sides = [side for each in reversed(windows) for side in each.sides]
    padded = F.pad(x, sides, value=-torch.inf) if any(sides) else x
    taps, strides, dilations = zip(*((w.taps, w.stride, w.dilation) for w in windows), strict=True)
    return F.max_pool2d(padded, taps, strides, 0, dilations)
