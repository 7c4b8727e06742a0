r"""Batch normalization, folded into the convolution or linear layer before it.

The accelerator has no batch norm: its factor and shift are part of the weight and bias of the
layer that it follows, per output channel,

.. math:: w' = w f, \qquad b' = (b - m) f + \beta, \qquad f = \frac{\gamma}{\sqrt{v + \epsilon}}.

A weight with a scale of its own for each channel keeps its integers when its channels are
multiplied: :math:`|f|` goes into the scales and the sign of :math:`f` to the integers. So the
layer's sums are formed once; in training :math:`m` and :math:`v` are theirs, in evaluation the
running statistics, which follow as ever. The backward is batch norm's own.

Which layers fold is seen while ranges are observed: those whose result goes straight into a batch
norm and nowhere else. Any other batch norm, and each on a chip whose weights have one scale a
tensor or powers of two for scales, is a depthwise convolution with one tap.

Reference:
    Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-
    only inference", CVPR 2018, arXiv 1712.05877, section 3.2.

Differs from the paper: there the folded weight is quantized and convolved a second time; the
statistics are those of the float weight.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.elementary import square_root
from lightning_nna.emulation.arithmetic.on_host import in_memory, on_host
from lightning_nna.emulation.arithmetic.quantized_weight import (
    SMALLEST_SCALE,
    QuantizedWeight,
    round_significands,
)
from lightning_nna.emulation.arithmetic.rescaling import (
    Rescaler,
    round_fast,
    rounding_factors,
    spills,
)
from lightning_nna.emulation.clipping import clip, inside, output_in_blocks
from lightning_nna.emulation.first_order import first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.fusion import FusionCandidate
from lightning_nna.emulation.kernels import definitions as kernels
from lightning_nna.emulation.kernels.library import compiled_for, runs_kernel
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.convolution import convolve
from lightning_nna.emulation.operators.convolution_layout import Geometry
from lightning_nna.emulation.operators.linear import (
    accumulator_limit,
    holding_bias,
    integer_bias,
    largest_magnitude,
    needs_exact,
    overflowed,
    requantized,
)
from lightning_nna.emulation.operators.record import Operator, register_operator
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import QParams


def batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Emulate ``F.batch_norm`` of shape ``(batch, channels, ...)``."""
    if call.observing:
        spec = call.state.spec
        if spec.weight_granularity == "per_channel" and not spec.power_of_two_scales:
            call.state.fusion.note_batch_norm(input)
        value = call.operand(input, "input").value
        arguments = (running_mean, running_var, weight, bias, training, momentum, eps)
        return call.observed(F.batch_norm(value, *arguments))
    folded = call.state.fusion.deferred(input)
    x = None if folded is not None else call.operand(input, "input")
    values = input if x is None else x.value
    with float32_arithmetic(values):
        # A norm that is folded has a backward of its own.
        followed = values if folded is None else values.detach()
        mean, variance = _statistics(followed, running_mean, running_var, training, momentum)

        def inverse() -> Tensor:
            return square_root(variance + eps).reciprocal()

        y = call.output(lambda: _normalized(values.detach(), mean, inverse(), weight, bias))
        if folded is not None:
            statistics = (mean, variance, eps, training)
            result = _Folded.apply(input, weight, bias, statistics, folded, y, call)
            return call.with_qparams(result, y)
    assert x is not None, "either the layer before folds, or there is an operand"
    with float32_arithmetic(values):
        known = mean, inverse()
    return _as_convolution(call, x, weight, bias, *known, y)


