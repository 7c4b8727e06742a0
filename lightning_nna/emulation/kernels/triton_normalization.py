"""Normalization of rows in Triton, one program a row, equal in every bit to :mod:`.reference`.

A row goes through the instructions once for each number that it has one of (mean, variance, second
variance) and once for the result: to compute its integers again costs less than to store them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_nna.emulation.kernels.triton_kernels import (
    _integers,
    _round_half_away,
    divided,
    lowest,
    rescaled,
)

_BLOCK = 2048


@triton.jit
def _in_16_bits(x):
    return tl.minimum(tl.maximum(x, -32768), 32767)


@triton.jit
def _rescaled_by(x, factor, ROUNDING: tl.constexpr):
    return rescaled(x, tl.full(x.shape, 0.0, tl.float64) + factor, 0, ROUNDING, False)


@triton.jit
def _mean(total, factor, mantissa, exponent, ROUNDING: tl.constexpr):
    """Return the mean of a row from its sum, int64 of shape (1,)."""
    if ROUNDING == 1:
        zeros = tl.full(total.shape, 0, tl.int64)
        exponents = zeros + exponent
        shifted = lowest(total << (tl.maximum(exponents, 0) & 31), 32)
        high = (shifted * (zeros + mantissa) + 0x40000000) >> 31
        result = lowest(divided(high, tl.maximum(-exponents, 0)), 32)
    else:
        result = _rescaled_by(total, factor, ROUNDING)
    return _in_16_bits(result)


@triton.jit
def _term(x, factor, ROUNDING: tl.constexpr):
    """Return an operand of a sum at the scale in which it is added."""
    return _rescaled_by(x << 15, factor, ROUNDING)


@triton.jit
def _inverse_root(v, table, entries, SEGMENT_BITS: tl.constexpr):
    if SEGMENT_BITS < 0:
        index = tl.minimum(tl.maximum(v, 0), entries - 1)
        result = tl.minimum(tl.load(table + index).to(tl.int64), 32767)
    else:
        offset = v + 32768
        start = tl.load(table + (offset >> SEGMENT_BITS))
        end = tl.load(table + (offset >> SEGMENT_BITS) + 1)
        within = offset & ((1 << SEGMENT_BITS) - 1)
        result = start + (((end - start) * within + ((1 << SEGMENT_BITS) >> 1)) >> SEGMENT_BITS)
    return result


@triton.jit
def _deviations(
    x,
    at,
    inside,
    scale,
    mean,
    own,
    last,
    CENTERED: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the integers of a part of a row, int64; ``mean`` has the scale of the sum."""
    q = _integers(x, at, inside, scale, BLOCK).to(tl.int64)
    if CENTERED:
        q = _in_16_bits(_rescaled_by(_term(q, own, ROUNDING) - mean, last, ROUNDING))
    return q


@triton.jit
def _scaled(q, inverse, factor, ROUNDING: tl.constexpr):
    return _in_16_bits(_rescaled_by(q * inverse, factor, ROUNDING))


@triton.jit
def _constants(values, at, inside, scale, BLOCK: tl.constexpr):
    """Return the integers of a parameter."""
    real = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    quotient = tl.div_rn(real, tl.full((BLOCK,), scale, tl.float32))
    return _in_16_bits(_round_half_away(quotient).to(tl.int64))


