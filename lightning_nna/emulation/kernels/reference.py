r"""Fused kernels in plain PyTorch: the definition of what every other implementation computes.

Integers are int64, real numbers float64 but where the arithmetic of an accelerator has float32.
Nothing here looks at a value: no branch depends on one and no host waits for a device, so that the
functions run on every device alike.

Divisors are tensors: on CUDA PyTorch multiplies by the inverse of a number that stands in Python,
which is another result in the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nna import elementary
from lightning_nna.emulation.arithmetic.fixed_point import (
    multipliers_of,
    multiply_by_quantized_multiplier,
    round_half_away,
    rounding_divide_by_power_of_two,
)
from lightning_nna.emulation.arithmetic.integer_softmax import reciprocal, to_sum

#: Numbers of the roundings of a requantization, see :mod:`.arithmetic.rescaling`.
REAL, DOUBLE, REDUCED, SINGLE, SHIFT = range(5)
#: Scale of a channel of zeros, which has to be raised for its bias if it has one.
SMALLEST_SCALE = 2.0**-60
#: Integers of a tensor up to which encoders of weights take them for centroids.
CENTROIDS = 32

_INT16, _INT32 = 2**15, 2**31
# Of the operands of a sum of 16 bits.
_LEFT_SHIFT = 15
# Any result beyond is clipped, and an int64 holds it.
_FAR = 2.0**40
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def requantize(
    sums: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    offset: Tensor | None,
    scale_before: float,
    scale_after: float,
    out_scale: float,
    rounding: int,
    accumulator_bits: int,
    saturates: bool,
    bias_bits: int,
    zero_point: int,
    low: int,
    high: int,
    fused_relu: bool,
    inner: int,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """Requantize accumulators of any shape; see :func:`.definitions.requantize`."""
    per_channel = next((len(x) for x in (scales, bias, offset) if x is not None), 1)
    x = sums.reshape(-1, per_channel, inner).long()
    scale = _number(1.0, sums) if scales is None else scales.double().view(-1, 1)
    before = scale * scale_before
    if offset is not None:
        x = x + offset.long().view(-1, 1)
    if bias is not None:
        limit = 2.0 ** (bias_bits - 1)
        units = (bias.double().view(-1, 1) / before).round().clamp(-limit, limit - 1)
        x = x + units.long()
    x = accumulated(x, accumulator_bits, saturates)
    factors = before / _number(scale_after, sums)
    rounded = rescaled(x, factors, rounding, zero_point, wide)
    values, clipped = _clipped(rounded, low, high, fused_relu)
    return values.float().mul(out_scale).view(sums.shape), clipped.view(sums.shape)


def rescaled(x: Tensor, factors: Tensor, rounding: int, zero_point: int, wide: bool) -> Tensor:
    """Rescale whole numbers, int64, by float64 factors that broadcast, as kernels round.

    Returns:
        int64 of the shape of ``x``, less the zero point.
    """
    if rounding in (REAL, SHIFT):
        real = round_half_away(x.double() * factors)
        if rounding == SHIFT:
            return real.clamp(-_FAR, _FAR).long()
        # What no integer of 32 bits holds becomes the least of them, as on x86-64.
        real = real.masked_fill((real >= _INT32) | (real < -_INT32), -_INT32)
        return lowest(real.long() + zero_point, 32) - zero_point
    mantissas, exponents = multipliers_of(factors)
    if rounding == DOUBLE:
        if wide:
            right = (-exponents).clamp_min(0)
            left = exponents.clamp(0, 40)
            # A larger number leads out of every grid, as this one does.
            bound = torch.full_like(left, 2**47) >> left
            return rounding_divide_by_power_of_two(
                _high(torch.clamp(x, -bound, bound) << left, mantissas), right
            )
        return multiply_by_quantized_multiplier(x, mantissas, exponents, zero_point)
    if rounding == SINGLE:
        # A larger factor leads out of every grid, as this one does.
        right = 31 - exponents.clamp_max(30)
        return (x * mantissas + (torch.ones_like(right) << (right - 1))) >> right
    reduced = ((mantissas + 2**15) >> 16).clamp_max(2**15 - 1)
    right = 15 - exponents
    half = torch.ones_like(right) << ((right - 1) & 63)
    return lowest(((x * reduced + half) >> (right & 63)) + zero_point, 32) - zero_point


def accumulated(x: Tensor, bits: int, saturates: bool) -> Tensor:
    """Saturate or wrap sums of any shape, int64, to the width of an accumulator.

    Example:
        >>> [accumulated(torch.tensor(40_000), 16, saturates).item() for saturates in (True, False)]
        [32767, -25536]
    """
    if not saturates:
        return lowest(x, bits)
    limit = 2 ** (bits - 1)
    return x.clamp(-limit, limit - 1)


def lowest(x: Tensor, bits: int) -> Tensor:
    """Return the lowest bits of int64, any shape, as integers with a sign."""
    return (x << (64 - bits)) >> (64 - bits)


def quantize(
    x: Tensor, scale: float, low: int, high: int, fused_relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize real values of any shape; see :func:`.definitions.quantize`."""
    scaled = x.float() / x.new_full((), scale, dtype=torch.float32)
    is_finite = scaled.abs() <= _LARGEST_FLOAT32
    rounded = round_half_away(scaled.masked_fill(~is_finite, 0))
    values, clipped = _clipped(rounded, low, high, fused_relu)
    # Rounded zeros have a sign, integers do not.
    return values.add(0.0).mul(scale), clipped, is_finite.all()


