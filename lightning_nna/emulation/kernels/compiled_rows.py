"""Kernels of whole rows, compiled for processors; equal in every bit to :mod:`.reference`.

The integers of a row stand in a buffer of a row's size, and go through one instruction after the
other there, in the processor's cache.
"""

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
    integers_of,
    lowest_32,
    mask_of,
    multiplied,
    over_rows,
    rounded_half_away_32,
)
from lightning_nna.emulation.kernels.compiled_elements import multipliers, rescaled
from lightning_nna.emulation.kernels.reference import DOUBLE, REAL, SINGLE

_NOTHING = np.zeros(0, np.float32)
# Factors of instructions that there are not.
_ABSENT = (1.0,) * 4
_INT16, _FAR = np.int64(2**15), np.int64(2**62)


@inlined
def _high_multiply(a, b):
    return (a * b + 0x40000000) >> 31


@inlined
def _in_32_bits(x):
    return min(max(x, -2147483648), 2147483647)


@compiled
def _reciprocal(total):
    """Return one over a sum and its exponent; see :func:`.integer_softmax.reciprocal`."""
    _, bits = math.frexp(np.float64(total))
    headroom = 32 - bits
    # PyTorch shifts to zero where a processor takes the lowest bits of the number.
    shifted = total << headroom if 0 <= headroom < 64 else 0
    half = shifted >> 1
    estimate = 1515870810 + _high_multiply(half, -1010580540)
    for _ in range(3):
        error = 536870912 - _high_multiply(half, estimate)
        estimate += _in_32_bits(_high_multiply(estimate, error) << 2)
    return _in_32_bits(estimate << 1), 12 - headroom


@inlined
def _probability(exponential, inverse, left, right):
    rounded = lowest_32(multiplied(exponential, inverse, left, right))
    return np.float32(np.int32(min(max(rounded, 0), 255))) * np.float32(0.00390625)


@compiled
def _softmax_rows(x, table, scale, values, first, last):
    columns, entries = x.shape[1], len(table)
    integers, terms = np.empty(columns, np.int64), np.empty(entries, np.int64)
    probabilities = np.empty(entries, np.float32)
    for d in range(entries):
        terms[d] = divided(table[d], 12)
    for r in range(first, last):
        integers_of(x[r], np.float32(scale), integers)
        largest = integers[0]
        for i in range(columns):
            largest = max(largest, integers[i])
        total, reach = np.int64(0), np.int64(0)
        for i in range(columns):
            difference = min(max(largest - integers[i], 0), entries - 1)
            integers[i] = difference
            reach = max(reach, difference)
        for i in range(columns):
            total += terms[integers[i]]
        inverse, above_unit = _reciprocal(total)
        # From 31 fractional bits to 8.
        exponent = -(above_unit + 23)
        left, right = max(exponent, 0) & 31, max(-exponent, 0)
        if reach < columns:  # Fewer differences than elements.
            for d in range(reach + 1):
                probabilities[d] = _probability(table[d], inverse, left, right)
            for i in range(columns):
                values[r, i] = probabilities[integers[i]]
        else:
            for i in range(columns):
                values[r, i] = _probability(table[integers[i]], inverse, left, right)
    return 0


def softmax_rows(x: Tensor, table: Tensor, scale: float) -> Tensor:
    """Compute the softmax of rows ``(rows, n)``; see :func:`.definitions.softmax_rows`."""
    real = array(x)
    values = np.empty(real.shape, np.float32)
    if values.size:
        rows = len(values)
        over_rows(rows, values.size, _softmax_rows, real, table.numpy(), scale, values)
    return torch.from_numpy(values)


@inlined
def _in_16_bits(x):
    return min(max(x, -32768), 32767)


@compiled
def _by(x, instruction, rounding):
    """Rescale an integer by a factor, of which there are mantissa and exponent."""
    factor, mantissa, exponent = instruction
    return rescaled(x, factor, mantissa, exponent, rounding, 0, False)