@triton.jit(
    do_not_specialize=[
        *("mean_m", "mean_e", "first_m", "first_e", "again_m", "again_e"),
        *("epsilon", "low", "high"),
    ]
)
def _normalize_rows_kernel(
    x,
    gain,
    shift,
    table,
    again_table,
    values,
    clipped,
    columns,
    entries,
    groups,
    channels,
    inner,
    scale: tl.float32,
    mean_factor: tl.float64,
    center_own: tl.float64,
    center_other: tl.float64,
    center_last: tl.float64,
    first_square: tl.float64,
    first_variance: tl.float64,
    first_product: tl.float64,
    epsilon_own: tl.float64,
    epsilon_other: tl.float64,
    epsilon_last: tl.float64,
    again_square: tl.float64,
    again_variance: tl.float64,
    again_product: tl.float64,
    gain_scale: tl.float32,
    gain_factor: tl.float64,
    shift_scale: tl.float32,
    shift_own: tl.float64,
    shift_other: tl.float64,
    shift_last: tl.float64,
    out_factor: tl.float64,
    out_scale: tl.float32,
    epsilon,
    mean_m,
    mean_e,
    first_m,
    first_e,
    again_m,
    again_e,
    low,
    high,
    ROUNDING: tl.constexpr,
    SEGMENT_BITS: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_EPSILON: tl.constexpr,
    AGAIN: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SAME_SCALE: tl.constexpr,
    FUSED_RELU: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = row * columns
    mean = tl.full((1,), 0, tl.int64)
    if CENTERED:
        sums = tl.full((BLOCK,), 0, tl.int64)
        for chunk in range(CHUNKS):
            at = chunk * BLOCK + tl.arange(0, BLOCK)
            sums += _integers(x, base + at, at < columns, scale, BLOCK).to(tl.int64)
        total = tl.full((1,), 0, tl.int64) + tl.sum(sums, 0)
        mean = _mean(total, mean_factor, mean_m, mean_e, ROUNDING)
        mean = _term(mean, center_other, ROUNDING)
    squares = tl.full((BLOCK,), 0, tl.int64)
    for chunk in range(CHUNKS):
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = at < columns
        q = _deviations(
            x, base + at, inside, scale, mean, center_own, center_last, CENTERED, ROUNDING, BLOCK
        )
        square = _in_16_bits(_rescaled_by(q * q, first_square, ROUNDING))
        squares += tl.where(inside, square, 0)
    total = tl.full((1,), 0, tl.int64) + tl.sum(squares, 0)
    v = _mean(total, first_variance, first_m, first_e, ROUNDING)
    if HAS_EPSILON:
        constant = tl.full((1,), 0, tl.int64) + epsilon
        raised = _term(v, epsilon_own, ROUNDING) + _term(constant, epsilon_other, ROUNDING)
        v = _in_16_bits(_rescaled_by(raised, epsilon_last, ROUNDING))
    first = _inverse_root(v, table, entries, SEGMENT_BITS)
    second = first
    if AGAIN:
        squares = tl.full((BLOCK,), 0, tl.int64)
        for chunk in range(CHUNKS):
            at = chunk * BLOCK + tl.arange(0, BLOCK)
            inside = at < columns
            q = _deviations(
                x,
                base + at,
                inside,
                scale,
                mean,
                center_own,
                center_last,
                CENTERED,
                ROUNDING,
                BLOCK,
            )
            q = _scaled(q, first, first_product, ROUNDING)
            square = _in_16_bits(_rescaled_by(q * q, again_square, ROUNDING))
            squares += tl.where(inside, square, 0)
        total = tl.full((1,), 0, tl.int64) + tl.sum(squares, 0)
        v = _mean(total, again_variance, again_m, again_e, ROUNDING)
        second = _inverse_root(v, again_table, entries, SEGMENT_BITS)
    for chunk in range(CHUNKS):
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = at < columns
        q = _deviations(
            x, base + at, inside, scale, mean, center_own, center_last, CENTERED, ROUNDING, BLOCK
        )
        q = _scaled(q, first, first_product, ROUNDING)
        if AGAIN:
            q = _scaled(q, second, again_product, ROUNDING)
        channel = (row % groups) * channels + at // inner
        if HAS_GAIN:
            factors = _constants(gain, channel, inside, gain_scale, BLOCK)
            q = _scaled(q, factors, gain_factor, ROUNDING)
        if HAS_SHIFT:
            constants = _constants(shift, channel, inside, shift_scale, BLOCK)
            terms = _term(q, shift_own, ROUNDING) + _term(constants, shift_other, ROUNDING)
            q = _in_16_bits(_rescaled_by(terms, shift_last, ROUNDING))
        if not SAME_SCALE:
            q = _rescaled_by(q, out_factor, ROUNDING)
        outside = q > high
        if not FUSED_RELU:
            outside = outside | (q < low)
        centered = tl.minimum(tl.maximum(q, low), high).to(tl.float32)
        tl.store(values + base + at, centered * out_scale, mask=inside)
        tl.store(clipped + base + at, outside, mask=inside)


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
    block: int = _BLOCK,
) -> tuple[Tensor, Tensor]:
    """Normalize rows, shape ``(rows, columns)``; see :func:`.definitions.normalize_rows`."""
    values = x.new_empty(x.shape, dtype=torch.float32)
    clipped = x.new_empty(x.shape, dtype=torch.bool)
    if not x.numel():
        return values, clipped
    rows, columns = x.shape
    block = min(block, triton.next_power_of_2(columns))
    entries = len(tables[0])
    segment_bits = -1 if tables[0].is_floating_point() else 17 - (entries - 1).bit_length()
    # What belongs to an absent instruction is not read.
    numbers = [
        *(of_center or [1.0] * 4),
        *of_normalize[:3],
        *(of_epsilon[1:] or [1.0] * 3),
        *(of_normalize[3:] or [1.0] * 3),
        *(of_gain or [1.0] * 2),
        *(of_shift or [1.0] * 4),
        *(of_output or [1.0]),
    ]
    means = [*([] if of_center else [1, 0]), *means, *([] if len(tables) > 1 else [1, 0])]
    with torch.cuda.device_of(x):
        _normalize_rows_kernel[(rows,)](
            x.contiguous(),
            x if gain is None else gain.contiguous(),
            x if shift is None else shift.contiguous(),
            tables[0],
            tables[-1],
            values,
            clipped,
            columns,
            entries,
            groups,
            channels,
            columns // channels,
            scale,
            *numbers,
            out_scale,
            int(of_epsilon[0]) if of_epsilon else 0,
            *means,
            low,
            high,
            ROUNDING=rounding,
            SEGMENT_BITS=segment_bits,
            CENTERED=bool(of_center),
            HAS_EPSILON=bool(of_epsilon),
            AGAIN=len(tables) > 1,
            HAS_GAIN=gain is not None,
            HAS_SHIFT=shift is not None,
            SAME_SCALE=not of_output,
            FUSED_RELU=fused_relu,
            CHUNKS=triton.cdiv(columns, block),
            BLOCK=block,
            enable_fp_fusion=False,
        )
    return values, clipped