def largest_of_groups(weight: Tensor, groups: int) -> Tensor:
    """Return the largest finite absolute values, float32, shape ``(groups, parts)``."""
    size = weight.float().abs()
    return size.masked_fill(size > _LARGEST_FLOAT32, 0).nan_to_num(0).view(groups, -1).amax(1, True)


def quantize_rows(
    weight: Tensor, largest: Tensor | None, rows_per_scale: int, maximum: int, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight of shape ``(rows, ...)``; see :func:`.definitions.quantize_rows`."""
    weight = weight.float()
    is_finite = weight.abs() <= _LARGEST_FLOAT32
    weight = weight.masked_fill(~is_finite, 0)
    groups = weight.reshape(weight.shape[0] // rows_per_scale, -1) if largest is None else largest
    magnitude = groups.abs().amax(1).double()
    scale = (magnitude / _number(maximum, weight)).clamp_min(SMALLEST_SCALE)
    mantissa, exponent = torch.frexp(scale)
    if power_of_two:  # Rounded up.
        scale = elementary.power_of_two(exponent - (mantissa == 0.5).to(exponent.dtype))
    else:  # Its significand rounded to 16 bits.
        scale = (mantissa * 2**16).round() * elementary.power_of_two(exponent - 16)
    scales = scale.float().repeat_interleave(rows_per_scale)
    rows = scales.view(-1, *([1] * (weight.dim() - 1)))
    return (weight / rows).round().to(torch.int8), scales, is_finite.all()


def raise_scales(
    stored: Tensor,
    scales: Tensor,
    bias: Tensor,
    unit: float,
    rows_per_scale: int,
    power_of_two: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raise scales of a weight of shape ``(rows, ...)``; see :func:`.definitions.raise_scales`."""
    magnitude = bias.abs().double()
    is_finite = magnitude <= _LARGEST_FLOAT32
    smallest = magnitude.masked_fill(~is_finite, 0) / _number(unit, scales)
    needed = smallest.view(-1, rows_per_scale).amax(1, keepdim=True)
    needed = needed.expand(-1, rows_per_scale).reshape(-1)
    mantissa, exponent = torch.frexp(needed)
    if power_of_two:
        upper = elementary.power_of_two(exponent - (mantissa == 0.5).to(exponent.dtype))
    else:  # Its significand rounded up to 16 bits: float32 must not fall below what is needed.
        upper = (mantissa * 2**16).ceil() * elementary.power_of_two(exponent - 16)
    is_raised = needed > scales
    raised = torch.where(is_raised, upper.float(), scales)
    rows = (-1, *[1] * (stored.dim() - 1))
    integers = (stored.double() * (scales.double() / raised.double()).view(rows)).round().long()
    nearest = _nearest_integers(stored)[integers + 128]
    return torch.where(is_raised.view(rows), nearest, stored), raised, is_finite.all()


def _nearest_integers(stored: Tensor) -> Tensor:
    """For each integer of 8 bits the nearest of a tensor's few, or 0; itself if they are many.

    Between two that are as near it is the smaller.
    """
    every = torch.arange(-128, 128, device=stored.device)
    present = torch.zeros(256, device=stored.device)
    present.scatter_(0, stored.flatten().long() + 128, 1.0)
    is_few = present.sum() <= CENTROIDS
    # Twice the distance, and one more for a larger integer: the smaller wins a tie.
    distances = 2 * (every[:, None] - every).abs() + (every > every[:, None]).long()
    is_absent = (present == 0) & (every != 0)
    nearest = distances.masked_fill(is_absent, 2**20).argmin(1) - 128
    return torch.where(is_few, nearest, every).to(torch.int8)


def fold_batch_norm(
    stored: Tensor,
    scales: Tensor,
    layer_bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fold a norm into a weight ``(channels, ...)``; see :func:`.definitions.fold_batch_norm`."""
    inverse = elementary.square_root(variance + eps).reciprocal()
    factor = inverse if weight is None else inverse * weight
    offset = -mean if layer_bias is None else layer_bias - mean
    shift = offset * factor if bias is None else bias + offset * factor
    mantissa, exponent = torch.frexp(scales.double() * factor.double().abs())
    folded = (mantissa * 2**16).round() * elementary.power_of_two(exponent - 16)
    is_nothing = folded < SMALLEST_SCALE
    signs = factor.sign().masked_fill(is_nothing, 0.0).to(torch.int8)
    integers = stored * signs.view(-1, *[1] * (stored.dim() - 1))
    return integers, folded.masked_fill(is_nothing, SMALLEST_SCALE).float(), shift, inverse


def softmax_rows(x: Tensor, table: Tensor, scale: float) -> Tensor:
    """Compute the softmax of rows ``(rows, n)``; see :func:`.definitions.softmax_rows`."""
    q = _integers(x, scale)
    differences = (q.amax(1, keepdim=True) - q).clamp(0, len(table) - 1)
    exponentials = table.index_select(0, differences.flatten()).view(x.shape)
    inverse, above_unit = reciprocal(to_sum(exponentials).sum(1, keepdim=True))
    # From 31 fractional bits to 8.
    rounded = multiply_by_quantized_multiplier(exponentials, inverse, -(above_unit + 31 - 8))
    return lowest(rounded, 32).clamp(0, 255).float().mul(1 / 256)


def whole_numbers(x: Tensor, scale: float) -> Tensor:
    """Return integers in the shape of ``x``; see :func:`.definitions.whole_numbers`."""
    # The quotient is whole but for rounding; an integer has no negative zero.
    quotient = x.float() / x.new_full((), scale, dtype=torch.float32)
    return quotient.round().add(0.0)


def dequantize(
    sums: Tensor, scales: Tensor, bias: Tensor | None, scale: float, inner: int
) -> Tensor:
    """Return real values of sums of any shape; see :func:`.definitions.dequantize`."""
    x = sums.reshape(-1, len(scales), inner)
    values = (x * (scale * scales).view(-1, 1)).float()
    if bias is not None:
        values = values + bias.view(-1, 1)
    return values.view(sums.shape)


def normalize_rows(
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    tables: list[Tensor],
    scale: float,
    of_center: list[float],
    of_normalize: list[float],
    of_epsilon: list[float],
    of_gain: list[float],
    of_shift: list[float],
    of_output: list[float],
    means: list[int],
    rounding: int,
    groups: int,
    channels: int,
    low: int,
    high: int,
    out_scale: float,
    fused_relu: bool,
) -> tuple[Tensor, Tensor]:
    """Normalize rows, shape ``(rows, columns)``; see :func:`.definitions.normalize_rows`."""
    q, multipliers_of_means = _integers(x, scale), iter(means)

    def rescale(integers: Tensor, factor: float) -> Tensor:
        return rescaled(integers, _number(factor, x), rounding, 0, False)

    def mean_of(integers: Tensor, factor: float) -> Tensor:
        total = integers.sum(1, keepdim=True)
        mantissa, exponent = next(multipliers_of_means), next(multipliers_of_means)
        if rounding != DOUBLE:
            return _in_16_bits(rescale(total, factor))
        numbers = total.new_full((), mantissa), total.new_full((), exponent)
        return _in_16_bits(lowest(multiply_by_quantized_multiplier(total, *numbers), 32))

    def sum_of(a: Tensor, b: Tensor, factors: list[float], sign: int = 1) -> Tensor:
        own, other, last = factors
        terms = rescale(a << _LEFT_SHIFT, own), rescale(b << _LEFT_SHIFT, other)
        return _in_16_bits(rescale(terms[0] + sign * terms[1], last))

    if of_center:
        q = sum_of(q, mean_of(q, of_center[0]), of_center[1:], -1)
    for position, table in enumerate(tables):
        square, variance, product = of_normalize[3 * position : 3 * position + 3]
        v = mean_of(_in_16_bits(rescale(q * q, square)), variance)
        if of_epsilon and not position:
            v = sum_of(v, torch.full_like(v, int(of_epsilon[0])), of_epsilon[1:])
        q = _in_16_bits(rescale(q * _inverse_roots(table, v), product))
    # One number a channel of a group.
    q = q.view(-1, groups, channels, x.shape[1] // channels)
    if gain is not None:
        factors = _constants(gain, of_gain[0]).view(groups, channels, 1)
        q = _in_16_bits(rescale(q * factors, of_gain[1]))
    if shift is not None:
        terms = _constants(shift, of_shift[0]).view(groups, channels, 1)
        q = sum_of(q, terms, of_shift[1:])
    rounded = rescale(q, of_output[0]) if of_output else q
    values, clipped = _clipped(rounded.view(x.shape), low, high, fused_relu)
    return values.float().mul(out_scale), clipped


def _inverse_roots(table: Tensor, v: Tensor) -> Tensor:
    """Inverse roots of 16-bit integers: entries, or straight lines between the ends of segments."""
    if table.is_floating_point():
        entries = table.index_select(0, v.clamp(0, len(table) - 1).flatten())
        return entries.view(v.shape).long().clamp_max(_INT16 - 1)
    bits = 16 - (len(table) - 1).bit_length() + 1
    segment, within = (v + _INT16) >> bits, (v + _INT16) & ((1 << bits) - 1)
    start, end = (table.index_select(0, (segment + k).flatten()).view(v.shape) for k in (0, 1))
    return start + (((end - start) * within + ((1 << bits) >> 1)) >> bits)


def _constants(values: Tensor, scale: float) -> Tensor:
    """Integers of a parameter, 16 bits."""
    divisor = values.new_full((), scale, dtype=torch.float32)
    return _in_16_bits(round_half_away(values.float() / divisor).long())


def _in_16_bits(x: Tensor) -> Tensor:
    return x.clamp(-_INT16, _INT16 - 1)


def look_up(
    x: Tensor, table: Tensor, mask_table: Tensor | None, scale: float, first: int
) -> tuple[Tensor, Tensor]:
    """Look integers of any shape up; see :func:`.definitions.look_up`."""
    return _entries(table, mask_table, _integers(x, scale) - first)


def look_up_pair(
    a: Tensor,
    b: Tensor,
    table: Tensor,
    mask_table: Tensor | None,
    scale_a: float,
    first_a: int,
    scale_b: float,
    first_b: int,
) -> tuple[Tensor, Tensor]:
    """Look pairs of integers up, shapes that broadcast; see :func:`.definitions.look_up_pair`."""
    index = 256 * (_integers(a, scale_a) - first_a) + (_integers(b, scale_b) - first_b)
    return _entries(table, mask_table, index)


def centered_integers(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Return bytes in the shape of ``x``; see :func:`.definitions.centered_integers`."""
    return (_integers(x, scale) + zero_point).to(torch.int8)


def _number(value: float, like: Tensor) -> Tensor:
    return like.new_full((), value, dtype=torch.float64)


def _high(x: Tensor, mantissas: Tensor) -> Tensor:
    """(x m + 2^30) >> 31 of numbers up to 2^47, whose product an int64 does not hold.

    m is u 2^16 + l, and x u is whole: 0x6000_4001 is 0x6000 * 2^16 plus 0x4001.
    """
    lower = (x * (mantissas & 0xFFFF) + 2**30) >> 16
    return (x * (mantissas >> 16) + lower) >> 15


def _clipped(rounded: Tensor, low: int, high: int, fused_relu: bool) -> tuple[Tensor, Tensor]:
    """Clip to the bounds, and tell what was clipped; a ReLU's backward knows what it clips."""
    clipped = rounded > high
    if not fused_relu:
        clipped = clipped | (rounded < low)
    return rounded.clamp(low, high), clipped


def _integers(x: Tensor, scale: float) -> Tensor:
    """Integers of real values; the quotient is whole but for rounding."""
    return (x / x.new_full((), scale, dtype=torch.float32)).round().long()


def _entries(table: Tensor, mask_table: Tensor | None, index: Tensor) -> tuple[Tensor, Tensor]:
    # No value leads out of the memory of a table, not even one that is not finite.
    position = index.clamp(0, len(table) - 1).flatten()
    values = table.index_select(0, position).view(index.shape)
    if mask_table is None:
        return values, table.new_empty(0, dtype=torch.bool)
    return values, mask_table.index_select(0, position).view(index.shape)
