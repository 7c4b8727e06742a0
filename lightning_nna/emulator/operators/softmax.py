"""Softmax (a first form, in float; the reference's arithmetic follows)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulator.operators.call import Activation, Call, clip, float32_arithmetic
from lightning_nna.emulator.ranges import PENDING, QParams

_OUTPUTS = {8: QParams(1 / 256, -128), 16: QParams(1 / 32768, 0, -32768, 32767)}


def softmax(call: Call, input: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """``torch.softmax`` on its fixed grid."""
    x = call.operand(input, "input")
    if call.observing:
        return call.unchanged(torch.softmax(x.value, dim), Activation(x.value, PENDING))
    y = _OUTPUTS[call.bits]
    with float32_arithmetic(input):
        result = _Softmax.apply(x.value, dim, y)
    return call.tagged(result, y)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, y: QParams) -> Tensor:
        centred, _ = clip(torch.softmax(x, dim).mul_(1 / y.scale).round_(), y, False)
        result = centred.mul_(y.scale)
        ctx.dim = dim
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        with float32_arithmetic(grad):
            return y * (grad - (grad * y).sum(ctx.dim, keepdim=True)), None, None
