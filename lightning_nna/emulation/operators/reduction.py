r"""Means, sums and extremes over axes.

The reference divides by the number of elements inside the multiplier: with the mantissa :math:`m`
and exponent :math:`e` of :math:`s_x / s_y`, and as many bits :math:`k` as leave 32,

.. math:: \bar q = M\Bigl(\sum_i (q_i - o_x);\ \lfloor 2^k m / N \rfloor,\ e - k\Bigr) + o_y,
          \qquad k = \min(\lfloor \log_2 N \rfloor,\ 32,\ 31 + e)

Its ``SUM`` of 8-bit or 16-bit integers wraps around. A sum is therefore a ``MEAN`` onto a grid
:math:`N` times finer and a ``MUL`` by the integer 1 of scale :math:`N`, which changes no integer.
Extremes choose among values and need no arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.fixed_point import quantize_multiplier
from lightning_nna.emulation.arithmetic.integer_products import FLOAT32_INTEGERS
from lightning_nna.emulation.arithmetic.rescaling import Multiplier, Prepared, rescale
from lightning_nna.emulation.clipping import clip, inside
from lightning_nna.emulation.first_order import first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators import clamping
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.convolution_layout import channels_last as images
from lightning_nna.emulation.operators.driver import gives_float32
from lightning_nna.emulation.operators.indices_of_extremes import record_index
from lightning_nna.emulation.operators.linear import overflowed
from lightning_nna.emulation.operators.record import Form, Kernel, Operator, register_operator
from lightning_nna.emulation.program import Activation, Stored
from lightning_nna.emulation.ranges import QParams, with_min_scale

# How many times finer than its input a mean may be: 16 bits then hold 8 steps of the input.
_FINEST = 2**12
# What the kernel's sums hold.
_SUM_LIMIT = 2.0**31

# Operators and kernels of the indices that extremes are at.
_INDICES = {"REDUCE_MAX": ("argmax", "ARG_MAX"), "REDUCE_MIN": ("argmin", "ARG_MIN")}

Axes = int | tuple[int, ...] | list[int] | None


def _with_numpy_names(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``axis`` and ``keepdims`` stand for ``dim`` and ``keepdim``, as torch does."""

    @wraps(function)
    def renamed(*args: Any, axis: Axes = None, keepdims: bool | None = None, **kwargs: Any) -> Any:
        if axis is not None:
            kwargs["dim"] = axis
        if keepdims is not None:
            kwargs["keepdim"] = keepdims
        return function(*args, **kwargs)

    return renamed