@compiled
def _rescale_row(q, instruction, rounding, limit):
    """Rescale the integers of a row, and limit the results to less than ``limit``."""
    factor, mantissa, exponent = instruction
    if rounding == DOUBLE:
        left, right = max(exponent, 0) & 31, max(-exponent, 0)
        for i in range(len(q)):
            y = lowest_32(multiplied(q[i], mantissa, left, right))
            q[i] = min(max(y, -limit), limit - 1)
    elif rounding == SINGLE:
        for i in range(len(q)):
            y = rescaled(q[i], factor, mantissa, exponent, SINGLE, 0, False)
            q[i] = min(max(y, -limit), limit - 1)
    elif rounding == REAL:
        for i in range(len(q)):
            y = rescaled(q[i], factor, mantissa, exponent, REAL, 0, False)
            q[i] = min(max(y, -limit), limit - 1)
    else:
        for i in range(len(q)):
            y = rescaled(q[i], factor, mantissa, exponent, rounding, 0, False)
            q[i] = min(max(y, -limit), limit - 1)


@compiled
def _multiply_row(q, numbers, is_scalar, product, rounding):
    """Multiply the integers of a row by numbers, one or one each, and rescale them."""
    if is_scalar:
        number = numbers[0]
        for i in range(len(q)):
            q[i] *= number
    else:
        for i in range(len(q)):
            q[i] *= numbers[i]
    _rescale_row(q, product, rounding, _INT16)


@compiled
def _add_to_row(q, terms, is_scalar, own, last, rounding):
    """Add terms, one or one each and rescaled, to the integers of a row; rescale the sums."""
    for i in range(len(q)):
        q[i] <<= 15
    _rescale_row(q, own, rounding, _FAR)
    if is_scalar:
        term = terms[0]
        for i in range(len(q)):
            q[i] += term
    else:
        for i in range(len(q)):
            q[i] += terms[i]
    _rescale_row(q, last, rounding, _INT16)


@compiled
def _sum_of(q):
    """Return the sum of integers."""
    total = np.int64(0)
    for i in range(len(q)):
        total += q[i]
    return total


@compiled
def _sum_of_squares(q, square, rounding, squares):
    """Return the sum of the squares of a row, each rescaled to 16 bits."""
    for i in range(len(q)):
        squares[i] = q[i] * q[i]
    _rescale_row(squares, square, rounding, _INT16)
    return _sum_of(squares)


@compiled
def _mean(total, factor, mean, rounding):
    """Return the mean of a row from its sum."""
    if rounding == DOUBLE:
        left, right = max(mean[1], 0) & 31, max(-mean[1], 0)
        return _in_16_bits(lowest_32(multiplied(total, mean[0], left, right)))
    return _in_16_bits(_by(total, factor, rounding))


@compiled
def _inverse_root(table, is_direct, v):
    """Return the inverse root of an integer of 16 bits."""
    if is_direct:
        entry = np.int64(table[min(max(v, 0), len(table) - 1)])
        return min(entry, 32767)
    # The table has the ends of a power of two of segments.
    _, bits = math.frexp(np.float64(len(table) - 1))
    bits = 17 - bits
    segment, within = (v + 32768) >> bits, (v + 32768) & ((1 << bits) - 1)
    start, end = np.int64(table[segment]), np.int64(table[segment + 1])
    return start + (((end - start) * within + ((1 << bits) >> 1)) >> bits)


@compiled
def _constants(values, scale):
    """Return the integers of a parameter, 16 bits."""
    integers = np.empty(len(values), np.int64)
    for i in range(len(values)):
        integers[i] = _in_16_bits(np.int64(rounded_half_away_32(values[i] / scale)))
    return integers


@compiled
def _clip_row(q, low, high, fused_relu, out_scale, values, mask):
    """Write the real values of a row and its mask; return the number of clipped elements."""
    count, scale = 0, np.float32(out_scale)
    smallest = np.int64(-(2**62)) if fused_relu else np.int64(low)
    for i in range(len(q)):
        clipped = (q[i] > high) | (q[i] < smallest)
        values[i] = np.float32(np.int32(min(max(q[i], low), high))) * scale
        mask[i] = clipped
        count += clipped
    return count


