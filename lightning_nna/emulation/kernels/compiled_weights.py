"""Kernels of weights and their scales, compiled for processors; equal to :mod:`.reference`."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lightning_nna.emulation.kernels.compiled import array, compiled, inlined, over_rows
from lightning_nna.emulation.kernels.reference import CENTROIDS, SMALLEST_SCALE

_NO_NUMBERS = np.zeros(0, np.float32)
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max
# Bits of the size of float32 from which on a number is not finite.
_INFINITY_BITS = np.int32(0x7F800000)
_SIZE_BITS = np.int32(0x7FFFFFFF)
# From so many elements on a channel is a loop of its own.
_LONG_ROW = 16
# From so many elements on a weight with one scale goes to several threads.
_LARGE = 2**17


@inlined
def _power_of_two(exponent):
    """Return a power of two; see :func:`.elementary.power_of_two`."""
    return math.ldexp(1.0, min(max(exponent, -1022), 1023))


@inlined
def _rounded_scale(scale, power_of_two):
    """Round a scale up to a power of two, or its significand to 16 bits."""
    mantissa, exponent = math.frexp(scale)
    if power_of_two:
        return _power_of_two(exponent - (1 if mantissa == 0.5 else 0))
    return np.rint(mantissa * 65536.0) * _power_of_two(exponent - 16)


@compiled
def _sizes_of_rows(weight, sizes, first, last):
    """Write the largest finite size in each row; return the number of rows with one not finite."""
    count = 0
    for r in range(first, last):
        # Sizes of numbers are in the order of their bits.
        row, largest, largest_finite = weight[r].view(np.int32), np.int32(0), np.int32(0)
        for i in range(len(row)):
            size = row[i] & _SIZE_BITS
            largest = max(largest, size)
            largest_finite = max(largest_finite, size if size < _INFINITY_BITS else np.int32(0))
        sizes.view(np.int32)[r] = largest_finite
        count += largest >= _INFINITY_BITS
    return count


def largest_of_groups(weight: Tensor, groups: int) -> Tensor:
    """Return the largest finite absolute values, float32, shape ``(groups, parts)``."""
    rows = array(weight.float()).reshape(groups, -1)
    sizes = np.empty(groups, np.float32)
    over_rows(groups, rows.size, _sizes_of_rows, rows, sizes)
    return torch.from_numpy(sizes.reshape(groups, 1))


@compiled
def _scales_of_sizes(sizes, maximum, power_of_two, scales):
    """Write the scales of groups of weights, given their largest sizes; repeat them by row."""
    rows = len(scales) // len(sizes)
    for g in range(len(sizes)):
        scale = max(np.float64(sizes[g]) / maximum, SMALLEST_SCALE)
        scales[g * rows : (g + 1) * rows] = np.float32(_rounded_scale(scale, power_of_two))


@compiled
def _integers_of_rows(weight, scales, stored, first, last):
    """Write the integers of rows, each with its scale."""
    infinity, zero = np.float32(np.inf), np.float32(0.0)
    for r in range(first, last):
        row, integers, scale = weight[r], stored[r], scales[r]
        for i in range(len(row)):
            real = row[i] if abs(row[i]) < infinity else zero
            integers[i] = np.int8(np.int32(np.rint(real / scale)))
    return 0


@compiled
def _quantize_groups(weight, sizes, maximum, power_of_two, stored, scales, first, last):
    """Quantize groups of weights, each with its scale, which is repeated by row."""
    rows = len(scales) // len(weight)
    count = _sizes_of_rows(weight, sizes, first, last)
    of_groups = scales[first * rows : last * rows]
    _scales_of_sizes(sizes[first:last], maximum, power_of_two, of_groups)
    _integers_of_rows(weight, scales[::rows], stored, first, last)
    return count


def quantize_rows(
    weight: Tensor, largest: Tensor | None, rows_per_scale: int, maximum: int, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight of shape ``(rows, ...)``; see :func:`.definitions.quantize_rows`."""
    real = array(weight.float())
    stored, scales = np.empty(real.shape, np.int8), np.empty(len(real), np.float32)
    groups = len(real) // rows_per_scale
    if largest is None and (groups > 1 or real.size < _LARGE):
        count = over_rows(
            *(groups, real.size, _quantize_groups, real.reshape(groups, -1)),
            *(np.empty(groups, np.float32), maximum, power_of_two),
            *(stored.reshape(groups, -1), scales),
        )
    else:  # Row by row, so that there is something to do for every thread.
        rows = real.reshape(len(real), -1)
        sizes = np.empty(len(rows), np.float32)
        count = over_rows(len(rows), rows.size, _sizes_of_rows, rows, sizes)
        of_groups = sizes.reshape(groups, -1) if largest is None else np.abs(array(largest))
        _scales_of_sizes(of_groups.max(1), maximum, power_of_two, scales)
        matrix = stored.reshape(rows.shape)
        over_rows(len(rows), rows.size, _integers_of_rows, rows, scales, matrix)
    return (
        torch.from_numpy(stored),
        torch.from_numpy(scales),
        torch.from_numpy(np.asarray(count == 0)),
    )


