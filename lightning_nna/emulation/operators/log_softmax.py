r"""Log-softmax over an axis: in 8 bits the fixed point of the reference kernel, in 16 several.

The reference has it in 8 bits alone, on a grid that it fixes: steps of 1/16 from -255/16 to 0. So
:math:`\ln p` is known to 1/32, and what is less likely than :math:`e^{-16}` is told apart no more.
Its sums of exponentials overflow at 4096.

In 16 bits, over an axis of 4096 entries or more, and on a runtime without the kernel it is a
sequence of instructions of 16 bits.
The table of the logarithm has straight lines that are too long for the lower end of its range, so
the logarithm of the sum s, from 1 to the number of entries, is added up of ranges of a factor b:

.. math:: \ln s = \sum_{k \ge 0} \ln \min(\max(s / b^k, 1), b), \qquad b = 16

An exponential of less than :math:`2^{-16}` counts as 0: 4000 labels of :math:`10^{-5}` each are
missed, which is 0.04 in the logarithm.

The backward is the float derivative at the quantized input, :math:`g - \mathrm{softmax}(x) \sum g`;
an output at the low end keeps its gradient, or a loss could never raise an unlikely label.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.fixed_point import INT16_MAX, INT16_MIN
from lightning_nna.emulation.arithmetic.integer_log_softmax import LOWEST, log_softmax_int8
from lightning_nna.emulation.first_order import first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators import (
    clamping,
    elementary_kernels,
    elementwise,
    reduction,
)
from lightning_nna.emulation.operators.call import Call, requantize
from lightning_nna.emulation.operators.composition import (
    Result,
    carrier,
    derivative,
    with_gradient,
)
from lightning_nna.emulation.operators.driver import drive
from lightning_nna.emulation.operators.record import Kernel, Operator, register_operator
from lightning_nna.emulation.operators.softmax import along_last, implicit_axis, supports_softmax
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import PENDING, QParams

#: The grid of every output.
OUTPUT = QParams(1 / 16, 127)
# What the sums of the kernel of 8 bits hold, and those of 16 bits.
_LONGEST, _LONGEST_WIDE = 4095, 2**16
_TOO_LONG = "kernels add up at most 65,536 entries of 16 bits: take fewer labels"


def log_softmax(call: Call, input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    """Emulate ``F.log_softmax``.

    Args:
        call: The call.
        input: Scores, any shape.
        dim: Axis along which the exponentials of the results sum to 1.
    """
    axis = implicit_axis(input) if dim is None else dim
    x = call.operand(input, "input")
    if call.bits == 16 or input.shape[axis] > _LONGEST or not call.has("LOG_SOFTMAX"):
        return _composed(call, x, axis)
    if call.observing:
        return call.with_qparams(torch.log_softmax(x.value, axis), PENDING)
    with float32_arithmetic(x.value):
        result = _LogSoftmax.apply(x.value, axis, x, call)
    if call.recording:
        both = (activation.stored() for activation in (x, Activation(result, OUTPUT)))
        scores, logarithms = (along_last(stored, axis) for stored in both)
        call.record("LOG_SOFTMAX", [scores], [logarithms])
    return call.with_qparams(result, OUTPUT)


def supports_log_softmax(
    input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any
) -> bool | str:
    """Tell whether a sum along an axis of the input's shape fits the register of 32 bits."""
    axis = implicit_axis(input) if dim is None else dim
    if input.dim() == 0 or not input.numel():
        return False
    if input.shape[axis] > _LONGEST_WIDE:
        return _TOO_LONG
    return supports_softmax(input, dim, *args, **kwargs)


