r"""Fully connected layers and embedding look-ups.

.. math:: y = \mathrm{clip}\Bigl(\mathrm{round}\Bigl(
          \Bigl(\sum_i (q_{x,i} - o_x)\, q_{w,i} + q_b\Bigr) \frac{s_x s_w}{s_y}\Bigr) + o_y\Bigr)

LiteRT's reference kernel of the fully connected operator computes the factor and the product in
double precision and rounds ties away from zero, and so do we; the accumulator is an integer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulator.operators.call import Activation, Call, float32_arithmetic, round_clip
from lightning_nna.emulator.ranges import QParams
from lightning_nna.emulator.weights import QuantizedWeight
from lightning_nna.functional.fixed_point import INT32_MAX, INT32_MIN

# float32 holds every integer up to here, and so every partial sum of a matrix product.
FLOAT32_INTEGERS = 2**24


def linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` on the chip."""
    x = call.operand(input, "input")
    if call.observing:
        return call.observed(F.linear(input, weight, bias))
    rows_per_scale = 1 if call.host.spec.weight_granularity == "per_channel" else weight.shape[0]
    quantized = call.host.weight(weight, rows_per_scale)
    y = call.output(lambda: F.linear(input, weight, bias))
    with float32_arithmetic(input):
        result = _FullyConnected.apply(x.value, weight, bias, x, quantized, y, call.exact)
    return call.tagged(result, y)


def embedding(call: Call, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``F.embedding``: a look-up in an int8 table; the result has the table's scale."""
    if call.observing:
        return call.observed(F.embedding(input, weight, *args, **kwargs), "table")
    quantized = call.host.weight(weight, weight.shape[0])
    with float32_arithmetic(weight):
        table = _StraightThrough.apply(weight, quantized.values)
        result = F.embedding(input, table, *args, **kwargs)
    limit = call.host.spec.weight_max
    return call.tagged(result, QParams(float(quantized.scales[0]), 0, -limit, limit))


def integer_matmul(x: Tensor, weight: QuantizedWeight, largest_input: int) -> Tensor:
    """Product of integers held in float32, exact: float64 where a sum could pass 2^24.

    Args:
        x: Integers, shape ``(n, in)``.
        weight: Weight of shape ``(out, in)``.
        largest_input: Bound on the absolute value of ``x``.

    Returns:
        Accumulators, shape ``(n, out)``, float32 or float64.
    """
    if weight.largest_sum() * largest_input < FLOAT32_INTEGERS:
        return x @ weight.integers.T
    return x.double() @ weight.integers.double().T


def integer_bias(bias: Tensor, scales: Tensor) -> Tensor:
    """Bias in units of the accumulator, 32 bits, as float64.

    Args:
        bias: Shape ``(out,)``.
        scales: Scale of the accumulator per output, float64.
    """
    return (bias.detach().double() / scales).round_().clamp_(INT32_MIN, INT32_MAX)


class _FullyConnected(torch.autograd.Function):
    """Integer forward, straight-through backward with the weights of the chip."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation,
        quantized: QuantizedWeight,
        y: QParams,
        exact: bool,
    ) -> Tensor:
        compute = _exact_output if exact else _fast_output
        values = quantized.values
        scaled = compute(activation, quantized, values, bias, y)
        needs_grad = any(ctx.needs_input_grad)
        centred, mask = round_clip(scaled, y, exact=exact, keep_mask=needs_grad)
        if needs_grad:
            ctx.save_for_backward(x, values, mask)
        return centred.mul_(y.scale).reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, mask = ctx.saved_tensors
        with float32_arithmetic(grad):
            flat = grad.reshape(mask.shape) * mask
            grad_x = (flat @ values).reshape(x.shape) if ctx.needs_input_grad[0] else None
            grad_w = flat.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
            grad_b = flat.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_b, None, None, None, None


def _exact_output(
    x: Activation, weight: QuantizedWeight, values: Tensor, bias: Tensor | None, y: QParams
) -> Tensor:
    """The output in units of its scale, float64: every step as the reference kernel's."""
    integers = x.integers().reshape(-1, values.shape[1])
    largest = max(abs(bound) for bound in x.qparams.bounds)
    accumulator = integer_matmul(integers, weight, largest).double()
    scales = x.qparams.scale * weight.scales.double()
    if bias is not None:
        accumulator += integer_bias(bias, scales)
    return accumulator.mul_(scales / y.scale)


def _fast_output(
    x: Activation, weight: QuantizedWeight, values: Tensor, bias: Tensor | None, y: QParams
) -> Tensor:
    """The same in float32: equal but for results that lie within rounding error of a tie."""
    if bias is not None:
        scales = x.qparams.scale * weight.scales.double()
        bias = integer_bias(bias, scales).mul_(scales).float()
    product = F.linear(x.value.detach().reshape(-1, values.shape[1]), values, bias)
    return product.mul_(1 / y.scale)


class _StraightThrough(torch.autograd.Function):
    """Give the second tensor forward, and the gradient to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, replacement: Tensor) -> Tensor:
        return replacement

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
