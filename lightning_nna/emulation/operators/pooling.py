r"""Average and maximum pooling over one or two axes.

Both keep the quantization parameters of their input. An average is that of the stored integers,
with the zero point, in 32 bits and rounded away from zero:

.. math:: q_y = \mathrm{trunc}\Bigl(\frac{S \pm \lfloor n / 2 \rfloor}{n}\Bigr),
          \qquad S = \sum_{i=1}^n q_{x,i},

with the sign of :math:`S`, where :math:`n` counts the elements of a window that lie inside of the
input. Zeros that are to count come from a ``PAD`` before. A divisor that no kernel has is a product
with a constant after; one number for all windows is a convolution with a constant. Padding of a
maximum is the lowest integer. A pooling over time is one over height and width with height 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.arithmetic.integer_products import FLOAT32_INTEGERS
from lightning_nna.emulation.constants import Kind
from lightning_nna.emulation.first_order import first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators.call import Call, with_any_integer
from lightning_nna.emulation.operators.convolution import convolve
from lightning_nna.emulation.operators.convolution_layout import Geometry, each_axis
from lightning_nna.emulation.operators.driver import drive
from lightning_nna.emulation.operators.elementwise import MUL
from lightning_nna.emulation.operators.pooling_layout import (
    Windows,
    image,
    kernel_padding,
    maxima,
    record_average,
    record_maximum,
    windows_of,
    without_image,
)
from lightning_nna.emulation.operators.record import Form, Kernel, Operator, register_operator
from lightning_nna.emulation.program import Activation

#: Why a maximum with indices is no operator.
WITH_INDICES = "no kernel has the indices of maxima: leave return_indices out"
# The kernel's sums have 32 bits.
_MOST_ELEMENTS = 2**16


def average_pool(
    call: Call,
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    axes: int = 2,
) -> Tensor:
    """Emulate ``F.avg_pool2d`` of shapes ``(N, C, H, W)``, or of one axis, ``F.avg_pool1d``."""
    operand = with_any_integer(call, call.operand(input, "input"))
    x = Activation(image(operand.value, axes), operand.qparams)
    windows = windows_of(x.value, kernel_size, stride, padding, ceil_mode=ceil_mode, axes=axes)
    if divisor_override is not None:
        result = _scaled_sum(call.child("sum"), x, windows, 1.0 / divisor_override)
    else:
        result = averaged(call, x, windows)
        wanted = [w.divisors(count_padding=count_include_pad) for w in windows]
        ratio = counts(windows) / _outer(wanted)
        if bool((ratio != 1).any()):
            result = _multiplied(call, result, ratio)
    return call.viewed(without_image(result, input, axes), result)


def max_pool(
    call: Call,
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    axes: int = 2,
) -> Tensor:
    """Emulate ``F.max_pool2d`` of shapes ``(N, C, H, W)``, or of one axis, ``F.max_pool1d``."""
    operand = call.operand(input, "input")
    x = Activation(image(operand.value, axes), operand.qparams)
    windows = windows_of(
        x.value, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode, axes=axes
    )
    result = largest(call, x, windows)
    return call.viewed(without_image(result, input, axes), result)


def supports_average_pool(
    input: Any, kernel_size: int | Sequence[int], *args: Any, axes: int = 2, **kwargs: Any
) -> bool | str:
    """Tell whether the sums of a pooling stay in the kernel's 32 bits."""
    elements = math.prod(each_axis(kernel_size, axes))
    if elements > _MOST_ELEMENTS:
        return f"its windows have more than {_MOST_ELEMENTS} elements: write x.mean over the axes"
    return is_image(input, axes)


def supports_max_pool(input: Any, *args: Any, axes: int = 2, **kwargs: Any) -> bool | str:
    """Tell whether a maximum is over an image, and nobody asks for its indices."""
    indices = args[5] if len(args) > 5 else kwargs.get("return_indices", False)
    return WITH_INDICES if indices else is_image(input, axes)


def is_image(input: Any, axes: int) -> bool:
    """Tell whether a tensor has a batch or none, channels, and so many axes, and elements."""
    return isinstance(input, Tensor) and input.dim() in (axes + 1, axes + 2) and input.numel() > 0


def averaged(call: Call, x: Activation, windows: tuple[Windows, Windows]) -> Tensor:
    """One AVERAGE_POOL_2D instruction, with the divisors of :func:`counts`.

    Args:
        call: The call.
        x: Input, shape ``(N, C, H, W)``.
        windows: Windows along height and width.

    Returns:
        Tensor of shape ``(N, C, *outputs)`` with the quantization parameters of ``x``.
    """
    with float32_arithmetic(x.value):
        if call.observing:
            return call.unchanged(_sums(x.value, windows) / counts(windows).to(x.value), x)
        result = _Average.apply(x.value, x, windows)
    if call.recording:
        record_average(call, x, Activation(result, x.qparams), windows)
    return call.unchanged(result, x)


def largest(call: Call, x: Activation, windows: tuple[Windows, Windows]) -> Tensor:
    """One MAX_POOL_2D instruction.

    Args:
        call: The call.
        x: Input, shape ``(N, C, H, W)``.
        windows: Windows along height and width.

    Returns:
        Tensor of shape ``(N, C, *outputs)`` with the quantization parameters of ``x``.
    """
    with float32_arithmetic(x.value):
        result = maxima(x.value, windows)
    if call.recording:
        record_maximum(call, x, Activation(result, x.qparams), windows)
    return call.unchanged(result, x)


