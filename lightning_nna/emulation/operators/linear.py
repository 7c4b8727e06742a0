r"""Fully connected layers and embedding look-ups.

.. math:: y = \mathrm{clip}\Bigl(\mathrm{round}\Bigl(
          \Bigl(\sum_i (q_{x,i} - o_x)\, q_{w,i} + q_b\Bigr) \frac{s_x s_w}{s_y}\Bigr) + o_y\Bigr)

LiteRT's reference kernel of the fully connected operator computes the factor and the product in
double precision and rounds ties away from zero, and so do we; the accumulator is an integer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.arithmetic.deferred_checks import DEFERRED
from lightning_nna.emulation.arithmetic.integer_products import FLOAT32_INTEGERS, has_byte_products
from lightning_nna.emulation.arithmetic.on_host import in_memory, on_host
from lightning_nna.emulation.arithmetic.quantized_weight import (
    QuantizedWeight,
    values_of,
    with_scales_for,
    with_scales_of_at_least,
)
from lightning_nna.emulation.arithmetic.rescaling import (
    Rescaler,
    largest_of,
    rescale,
    round_fast,
    rounding_factors,
    spills,
    wrap,
)
from lightning_nna.emulation.clipping import (
    clip,
    inside,
    requantize_by_kernel,
    rescale_rows,
)
from lightning_nna.emulation.first_order import first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.fusion import FusionCandidate
from lightning_nna.emulation.kernels import definitions as kernels
from lightning_nna.emulation.kernels.library import runs_kernel
from lightning_nna.emulation.operators.call import Call, stored_bytes
from lightning_nna.emulation.operators.record import (
    NO_OPTIONS,
    Form,
    Kernel,
    Operator,
    register_operator,
)
from lightning_nna.emulation.program import Activation, Stored
from lightning_nna.emulation.ranges import QParams
from lightning_nna.emulation.spec import KernelRounding, NNASpec


def linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Emulate ``F.linear`` of an input ``(..., in)`` and a weight ``(out, in)``."""
    x = call.operand(input, "input")
    if call.observing:
        result = call.observed(F.linear(input, weight, bias))
        # A batch norm over (batch, channels); elsewhere its channels are not the layer's.
        return call.state.fusion.note_producer(result, call.site) if input.dim() == 2 else result
    if call.state.fusion.is_folded(call.site):
        return _waiting(call, x, weight, bias)
    rows_per_scale = 1 if call.state.spec.weight_granularity == "per_channel" else weight.shape[0]
    quantized = call.state.weight(weight, rows_per_scale)
    y = call.output(lambda: F.linear(input, weight, bias))
    trained = call.state.trainable(weight, rows_per_scale)
    return fully_connected(call, x, trained, bias, quantized, y)