@compiled
def _raised_scales(scales, bias, unit, rows_per_scale, power_of_two, raised):
    """Write scales that hold a bias; return how many are raised, and of biases not finite."""
    count, others = 0, 0
    for begin in range(0, len(scales), rows_per_scale):
        needed = 0.0
        for r in range(begin, begin + rows_per_scale):
            size = abs(bias[r])
            if size <= _LARGEST_FLOAT32:
                needed = max(needed, size / unit)
            else:
                others += 1
        upper = np.float32(0.0)
        if needed > 0:
            mantissa, exponent = math.frexp(needed)
            if power_of_two:
                upper = np.float32(_rounded_scale(needed, True))
            else:  # float32 must not fall below what is needed.
                upper = np.float32(np.ceil(mantissa * 65536.0) * _power_of_two(exponent - 16))
        for r in range(begin, begin + rows_per_scale):
            is_raised = needed > scales[r]
            raised[r] = upper if is_raised else scales[r]
            count += is_raised
    return count, others


@compiled
def _nearest_integers(stored):
    """For each integer of 8 bits the nearest of a tensor's few, or 0; itself if they are many."""
    present = np.zeros(256, np.bool_)
    for i in range(len(stored)):
        present[np.int64(stored[i]) + 128] = True
    nearest = np.arange(-128, 128).astype(np.int8)
    if present.sum() > CENTROIDS:
        return nearest
    present[128] = True
    for k in range(256):
        smallest = 1024
        for other in range(256):
            # The smaller of two that are as near.
            if present[other] and abs(other - k) < smallest:
                smallest = abs(other - k)
                nearest[k] = np.int8(other - 128)
    return nearest


@compiled
def _raise_rows(stored, scales, raised, nearest, integers, first, last):
    """Write the integers of rows whose scales may be raised."""
    by_integer = np.empty(256, np.int8)
    for r in range(first, last):
        row, results = stored[r], integers[r]
        if raised[r] == scales[r]:
            results[:] = row
            continue
        ratio = np.float64(scales[r]) / np.float64(raised[r])
        if len(row) < 256:
            for i in range(len(row)):
                results[i] = nearest[np.int64(np.rint(row[i] * ratio)) + 128]
            continue
        for k in range(256):
            by_integer[k] = nearest[np.int64(np.rint((k - 128) * ratio)) + 128]
        for i in range(len(row)):
            results[i] = by_integer[np.int64(row[i]) + 128]
    return 0


