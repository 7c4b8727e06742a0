r"""Convolutions over one or two axes, with groups or depthwise.

.. math:: y_o = \mathrm{clip}\Bigl(M_o\Bigl(\sum_{c, k} (q_{x,c,k} - o_x)\, q_{w,o,c,k} + q_{b,o}
          \Bigr) + o_y\Bigr), \qquad M_o \approx s_x s_{w,o} / s_y

:math:`M_o` rounds twice; with 16-bit activations, where 64 bits accumulate, it has a 16-bit
mantissa and rounds once. A convolution over time is one over height and width with height 1. Zeros
around the input are the reference's ``SAME`` padding where that puts them in the same places, and
else a ``PAD`` before a convolution without padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_nna.emulation.arithmetic.integer_products import FLOAT32_INTEGERS
from lightning_nna.emulation.arithmetic.on_host import in_memory
from lightning_nna.emulation.arithmetic.quantized_weight import (
    SECOND_AXIS,
    QuantizedWeight,
    values_of,
)
from lightning_nna.emulation.arithmetic.rescaling import round_fast, rounding_factors
from lightning_nna.emulation.clipping import clip, inside
from lightning_nna.emulation.first_order import first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.fusion import FusionCandidate
from lightning_nna.emulation.kernels import definitions as kernels
from lightning_nna.emulation.kernels.library import runs_kernel
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.convolution_layout import Geometry, record_convolution
from lightning_nna.emulation.operators.linear import (
    accumulator_limit,
    holding_bias,
    integer_bias,
    largest_magnitude,
    needs_exact,
    requantized,
    settled,
)
from lightning_nna.emulation.operators.record import Kernel, Operator, register_operator
from lightning_nna.emulation.operators.transposed_layout import record_transposed_convolution
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import QParams


def convolution(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Emulate ``F.conv1d`` and ``F.conv2d`` of shapes ``(batch, channels, ...)``."""
    geometry = Geometry.of(weight, stride, padding, dilation, groups)
    return layer(call, input, weight, bias, geometry)


