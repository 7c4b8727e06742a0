"""Kernels of single elements, compiled for processors; equal in every bit to :mod:`.reference`."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lightning_nna.emulation.kernels.compiled import (
    array,
    compiled,
    divided,
    inlined,
    lowest,
    lowest_32,
    mask_of,
    multiplied,
    over_rows,
    rounded_half_away,
    rounded_half_away_32,
)
from lightning_nna.emulation.kernels.reference import DOUBLE, REAL, SHIFT, SINGLE

# From so many elements on a channel is a loop of its own. Loops stand here once for each rounding,
# and store by themselves: one that calls a function that stores takes three to five times as long.
_LONG_ROW = 16
_NOTHING = np.zeros(0)
_LARGEST_FLOAT32 = np.float32(torch.finfo(torch.float32).max)


@compiled
def multipliers(factors, mantissas, exponents):
    """Write factors as mantissas and exponents; see :func:`.fixed_point.multipliers_of`."""
    for k in range(len(factors)):
        mantissa, exponent = math.frexp(factors[k])
        fixed = np.int64(np.floor(mantissa * 2147483648.0 + 0.5))
        if fixed >> 31:
            fixed, exponent = fixed >> 1, exponent + 1
        if exponent < -31:
            fixed, exponent = np.int64(0), 0
        mantissas[k], exponents[k] = fixed, exponent


@compiled
def _of_channels(channels, scales, bias, offset, scale_before, scale_after, bias_bits):
    """Return factors, mantissas, exponents and what is added to the sums of each channel."""
    factors, added = np.empty(channels, np.float64), np.zeros(channels, np.int64)
    limit = 2.0 ** (bias_bits - 1)
    for c in range(channels):
        before = scale_before
        if len(scales):
            before = np.float64(scales[c]) * scale_before
        factors[c] = before / scale_after
        if len(offset):
            added[c] += np.int64(offset[c])
        if len(bias):
            units = np.rint(np.float64(bias[c]) / before)
            added[c] += np.int64(min(max(units, -limit), limit - 1))
    mantissas, exponents = np.empty(channels, np.int64), np.empty(channels, np.int64)
    multipliers(factors, mantissas, exponents)
    return factors, mantissas, exponents, added


@inlined
def accumulated(x, bits, saturates):
    """Saturate or wrap a sum to the width of an accumulator."""
    limit = np.int64(1) << (bits - 1)
    return min(max(x, -limit), limit - 1) if saturates else lowest(x, bits)


@inlined
def _real(x, factor, zero_point):
    rounded = rounded_half_away(np.float64(x) * factor)
    is_held = (rounded < 2147483648.0) & (rounded >= -2147483648.0)
    return lowest_32(np.int64(np.int32(rounded if is_held else -2147483648.0)) + zero_point) - (
        zero_point
    )


@inlined
def _wide(x, mantissa, exponent):
    left = min(max(exponent, 0), 40)
    bound = np.int64(140737488355328) >> left
    shifted = min(max(x, -bound), bound) << left
    lower = (shifted * (mantissa & 0xFFFF) + 0x40000000) >> 16
    return divided((shifted * (mantissa >> 16) + lower) >> 15, max(-exponent, 0))


@inlined
def rescaled(x, factor, mantissa, exponent, rounding, zero_point, wide):
    """Rescale a whole number, int64, as kernels round; see :func:`.reference.rescaled`."""
    if rounding == REAL:
        return _real(x, factor, zero_point)
    if rounding == SHIFT:
        real = rounded_half_away(np.float64(x) * factor)
        return np.int64(min(max(real, -1099511627776.0), 1099511627776.0))
    if rounding == DOUBLE:
        if wide:
            return _wide(x, mantissa, exponent)
        result = multiplied(x, mantissa, max(exponent, 0) & 31, max(-exponent, 0))
        return lowest_32(result + zero_point) - zero_point
    if rounding == SINGLE:
        right = 31 - min(exponent, 30)
        return (x * mantissa + (np.int64(1) << (right - 1))) >> right
    reduced, right = min((mantissa + 32768) >> 16, 32767), 15 - exponent
    half = np.int64(1) << ((right - 1) & 63)
    return lowest_32(((x * reduced + half) >> (right & 63)) + zero_point) - zero_point


@compiled
def _requantize_columns(
    sums, factors, mantissas, exponents, added, rounding, bits, saturates, zero_point, low, high,
    fused_relu, wide, out_scale, values, mask, first, last,
):  # fmt: skip
    columns, count = sums.shape[1], 0
    scale = np.float32(out_scale)
    lowest_kept = np.int64(-(2**62)) if fused_relu else np.int64(low)
    if rounding == REAL:
        for r in range(first, last):
            for c in range(columns):
                x = accumulated(np.int64(sums[r, c]) + added[c], bits, saturates)
                y = _real(x, factors[c], zero_point)
                clipped = (y > high) | (y < lowest_kept)
                values[r, c] = np.float32(np.int32(min(max(y, low), high))) * scale
                mask[r, c] = clipped
                count += clipped
    elif rounding == DOUBLE and not wide:
        for r in range(first, last):
            for c in range(columns):
                x = accumulated(np.int64(sums[r, c]) + added[c], bits, saturates)
                left, right = max(exponents[c], 0) & 31, max(-exponents[c], 0)
                y = multiplied(x, mantissas[c], left, right)
                y = lowest_32(y + zero_point) - zero_point
                clipped = (y > high) | (y < lowest_kept)
                values[r, c] = np.float32(np.int32(min(max(y, low), high))) * scale
                mask[r, c] = clipped
                count += clipped
    else:
        for r in range(first, last):
            for c in range(columns):
                x = accumulated(np.int64(sums[r, c]) + added[c], bits, saturates)
                y = rescaled(x, factors[c], mantissas[c], exponents[c], rounding, zero_point, wide)
                clipped = (y > high) | (y < lowest_kept)
                values[r, c] = np.float32(np.int32(min(max(y, low), high))) * scale
                mask[r, c] = clipped
                count += clipped
    return count


@compiled
def _requantize_rows(
    sums, factors, mantissas, exponents, added, rounding, bits, saturates, zero_point, low, high,
    fused_relu, wide, out_scale, values, mask, first, last,
):  # fmt: skip
    columns, channels, count = sums.shape[1], len(factors), 0
    scale = np.float32(out_scale)
    lowest_kept = np.int64(-(2**62)) if fused_relu else np.int64(low)
    for r in range(first, last):
        c = r % channels
        factor, mantissa, exponent, more = factors[c], mantissas[c], exponents[c], added[c]
        if rounding == REAL:
            for i in range(columns):
                x = accumulated(np.int64(sums[r, i]) + more, bits, saturates)
                y = _real(x, factor, zero_point)
                clipped = (y > high) | (y < lowest_kept)
                values[r, i] = np.float32(np.int32(min(max(y, low), high))) * scale
                mask[r, i] = clipped
                count += clipped
        elif rounding == DOUBLE and not wide:
            left, right = max(exponent, 0) & 31, max(-exponent, 0)
            for i in range(columns):
                x = accumulated(np.int64(sums[r, i]) + more, bits, saturates)
                y = lowest_32(multiplied(x, mantissa, left, right) + zero_point) - zero_point
                clipped = (y > high) | (y < lowest_kept)
                values[r, i] = np.float32(np.int32(min(max(y, low), high))) * scale
                mask[r, i] = clipped
                count += clipped
        else:
            for i in range(columns):
                x = accumulated(np.int64(sums[r, i]) + more, bits, saturates)
                y = rescaled(x, factor, mantissa, exponent, rounding, zero_point, wide)
                clipped = (y > high) | (y < lowest_kept)
                values[r, i] = np.float32(np.int32(min(max(y, low), high))) * scale
                mask[r, i] = clipped
                count += clipped
    return count


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
) -> tuple[Tensor, Tensor | None]:
    """Requantize accumulators of any shape; see :func:`.definitions.requantize`."""
    vectors = [_NOTHING if x is None else array(x) for x in (scales, bias, offset)]
    channels = max(1, *(len(x) for x in vectors))
    of_channels = _of_channels(channels, *vectors, scale_before, scale_after, bias_bits)
    integers = array(sums)
    values, mask = np.empty(integers.shape, np.float32), np.empty(integers.shape, np.bool_)
    if channels == 1:
        inner = integers.size
    if inner >= _LONG_ROW:
        kernel, columns = _requantize_rows, inner
    else:
        kernel, columns = _requantize_columns, channels * inner
        if inner > 1:
            of_channels = tuple(x.repeat(inner) for x in of_channels)
    if not integers.size:
        return torch.from_numpy(values), None
    matrix = (-1, columns)
    clipped = over_rows(
        integers.size // columns,
        integers.size,
        kernel,
        integers.reshape(matrix),
        *of_channels,
        *(rounding, accumulator_bits, saturates, zero_point, low, high, fused_relu, wide),
        *(out_scale, values.reshape(matrix), mask.reshape(matrix)),
    )
    return torch.from_numpy(values), mask_of(mask, clipped)


@compiled
def _quantize(x, scale, low, high, fused_relu, values, mask, first, last):
    """Return the number of clipped elements, less 2^62 where one is not finite."""
    count, infinite = 0, 0
    bottom, top = np.float32(low), np.float32(high)
    lowest_kept = np.float32(-np.inf) if fused_relu else bottom
    for k in range(first, last):
        scaled = np.float32(x[k]) / scale
        is_finite = abs(scaled) <= _LARGEST_FLOAT32
        infinite += not is_finite
        rounded = rounded_half_away_32(scaled if is_finite else np.float32(0.0))
        clipped = (rounded > top) | (rounded < lowest_kept)
        # Rounded zeros have a sign, integers do not.
        values[k] = (min(max(rounded, bottom), top) + np.float32(0.0)) * scale
        mask[k] = clipped
        count += clipped
    return count - 2**62 if infinite else count


def quantize(
    x: Tensor, scale: float, low: int, high: int, fused_relu: bool
) -> tuple[Tensor, Tensor | None, bool]:
    """Quantize real values of any shape; see :func:`.definitions.quantize`."""
    # NumPy has no bfloat16.
    real = array(x if x.dtype in (torch.float32, torch.float64) else x.float())
    values, mask = np.empty(real.shape, np.float32), np.empty(real.shape, np.bool_)
    arrays = values.reshape(-1), mask.reshape(-1)
    settings = np.float32(scale), low, high, fused_relu
    count = over_rows(real.size, real.size, _quantize, real.reshape(-1), *settings, *arrays)
    is_finite = count >= 0
    return torch.from_numpy(values), mask_of(mask, count if is_finite else 1), is_finite


@compiled
def _centered_integers(x, scale, zero_point, values, first, last):
    for k in range(first, last):
        values[k] = np.int8(np.int32(np.rint(x[k] / scale)) + zero_point)
    return 0


def centered_integers(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Return bytes in the shape of ``x``; see :func:`.definitions.centered_integers`."""
    real = array(x.float())
    values = np.empty(real.shape, np.int8)
    arguments = real.reshape(-1), np.float32(scale), zero_point, values.reshape(-1)
    over_rows(real.size, real.size, _centered_integers, *arguments)
    return torch.from_numpy(values)