@_with_numpy_names
def mean(
    call: Call, input: Tensor, dim: Axes = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """Emulate ``torch.mean`` over axes of any shape."""
    x = call.operand(input, "input")

    def in_float() -> Tensor:
        return torch.mean(input, dim, keepdim)

    if call.observing:
        return call.observed(in_float())
    axes = _axes(input, dim)
    y = mean_grid(call, x.qparams, call.output(in_float))
    return mean_onto(call, x, axes, keepdim, y)


@_with_numpy_names
def sum(
    call: Call, input: Tensor, dim: Axes = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """Emulate ``torch.sum`` of any shape: a mean, and a product with the number of elements."""
    return multiplied_mean(call, input, dim, keepdim, _count(input, _axes(input, dim)))


def multiplied_mean(
    call: Call,
    input: Tensor,
    dim: Axes,
    keepdim: bool,
    factor: float,
    *,
    grid: QParams | None = None,
) -> Tensor:
    """Compute the mean times a number: a ``MEAN`` onto a finer scale, and a ``MUL`` by 1.

    Args:
        call: The call.
        input: Tensor of any shape.
        dim: Axes; None for all of them.
        keepdim: Whether they stay, with one element.
        factor: Number, positive; that of the elements makes a sum.
        grid: Quantization parameters of the result; None for those of the observed range.
    """
    x = call.operand(input, "input")
    axes = _axes(input, dim)
    count = _count(input, axes)

    def in_float() -> Tensor:
        total = torch.sum(input, dim, keepdim)
        return total if factor == count else total * (factor / count)

    if call.observing:
        return call.observed(in_float())
    y = mean_grid(call, x.qparams, grid or call.output(in_float), factor)
    finer = replace(y, scale=float(np.float32(y.scale) / np.float32(factor)))
    with float32_arithmetic(input):
        result = _Mean.apply(x.value, x, axes, keepdim, finer, y.scale, call)
    if call.recording:
        integers = Activation(result, y).stored()
        average = replace(integers, scale=finer.scale)
        _record_reduction(call, "MEAN", x.stored(), average, axes, keepdim)
        one = Stored(torch.ones((), dtype=torch.int64), integers.dtype, factor, constant=True)
        call.record("MUL", [average, one], [integers])
    return call.with_qparams(result, y)


def mean_grid(call: Call, x: QParams, y: QParams, count: float = 1) -> QParams:
    """Grid of ``count`` times a mean that the kernel's multiplier reaches from ``x``.

    The mean of what is centered already (a normalized activation) is 0 except for the rounding of
    the float forward. With a grid for that alone the multiplier would shift the sum out of 32 bits.
    """
    step = count * x.scale / _FINEST
    return with_min_scale(y, step, power_of_two=call.state.spec.power_of_two_scales)


def mean_onto(
    call: Call,
    x: Activation,
    axes: tuple[int, ...],
    keepdim: bool,
    y: QParams,
    *,
    channels_last: bool = False,
) -> Tensor:
    """One MEAN instruction.

    Args:
        call: The call.
        x: Any shape.
        axes: Which to average over, from 0.
        keepdim: Whether they stay, with one element.
        y: Grid of the output.
        channels_last: Whether the instruction reads images ``(N, C, H, W)`` in the order
            ``(N, H, W, C)``; ``axes`` are 2 and 3 then, and stay.
    """
    with float32_arithmetic(x.value):
        result = _Mean.apply(x.value, x, axes, keepdim, y, y.scale, call)
    if call.recording:
        operand, output = x.stored(), Activation(result, y).stored()
        if channels_last:
            operand, output, axes = images(operand), images(output), (1, 2)
        _record_reduction(call, "MEAN", operand, output, axes, keepdim)
    return call.with_qparams(result, y)


@_with_numpy_names
def amax(call: Call, input: Tensor, dim: Axes = (), keepdim: bool = False) -> Tensor:
    """Emulate ``torch.amax`` over axes of any shape."""
    return _extreme(call, "REDUCE_MAX", torch.amax, input, dim, keepdim)


@_with_numpy_names
def amin(call: Call, input: Tensor, dim: Axes = (), keepdim: bool = False) -> Tensor:
    """Emulate ``torch.amin`` over axes of any shape."""
    return _extreme(call, "REDUCE_MIN", torch.amin, input, dim, keepdim)


@_with_numpy_names
def maximum_over(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Emulate ``torch.max`` of any shape, of all values or over an axis, or of two tensors."""
    if (other := _second_tensor(args, kwargs)) is not None:
        return clamping.maximum(call, input, other)
    return _extreme(call, "REDUCE_MAX", torch.max, input, *args, **kwargs)


@_with_numpy_names
def minimum_over(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Emulate ``torch.min`` of any shape, of all values or over an axis, or of two tensors."""
    if (other := _second_tensor(args, kwargs)) is not None:
        return clamping.minimum(call, input, other)
    return _extreme(call, "REDUCE_MIN", torch.min, input, *args, **kwargs)


def supports_average(input: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> bool | str:
    """Tell whether a mean or sum is in float32 and has something to add up."""
    has_terms = "out" not in kwargs and input.dim() > 0 and input.numel() > 0
    return has_terms and gives_float32(dtype)


def supports_extreme(input: Any, *args: Any, **kwargs: Any) -> bool:
    """Tell whether an extreme has values to choose among, or is of two tensors of floats."""
    if (other := _second_tensor(args, kwargs)) is not None:
        return clamping.supports_pair(input, other)
    return input.dim() > 0 and input.numel() > 0


def _second_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the second operand of an extreme of two tensors, if it is one."""
    second = args[0] if args else kwargs.get("other")
    return second if isinstance(second, Tensor) else None


def _extreme(
    call: Call,
    kind: str,
    function: Callable[..., Any],
    input: Tensor,
    dim: Any = None,
    keepdim: bool = False,
) -> Any:
    """The values lie on the input's own grid."""
    call.require(kind)
    x = call.operand(input, "input")
    with float32_arithmetic(input):
        result = function(x.value) if dim is None else function(x.value, dim, keepdim)
    values = result if isinstance(result, Tensor) else result.values
    call.unchanged(values, x)
    if call.recording:
        stored = Activation(values, x.qparams).stored()
        axes = _axes(input, dim)
        _record_reduction(call, kind, x.stored(), stored, axes, keepdim)
        if not isinstance(result, Tensor) and call.state.spec.has_operator(_INDICES[kind][0]):
            index = result.indices.squeeze(axes[0]) if keepdim else result.indices
            record_index(call, _INDICES[kind][1], x, axes[0], index)
    return result


class _Mean(torch.autograd.Function):
    """A mean, whose integers may stand for another scale than the one they are rounded to."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        activation: Activation,
        axes: tuple[int, ...],
        keepdim: bool,
        grid: QParams,
        scale: float,
        call: Call,
    ) -> Tensor:
        count = _count(x, axes)
        largest = float(count * activation.qparams.largest)
        integers = activation.integers()
        dtype = torch.float32 if largest < FLOAT32_INTEGERS else torch.float64
        total = integers.sum(axes, keepdim, dtype=dtype)
        factor = activation.qparams.scale / grid.scale
        rounded = average(call, total, count, factor, largest, grid.zero_point)
        centered, clipped = clip(rounded, grid, any(ctx.needs_input_grad))
        ctx.axes, ctx.shape = () if keepdim else axes, x.shape
        ctx.slope = scale / (grid.scale * count)
        ctx.save_for_backward(clipped)
        return centered.mul_(scale)

    @staticmethod
    @first_order("mean")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (clipped,) = ctx.saved_tensors
        with float32_arithmetic(grad):
            passed = inside(grad, clipped) * ctx.slope
            for axis in sorted(ctx.axes):
                passed = passed.unsqueeze(axis)
            # In full: the order of elements decides the last bits of what convolutions make of it.
            return passed.expand(ctx.shape).contiguous(), None, None, None, None, None, None


def average(
    call: Call, total: Tensor, count: int, factor: float, largest: float, zero_point: int = 0
) -> Tensor:
    """Compute ``total * factor / count``, rounded as the kernel does.

    The kernel's sums have 32 bits whatever the width of the elements: 65,537 elements of 16 bits
    may leave them.

    Args:
        call: The call.
        total: Sums, whole numbers, any shape.
        count: Number of elements in each.
        factor: Scale of the elements over that of the output.
        largest: Bound on the absolute value of a sum.
        zero_point: Of the output.

    Returns:
        Whole numbers, float64, without the zero point.
    """
    rounding, ratio = call.state.spec.rounding_of("double"), factor / count
    total = overflowed(call, total, largest, limit=_SUM_LIMIT, factors=ratio, rounding=rounding)
    largest = min(largest, _SUM_LIMIT)
    if rounding != "double":
        return rescale(total, ratio, rounding=rounding, largest=largest)
    return _divider(factor, count, largest, zero_point)(total.double())


@lru_cache(maxsize=1024)
def _divider(factor: float, count: int, largest: float, zero_point: int) -> Prepared:
    multiplier, exponent = map(torch.tensor, mean_multiplier(factor, count))
    return Prepared(Multiplier(multiplier, exponent, largest=largest, zero_point=zero_point))


def mean_multiplier(factor: float, count: int) -> tuple[int, int]:
    """Return the mantissa and the exponent that divide a sum by the number of its terms.

    Args:
        factor: Scale of the terms over that of the mean.
        count: Number of terms.

    Example:
        >>> mean_multiplier(1.0, 4)
        (1073741824, -1)
    """
    mantissa, shift = quantize_multiplier(factor)
    bits = min(count.bit_length() - 1, 32, 31 + shift)
    return (mantissa << bits) // count, shift - bits


def _axes(x: Tensor, dim: Axes) -> tuple[int, ...]:
    """Axes from 0, in order; all of them where none is named."""
    named = (dim,) if isinstance(dim, int) else tuple(dim or range(x.dim()))
    return tuple(sorted(axis % x.dim() for axis in named)) if x.dim() else ()


def _count(x: Tensor, axes: tuple[int, ...]) -> int:
    return int(np.prod([x.shape[axis] for axis in axes], dtype=np.int64))


def _record_reduction(
    call: Call, kind: str, x: Stored, y: Stored, axes: tuple[int, ...], keepdim: bool
) -> None:
    over = Stored(torch.tensor(axes, dtype=torch.int64), "int32", constant=True)
    call.record(kind, [x, over], [y], keepDims=keepdim)


register_operator(
    Operator(
        "mean",
        torch=("mean",),
        emulate=mean,
        supports=supports_average,
        litert=(
            Kernel(
                "MEAN",
                order="reduction",
                options="ReducerOptions",
                versions={"int8": 2, "int16": 3},
            ),
        ),
        learns_scale=True,
        arithmetic="integer sum, divided inside the multiplier",
    )
)
register_operator(
    Operator(
        "sum",
        torch=("sum",),
        emulate=sum,
        supports=supports_average,
        learns_scale=True,
        arithmetic="a mean at a scale as many times finer as there are terms",
    )
)
register_operator(
    Operator(
        "reduce_max",
        torch=("amax",),
        emulate=amax,
        supports=supports_extreme,
        forms=(Form(("max",), maximum_over, supports_extreme),),
        litert=(
            Kernel(
                "REDUCE_MAX",
                order="reduction",
                options="ReducerOptions",
                versions={"int8": 2, "int16": 3},
            ),
        ),
        arithmetic="chooses among the integers; `max` of one tensor, and of two as `maximum`",
    )
)
register_operator(
    Operator(
        "reduce_min",
        torch=("amin",),
        emulate=amin,
        supports=supports_extreme,
        forms=(Form(("min",), minimum_over, supports_extreme),),
        litert=(
            Kernel(
                "REDUCE_MIN",
                order="reduction",
                options="ReducerOptions",
                versions={"int8": 2, "int16": 3},
            ),
        ),
        arithmetic="chooses among the integers; `min` of one tensor, and of two as `minimum`",
    )
)
