r"""Addition, subtraction, multiplication and concatenation of activations on different grids.

Addition rescales both operands to a common grid 2^20 finer than twice the coarser one, adds, and
rescales to the output; each of the three factors is a doubly rounded fixed-point multiplier.

.. math:: y = M(M(q_a 2^{20}) + M(q_b 2^{20}))

Multiplication rescales the product of the integers once, by :math:`s_a s_b / s_y`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_nna.emulator.operators.call import Activation, Call, float32_arithmetic, round_clip
from lightning_nna.emulator.ranges import QParams
from lightning_nna.functional.fixed_point import (
    multiply_by_quantized_multiplier,
    multiply_in_float,
    quantize_multiplier,
)

_LEFT_SHIFT = 20


def add(call: Call, input: Tensor | float, other: Tensor | float, *, alpha: float = 1) -> Tensor:
    """``input + alpha * other`` on the chip; ``alpha`` other than ±1 is folded into the operand."""
    if abs(alpha) != 1:
        other = mul(call, other, abs(alpha))
    return _sum(call, input, other, 1.0 if alpha > 0 else -1.0)


def sub(call: Call, input: Tensor | float, other: Tensor | float, *, alpha: float = 1) -> Tensor:
    """``input - alpha * other`` on the chip."""
    return add(call, input, other, alpha=-alpha)


def reversed_sub(call: Call, input: Tensor, other: Tensor | float) -> Tensor:
    """``other - input``, as ``1 - x`` calls it."""
    return sub(call, other, input)


def mul(call: Call, input: Tensor | float, other: Tensor | float) -> Tensor:
    """``input * other`` on the chip."""
    a, b = call.operand(input, "input"), call.operand(other, "other")
    if call.observing:
        return call.observed(a.value * b.value)
    y = call.output(lambda: a.value * b.value)
    with float32_arithmetic(a.value):
        result = _Product.apply(a.value, b.value, a, b, y, call.exact)
    return call.tagged(result, y)


def concatenate(call: Call, tensors: list[Tensor], dim: int = 0) -> Tensor:
    """``torch.cat``: operands on another grid than the output's are requantised to it.

    Float data that no operator has quantised yet are put together before they come to the chip.
    """
    if all(call.host.tag_of(x) is None and not call.host.is_constant(x) for x in tensors):
        return torch.cat(tensors, dim)
    parts = [call.operand(x, f"input{i}") for i, x in enumerate(tensors)]
    if call.observing:
        return call.observed(torch.cat([part.value for part in parts], dim))
    if len({part.qparams for part in parts}) == 1:
        return call.unchanged(torch.cat([part.value for part in parts], dim), parts[0])
    y = call.output(lambda: torch.cat([part.value for part in parts], dim))
    with float32_arithmetic(parts[0].value):
        moved = [_Requantize.apply(part.value, part, y, call.exact) for part in parts]
        result = torch.cat(moved, dim)
    return call.tagged(result, y)


def _sum(call: Call, input: Tensor | float, other: Tensor | float, sign: float) -> Tensor:
    a, b = call.operand(input, "input"), call.operand(other, "other")
    if call.observing:
        return call.observed(a.value + sign * b.value)
    y = call.output(lambda: a.value + sign * b.value)
    with float32_arithmetic(a.value):
        result = _Sum.apply(a.value, b.value, sign, a, b, y, call.exact)
    return call.tagged(result, y)


class _Sum(torch.autograd.Function):
    """Sum or difference with broadcasting."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        sign: float,
        left: Activation,
        right: Activation,
        y: QParams,
        exact: bool,
    ) -> Tensor:
        if exact:
            scaled = _exact_sum(left, right, sign, y)
        else:
            # The operands are small before broadcasting: scale them there.
            scaled = a.detach() * (1 / y.scale) + b.detach() * (sign / y.scale)
        centred, mask = round_clip(scaled, y, exact=exact, keep_mask=any(ctx.needs_input_grad))
        ctx.sign, ctx.shapes = sign, (a.shape, b.shape)
        ctx.save_for_backward(mask)
        return centred.mul_(y.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        shape_a, shape_b = ctx.shapes
        with float32_arithmetic(grad):
            inside = grad * mask
            grad_a = inside.sum_to_size(shape_a) if ctx.needs_input_grad[0] else None
            grad_b = inside.sum_to_size(shape_b) * ctx.sign if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None, None, None, None, None


class _Product(torch.autograd.Function):
    """Product with broadcasting."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        left: Activation,
        right: Activation,
        y: QParams,
        exact: bool,
    ) -> Tensor:
        factor = _product_factor(left, right, y)
        if exact:
            product = (left.integers() * right.integers()).long()
            scaled = multiply_by_quantized_multiplier(product, *factor).double()
        else:
            product = a.detach() * b.detach()
            product *= 1 / (left.qparams.scale * right.qparams.scale)
            scaled = multiply_in_float(product, *factor)
        centred, mask = round_clip(scaled, y, exact=exact, keep_mask=any(ctx.needs_input_grad))
        ctx.save_for_backward(a, b, mask)
        return centred.mul_(y.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, mask = ctx.saved_tensors
        with float32_arithmetic(grad):
            inside = grad * mask
            grad_a = (inside * b).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
            grad_b = (inside * a).sum_to_size(b.shape) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None, None, None, None


class _Requantize(torch.autograd.Function):
    """The same value on another grid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation, y: QParams, exact: bool) -> Tensor:
        factor = quantize_multiplier(activation.qparams.scale / y.scale)
        integers = activation.integers()
        if exact:
            scaled = multiply_by_quantized_multiplier(integers.long(), *factor).double()
        else:
            scaled = multiply_in_float(integers, *factor)
        centred, mask = round_clip(scaled, y, exact=exact, keep_mask=True)
        ctx.save_for_backward(mask)
        return centred.mul_(y.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        with float32_arithmetic(grad):
            return grad * mask, None, None, None


def _exact_sum(a: Activation, b: Activation, sign: float, y: QParams) -> Tensor:
    """The sum or difference as the reference adds, in units of the output's scale.

    The subtraction kernel negates the second operand after its rescaling, not before: a doubly
    rounded multiplier is not odd.
    """
    twice_coarser = 2 * max(a.qparams.scale, b.qparams.scale)
    first, second = (
        multiply_by_quantized_multiplier(
            operand.integers().long() << _LEFT_SHIFT,
            *quantize_multiplier(operand.qparams.scale / twice_coarser),
        )
        for operand in (a, b)
    )
    total = first + second if sign > 0 else first - second
    factor = quantize_multiplier(twice_coarser / ((1 << _LEFT_SHIFT) * y.scale))
    return multiply_by_quantized_multiplier(total, *factor).double()


def _product_factor(a: Activation, b: Activation, y: QParams) -> tuple[int, int]:
    """Multiplier and shift of a product; the reference forms their factor in float32."""
    scale_a, scale_b = np.float32(a.qparams.scale), np.float32(b.qparams.scale)
    return quantize_multiplier(float(scale_a * scale_b / np.float32(y.scale)))
