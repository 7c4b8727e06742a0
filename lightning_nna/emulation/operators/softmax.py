r"""Softmax over an axis, in the fixed point of the reference kernels.

Scores that a mask leaves out become the smallest integer of their grid before the softmax, as a
selection does on the chip; the exponential of a difference that large is 0 or nearly so.
The output's grid is the reference's: 1/256 from -128. The backward is
:math:`y \odot (g - \langle g, y \rangle)` at the quantized output.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.device_tables import on_device_of
from lightning_nna.emulation.arithmetic.fixed_point import INT16_MAX
from lightning_nna.emulation.arithmetic.integer_softmax import (
    exp_table,
    reciprocal,
    softmax_int16,
    to_sum,
)
from lightning_nna.emulation.arithmetic.rescaling import multiply
from lightning_nna.emulation.first_order import first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.kernels import definitions as kernels
from lightning_nna.emulation.kernels.library import runs_kernel
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.driver import gives_float32, has_elements
from lightning_nna.emulation.operators.record import Kernel, Operator, register_operator
from lightning_nna.emulation.operators.tables import look_up
from lightning_nna.emulation.program import Activation, Stored
from lightning_nna.emulation.ranges import PENDING, SIGMOID_OUTPUT, QParams

#: Outputs of 16 bits go from 0 to 1 in steps of 2^-15.
WIDE_OUTPUT = QParams(2.0**-15, 0, -(2**15), INT16_MAX)
# The table of exponentials of 16 bits ends this far below the largest score.
_TABLE_REACH = 10.0
_WITHIN_REACH = (
    "keep scores within 10 of the largest of their row, as by "
    "torch.maximum(x, x.amax(dim, keepdim=True) - 9), or use a preset of 8-bit activations, as an "
    "attention with a mask has to"
)


def softmax(
    call: Call,
    input: Tensor,
    dim: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    mask: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Emulate ``F.softmax``.

    Args:
        call: The call.
        input: Scores, any shape.
        dim: Axis along which the results sum to 1.
        dtype: None or float32, see :func:`supports_softmax`.
        mask: True where a score is left out; broadcasts with ``input``.
    """
    axis = implicit_axis(input) if dim is None else dim
    x = call.operand(input, "input")
    if call.observing:
        scores = x.value if mask is None else x.value.masked_fill(mask, -torch.inf)
        return call.with_qparams(torch.softmax(scores, axis), PENDING)
    y = SIGMOID_OUTPUT if x.qparams.bits == 8 else WIDE_OUTPUT
    if mask is not None:
        x = masked(call, x, mask)
    with float32_arithmetic(x.value):
        result = _Softmax.apply(x.value, axis, x, y, call)
    if call.recording:
        last = (activation.stored() for activation in (x, Activation(result, y)))
        operand, probabilities = (along_last(stored, axis) for stored in last)
        call.record("SOFTMAX", [operand], [probabilities], beta=1.0)
    return call.with_qparams(result, y)


def supports_softmax(
    input: Any, dim: int | None = None, *args: Any, dtype: Any = None, **_: Any
) -> bool | str:
    """Tell whether an input of any shape has elements, and the result is to be float32."""
    types = [dtype, *(x for x in args if isinstance(x, torch.dtype))]
    answers = [gives_float32(each) for each in types]
    return has_elements(input) and next((x for x in answers if x is not True), True)


def masked(call: Call, x: Activation, mask: Tensor, *, constant: bool = True) -> Activation:
    """Set the scores that a mask leaves out to the low end of their range.

    Args:
        call: The call.
        x: Scores, any shape.
        mask: True where a score is left out; broadcasts with ``x``.
        constant: Whether the mask belongs to the program and not to the data.
    """
    low = x.qparams.bounds[0] * x.qparams.scale
    with float32_arithmetic(x.value):
        result = Activation(x.value.masked_fill(mask, low), x.qparams)
    if call.recording:
        lowest = Activation(torch.tensor(low, dtype=torch.float32), x.qparams, constant=True)
        condition = Stored(mask, "bool", constant=constant, source=mask)
        # The first operand is taken where the condition holds.
        call.record("SELECT_V2", [condition, lowest.stored(), x.stored()], [result.stored()])
    return result