def _composed(call: Call, x: Activation, axis: int) -> Tensor:
    """Log-softmax by instructions of 16 bits, with the gradient of the float function."""

    def compute() -> Result:
        with torch.no_grad():
            result = _steps(call.child("wide", bits=16), carrier(call, x), axis)
        y = call.state.qparams_of(result)
        assert y is not None, "an operator's result has quantization parameters"
        if call.bits == 8 and not call.observing:
            result, y = requantize(call, Activation(result, y), OUTPUT), OUTPUT
        return result, y, None

    def in_float(x: Tensor) -> Tensor:
        return torch.log_softmax(x, axis)

    if call.observing:
        compute()
        return call.with_qparams(in_float(x.value), PENDING)
    with float32_arithmetic(x.value):
        result, y = with_gradient(call, compute, derivative(in_float), x.value)
    return call.with_qparams(result, y)


def _steps(call: Call, x: Tensor, axis: int) -> Tensor:
    """The instructions of 16 bits."""
    count = x.shape[axis]
    largest = reduction.amax(call.child("largest"), x, axis, keepdim=True)
    difference = drive(_DIFFERENCE, call.child("difference"), x, largest)
    exponential = drive(_EXPONENTIAL, call.child("exponential"), difference)
    total, lowest = largest, 1
    while lowest < count:
        part = call.child(f"from{lowest}")
        summed = reduction.multiplied_mean(
            part.child("sum"), exponential, axis, True, count / lowest, grid=_SUMS
        )
        summed = clamping.clamped(part.child("clipped"), summed, 1.0, _RANGE)
        logarithm = drive(_LOGARITHM, part.child("logarithm"), summed, smallest=_SUMS.scale)
        total, lowest = elementwise.add(part, total, logarithm), lowest * _RANGE
    return elementwise.sub(call, x, total)


def _output_of_difference(call: Call, operands: tuple[Activation, ...], y: QParams) -> QParams:
    """Parameters that end where an exponential is less than half a step."""
    a, b = operands
    return elementwise.grid_of_sum(a.qparams, b.qparams, _DIFFERENCES)


def _up_to(power: int) -> QParams:
    """Parameters of 16 bits from -2^power to nearly 2^power."""
    return QParams(2.0 ** (power - 15), 0, INT16_MIN, INT16_MAX)


#: The factor b of the ranges of the logarithm.
_RANGE = 16
_UNIT, _SUMS, _LOGARITHMS = _up_to(0), _up_to(4), _up_to(2)
_DIFFERENCES = _up_to(4)
_DIFFERENCE = replace(elementwise.SUB, output_of=_output_of_difference)
_EXPONENTIAL = replace(elementary_kernels.EXP, output={16: _UNIT})
_LOGARITHM = replace(elementary_kernels.LOG, output={16: _LOGARITHMS})


class _LogSoftmax(torch.autograd.Function):
    """Fixed point forward, the float function's derivative backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int, scores: Activation, call: Call) -> Tensor:
        ctx.axis = axis
        ctx.save_for_backward(x)
        if call.exact:
            last = scores.integers().long().movedim(axis, -1)
            steps = log_softmax_int8(last, scores.qparams.scale).movedim(-1, axis).contiguous()
            return steps.float().mul_(OUTPUT.scale)
        in_float = torch.log_softmax(x.detach(), axis)
        return in_float.mul_(1 / OUTPUT.scale).round_().clamp_min_(LOWEST).mul_(OUTPUT.scale)

    @staticmethod
    @first_order("log_softmax")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        with float32_arithmetic(grad):
            y = torch.log_softmax(x, ctx.axis)
            slope = torch._log_softmax_backward_data(grad, y, ctx.axis, y.dtype)
        return slope, None, None, None


register_operator(
    Operator(
        "log_softmax",
        torch=("log_softmax",),
        emulate=log_softmax,
        supports=supports_log_softmax,
        litert=(
            Kernel("LOG_SOFTMAX", order="rows", versions={"int8": 2}),
            *elementary_kernels.LOG.litert,
        ),
        arithmetic="fixed point: the sum of exponentials, and its logarithm; output scale 1/16, "
        "zero point 127; in 16 bits, and for axes of 4096 to 65,536 entries, differences, "
        "exponentials, sums and logarithms",
    )
)
