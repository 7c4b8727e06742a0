"""Means over axes (a first form; sums and maxima follow)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulator.operators.call import Activation, Call, clip, float32_arithmetic
from lightning_nna.emulator.program import Stored
from lightning_nna.emulator.ranges import QParams
from lightning_nna.functional.fixed_point import (
    multiply_by_quantized_multiplier,
    quantize_multiplier,
)


def mean(
    call: Call, input: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Tensor:
    x = call.operand(input, "input")
    axes = (dim,) if isinstance(dim, int) else tuple(dim if dim is not None else range(input.dim()))
    if call.observing:
        return call.observed(x.value.mean(axes, keepdim))
    y = call.output(lambda: x.value.mean(axes, keepdim))
    with float32_arithmetic(input):
        result = _Mean.apply(x.value, axes, keepdim, x, y, call)
    if call.recording:
        positive = torch.tensor([a % input.dim() for a in axes])
        call.record(
            "MEAN",
            [x.stored(), Stored(positive, "int32", constant=True)],
            [Activation(result, y).stored()],
            keepDims=keepdim,
        )
    return call.tagged(result, y)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        axes: tuple[int, ...],
        keepdim: bool,
        a: Activation,
        y: QParams,
        call: Call,
    ) -> Tensor:
        count = math.prod(x.shape[i] for i in axes)
        m, shift = quantize_multiplier(a.qparams.scale / y.scale)
        k = min(int(math.log2(count)), 32, 31 + shift)
        total = a.integers().double().sum(axes, keepdim).long()
        rounded = multiply_by_quantized_multiplier(total, (m << k) // count, shift - k)
        centred, mask = clip(rounded.double(), y, True)
        ctx.save_for_backward(mask)
        ctx.shape, ctx.axes, ctx.keepdim, ctx.count = x.shape, axes, keepdim, count
        return centred.mul_(y.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        inside = grad * mask / ctx.count
        if not ctx.keepdim:
            for a in sorted(i % len(ctx.shape) for i in ctx.axes):
                inside = inside.unsqueeze(a)
        return inside.expand(ctx.shape), None, None, None, None, None
