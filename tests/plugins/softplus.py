"""Softplus as an operator from outside of the package: a table of 256 entries.

An accelerator looks the entry of an 8-bit integer up. In a program that is a GATHER, whose indices
are integers of 32 bits from 0:

    CAST (int8 -> int32) -> ADD 128 -> GATHER (table)
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna import elementary
from lightning_nna.emulation.arithmetic.pointwise import tabulate
from lightning_nna.emulation.clipping import clip, inside
from lightning_nna.emulation.first_order import first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators.call import Call, look_up
from lightning_nna.emulation.operators.record import Kernel, Operator
from lightning_nna.emulation.program import Activation, Stored
from lightning_nna.emulation.ranges import QParams

_INT8, _INT32 = 9, 2  # As the TensorFlow Lite schema numbers types.


def softplus(call: Call, input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """Emulate ``F.softplus`` of activations of any shape."""
    x = call.operand(input, "input")
    if call.observing:
        return call.observed(F.softplus(x.value))
    y = call.output(lambda: F.softplus(x.value))
    with float32_arithmetic(input):
        result = _Softplus.apply(x.value, x, y)
    if call.recording:
        _record(call, x, Activation(result, y))
    return call.with_qparams(result, y)


def supports_softplus(input: Any, beta: float = 1.0, threshold: float = 20.0) -> bool:
    """Tell whether the accelerator has this form: the table is made for a slope of 1."""
    return beta == 1 and threshold == 20


@lru_cache
def table(x: QParams, y: QParams) -> Tensor:
    """Integers of the output less its zero point for all 256 inputs, not clipped, float32."""

    def real(values: Tensor) -> Tensor:
        # log(1 + e^v) = max(v, 0) + log(1 + e^-|v|)
        return values.relu() + elementary.log1p(elementary.exp(-values.abs())).float()

    return tabulate(real, x.bounds[0], x.scale, y.scale)


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Activation, y: QParams) -> Tensor:
        index = (x.integers() - x.qparams.bounds[0]).int()
        rounded = look_up(table(x.qparams, y).to(value.device), index)
        centered, clipped = clip(rounded, y, ctx.needs_input_grad[0])
        ctx.save_for_backward(value, clipped)
        return centered.mul_(y.scale)

    @staticmethod
    @first_order("softplus")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, clipped = ctx.saved_tensors
        with float32_arithmetic(grad):
            return inside(grad, clipped) * torch.sigmoid(value), None, None


def _record(call: Call, x: Activation, y: Activation) -> None:
    """Report the three instructions."""
    low, high = y.qparams.bounds
    entries = table(x.qparams, y.qparams).clamp(low, high).long() + y.qparams.zero_point
    stored = Stored(entries, "int8", y.qparams.scale, y.qparams.zero_point, constant=True)
    integers = x.stored().integers
    cast = Stored(integers, "int32", source=integers)
    raised = integers + 128
    index = Stored(raised, "int32", source=raised)
    offset = Stored(torch.tensor(128), "int32", constant=True)
    call.record("CAST", [x.stored()], [cast], inDataType=_INT8, outDataType=_INT32)
    call.record("ADD", [cast, offset], [index])
    call.record("GATHER", [stored, index], [y.stored()], axis=0)


#: For ``register_operator``.
SOFTPLUS = Operator(
    "softplus",
    torch=("softplus",),
    emulate=softplus,
    supports=supports_softplus,
    litert=(Kernel("CAST", versions={"int8": 3}),),
    widths=(8,),
    learns_scale=True,
    arithmetic="table of 256 entries",
)