def counts(windows: tuple[Windows, Windows]) -> Tensor:
    """Return the number that the kernel divides each sum by, float64, shape ``(*outputs,)``."""
    if kernel_padding(windows) is None:  # With a PAD before, all windows are full.
        return _outer([[w.taps] * w.outputs for w in windows])
    return _outer([w.elements() for w in windows])


def _outer(factors: Sequence[Sequence[int]]) -> Tensor:
    """Products of numbers of rows and columns, float64."""
    rows, columns = (torch.tensor(numbers, dtype=torch.float64) for numbers in factors)
    return rows[:, None] * columns


def _sums(x: Tensor, windows: tuple[Windows, Windows]) -> Tensor:
    """Sums over windows, with zeros around the input."""
    padded = F.pad(x, _padding(windows))
    return F.avg_pool2d(padded, *_sizes(windows), divisor_override=1)


def _padding(windows: tuple[Windows, Windows]) -> list[int]:
    """Padding as ``F.pad`` takes it: the last axis first."""
    return [side for each in reversed(windows) for side in each.sides]


def _sizes(windows: tuple[Windows, Windows]) -> tuple[list[int], list[int]]:
    """Sizes and strides of windows."""
    return [w.taps for w in windows], [w.stride for w in windows]


def _multiplied(call: Call, x: Tensor, ratio: Tensor) -> Tensor:
    """The product of an image with one number for every place, as an instruction."""
    factor = ratio.to(x).unsqueeze(-1)
    call.state.constants.mark(factor, Kind.CONSTANT)
    last = call.viewed(x.permute(0, 2, 3, 1), x)
    result = drive(MUL, call.child("mul"), last, factor)
    return call.viewed(result.permute(0, 3, 1, 2), result)


def _scaled_sum(
    call: Call, x: Activation, windows: tuple[Windows, Windows], factor: float
) -> Tensor:
    """Sums over windows times a number: a depthwise convolution with a constant."""
    height, width = windows
    channels = x.value.shape[1]
    weight = x.value.new_full((channels, 1, height.taps, width.taps), factor)
    geometry = Geometry(
        (height.stride, width.stride), (height.sides, width.sides), (1, 1), channels
    )

    def in_float() -> Tensor:
        return _sums(x.value, windows) * factor

    if call.observing:
        return call.observed(in_float())
    y = call.output(in_float)
    return convolve(call, x, weight, None, call.quantized(weight), geometry, y)


class _Average(torch.autograd.Function):
    """Averages of stored integers; backward those of the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, activation: Activation, windows: tuple[Windows, Windows]
    ) -> Tensor:
        qparams, number = activation.qparams, counts(windows).to(x.device)
        integers = activation.integers()
        if float(number.max()) * qparams.largest >= FLOAT32_INTEGERS:
            integers = integers.double()
        # With a zero point of -3, a window of the integers -7, -7, -6 and -6 has the sum -26, and
        # -26 - 4 // 2 = -28; a fourth of that is -7.
        total = _sums(integers, windows).double() + number * qparams.zero_point
        half = (number / 2).floor()
        rounded = ((total.abs() + half) / number).floor().copysign(total) - qparams.zero_point
        ctx.windows, ctx.shape = windows, x.shape
        return rounded.float().mul_(qparams.scale)

    @staticmethod
    @first_order("average_pool")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        windows = ctx.windows
        left, right, top, bottom = _padding(windows)
        batch, channels, height, width = ctx.shape
        with float32_arithmetic(grad):
            padded = grad.new_empty(batch, channels, top + height + bottom, left + width + right)
            passed: Tensor = torch.ops.aten.avg_pool2d_backward(
                grad / counts(windows).to(grad),
                padded,
                *_sizes(windows),
                [0, 0],
                False,
                True,
                1,
            )
            return passed[..., top : top + height, left : left + width], None, None


register_operator(
    Operator(
        "average_pool",
        torch=("avg_pool2d",),
        emulate=average_pool,
        supports=supports_average_pool,
        forms=(
            Form(
                ("avg_pool1d",),
                partial(average_pool, axes=1),
                partial(supports_average_pool, axes=1),
            ),
        ),
        litert=(
            Kernel(
                "AVERAGE_POOL_2D",
                fuses_activation=True,
                options="Pool2DOptions",
                versions={"int8": 2, "int16": 3},
            ),
        ),
        arithmetic="integer sum of the stored integers, divided, rounded away from zero",
    )
)
register_operator(
    Operator(
        "max_pool",
        torch=("max_pool2d",),
        emulate=max_pool,
        supports=supports_max_pool,
        forms=(
            Form(
                ("max_pool1d",),
                partial(max_pool, axes=1),
                partial(supports_max_pool, axes=1),
            ),
        ),
        litert=(
            Kernel(
                "MAX_POOL_2D",
                fuses_activation=True,
                options="Pool2DOptions",
                versions={"int8": 2, "int16": 3},
            ),
        ),
        arithmetic="chooses among the integers; padding is the lowest",
    )
)