def _waiting(call: Call, x: Activation, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The result of a layer before its rounding, for the batch norm that folds it."""
    quantized = call.state.weight(weight, 1)
    exact = needs_exact(call, x, quantized)

    def sums_of(other: QuantizedWeight) -> Tensor:
        return integer_matmul(x.integers(), other, x.qparams.largest)

    with float32_arithmetic(x.value):
        values = _StraightThrough.apply(call.state.trainable(weight, 1), quantized.values)
        result = F.linear(x.value, values, bias)
        sums = sums_of(quantized) if exact else result

    def record(at: Call, folded: QuantizedWeight, shift: Tensor, y: Activation) -> None:
        _record(at, x, shift, folded, y)

    rounding = _rounding(call, x)
    deferred = FusionCandidate(
        sums.detach(), bias, quantized, x, rounding, exact, sums_of, record, call.site
    )
    return call.state.fusion.note_producer(result, deferred)


def fully_connected(
    call: Call,
    x: Activation,
    weight: Tensor,
    bias: Tensor | None,
    quantized: QuantizedWeight,
    y: QParams,
) -> Tensor:
    """One FULLY_CONNECTED instruction over the last axis.

    A channel whose bias its accumulator could not hold gets a coarser scale.

    Args:
        call: The call.
        x: Input, shape ``(*, in)``.
        weight: What the gradient goes to, shape ``(out, in)``.
        bias: Shape ``(out,)``, or None.
        quantized: The quantized weight.
        y: Grid of the output.

    Returns:
        Tensor of shape ``(*, out)`` on ``y``.
    """
    with float32_arithmetic(x.value):
        layer = _layer(call, x, bias, quantized, y)
        if torch.is_grad_enabled():
            result = _FullyConnected.apply(x.value, weight, bias, x, layer, y, call)
        else:
            result, _ = _output(call, x, bias, layer, y, keep=False)
    if call.recording:
        _record(call, x, bias, layer.weight, Activation(result, y))
    return call.with_qparams(result, y)


class _Layer(NamedTuple):
    """Hold what a layer needs except its input.

    Args:
        weight: The quantized weight, whose scales hold the bias.
        rescaler: Rescaling of integer sums; None for a layer that is computed in float, or by a
            kernel.
        is_fused: Whether a kernel requantizes.
    """

    weight: QuantizedWeight
    rescaler: Rescaler | None
    is_fused: bool = False


def _layer(
    call: Call, x: Activation, bias: Tensor | None, quantized: QuantizedWeight, y: QParams
) -> _Layer:
    """Prepare a layer; again only where its weight, bias or parameters have changed."""
    # An export follows other functions than a forward runs, and a device runs others still.
    is_fused = runs_kernel("requantize", x.value)
    key = x.qparams, y, call.exact, on_host(x.value), in_memory(x.value), is_fused
    stamp = None if bias is None else call.state.stamp(bias)
    known = quantized.layers.get(key)
    if known is not None and known[0] is bias and known[1] == stamp and call.telemetry is None:
        layer: _Layer = known[2]
        return layer
    layer = _new_layer(call, x, bias, quantized, y)
    # One that may overflow counts for its own site.
    if layer.rescaler is None or layer.rescaler.settle is None:
        quantized.layers[key] = bias, stamp, layer
    return layer


def _new_layer(
    call: Call, x: Activation, bias: Tensor | None, quantized: QuantizedWeight, y: QParams
) -> _Layer:
    weight = holding_bias(call, quantized, bias, x.qparams)
    exact = needs_exact(call, x, weight, y)
    multiplies_bytes = _multiplies_bytes(x, weight)
    if not exact and not multiplies_bytes:
        return _Layer(weight, None)
    if runs_kernel("requantize", x.value):
        return _Layer(weight, None, is_fused=True)
    zero_point = x.qparams.zero_point
    offset = weight.row_sums * -zero_point if multiplies_bytes and zero_point else None
    return _Layer(weight, rescaler_of_layer(call, x, weight, bias, y, offset, exact))


def embedding(call: Call, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Look rows of an 8-bit table up, shape ``(rows, n)``; the result has the table's scale."""
    return _look_up(call, weight, input, lambda x: F.embedding(input, x, *args, **kwargs))


def _look_up(
    call: Call, weight: Tensor, index: Tensor, function: Callable[[Tensor], Tensor]
) -> Tensor:
    """Look rows up with a function of the table, which has the shape of the weight."""
    if call.observing:
        return call.observed(function(weight), "table")
    quantized = call.state.weight(weight, weight.shape[0])
    with float32_arithmetic(weight):
        trained = call.state.trainable(weight, weight.shape[0])
        result = function(_StraightThrough.apply(trained, quantized.values))
    limit = call.state.spec.weight_max
    y = QParams(call.state.scale_of_table(weight), 0, -limit, limit)
    if call.recording:
        call.record(
            "GATHER",
            [stored_weight(quantized), Stored(index.long(), "int32", source=index)],
            [Activation(result, y).stored()],
            axis=0,
        )
    return call.with_qparams(result, y)


#: Functions that read rows of a parameter, as an embedding does.
LOOK_UPS = frozenset({"__getitem__", "index_select"})


def index_of_rows(name: str, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return the numbers of the rows that a function of :data:`LOOK_UPS` reads.

    Args:
        name: Name of the function.
        args: Its arguments after the parameter.
        kwargs: Its keyword arguments.

    Returns:
        Integers of any shape; None if it reads something else than rows.
    """
    if name == "index_select":
        arguments = dict(zip(("dim", "index"), args, strict=False)) | kwargs
        return arguments["index"] if arguments["dim"] == 0 else None
    index = args[0]
    is_integer = isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64)
    return index if is_integer else None


def _rows(name: str, call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Emulate ``weight[index]`` and ``index_select`` of a parameter, shape ``(rows, ...)``."""
    index = index_of_rows(name, *args, **kwargs)
    assert index is not None
    numbers = index if call.recording else torch.where(index < 0, index + len(input), index)
    shape = index.shape + input.shape[1:]

    def read(table: Tensor) -> Tensor:
        # What an export follows: ``table[index]`` is a layout that the index decides about.
        return F.embedding(numbers, table.reshape(len(table), -1)).reshape(shape)

    try:
        return _look_up(call, input, index, read)
    except IndexError as error:
        raise IndexError(
            f"{call.site} reads rows {int(index.min())} to {int(index.max())} of {len(input)}, and "
            "a program numbers them from 0: add their number to negative ones"
        ) from error


def supports_embedding(input: Any, weight: Any, *args: Any, **kwargs: Any) -> bool:
    """Tell whether a table is looked up unchanged: a limit of norms changes rows when read."""
    max_norm = args[1] if len(args) > 1 else kwargs.get("max_norm")
    return max_norm is None


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
    return x.double() @ weight.stored.double().T


def integer_bias(bias: Tensor, scales: Tensor, bits: int = 32) -> Tensor:
    """Bias in units of the accumulator, saturated to its width, as float64.

    Args:
        bias: Shape ``(out,)``.
        scales: Scale of the accumulator per output, float64.
        bits: Width.

    Raises:
        FloatingPointError: If a bias is not finite.
    """
    limit = 2.0 ** (bits - 1)
    exact = bias.detach().double()
    if not on_host(exact):
        _require_finite(exact)
        return (exact / scales).round_().clamp_(-limit, limit - 1)
    integers = np.rint(exact.numpy() / scales.numpy())
    if not np.isfinite(integers).all():
        _require_finite(exact)
    return torch.from_numpy(np.clip(integers, -limit, limit - 1))


def largest_magnitude(integers: Tensor) -> float:
    """Return the largest absolute value of a short vector of integers, float64."""
    if on_host(integers):
        return float(np.abs(integers.numpy()).max())
    return float(integers.abs().max())


def _require_finite(bias: Tensor) -> None:
    DEFERRED.require(torch.isfinite(bias).all(), _bias_error())


def _bias_error() -> FloatingPointError:
    return FloatingPointError("a bias is not finite: it cannot be quantized")


def holding_bias(
    call: Call,
    weight: QuantizedWeight,
    bias: Tensor | None,
    x: QParams,
    rows_per_scale: int | None = None,
) -> QuantizedWeight:
    """A weight whose scales are so large that the bias fits into the accumulator's units.

    Args:
        call: The call; its telemetry counts the channels whose scale was raised.
        weight: The quantized weight.
        bias: Shape ``(out,)``, or None.
        x: Grid of the input.
        rows_per_scale: Rows that share a scale; None for what the spec says of a layer.

    Returns:
        ``weight`` itself where the bias fits, which it nearly always does; on a device, an equal
        one.

    Raises:
        FloatingPointError: If a bias is not finite.
    """
    if bias is None:
        return weight
    spec = call.state.spec
    unit = x.scale * spec.largest_bias(x.bits)
    if rows_per_scale is None:
        rows_per_scale = 1 if spec.weight_granularity == "per_channel" else len(bias)
    if not in_memory(bias):
        call.state.count_biases(call.site, bias, unit, weight.scales)
        raised, is_finite = with_scales_for(
            weight,
            bias,
            unit=unit,
            rows_per_scale=rows_per_scale,
            power_of_two=spec.power_of_two_scales,
        )
        DEFERRED.require(is_finite, _bias_error())
        return raised
    smallest = bias.detach().abs().double() / unit
    call.state.count_biases(call.site, bias, unit, weight.scales)
    if on_host(smallest):
        holds = bool((smallest.numpy() <= weight.scales.numpy()).all())
    else:
        holds = bool((smallest <= weight.scales).all())
    if holds:
        return weight
    _require_finite(bias)
    return with_scales_of_at_least(
        weight, smallest, rows_per_scale=rows_per_scale, power_of_two=spec.power_of_two_scales
    )


def overflowed(
    call: Call,
    accumulator: Tensor,
    largest: float,
    *,
    limit: float,
    factors: float | Tensor,
    rounding: KernelRounding,
) -> Tensor:
    """Saturate or wrap an accumulator beyond the width that the accelerator has.

    Args:
        call: Call, whose site overflows are counted for.
        accumulator: Whole numbers, float32 or float64, any shape.
        largest: Bound on their absolute value: below the width nothing needs a look.
        limit: Capacity of the accumulator, 2^(b - 1).
        factors: Factors of the kernel's rescaling, whose result may be too wide as well.
        rounding: Rounding of the rescaling.
    """
    too_far = spills(factors, rounding=rounding, largest=min(largest, limit))
    if call.state.watches_overflow(call.site) and (largest >= limit or too_far):
        lost = (accumulator >= limit) | (accumulator < -limit)
        if too_far:
            lost |= (accumulator.double() * factors).abs() >= 2.0**31
        call.state.count_overflow(call.site, lost.sum(), lost.numel())
    if largest < limit:
        return accumulator
    if call.state.spec.accumulator_overflow == "saturate":
        return accumulator.clamp_(-limit, limit - 1)
    return wrap(accumulator.double(), limit)


def settled(
    call: Call,
    accumulator: Tensor,
    factors: float | Tensor,
    y: QParams,
    *,
    largest: float,
    limit: float,
    rounding: KernelRounding,
) -> Tensor:
    """Rescale sums to an output's scale, by way of the accumulator that the accelerator has.

    Args:
        call: The call.
        accumulator: Whole numbers, shape ``(..., out)``.
        factors: See :func:`.rescaling.rescale`.
        y: Quantization parameters of the output.
        largest: Bound on the absolute value of the sums.
        limit: What the accumulator holds, 2^(b - 1).
        rounding: Of the kernel.

    Returns:
        Whole numbers, float64, not clipped.
    """
    sums = overflowed(call, accumulator, largest, limit=limit, factors=factors, rounding=rounding)
    return rescale(
        sums,
        factors,
        rounding=rounding,
        largest=min(largest, limit),
        zero_point=y.zero_point,
    )


def accumulator_limit(call: Call, bits: int) -> float:
    """Return the limit of an accumulator with activations of a width: 2^(b - 1)."""
    return 2.0 ** (call.state.spec.accumulator_width(bits) - 1)


def stored_weight(weight: QuantizedWeight) -> Stored:
    """A weight for an instruction: one scale, or one per output channel where they differ."""
    scales = weight.scales
    shared = bool((scales == scales[0]).all())
    integers = weight.stored.long()
    return Stored(integers, "int8", float(scales[0]) if shared else scales, constant=True)


def stored_bias(bias: Tensor, scales: Tensor, spec: NNASpec, bits: int) -> Stored:
    """Store a bias of shape ``(out,)``: in 32 bits, with 16-bit activations in 64."""
    integers = integer_bias(bias, scales, spec.bias_width(bits)).long()
    shared = bool((scales == scales[0]).all())
    scale = float(scales[0]) if shared else scales
    return Stored(integers, "int64" if bits == 16 else "int32", scale, constant=True)


class _FullyConnected(torch.autograd.Function):
    """Integer forward, straight-through backward with the weights of the chip."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation,
        layer: _Layer,
        y: QParams,
        call: Call,
    ) -> Tensor:
        needs_grad, quantized = any(ctx.needs_input_grad), layer.weight
        result, clipped = _output(call, activation, bias, layer, y, keep=needs_grad)
        if needs_grad:
            ctx.save_for_backward(x, quantized.stored, quantized.scales, clipped)
        return result

    @staticmethod
    @first_order("linear")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, stored, scales, clipped = ctx.saved_tensors
        with float32_arithmetic(grad):
            flat, grad_x = inside(grad, clipped).reshape(-1, stored.shape[0]), None
            if ctx.needs_input_grad[0]:
                grad_x = (flat @ values_of(stored, scales)).reshape(x.shape)
            grad_w = flat.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
            grad_b = flat.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_b, None, None, None, None


def _output(
    call: Call, x: Activation, bias: Tensor | None, layer: _Layer, y: QParams, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Output of shape ``(*, out)``, and the second value of :func:`.clip`."""
    clipped: Tensor | None
    if layer.is_fused:
        result, clipped = _fused(call, x, layer.weight, bias, y)
    elif layer.rescaler is not None:
        sums = _integer_sums(x, layer.weight)
        result, clipped = rescale_rows(sums, layer.rescaler, y, keep=keep)
    else:
        rounded = _fast_output(call, x, layer.weight, bias, y)
        centered, clipped = clip(rounded, y, keep)
        result = centered.mul_(y.scale)
    # No view, so that what works in place on the result may.
    return result.reshape(*x.value.shape[:-1], len(layer.weight.scales)).detach(), clipped


def needs_exact(
    call: Call, x: Activation, weight: QuantizedWeight, y: QParams | None = None
) -> bool:
    """Tell whether a product must be formed in integers: if exact, or where it may overflow.

    Where a kernel requantizes, integers take no longer. On a device nobody looks at what may
    overflow.

    Args:
        call: The call.
        x: Input.
        weight: The quantized weight; the bias takes half of the accumulator at most.
        y: Grid of the output, if the result is rescaled to it at once.
    """
    if call.exact or not in_memory(x.value):
        return True
    if runs_kernel("requantize", x.value) and not weight.exceeds(
        FLOAT32_INTEGERS / x.qparams.largest
    ):
        return True
    half = accumulator_limit(call, x.qparams.bits) / 2
    if weight.exceeds(half / x.qparams.largest):
        return True
    # Without that, a result leaves 32 bits only where the output is that much finer.
    return y is not None and x.qparams.scale * float(weight.scales.max()) >= y.scale


def _fused(
    call: Call, x: Activation, weight: QuantizedWeight, bias: Tensor | None, y: QParams
) -> tuple[Tensor, Tensor | None]:
    """The layer's output and what was clipped, shape ``(rows, out)``, by a kernel."""
    if in_memory(x.value):
        sums, zero_point = _integer_sums(x, weight), x.qparams.zero_point
        is_offset = zero_point and _multiplies_bytes(x, weight)
        offset = weight.row_sums * -zero_point if is_offset else None
    else:
        sums, offset = _sums_on_device(x, weight)
    return requantized(
        call,
        sums,
        y,
        bits=x.qparams.bits,
        scale_before=x.qparams.scale,
        scale_after=y.scale,
        largest=weight.bound * x.qparams.largest,
        rounding=_rounding(call, x),
        scales=weight.scales,
        bias=bias,
        offset=offset,
    )


def _sums_on_device(x: Activation, weight: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    rows, columns = x.value.numel() // weight.stored.shape[1], weight.stored.shape[1]
    outputs = weight.stored.shape[0]
    # What CUDA's product of bytes takes.
    fits = rows > 16 and columns % 8 == 0 and outputs % 8 == 0
    if x.value.is_cuda and x.qparams.bits == 8 and fits:
        scale, zero_point = x.qparams.scale, x.qparams.zero_point
        q = kernels.centered_integers(x.value.detach(), scale=scale, zero_point=zero_point)
        offset = weight.row_sums * -zero_point if zero_point else None
        return torch._int_mm(q.view(-1, columns), weight.stored.T), offset
    return integer_matmul(x.integers().reshape(-1, columns), weight, x.qparams.largest), None


def requantized(
    call: Call,
    sums: Tensor,
    y: QParams,
    *,
    bits: int,
    scale_before: float,
    scale_after: float,
    largest: float,
    rounding: KernelRounding,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """Requantize the sums of a layer by a kernel; count what overflows.

    Args:
        call: The call.
        sums: Accumulators, whole numbers of any dtype, shape ``(..., channels, *)``.
        y: Quantization parameters of the output.
        bits: Width of the activations.
        scale_before: Scale of the input; with those of the weight, that of the sums.
        scale_after: Scale of the output.
        largest: Bound on the absolute value of the sums without the bias.
        rounding: Rounding of the kernel.
        scales: Scales of the weight, float32, shape ``(channels,)``.
        bias: Real values that :func:`holding_bias` has seen, shape ``(channels,)``, or None.
        settings: See :func:`.kernels.definitions.requantize`.

    Returns:
        Real values, float32, and a mask of what was clipped, both of the shape of ``sums``; None
        for the mask where Python may know that nothing was.
    """
    spec, width = call.state.spec, call.state.spec.accumulator_width(bits)
    if bias is not None:
        bias = bias.detach()
        largest += spec.largest_bias(bits)
    limit = 2.0 ** (width - 1)
    factor = scale_before / scale_after * (_largest_scale(scales) if in_memory(sums) else 0.0)
    is_far = spills(factor, rounding=rounding, largest=min(largest, limit))
    if (largest >= limit or is_far) and call.state.watches_overflow(call.site):
        before = sums.new_ones(1) if scales is None else scales
        before, units = before.double() * scale_before, None
        if bias is not None:
            units = integer_bias(bias, before, spec.bias_width(bits))
        factors = before / scale_after if is_far else None
        _count_overflow(call, sums, units, limit, factors, **settings)
    return requantize_by_kernel(
        sums.contiguous(),
        y,
        rounding=rounding,
        scale_before=scale_before,
        scale_after=scale_after,
        accumulator_bits=width,
        saturates=spec.accumulator_overflow == "saturate",
        bias_bits=spec.bias_width(bits),
        wide=min(largest, limit) > 2.0**31,
        scales=scales,
        bias=bias,
        **settings,
    )


def _largest_scale(scales: Tensor | None) -> float:
    return 1.0 if scales is None else largest_of(scales)


def _count_overflow(
    call: Call,
    sums: Tensor,
    bias: Tensor | None,
    limit: float,
    factors: Tensor | None,
    *,
    offset: Tensor | None = None,
    inner: int = 1,
) -> None:
    total = sums.double()
    for added in (offset, bias):
        if added is not None:
            total = total.reshape(-1, len(added), inner) + added.view(-1, 1)
    lost = (total >= limit) | (total < -limit)
    if factors is not None:
        scaled = total.reshape(-1, len(factors), inner) * factors.view(-1, 1)
        lost = lost.reshape(scaled.shape) | (scaled.abs() >= 2.0**31)
    call.state.count_overflow(call.site, lost.sum(), lost.numel())


def _multiplies_bytes(x: Activation, weight: QuantizedWeight) -> bool:
    """Tell whether to multiply bytes, whose sums have 32 bits: beyond these they wrap unseen."""
    fits = weight.bound * 128 < 2**31
    return x.qparams.bits == 8 and on_host(x.value) and fits and has_byte_products()


def _integer_sums(x: Activation, weight: QuantizedWeight) -> Tensor:
    """Sums of products of a layer; those of bytes are without the input's zero point."""
    columns = weight.stored.shape[1]
    if _multiplies_bytes(x, weight):
        stored = stored_bytes(x.value, x.qparams).reshape(-1, columns)
        return weight.byte_product(stored)
    integers = x.integers().reshape(-1, columns)
    if x.qparams.bits == 16 and weight.wide_product.dtype == torch.int32:
        return weight.wide_product(integers.to(torch.int16))
    return integer_matmul(integers, weight, x.qparams.largest)


def _rounding(call: Call, x: Activation) -> KernelRounding:
    """Rounding of the kernel: in double precision on LiteRT, as a convolution's elsewhere."""
    micro: KernelRounding = "double" if x.qparams.bits == 8 else "reduced"
    return call.state.spec.rounding_of("real", micro)


def rescaler_of_layer(
    call: Call,
    x: Activation,
    weight: QuantizedWeight,
    bias: Tensor | None,
    y: QParams,
    offset: Tensor | None = None,
    exact: bool = True,
) -> Rescaler:
    """Return the rescaling of a layer's sums to its output, as the reference kernel has it.

    Args:
        call: The call.
        x: Input.
        weight: The quantized weight, whose scales hold the bias.
        bias: Shape ``(out,)``, or None.
        y: Grid of the output.
        offset: What is still to be added to the sums, float64, shape ``(out,)``, or None.
        exact: Every bit; otherwise in float32, equal but near a tie.
    """
    spec = call.state.spec
    bits, rounding = x.qparams.bits, _rounding(call, x)
    scales = x.qparams.scale * weight.scales.double()
    largest = weight.bound * x.qparams.largest
    if bias is not None:
        biases = integer_bias(bias, scales, spec.bias_width(bits))
        offset = biases if offset is None else offset + biases
        largest += largest_magnitude(biases) if in_memory(biases) else spec.largest_bias(bits)
    # By a tensor: a GPU would multiply by the inverse of a number.
    factors, limit = scales / scales.new_full((), y.scale), accumulator_limit(call, bits)
    settle, bound = None, min(largest, limit)
    if largest >= limit or spills(factors, rounding=rounding, largest=bound):
        settle = partial(
            overflowed, call, largest=largest, limit=limit, factors=factors, rounding=rounding
        )
    return Rescaler(
        factors,
        rounding=rounding,
        largest=bound,
        offset=offset,
        exact=exact,
        settle=settle,
        zero_point=y.zero_point,
    )


def _fast_output(
    call: Call, x: Activation, weight: QuantizedWeight, bias: Tensor | None, y: QParams
) -> Tensor:
    """The same in float32: equal except for results that lie within rounding error of a tie."""
    scales = x.qparams.scale * weight.scales.double()
    if bias is not None:
        width = call.state.spec.bias_width(x.qparams.bits)
        bias = integer_bias(bias, scales, width).mul_(scales).float()
    values = weight.values
    product = F.linear(x.value.detach().reshape(-1, values.shape[1]), values, bias)
    rounding = _rounding(call, x)
    if rounding != "double":
        return product.mul_(1 / y.scale).round_()
    # One rounding in place of two would miss half of the ties that the first makes.
    first, second = rounding_factors(scales / y.scale, rounding=rounding)
    return round_fast(product.mul_((first.to(scales) / scales).float()), second)


def _record(
    call: Call,
    x: Activation,
    bias: Tensor | None,
    quantized: QuantizedWeight,
    y: Activation,
) -> None:
    scales = x.qparams.scale * quantized.scales.double()
    biases = None
    if bias is not None:
        biases = stored_bias(bias, scales, call.state.spec, x.qparams.bits)
    if x.value.dim() == 1:  # The kernel's output has two axes at least.
        x, y = (replace(each, value=each.value.unsqueeze(0)) for each in (x, y))
    call.record(
        "FULLY_CONNECTED",
        [x.stored(), stored_weight(quantized), biases],
        [y.stored()],
        keepNumDims=x.value.dim() > 2,
    )


class _StraightThrough(torch.autograd.Function):
    """Give the second tensor forward, and the gradient to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, replacement: Tensor) -> Tensor:
        # No view of it, so that what works in place on a result may.
        return replacement.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _version_of_fully_connected(version: int, operator: Any, tensors: Any) -> int:
    """Version 5 in 8 bits where axes are kept, 6 without a bias."""
    if tensors[operator.inputs[0]].dtype != "int8":
        return version
    version = max(version, 5 if operator.options.keepNumDims else version)
    # Without a bias there are two operands.
    return max(version, 6 if "" in operator.inputs else version)


def _version_of_gather(version: int, operator: Any, tensors: Any) -> int:
    """Version 5 where axes of the table and of the indices are a batch."""
    return 5 if operator.options.batchDims else version


#: Kernel that reads at indices.
LOOK_UP = Kernel(
    "GATHER",
    versions={"bool": 3, "int8": 2, "int16": 4},
    version=_version_of_gather,
    operands={0: "table"},
    order="table",
)
#: Kernel of layers, whose operator is among the matrix products (see :mod:`.matmul`).
FULLY_CONNECTED = Kernel(
    "FULLY_CONNECTED",
    fuses_activation=True,
    order="columns",
    versions={"int8": 4, "int16": 7},
    version=_version_of_fully_connected,
    operands={1: "weight", 2: "bias"},
)

register_operator(
    Operator(
        "embedding",
        torch=("embedding",),
        emulate=embedding,
        supports=supports_embedding,
        forms=tuple(Form((name,), partial(_rows, name)) for name in sorted(LOOK_UPS)),
        litert=(
            LOOK_UP,
            # Tests of the oracle write it, no network becomes one.
            Kernel("EMBEDDING_LOOKUP", options=NO_OPTIONS),
        ),
        has_weights=True,
        arithmetic="rows of an 8-bit table with one scale, moved unchanged",
    )
)
