r"""Log-softmax over an axis, in the fixed point of the reference kernel.

The reference has it in 8 bits alone, on a grid that it fixes: steps of 1/16 from -255/16 to 0. So
:math:`\ln p` is known to 1/32, and what is less likely than :math:`e^{-16}` is told apart no more.
Its sums of exponentials overflow at 4096, so a longer axis runs in float.
The backward is the float derivative at the quantized input, :math:`g - \mathrm{softmax}(x) \sum g`;
an output at the low end keeps its gradient, or a loss could never raise an unlikely label.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.integer_log_softmax import LOWEST, log_softmax_int8
from lightning_nna.emulation.first_order import first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.record import Kernel, Operator, register_operator
from lightning_nna.emulation.operators.softmax import along_last, implicit_axis, supports_softmax
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import PENDING, QParams

#: The grid of every output.
OUTPUT = QParams(1 / 16, 127)
_LONGEST = 4095


def log_softmax(call: Call, input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    """Emulate ``F.log_softmax``.

    Args:
        call: The call.
        input: Scores, any shape.
        dim: Axis along which the exponentials of the results sum to 1.
    """
    axis = implicit_axis(input) if dim is None else dim
    x = call.operand(input, "input")
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
    """Tell whether a sum along an axis of the input's shape fits the kernel's register."""
    axis = implicit_axis(input) if dim is None else dim
    fits = input.dim() > 0 and 0 < input.shape[axis] <= _LONGEST
    return fits and supports_softmax(input, dim, *args, **kwargs)


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
    @first_order("log softmax")
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
        litert=(Kernel("LOG_SOFTMAX", order="rows", versions={"int8": 2}),),
        widths=(8,),
        arithmetic="fixed point: the sum of exponentials, and its logarithm; output scale 1/16, "
        "zero point 127; axes of 4096 entries or more run in float",
    )
)