@compiled
def _normalize_rows(
    x, gain, shift, table, again_table, flags, factors, means, scales, epsilon, rounding,
    groups, channels, low, high, out_scale, fused_relu, values, mask, first, last,
):  # fmt: skip
    is_centered, has_epsilon, is_repeated, has_output, is_direct = flags
    scale, gain_scale, shift_scale = scales
    columns, count = x.shape[1], 0
    mantissas, exponents = np.empty(len(factors), np.int64), np.empty(len(factors), np.int64)
    multipliers(factors, mantissas, exponents)
    each = [(factors[k], mantissas[k], exponents[k]) for k in range(len(factors))]
    gains = _constants(gain, np.float32(gain_scale))
    terms = _constants(shift, np.float32(shift_scale))
    for i in range(len(terms)):
        terms[i] = _by(terms[i] << 15, each[15], rounding)
    constant = _by(epsilon << 15, each[8], rounding)
    q, squares = np.empty(columns, np.int64), np.empty(columns, np.int64)
    number = np.empty(1, np.int64)
    for r in range(first, last):
        integers_of(x[r], np.float32(scale), q)
        if is_centered:
            mean = _mean(_sum_of(q), each[0], means[:2], rounding)
            number[0] = -_by(mean << 15, each[2], rounding)
            _add_to_row(q, number, True, each[1], each[3], rounding)
        v = _mean(_sum_of_squares(q, each[4], rounding, squares), each[5], means[2:4], rounding)
        if has_epsilon:
            raised = _by(v << 15, each[7], rounding) + constant
            v = _in_16_bits(_by(raised, each[9], rounding))
        number[0] = _inverse_root(table, is_direct, v)
        _multiply_row(q, number, True, each[6], rounding)
        if is_repeated:
            total = _sum_of_squares(q, each[10], rounding, squares)
            v = _mean(total, each[11], means[4:6], rounding)
            number[0] = _inverse_root(again_table, is_direct, v)
            _multiply_row(q, number, True, each[12], rounding)
        # One number an element, or one for all elements of a channel.
        inner = columns // channels
        size, parts = (inner, channels) if inner > 1 else (columns, 1)
        for part in range(parts):
            own = q[part * size : (part + 1) * size]
            begin = (r % groups) * channels + part
            if len(gains):
                _multiply_row(own, gains[begin:], inner > 1, each[13], rounding)
            if len(terms):
                _add_to_row(own, terms[begin:], inner > 1, each[14], each[16], rounding)
        if has_output:
            _rescale_row(q, each[17], rounding, _FAR)
        count += _clip_row(q, low, high, fused_relu, out_scale, values[r], mask[r])
    return count


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
) -> tuple[Tensor, Tensor | None]:
    """Normalize rows, shape ``(rows, columns)``; see :func:`.definitions.normalize_rows`."""
    real = array(x)
    values, mask = np.empty(real.shape, np.float32), np.empty(real.shape, np.bool_)
    if not values.size:
        return torch.from_numpy(values), None
    # What belongs to an absent instruction is not read.
    factors = np.array(
        (
            *(of_center or _ABSENT[:4]),
            *of_normalize[:3],
            *(of_epsilon[1:] or _ABSENT[:3]),
            *(of_normalize[3:] or _ABSENT[:3]),
            *(of_gain[1:] or _ABSENT[:1]),
            *(of_shift[1:] or _ABSENT[:3]),
            *(of_output or _ABSENT[:1]),
        )
    )
    table = tables[0].numpy()
    flags = (
        *(bool(of_center), bool(of_epsilon), len(tables) > 1, bool(of_output)),
        table.dtype == np.float32,
    )
    scales = scale, of_gain[0] if of_gain else 1.0, of_shift[0] if of_shift else 1.0
    # Mantissa and exponent of the mean, if there is one, and of both variances.
    of_means = np.array((*(() if of_center else (1, 0)), *means, 1, 0)[:6])
    clipped = over_rows(
        *(len(values), values.size, _normalize_rows, real),
        *(_NOTHING if p is None else array(p.float()) for p in (gain, shift)),
        *(table, tables[1].numpy() if len(tables) > 1 else table, flags, factors, of_means, scales),
        *(int(of_epsilon[0]) if of_epsilon else 0, rounding, groups, channels),
        *(low, high, out_scale, fused_relu, values, mask),
    )
    return torch.from_numpy(values), mask_of(mask, clipped)