def raise_scales(
    stored: Tensor,
    scales: Tensor,
    bias: Tensor,
    unit: float,
    rows_per_scale: int,
    power_of_two: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raise scales of a weight of shape ``(rows, ...)``; see :func:`.definitions.raise_scales`.

    Where none is too small, the integers and scales are the given tensors themselves.
    """
    before = array(scales)
    raised = np.empty(before.shape, np.float32)
    count, others = _raised_scales(
        before, array(bias.double()), unit, rows_per_scale, power_of_two, raised
    )
    is_finite = torch.from_numpy(np.asarray(others == 0))
    if not count:
        return stored, scales, is_finite
    integers = array(stored)
    results = np.empty(integers.shape, np.int8)
    matrix = len(integers), -1
    over_rows(
        *(len(integers), integers.size, _raise_rows, integers.reshape(matrix), before, raised),
        *(_nearest_integers(integers.reshape(-1)), results.reshape(matrix)),
    )
    return torch.from_numpy(results), torch.from_numpy(raised), is_finite


@compiled
def _fold_rows(
    stored, scales, layer_bias, mean, variance, weight, bias, eps,
    integers, folded, shift, inverse, first, last,
):  # fmt: skip
    eps, one = np.float32(eps), np.float32(1.0)
    for r in range(first, last):
        # A root in float64, rounded to float32, is that of float32.
        inverse[r] = one / np.float32(np.sqrt(np.float64(variance[r] + eps)))
        factor = inverse[r] * weight[r] if len(weight) else inverse[r]
        offset = layer_bias[r] - mean[r] if len(layer_bias) else -mean[r]
        moved = offset * factor
        shift[r] = bias[r] + moved if len(bias) else moved
        scale = _rounded_scale(np.float64(scales[r]) * abs(np.float64(factor)), False)
        sign = np.int8(factor > 0) - np.int8(factor < 0)
        if scale < SMALLEST_SCALE:
            scale, sign = SMALLEST_SCALE, 0
        folded[r] = np.float32(scale)
        row, results, sign = stored[r], integers[r], np.int32(sign)
        for i in range(len(row)):
            results[i] = np.int8(row[i] * sign)
    return 0


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
    integers = array(stored)
    results, rows = np.empty(integers.shape, np.int8), len(integers)
    vectors = (layer_bias, mean, variance, weight, bias)
    folded, shift, inverse = (np.empty(rows, np.float32) for _ in range(3))
    over_rows(
        *(rows, integers.size, _fold_rows, integers.reshape(rows, -1), array(scales)),
        *(_NO_NUMBERS if x is None else array(x) for x in vectors),
        *(eps, results.reshape(rows, -1), folded, shift, inverse),
    )
    return (
        *(torch.from_numpy(results), torch.from_numpy(folded)),
        *(torch.from_numpy(shift), torch.from_numpy(inverse)),
    )


@compiled
def _factors_and_biases(scales, bias, scale):
    """Return a factor and a bias for each channel; adding -0 changes no number."""
    factors, added = np.empty(len(scales), np.float32), np.empty(len(scales), np.float32)
    for c in range(len(scales)):
        factors[c] = np.float32(scale) * scales[c]
        added[c] = bias[c] if len(bias) else np.float32(-0.0)
    return factors, added


@compiled
def _dequantize_rows(sums, factors, added, values, first, last):
    for r in range(first, last):
        factor, more = factors[r % len(factors)], added[r % len(factors)]
        row, results = sums[r], values[r]
        for i in range(len(row)):
            results[i] = np.float32(row[i] * factor) + more
    return 0


@compiled
def _dequantize_columns(sums, factors, added, values, first, last):
    for r in range(first, last):
        row, results = sums[r], values[r]
        for i in range(len(row)):
            results[i] = np.float32(row[i] * factors[i]) + added[i]
    return 0


def dequantize(
    sums: Tensor, scales: Tensor, bias: Tensor | None, scale: float, inner: int
) -> Tensor:
    """Return real values of sums of any shape; see :func:`.definitions.dequantize`."""
    integers = array(sums)
    values = np.empty(integers.shape, np.float32)
    if not values.size:
        return torch.from_numpy(values)
    vectors = _factors_and_biases(
        array(scales), _NO_NUMBERS if bias is None else array(bias), scale
    )
    if inner >= _LONG_ROW:
        kernel, columns = _dequantize_rows, inner
    else:
        kernel, columns = _dequantize_columns, len(vectors[0]) * inner
        if inner > 1:
            vectors = tuple(x.repeat(inner) for x in vectors)
    rows = values.size // columns
    over_rows(
        *(rows, values.size, kernel, integers.reshape(rows, columns), *vectors),
        values.reshape(rows, columns),
    )
    return torch.from_numpy(values)