def with_statistics(
    call: Call,
    input: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalize with known statistics: a depthwise convolution with one tap.

    Args:
        call: The call.
        input: Tensor of shape ``(batch, channels, ...)``.
        mean: Shape ``(channels,)``.
        variance: Shape ``(channels,)``.
        weight: Gain, shape ``(channels,)``, or None.
        bias: Shift, shape ``(channels,)``, or None.
        eps: Added to the variance.
    """
    x = call.operand(input, "input")
    inverse = square_root(variance + eps).reciprocal()

    def in_float() -> Tensor:
        return _normalized(x.value, mean, inverse, weight, bias)

    if call.observing:
        return call.observed(in_float())
    return _as_convolution(call, x, weight, bias, mean, inverse, call.output(in_float))


def _statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel (second axis); the running ones follow in training."""
    if not training:
        assert running_mean is not None, "torch asks for statistics outside of training"
        assert running_var is not None, "torch asks for statistics outside of training"
        return running_mean, running_var
    kernel = None if x.requires_grad else compiled_for("channel_statistics", x)
    if kernel is None:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = torch.var_mean(x, axes, correction=0)
    else:
        variance, mean = kernel(x)
    if running_mean is not None and running_var is not None:
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            unbiased = variance.detach() * (count / max(count - 1, 1))
            if in_memory(x):
                running_mean.lerp_(mean.detach(), momentum)
                running_var.lerp_(unbiased, momentum)
            else:
                running, current = [running_mean, running_var], [mean.detach(), unbiased]
                torch._foreach_lerp_(running, current, momentum)
    return mean, variance


def _normalized(
    x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Batch norm in float with known statistics."""
    factor = inverse if weight is None else inverse * weight
    shape = (-1, *[1] * (x.dim() - 2))
    result = (x - mean.view(shape)) * factor.view(shape)
    return result if bias is None else result + bias.view(shape)


class _Folded(torch.autograd.Function):
    """The layer's sums with the norm's scales and bias forward, batch norm's own backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: tuple[Tensor, Tensor, float, bool],
        layer: FusionCandidate,
        y: QParams,
        call: Call,
    ) -> Tensor:
        mean, variance, eps, training = statistics
        mean, variance = mean.detach(), variance.detach()
        keep = any(ctx.needs_input_grad)
        clipped: Tensor | None
        if not in_memory(x):
            quantized, shift, inverse = _folded_on_device(
                call, layer, mean, variance, weight, bias, eps
            )
            # Whether a scale has grown, and integers with it, nobody knows.
            sums = layer.sums_of(quantized)
            result, clipped = _requantized(call, layer, sums, shift, quantized, y)
        else:
            inverse = square_root(variance + eps).reciprocal()
            factor = inverse if weight is None else inverse * weight.detach()
            offset = -mean if layer.bias is None else layer.bias.detach() - mean
            shift = offset * factor if bias is None else bias.detach() + offset * factor
            folded = _folded(call, layer, factor, shift)
            quantized = folded.weight
            result, clipped = _output(call, layer, x.detach(), shift, folded, y, keep)
        if call.recording:
            layer.record(call, quantized, shift, Activation(result, y))
        ctx.training, ctx.has_bias = training, bias is not None
        ctx.save_for_backward(x, weight, mean, inverse, clipped)
        return result

    @staticmethod
    @first_order("batch normalization of a layer")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, clipped = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with float32_arithmetic(grad):
            # In evaluation the kernel takes the running statistics; the inverse is that of var + 0.
            running = (None, None) if ctx.training else (mean, inverse.square().reciprocal())
            grads = torch.ops.aten.native_batch_norm_backward(
                inside(grad, clipped),
                x,
                weight,
                *running,
                mean,
                inverse,
                ctx.training,
                0.0,
                [needs_x, needs_weight, needs_bias],
            )
        wanted = zip(grads, (needs_x, needs_weight, needs_bias), strict=True)
        return *(gradient if need else None for gradient, need in wanted), *(None,) * 4


class _FoldedWeight(NamedTuple):
    """A layer's weight with the norm's factor.

    Args:
        weight: The quantized weight, shape ``(channels, …)``.
        signs: Of the factor; 0 where the norm multiplies with nothing.
        same_integers: Whether the integers are the layer's except for the signs, and so its sums
            are.
    """

    weight: QuantizedWeight
    signs: Tensor
    same_integers: bool


def _folded(call: Call, layer: FusionCandidate, factor: Tensor, shift: Tensor) -> _FoldedWeight:
    """Put the norm's factor into the scales, which grow where they could not hold the shift."""
    plain = layer.weight
    scales = round_significands(plain.scales.double() * factor.double().abs())
    nothing = scales < SMALLEST_SCALE
    signs = factor.sign().masked_fill_(nothing, 0.0)
    integers = plain.stored * signs.to(torch.int8).view(-1, *[1] * (plain.stored.dim() - 1))
    weight = QuantizedWeight(integers, scales.masked_fill_(nothing, SMALLEST_SCALE).float())
    fitting = holding_bias(call, weight, shift, layer.x.qparams)
    return _FoldedWeight(fitting, signs, fitting is weight)


def _output(
    call: Call,
    layer: FusionCandidate,
    result: Tensor,
    shift: Tensor,
    folded: _FoldedWeight,
    y: QParams,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output, from the layer's sums or its result, and the second value of :func:`.clip`.

    Where the integers are not those that the sums were formed with, they are formed once more.
    """
    shape, bits = (-1, *[1] * (result.dim() - 2)), layer.x.qparams.bits
    signs = folded.signs
    if layer.exact or not folded.same_integers or needs_exact(call, layer.x, folded.weight, y):
        same_sums = layer.exact and folded.same_integers
        sums = layer.sums if same_sums else layer.sums_of(folded.weight)
        # Most often no channel is negated.
        negates = same_sums and not (on_host(signs) and bool((signs.numpy() == 1).all()))
        if runs_kernel("requantize", sums):
            signed = sums * signs.view(shape).to(sums.dtype) if negates else sums
            return _requantized(call, layer, signed, shift, folded.weight, y)
        scales = layer.x.qparams.scale * folded.weight.scales.double()
        biases = integer_bias(shift, scales, call.state.spec.bias_width(bits))
        factors, limit = (scales / y.scale).view(shape), accumulator_limit(call, bits)
        largest = layer.weight.largest_sum() * layer.x.qparams.largest + largest_magnitude(biases)
        settle, bound, rounding = None, min(largest, limit), layer.rounding
        if largest >= limit or spills(factors, rounding=rounding, largest=bound):
            settle = partial(
                overflowed, call, largest=largest, limit=limit, factors=factors, rounding=rounding
            )
        rescaler = Rescaler(
            factors,
            rounding=rounding,
            largest=bound,
            offset=biases.view(shape),
            settle=settle,
            zero_point=y.zero_point,
        )

        def exactly(samples: Tensor) -> Tensor:
            total = samples.to(torch.float64, copy=True)
            return rescaler(total.mul_(signs.view(shape)) if negates else total)

        if settle is None:
            return output_in_blocks(sums, exactly, y, keep=keep)
        # Sums that overflow are counted all at once.
        centered, clipped = clip(exactly(sums), y, keep)
        return centered.mul_(y.scale), clipped
    scales = layer.x.qparams.scale * folded.weight.scales.double()
    biases = integer_bias(shift, scales, call.state.spec.bias_width(bits))
    first, second = rounding_factors(scales / y.scale, rounding=layer.rounding)
    first = first.to(result.device)
    to_units = signs * first / (layer.x.qparams.scale * layer.weight.scales)
    constant = (biases * first).float()
    if layer.bias is not None:
        constant -= layer.bias.detach() * to_units
    constant, to_units = constant.view(shape), to_units.view(shape)
    second = None if second is None else second.view(shape)

    def quickly(samples: Tensor) -> Tensor:
        return round_fast(torch.addcmul(constant, samples, to_units), second)

    return output_in_blocks(result, quickly, y, keep=keep)


def _folded_on_device(
    call: Call,
    layer: FusionCandidate,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[QuantizedWeight, Tensor, Tensor]:
    """The folded weight, its bias, and one over the root of the variance, in two launches."""
    plain, parameters = layer.weight, (layer.bias, mean, variance, weight, bias)
    stored, scales, shift, inverse = kernels.fold_batch_norm(
        plain.stored,
        plain.scales,
        *(None if x is None else x.detach() for x in parameters),  # type: ignore[arg-type]
        eps=eps,
    )
    folded = holding_bias(call, QuantizedWeight(stored, scales), shift, layer.x.qparams)
    return folded, shift, inverse


def _requantized(
    call: Call,
    layer: FusionCandidate,
    sums: Tensor,
    shift: Tensor,
    folded: QuantizedWeight,
    y: QParams,
) -> tuple[Tensor, Tensor | None]:
    """The output and what was clipped, of the layer's shape, from its sums by a kernel."""
    x = layer.x.qparams
    return requantized(
        call,
        sums,
        y,
        bits=x.bits,
        scale_before=x.scale,
        scale_after=y.scale,
        largest=folded.bound * x.largest,
        rounding=layer.rounding,
        scales=folded.scales,
        bias=shift,
        inner=math.prod(sums.shape[2:]),
    )


def _as_convolution(
    call: Call,
    x: Activation,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    y: QParams,
) -> Tensor:
    """A factor and a shift per channel: a depthwise convolution with one tap."""
    with float32_arithmetic(x.value):
        factor = inverse if weight is None else inverse * weight
        shift = -mean * factor if bias is None else bias - mean * factor
    value = x.value.unsqueeze(2) if x.value.dim() == 2 else x.value
    # More than two axes in space are two to this layer.
    shaped = value.flatten(3) if value.dim() > 4 else value
    taps = factor.view(-1, *[1] * (shaped.dim() - 1))
    geometry = Geometry.of(taps, groups=len(factor))
    operand = Activation(shaped, x.qparams)
    result = convolve(call, operand, taps, shift, call.quantized(taps), geometry, y)
    return call.with_qparams(result.reshape(x.value.shape), y)


register_operator(
    Operator(
        "batch_norm",
        torch=("batch_norm",),
        emulate=batch_norm,
        arithmetic="none: folded into the layer before; else a depthwise convolution with one tap",
    )
)