def implicit_axis(x: Tensor) -> int:
    """Return the axis that torch takes by the shape where none is named."""
    return 0 if x.dim() in (0, 1, 3) else 1


def along_last(stored: Stored, axis: int) -> Stored:
    """The same tensor with an axis moved to the end, where the instruction takes it."""
    source = None if stored.source is None else stored.source.movedim(axis, -1)
    return replace(stored, integers=stored.integers.movedim(axis, -1), source=source)


class _Softmax(torch.autograd.Function):
    """Fixed point forward, the softmax's derivative at the result backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, axis: int, scores: Activation, y: QParams, call: Call
    ) -> Tensor:
        if y.bits == 8 and runs_kernel("softmax_rows", x):
            result = _fused(scores, axis)
        elif not call.exact:
            result = torch.softmax(x.detach(), axis)
            result = result.mul_(1 / y.scale).round_().clamp_max_(y.bounds[1]).mul_(y.scale)
        else:
            last = scores.integers().movedim(axis, -1)
            scale = float(np.float32(scores.qparams.scale))
            rows = _exact(last, scale) if y.bits == 8 else _exact_wide(call, last, scale)
            result = rows.movedim(-1, axis).contiguous()
        ctx.axis = axis
        ctx.save_for_backward(result)
        return result

    @staticmethod
    @first_order("softmax")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        with float32_arithmetic(grad):
            slope = torch._softmax_backward_data(grad, y, ctx.axis, y.dtype)
        return slope, None, None, None, None


def _fused(scores: Activation, axis: int) -> Tensor:
    """Probabilities of 8 bits by a kernel, exact in fast fidelity, too."""
    x, scale = scores.value.detach().movedim(axis, -1), scores.qparams.scale
    table = on_device_of(x, exp_table(float(np.float32(scale))))
    columns = x.shape[-1] if x.dim() else 1
    rows = kernels.softmax_rows(x.reshape(-1, columns), table, scale=scale)
    return rows.view(x.shape).movedim(-1, axis).contiguous()


def _exact(scores: Tensor, scale: float) -> Tensor:
    """Probabilities along the last axis from whole scores, on the grid of 1/256."""
    table = on_device_of(scores, exp_table(scale))
    differences = (scores.amax(-1, keepdim=True) - scores).int()
    sums = look_up(to_sum(table).double(), differences).sum(-1, keepdim=True)
    inverse, above_unit = reciprocal(sums.long())
    exponentials = look_up(table.double(), differences)
    shifts = -(above_unit + 31 - 8)
    rounded = multiply(exponentials, inverse, shifts, largest=2.0**31)
    return rounded.clamp_(0, 255).float().mul_(SIGMOID_OUTPUT.scale)


def _exact_wide(call: Call, scores: Tensor, scale: float) -> Tensor:
    """The same for 16 bits, on the grid of 2^-15."""
    runtime = call.state.spec.runtime
    wraps = runtime == "tosa"
    if wraps and call.state.watches_overflow(call.site):
        lost = scores.amax(-1, keepdim=True) - scores > _TABLE_REACH / scale
        call.state.count_overflow(call.site, lost.sum(), lost.numel(), _WITHIN_REACH)
    integers = softmax_int16(scores.long(), scale, single=runtime == "tflm", wraps=wraps)
    return integers.float().mul_(WIDE_OUTPUT.scale)


register_operator(
    Operator(
        "softmax",
        torch=("softmax",),
        emulate=softmax,
        supports=supports_softmax,
        litert=(Kernel("SOFTMAX", order="rows", versions={"int8": 2, "int16": 3}),),
        arithmetic="fixed point: exponentials of differences and a reciprocal, output scale 1/256; "
        "in 16 bits interpolated tables",
    )
)