def layer(
    call: Call, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """Emulate a convolution or a transposed convolution.

    Args:
        call: The call.
        input: Shape ``(N, C, L)`` or ``(N, C, H, W)``, or without the first axis.
        weight: Weight as PyTorch has it, see :meth:`.Geometry.outputs_first`.
        bias: Shape ``(out,)``, or None.
        geometry: Where to look.
    """
    x = call.operand(input, "input")

    def in_float() -> Tensor:
        return convolve_in_float(input, weight, bias, geometry)

    if call.observing:
        return call.state.fusion.note_producer(call.observed(in_float()), call.site)
    if call.state.fusion.is_folded(call.site):
        return _waiting(call, x, weight, bias, geometry)
    rows = _rows_per_scale(call, weight, geometry)
    quantized = _quantized(call, weight, rows, geometry)
    trained = call.state.trainable(weight, rows)
    return convolve(call, x, trained, bias, quantized, geometry, call.output(in_float))


def _rows_per_scale(call: Call, weight: Tensor, geometry: Geometry) -> int:
    """Rows of the parameter that share a scale, by the granularity of the accelerator."""
    per_channel = call.state.spec.weight_granularity == "per_channel"
    return _rows_of_channel(weight, geometry) if per_channel else weight.shape[0]


def _rows_of_channel(weight: Tensor, geometry: Geometry) -> int:
    """Rows that share a scale where channels have their own; transposed groups have one for all."""
    if not geometry.transposed:
        return 1
    return SECOND_AXIS if geometry.groups == 1 else weight.shape[0]


def _quantized(call: Call, weight: Tensor, rows: int, geometry: Geometry) -> QuantizedWeight:
    """The quantized weight, its output channels first."""
    quantized = call.state.weight(weight, rows)
    if not geometry.transposed:
        return quantized
    if rows == SECOND_AXIS:
        return quantized.turned()
    stored = geometry.outputs_first(quantized.stored)
    return QuantizedWeight(stored, quantized.scales[:1].repeat(len(stored)))


def _waiting(
    call: Call, x: Activation, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """The result of a convolution before its rounding, for the batch norm that folds it."""
    rows = _rows_of_channel(weight, geometry)
    quantized = _quantized(call, weight, rows, geometry)
    with float32_arithmetic(x.value):
        padded = x
        if any(geometry.rest):
            padded = replace(x, value=F.pad(x.value, geometry.rest))
        trained = call.state.trainable(weight, rows)
        # On a device the sums are formed twice.
        integers = None if in_memory(x.value) else padded.integers()
        arguments = (padded, integers, quantized, geometry, call)
        result, sums = _Sums.apply(padded.value, trained, bias, *arguments)

    def sums_of(other: QuantizedWeight) -> Tensor:
        largest = other.largest_sum() * x.qparams.largest
        own = padded.integers() if integers is None else integers
        return _accumulate(own, other, geometry, largest)

    def record(at: Call, folded: QuantizedWeight, shift: Tensor, y: Activation) -> None:
        _record(at, x, shift, folded, geometry, y)

    exact = needs_exact(call, x, quantized)
    deferred = FusionCandidate(
        sums, bias, quantized, x, _rounding(call, x), exact, sums_of, record, call.site
    )
    return call.state.fusion.note_producer(result, deferred)


def supports_convolution(input: Any, weight: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Tell whether a convolution is over one or two axes, by the shape of its weight."""
    return weight.dim() in (3, 4)


def convolve_in_float(x: Tensor, weight: Tensor, bias: Tensor | None, at: Geometry) -> Tensor:
    """Compute a convolution over one or two axes, with zeros that may differ before and after.

    Args:
        x: Shape ``(N, C, L)`` or ``(N, C, H, W)``, or without the first axis.
        weight: Shape ``(out, C / groups, K)`` or ``(out, C / groups, K_H, K_W)``; transposed
            ``(C, out / groups, ...)``.
        bias: Shape ``(out,)``, or None.
        at: Where to look.
    """
    padded = F.pad(x, at.rest) if any(at.rest) else x
    sides = at.stride, at.symmetric
    if at.transposed:
        spread = F.conv_transpose1d if weight.dim() == 3 else F.conv_transpose2d
        return spread(padded, weight, bias, *sides, at.output_padding, at.groups, at.dilation)
    function = F.conv1d if weight.dim() == 3 else F.conv2d
    return function(padded, weight, bias, *sides, at.dilation, at.groups)


def convolve(
    call: Call,
    x: Activation,
    weight: Tensor,
    bias: Tensor | None,
    quantized: QuantizedWeight,
    geometry: Geometry,
    y: QParams,
) -> Tensor:
    """One CONV_2D, DEPTHWISE_CONV_2D or TRANSPOSE_CONV instruction.

    A channel whose bias its accumulator could not hold gets a coarser scale.

    Args:
        call: The call.
        x: Input, shape ``(N, C, L)`` or ``(N, C, H, W)``, or without the first axis.
        weight: What the gradient goes to, as PyTorch has it: shape ``(out, C / groups, *kernel)``,
            transposed ``(C, out / groups, *kernel)``.
        bias: Shape ``(out,)``, or None.
        quantized: The quantized weight, its output channels first.
        geometry: Where to look.
        y: Grid of the output.

    Returns:
        Tensor of the convolution's shape on ``y``.
    """
    single = x.value.dim() < weight.dim()
    batch = replace(x, value=x.value.unsqueeze(0)) if single else x
    padded = batch
    with float32_arithmetic(x.value):
        if any(geometry.rest):
            padded = replace(batch, value=F.pad(batch.value, geometry.rest))
        quantized = holding_bias(call, quantized, bias, x.qparams)
        result = _Convolution.apply(
            padded.value, weight, bias, padded, quantized, geometry, y, call
        )
    if call.recording:
        _record(call, batch, bias, quantized, geometry, Activation(result, y))
    return call.with_qparams(result.squeeze(0) if single else result, y)


def _record(
    call: Call,
    x: Activation,
    bias: Tensor | None,
    quantized: QuantizedWeight,
    geometry: Geometry,
    y: Activation,
) -> None:
    """Report the instruction."""
    if not geometry.transposed:
        record_convolution(call, x, bias, quantized, geometry, y)
        return

    def integers(wider: Geometry) -> Tensor:
        rounded = _exact_output(call, x, quantized, bias, wider, y.qparams)
        return clip(rounded, y.qparams, keep=False)[0].long() + y.qparams.zero_point

    record_transposed_convolution(call, x, bias, quantized, geometry, y, integers)


class _Sums(torch.autograd.Function):
    """Real values of the sums with the bias, and the sums themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation,
        integers: Tensor | None,
        quantized: QuantizedWeight,
        geometry: Geometry,
        call: Call,
    ) -> tuple[Tensor, Tensor]:
        ctx.geometry = geometry
        ctx.save_for_backward(x, quantized.stored, quantized.scales)
        if not needs_exact(call, activation, quantized):
            result = _sums(x.detach(), quantized.values, bias, geometry)
            ctx.mark_non_differentiable(sums := result.new_empty(0))
            return result, sums
        largest = quantized.largest_sum() * activation.qparams.largest
        own = activation.integers() if integers is None else integers
        sums = _accumulate(own, quantized, geometry, largest)
        ctx.mark_non_differentiable(sums)
        if runs_kernel("dequantize", x):
            result = kernels.dequantize(
                sums,
                quantized.scales,
                None if bias is None else bias.detach(),
                scale=activation.qparams.scale,
                inner=math.prod(sums.shape[2:]),
            )
            return result, sums
        scales = _per_channel(activation.qparams.scale * quantized.scales, sums)
        result = (sums * scales).float()
        if bias is not None:
            result += _per_channel(bias.detach(), sums)
        return result, sums

    @staticmethod
    @first_order("convolution")
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, stored, scales = ctx.saved_tensors
        with float32_arithmetic(grad):
            grads = _gradients(
                grad, x, values_of(stored, scales), ctx.geometry, ctx.needs_input_grad[:3]
            )
        return *grads, None, None, None, None, None


class _Convolution(torch.autograd.Function):
    """Integer forward, straight-through backward with the weights of the chip."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation,
        quantized: QuantizedWeight,
        geometry: Geometry,
        y: QParams,
        call: Call,
    ) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        clipped: Tensor | None
        exact = needs_exact(call, activation, quantized, y)
        if exact and runs_kernel("requantize", x):
            result, clipped = _fused(call, activation, quantized, bias, geometry, y)
        else:
            compute = _exact_output if exact else _fast_output
            rounded = compute(call, activation, quantized, bias, geometry, y)
            centered, clipped = clip(rounded, y, needs_grad)
            result = centered.mul_(y.scale)
        if needs_grad:
            ctx.geometry = geometry
            ctx.save_for_backward(x, quantized.stored, quantized.scales, clipped)
        return result

    @staticmethod
    @first_order("convolution")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, stored, scales, clipped = ctx.saved_tensors
        with float32_arithmetic(grad):
            needs, weight = ctx.needs_input_grad[:3], values_of(stored, scales)
            grads = _gradients(inside(grad, clipped), x, weight, ctx.geometry, needs)
        return *grads, None, None, None, None, None


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, at: Geometry, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Of input, weight and bias."""
    gradients: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        grad,
        x,
        at.as_torch_has(weight),
        [weight.shape[0]],
        at.stride,
        at.symmetric,
        at.dilation,
        at.transposed,
        at.output_padding,
        at.groups,
        needs,
    )
    return gradients


def _fused(
    call: Call,
    x: Activation,
    weight: QuantizedWeight,
    bias: Tensor | None,
    geometry: Geometry,
    y: QParams,
) -> tuple[Tensor, Tensor | None]:
    """The output and what was clipped, of the convolution's shape, by a kernel."""
    largest = weight.largest_sum() * x.qparams.largest
    sums = _accumulate(x.integers(), weight, geometry, largest)
    return requantized(
        call,
        sums,
        y,
        bits=x.qparams.bits,
        scale_before=x.qparams.scale,
        scale_after=y.scale,
        largest=largest,
        rounding=_rounding(call, x),
        scales=weight.scales,
        bias=bias,
        inner=math.prod(sums.shape[2:]),
    )


def _exact_output(
    call: Call,
    x: Activation,
    weight: QuantizedWeight,
    bias: Tensor | None,
    geometry: Geometry,
    y: QParams,
) -> Tensor:
    """The rounded output in units of its scale, float64: as the reference kernel computes it."""
    bits, rounding = x.qparams.bits, _rounding(call, x)
    largest = weight.largest_sum() * x.qparams.largest
    accumulator = _accumulate(x.integers(), weight, geometry, largest)
    scales = x.qparams.scale * weight.scales.double()
    if bias is not None:
        biases = integer_bias(bias, scales, call.state.spec.bias_width(bits))
        accumulator = accumulator.double().add_(_per_channel(biases, accumulator))
        largest += largest_magnitude(biases)
    factors, limit = _per_channel(scales / y.scale, accumulator), accumulator_limit(call, bits)
    return settled(call, accumulator, factors, y, largest=largest, limit=limit, rounding=rounding)


def _accumulate(
    integers: Tensor, weight: QuantizedWeight, geometry: Geometry, largest: float
) -> Float[Tensor, "batch channels *axes"]:
    """Sums of products of integers, exact.

    float64 convolutions have no good kernel on a CPU: the bytes of 16-bit inputs are convolved
    apart, as long as each of the sums stays in float32.
    """
    # The transforms that cuDNN may choose leave the integers.
    with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
        if largest < FLOAT32_INTEGERS:
            return _sums(integers, weight.integers, None, geometry)
        if weight.largest_sum() * 2**8 < FLOAT32_INTEGERS:
            high = (integers * 2.0**-8).floor_()
            low = integers - high * 2.0**8
            upper = _sums(high, weight.integers, None, geometry).double().mul_(2.0**8)
            return upper.add_(_sums(low, weight.integers, None, geometry))
        return _sums(integers.double(), weight.stored.double(), None, geometry)


def _sums(x: Tensor, weight: Tensor, bias: Tensor | None, at: Geometry) -> Tensor:
    """A convolution without gradient over whatever axes there are."""
    return torch.convolution(
        x,
        at.as_torch_has(weight),
        bias,
        at.stride,
        at.symmetric,
        at.dilation,
        at.transposed,
        at.output_padding,
        at.groups,
    )


def _fast_output(
    call: Call,
    x: Activation,
    weight: QuantizedWeight,
    bias: Tensor | None,
    geometry: Geometry,
    y: QParams,
) -> Tensor:
    """The same in float32: equal except for results that lie within rounding error of a tie."""
    scales = x.qparams.scale * weight.scales.double()
    first, second = rounding_factors(scales / y.scale, rounding=_rounding(call, x))
    first = first.to(x.value.device)
    biases = None
    if bias is not None:
        width = call.state.spec.bias_width(x.qparams.bits)
        biases = integer_bias(bias, scales, width).mul_(first).float()
    # The small tensor takes the factor.
    factor = (first / x.qparams.scale).view(-1, *[1] * (weight.stored.dim() - 1))
    sums = _sums(x.value.detach(), weight.stored * factor, biases, geometry)
    return round_fast(sums, None if second is None else _per_channel(second, sums))


def _rounding(call: Call, x: Activation) -> Any:
    return call.state.spec.rounding_of("double" if x.qparams.bits == 8 else "reduced")


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """One number a channel, shaped to broadcast over a convolution's output."""
    return values.to(like.device).view(-1, *[1] * (like.dim() - 2))


_OPERANDS = {1: "weight", 2: "bias"}
register_operator(
    Operator(
        "convolution",
        torch=("conv1d", "conv2d"),
        emulate=convolution,
        supports=supports_convolution,
        litert=(
            Kernel(
                "CONV_2D",
                fuses_activation=True,
                options="Conv2DOptions",
                versions={"int8": 3, "int16": 4},
                operands=_OPERANDS,
            ),
            Kernel(
                "DEPTHWISE_CONV_2D",
                fuses_activation=True,
                options="DepthwiseConv2DOptions",
                versions={"int8": 3, "int16": 5},
                operands=_OPERANDS,
            ),
        ),
        learns_scale=True,
        has_weights=True,
        arithmetic="integer sum, one multiplier a channel; with groups or depthwise",
    )
)
