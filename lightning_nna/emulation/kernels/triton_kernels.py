"""Fused kernels in Triton, equal in every bit to those of :mod:`.reference`.

Products are integers of 64 bits. Where the arithmetic has real numbers, every quotient and product
rounds as IEEE 754 has it: ``div_rn`` in float32, and no product is fused with a sum
(``enable_fp_fusion=False``). A number of Python that has to keep its 53 bits is annotated: Triton
passes others in float32.

The functions take contiguous tensors or make them so. Elements in a program are a parameter, since
the interpreter, which tests use, is slow at many programs and fast at large ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _round_half_away(x):
    # Below 2^23 or 2^52 the difference is exact; beyond there is none.
    size = tl.abs(x)
    below = tl.floor(size)
    rounded = below + tl.where(size - below >= 0.5, 1.0, 0.0).to(x.dtype)
    return tl.where(x < 0, -rounded, rounded)


@triton.jit
def _round_half_even_float64(x):
    # 1.5 * 2^52: the sum has no room for a fraction.
    return tl.where(
        tl.abs(x) < 2251799813685248.0, (x + 6755399441055744.0) - 6755399441055744.0, x
    )


@triton.jit
def _round_half_even_float32(x):
    # 1.5 * 2^23, for numbers below 2^22.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def lowest(x, BITS: tl.constexpr):
    """Return the lowest bits of int64, as an integer with a sign."""
    return (x << (64 - BITS)) >> (64 - BITS)


@triton.jit
def accumulated(x, BITS: tl.constexpr, SATURATES: tl.constexpr):
    """Saturate or wrap int64 to the width of an accumulator."""
    if SATURATES:
        largest = (tl.full(x.shape, 1, tl.int64) << (BITS - 1)) - 1
        x = tl.minimum(tl.maximum(x, -largest - 1), largest)
    else:
        x = lowest(x, BITS)
    return x


@triton.jit
def _multipliers(factors):
    """Return 31-bit mantissas and exponents of float64, from their bits."""
    bits = factors.to(tl.int64, bitcast=True)
    # 0.75 is 1.5 * 2^-1: an exponent of 1022 and the fraction 2^51; its mantissa is 0.75 * 2^31.
    exponents = ((bits >> 52) & 0x7FF) - 1022
    significands = (bits & 0xFFFFFFFFFFFFF) + 0x10000000000000
    fixed = (significands + 0x200000) >> 22
    carried = fixed >> 31
    fixed = fixed >> carried
    exponents = exponents + carried
    is_large = exponents >= -31
    return tl.where(is_large, fixed, 0), tl.where(is_large, exponents, 0)


@triton.jit
def divided(x, right):
    """Divide by powers of two, ties away from zero."""
    half = (tl.full(right.shape, 1, tl.int64) << right) >> 1
    below = ((x < 0) & (right > 0)).to(tl.int64)
    return (x + half - below) >> right


@triton.jit
def rescaled(x, factors, zero_point, ROUNDING: tl.constexpr, WIDE: tl.constexpr):
    """Return int64, less the zero point; see the reference."""
    if ROUNDING == 0 or ROUNDING == 4:
        real = _round_half_away(x.to(tl.float64) * factors)
        if ROUNDING == 0:
            outside = (real >= 2147483648.0) | (real < -2147483648.0)
            least = tl.where(outside, -2147483648.0, real).to(tl.int64)
            result = lowest(least + zero_point, 32) - zero_point
        else:
            result = tl.minimum(tl.maximum(real, -1099511627776.0), 1099511627776.0).to(tl.int64)
    else:
        mantissas, exponents = _multipliers(factors)
        ones = tl.full(exponents.shape, 1, tl.int64)
        if ROUNDING == 1:
            right = tl.maximum(-exponents, 0)
            if WIDE:
                left = tl.minimum(tl.maximum(exponents, 0), 40)
                bound = (ones << 47) >> left
                shifted = tl.minimum(tl.maximum(x, -bound), bound) << left
                lower = (shifted * (mantissas & 0xFFFF) + 0x40000000) >> 16
                result = divided((shifted * (mantissas >> 16) + lower) >> 15, right)
            else:
                shifted = lowest(x << (tl.maximum(exponents, 0) & 31), 32)
                high = divided((shifted * mantissas + 0x40000000) >> 31, right)
                result = lowest(high + zero_point, 32) - zero_point
        elif ROUNDING == 3:
            right = 31 - tl.minimum(exponents, 30)
            result = (x * mantissas + (ones << (right - 1))) >> right
        else:
            reduced = tl.minimum((mantissas + 0x8000) >> 16, 0x7FFF)
            right = 15 - exponents
            product = x * reduced + (ones << ((right - 1) & 63))
            result = lowest((product >> (right & 63)) + zero_point, 32) - zero_point
    return result


@triton.jit(do_not_specialize=["zero_point", "low", "high"])
def _requantize_kernel(
    sums,
    scales,
    bias,
    offset,
    values,
    clipped,
    numel,
    inner,
    channels,
    scale_before: tl.float64,
    scale_after: tl.float64,
    out_scale: tl.float32,
    zero_point,
    low,
    high,
    ROUNDING: tl.constexpr,
    ACCUMULATOR_BITS: tl.constexpr,
    SATURATES: tl.constexpr,
    BIAS_BITS: tl.constexpr,
    FUSED_RELU: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    x = tl.load(sums + at, mask=inside, other=0).to(tl.int64)
    channel = (at // inner) % channels
    if HAS_SCALES:
        scale = tl.load(scales + channel, mask=inside, other=1.0).to(tl.float64)
    else:
        scale = tl.full((BLOCK,), 1.0, tl.float64)
    before = scale * scale_before
    if HAS_OFFSET:
        x = x + tl.load(offset + channel, mask=inside, other=0).to(tl.int64)
    if HAS_BIAS:
        real = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float64)
        units = _round_half_even_float64(real / before)
        # A number among the arguments of minimum has float32: powers of two alone.
        units = tl.minimum(tl.maximum(units, -4611686018427387904.0), 4611686018427387904.0)
        limit = tl.full((BLOCK,), 1, tl.int64) << (BIAS_BITS - 1)
        x = x + tl.minimum(tl.maximum(units.to(tl.int64), -limit), limit - 1)
    x = accumulated(x, ACCUMULATOR_BITS, SATURATES)
    rounded = rescaled(x, before / scale_after, zero_point, ROUNDING, WIDE)
    outside = rounded > high
    if not FUSED_RELU:
        outside = outside | (rounded < low)
    centered = tl.minimum(tl.maximum(rounded, low), high).to(tl.float32)
    tl.store(values + at, centered * out_scale, mask=inside)
    tl.store(clipped + at, outside, mask=inside)


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
    block: int = _BLOCK,
) -> tuple[Tensor, Tensor]:
    """Requantize accumulators of any shape; see :func:`.definitions.requantize`."""
    values = sums.new_empty(sums.shape, dtype=torch.float32)
    clipped = sums.new_empty(sums.shape, dtype=torch.bool)
    if not (numel := sums.numel()):
        return values, clipped
    sums = sums.contiguous()
    vectors = [None if x is None else x.contiguous() for x in (scales, bias, offset)]
    with torch.cuda.device_of(sums):
        _requantize_kernel[(triton.cdiv(numel, block),)](
            sums,
            # An absent vector is not read.
            *(sums if x is None else x for x in vectors),
            values,
            clipped,
            numel,
            inner,
            next((len(x) for x in vectors if x is not None), 1),
            scale_before,
            scale_after,
            out_scale,
            zero_point,
            low,
            high,
            ROUNDING=rounding,
            ACCUMULATOR_BITS=accumulator_bits,
            SATURATES=saturates,
            BIAS_BITS=bias_bits,
            FUSED_RELU=fused_relu,
            WIDE=wide,
            HAS_SCALES=scales is not None,
            HAS_BIAS=bias is not None,
            HAS_OFFSET=offset is not None,
            BLOCK=block,
            enable_fp_fusion=False,
        )
    return values, clipped


@triton.jit(do_not_specialize=["low", "high"])
def _quantize_kernel(
    x,
    values,
    clipped,
    finite,
    numel,
    scale: tl.float32,
    low,
    high,
    FUSED_RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    real = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scaled = tl.div_rn(real, tl.full((BLOCK,), scale, tl.float32))
    is_finite = tl.abs(scaled) <= 3.4028234663852886e38
    rounded = _round_half_away(tl.where(is_finite, scaled, 0.0))
    outside = rounded > high
    if not FUSED_RELU:
        outside = outside | (rounded < low)
    # By way of integers, which have no negative zero.
    lowest, highest = low.to(tl.float32), high.to(tl.float32)
    centered = tl.minimum(tl.maximum(rounded, lowest), highest).to(tl.int32)
    tl.store(values + at, centered.to(tl.float32) * scale, mask=inside)
    tl.store(clipped + at, outside, mask=inside)
    tl.store(finite + tl.program_id(0), tl.min(is_finite.to(tl.int32), 0) != 0)


def quantize(
    x: Tensor, scale: float, low: int, high: int, fused_relu: bool, block: int = _BLOCK
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize real values of any shape; see :func:`.definitions.quantize`."""
    values = x.new_empty(x.shape, dtype=torch.float32)
    clipped = x.new_empty(x.shape, dtype=torch.bool)
    if not (numel := x.numel()):
        return values, clipped, x.new_ones(1, dtype=torch.bool)
    programs = triton.cdiv(numel, block)
    finite = x.new_empty(programs, dtype=torch.bool)
    with torch.cuda.device_of(x):
        _quantize_kernel[(programs,)](
            x.contiguous(),
            values,
            clipped,
            finite,
            numel,
            scale,
            low,
            high,
            FUSED_RELU=fused_relu,
            BLOCK=block,
            enable_fp_fusion=False,
        )
    return values, clipped, finite


@triton.jit
def _finite_weights(weight, base, size, start, BLOCK: tl.constexpr):
    at = start + tl.arange(0, BLOCK)
    loaded = tl.load(weight + base + at, mask=at < size, other=0.0).to(tl.float32)
    is_finite = tl.abs(loaded) <= 3.4028234663852886e38
    return tl.where(is_finite, loaded, 0.0), is_finite


@triton.jit
def _largest_kernel(weight, largest, size, BLOCK: tl.constexpr):
    """Find the largest absolute values of the parts of groups."""
    group = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * BLOCK
    values, _ = _finite_weights(weight, group * size, size, start, BLOCK)
    part = group * tl.num_programs(1) + tl.program_id(1)
    tl.store(largest + part, tl.max(tl.abs(values), 0))


def largest_of_groups(weight: Tensor, groups: int, block: int = _BLOCK) -> Tensor:
    """Return the largest finite absolute values, float32, shape ``(groups, parts)``."""
    size = weight.numel() // groups
    parts = triton.cdiv(size, block)
    largest = weight.new_empty((groups, parts), dtype=torch.float32)
    with torch.cuda.device_of(weight):
        _largest_kernel[(groups, parts)](weight.contiguous(), largest, size, BLOCK=block)
    return largest


@triton.jit
def _quantize_rows_kernel(
    weight,
    maxima,
    stored,
    scales,
    finite,
    size,
    row_size,
    rows_per_scale,
    parts,
    maximum: tl.float64,
    POWER_OF_TWO: tl.constexpr,
    HAS_MAXIMA: tl.constexpr,
    CHUNKS_OF_MAXIMA: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    base = group * size
    largest = tl.full((BLOCK,), 0.0, tl.float32)
    if HAS_MAXIMA:
        for chunk in range(CHUNKS_OF_MAXIMA):
            at = chunk * BLOCK + tl.arange(0, BLOCK)
            part = tl.load(maxima + group * parts + at, mask=at < parts, other=0.0)
            largest = tl.maximum(largest, part)
    else:
        for chunk in range(CHUNKS):
            values, _ = _finite_weights(weight, base, size, chunk * BLOCK, BLOCK)
            largest = tl.maximum(largest, tl.abs(values))
    magnitude = tl.max(largest, 0)
    first = tl.program_id(1).to(tl.int64) * (CHUNKS * BLOCK)
    magnitudes_64 = tl.full((BLOCK,), magnitude, tl.float64)
    bits = tl.maximum(magnitudes_64 / maximum, 8.673617379884035e-19).to(tl.int64, bitcast=True)
    if POWER_OF_TWO:
        # Rounded up: whatever the fraction has raises the exponent.
        bits = ((bits + 0xFFFFFFFFFFFFF) >> 52) << 52
    else:
        # The significand rounded to 16 bits, ties to even; a carry raises the exponent.
        bits = ((bits + 0xFFFFFFFFF + ((bits >> 37) & 1)) >> 37) << 37
    scale = bits.to(tl.float64, bitcast=True).to(tl.float32)
    all_finite = tl.full((), 1, tl.int32)
    for chunk in range(CHUNKS):
        start = first + chunk * BLOCK
        values, is_finite = _finite_weights(weight, base, size, start, BLOCK)
        at = start + tl.arange(0, BLOCK)
        integers = _round_half_even_float32(tl.div_rn(values, scale)).to(tl.int8)
        tl.store(stored + base + at, integers, mask=at < size)
        begins_row = (at < size) & (at % row_size == 0)
        tl.store(scales + group * rows_per_scale + at // row_size, scale, mask=begins_row)
        all_finite = tl.minimum(all_finite, tl.min(is_finite.to(tl.int32), 0))
    tl.store(finite + group * tl.num_programs(1) + tl.program_id(1), all_finite != 0)


def quantize_rows(
    weight: Tensor,
    largest: Tensor | None,
    rows_per_scale: int,
    maximum: int,
    power_of_two: bool,
    block: int = _BLOCK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight of shape ``(rows, ...)``; see :func:`.definitions.quantize_rows`."""
    stored = weight.new_empty(weight.shape, dtype=torch.int8)
    scales = weight.new_empty(weight.shape[0], dtype=torch.float32)
    weight = weight.contiguous()
    groups = weight.shape[0] // rows_per_scale
    size = weight.numel() // groups
    block = min(block, triton.next_power_of_2(size))
    programs = 1 if largest is None else triton.cdiv(size, block)
    finite = weight.new_empty((groups, programs), dtype=torch.bool)
    parts = 1 if largest is None else largest.shape[1]
    with torch.cuda.device_of(weight):
        _quantize_rows_kernel[(groups, programs)](
            weight,
            # An absent tensor is not read.
            scales if largest is None else largest,
            stored,
            scales,
            finite,
            size,
            size // rows_per_scale,
            rows_per_scale,
            parts,
            float(maximum),
            POWER_OF_TWO=power_of_two,
            HAS_MAXIMA=largest is not None,
            CHUNKS_OF_MAXIMA=triton.cdiv(parts, block),
            CHUNKS=triton.cdiv(size, block * programs),
            BLOCK=block,
            enable_fp_fusion=False,
        )
    return stored, scales, finite


@triton.jit
def _nearest(integers, present):
    """Return the nearest of the present integers, or 0, int32; the smaller of two as near."""
    every = tl.arange(0, 256) - 128
    best = tl.full(integers.shape, 4096, tl.int32)
    nearest = integers
    candidate = tl.full((), -129, tl.int32)
    # As many as may be present, and 0.
    for _ in range(33):
        # Beyond the last one: farther than any other.
        candidate = tl.min(tl.where((present > 0) & (every > candidate), every, 1024), 0)
        distance = 2 * tl.abs(integers - candidate) + (candidate > integers).to(tl.int32)
        nearest = tl.where(distance < best, candidate, nearest)
        best = tl.minimum(distance, best)
    return nearest


@triton.jit
def _raise_scales_kernel(
    stored,
    scales,
    bias,
    raised,
    raised_scales,
    finite,
    numel,
    rows,
    row_size,
    rows_per_scale,
    unit: tl.float64,
    POWER_OF_TWO: tl.constexpr,
    BIASES: tl.constexpr,
    CHUNKS_OF_GROUP: tl.constexpr,
    CHUNKS_OF_BIAS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    CHUNKS_OF_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS_OF_ROW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = (row // rows_per_scale) * rows_per_scale
    largest = tl.full((BIASES,), 0.0, tl.float64)
    for chunk in range(CHUNKS_OF_GROUP):
        at = chunk * BIASES + tl.arange(0, BIASES)
        real = tl.load(bias + first + at, mask=at < rows_per_scale, other=0.0).to(tl.float64)
        size = tl.abs(real)
        largest = tl.maximum(largest, tl.where(size <= 3.4028234663852886e38, size, 0.0))
    needed = tl.full((1,), tl.max(largest, 0), tl.float64) / unit
    own = tl.load(scales + row + tl.arange(0, 1))
    bits = needed.to(tl.int64, bitcast=True)
    # Rounded up to a power of two, or the significand to 16 bits; a carry raises the exponent.
    dropped: tl.constexpr = 52 if POWER_OF_TWO else 37
    bits = ((bits + ((1 << dropped) - 1)) >> dropped) << dropped
    is_raised = needed > own.to(tl.float64)
    upper = tl.where(is_raised, bits, 0x3FF0000000000000).to(tl.float64, bitcast=True)
    scale = tl.where(is_raised, upper.to(tl.float32), own)
    tl.store(raised_scales + row + tl.arange(0, 1), scale)
    ratio = own.to(tl.float64) / scale.to(tl.float64)
    base = row * row_size
    # The sum of one boolean is a number that a branch takes.
    if tl.sum(is_raised.to(tl.int32), 0) > 0:
        # Rare, so that every program that needs to know it finds out which integers there are.
        counts = tl.full((256,), 0, tl.int32)
        for chunk in range(CHUNKS_OF_WEIGHT):
            # Beyond the end the last one once more: that it is there is known.
            at = tl.minimum(chunk * WEIGHTS + tl.arange(0, WEIGHTS), numel - 1)
            counts += tl.histogram(tl.load(stored + at).to(tl.int32) + 128, 256)
        present = (counts > 0).to(tl.int32)
        few = tl.sum(present, 0) <= 32
        present = tl.where(tl.arange(0, 256) == 128, 1, present)
        for chunk in range(CHUNKS_OF_ROW):
            at = chunk * BLOCK + tl.arange(0, BLOCK)
            integers = tl.load(stored + base + at, mask=at < row_size, other=0).to(tl.float64)
            rounded = _round_half_even_float64(integers * ratio).to(tl.int32)
            if few:
                rounded = _nearest(rounded, present)
            tl.store(raised + base + at, rounded.to(tl.int8), mask=at < row_size)
    else:
        for chunk in range(CHUNKS_OF_ROW):
            at = chunk * BLOCK + tl.arange(0, BLOCK)
            integers = tl.load(stored + base + at, mask=at < row_size, other=0)
            tl.store(raised + base + at, integers, mask=at < row_size)
    if row == 0:
        all_finite = tl.full((), 1, tl.int32)
        for chunk in range(CHUNKS_OF_BIAS):
            at = chunk * BIASES + tl.arange(0, BIASES)
            real = tl.load(bias + at, mask=at < rows, other=0.0).to(tl.float64)
            is_finite = tl.abs(real) <= 3.4028234663852886e38
            all_finite = tl.minimum(all_finite, tl.min(is_finite.to(tl.int32), 0))
        tl.store(finite, all_finite != 0)


def raise_scales(
    stored: Tensor,
    scales: Tensor,
    bias: Tensor,
    unit: float,
    rows_per_scale: int,
    power_of_two: bool,
    block: int = _BLOCK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raise scales of a weight of shape ``(rows, ...)``; see :func:`.definitions.raise_scales`."""
    stored, rows = stored.contiguous(), stored.shape[0]
    raised, raised_scales = torch.empty_like(stored), torch.empty_like(scales)
    finite = stored.new_empty((), dtype=torch.bool)
    numel, row_size = stored.numel(), stored.numel() // rows
    biases = min(block, triton.next_power_of_2(rows))
    weights = min(block, triton.next_power_of_2(row_size))
    with torch.cuda.device_of(stored):
        _raise_scales_kernel[(rows,)](
            stored,
            scales.contiguous(),
            bias.contiguous(),
            raised,
            raised_scales,
            finite,
            numel,
            rows,
            row_size,
            rows_per_scale,
            unit,
            POWER_OF_TWO=power_of_two,
            BIASES=biases,
            CHUNKS_OF_GROUP=triton.cdiv(rows_per_scale, biases),
            CHUNKS_OF_BIAS=triton.cdiv(rows, biases),
            WEIGHTS=block,
            CHUNKS_OF_WEIGHT=triton.cdiv(numel, block),
            BLOCK=weights,
            CHUNKS_OF_ROW=triton.cdiv(row_size, weights),
            enable_fp_fusion=False,
        )
    return raised, raised_scales, finite


@triton.jit
def _integers(x, at, inside, scale, BLOCK: tl.constexpr):
    """Load real values and return their integers; the quotient is whole but for rounding."""
    real = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    return _round_half_even_float32(tl.div_rn(real, tl.full((BLOCK,), scale, tl.float32)))


@triton.jit(do_not_specialize=["first"])
def _look_up_kernel(
    x,
    table,
    mask_table,
    values,
    clipped,
    numel,
    entries,
    scale: tl.float32,
    first,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    index = _integers(x, at, inside, scale, BLOCK).to(tl.int64) - first
    index = tl.minimum(tl.maximum(index, 0), entries - 1)
    tl.store(values + at, tl.load(table + index, mask=inside, other=0.0), mask=inside)
    if HAS_MASK:
        tl.store(clipped + at, tl.load(mask_table + index, mask=inside, other=0), mask=inside)


def look_up(
    x: Tensor,
    table: Tensor,
    mask_table: Tensor | None,
    scale: float,
    first: int,
    block: int = _BLOCK,
) -> tuple[Tensor, Tensor]:
    """Look integers of any shape up; see :func:`.definitions.look_up`."""
    values, clipped = _results(table, mask_table, x.shape)
    if numel := x.numel():
        with torch.cuda.device_of(x):
            _look_up_kernel[(triton.cdiv(numel, block),)](
                x.contiguous(),
                table,
                table if mask_table is None else mask_table,
                values,
                clipped,
                numel,
                len(table),
                scale,
                first,
                HAS_MASK=mask_table is not None,
                BLOCK=block,
                enable_fp_fusion=False,
            )
    return values, clipped


@triton.jit(do_not_specialize=["first_a", "first_b"])
def _look_up_pair_kernel(
    a,
    b,
    table,
    mask_table,
    values,
    clipped,
    numel,
    entries,
    inner_a,
    size_a,
    inner_b,
    size_b,
    scale_a: tl.float32,
    first_a,
    scale_b: tl.float32,
    first_b,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    row = _integers(a, (at // inner_a) % size_a, inside, scale_a, BLOCK).to(tl.int64) - first_a
    column = _integers(b, (at // inner_b) % size_b, inside, scale_b, BLOCK).to(tl.int64) - first_b
    index = tl.minimum(tl.maximum(256 * row + column, 0), entries - 1)
    tl.store(values + at, tl.load(table + index, mask=inside, other=0.0), mask=inside)
    if HAS_MASK:
        tl.store(clipped + at, tl.load(mask_table + index, mask=inside, other=0), mask=inside)


def look_up_pair(
    a: Tensor,
    b: Tensor,
    table: Tensor,
    mask_table: Tensor | None,
    scale_a: float,
    first_a: int,
    scale_b: float,
    first_b: int,
    block: int = _BLOCK,
) -> tuple[Tensor, Tensor]:
    """Look pairs of integers up, shapes that broadcast; see :func:`.definitions.look_up_pair`."""
    shape = torch.broadcast_shapes(a.shape, b.shape)
    values, clipped = _results(table, mask_table, shape)
    if numel := values.numel():
        a, inner_a = _repeated(a, shape)
        b, inner_b = _repeated(b, shape)
        with torch.cuda.device_of(a):
            _look_up_pair_kernel[(triton.cdiv(numel, block),)](
                a,
                b,
                table,
                table if mask_table is None else mask_table,
                values,
                clipped,
                numel,
                len(table),
                inner_a,
                a.numel(),
                inner_b,
                b.numel(),
                scale_a,
                first_a,
                scale_b,
                first_b,
                HAS_MASK=mask_table is not None,
                BLOCK=block,
                enable_fp_fusion=False,
            )
    return values, clipped


def _results(table: Tensor, mask_table: Tensor | None, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Memory for values and for what was clipped of them."""
    mask_shape = (0,) if mask_table is None else shape
    return table.new_empty(shape), table.new_empty(mask_shape, dtype=torch.bool)


def _repeated(x: Tensor, shape: torch.Size) -> tuple[Tensor, int]:
    """A contiguous tensor, and the number of elements of the shape that each of its own has.

    Element i of the shape is element (i // number) % size of the tensor: of the shape (4, 5, 6), a
    tensor (5, 1) repeats each element 6 times, and all of them 4 times.
    """
    sizes = (1,) * (len(shape) - x.dim()) + tuple(x.shape)
    own = [axis for axis, size in enumerate(sizes) if size != 1]
    if not own:
        return x.contiguous(), 1
    first, last = own[0], own[-1] + 1
    if sizes[first:last] != tuple(shape[first:last]):
        # Its axes are not neighbors: a copy is rare, and short to say.
        return x.expand(shape).contiguous(), 1
    return x.contiguous(), shape[last:].numel()


@triton.jit(do_not_specialize=["zero_point"])
def _centered_integers_kernel(
    x, integers, numel, scale: tl.float32, zero_point, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    centered = _integers(x, at, inside, scale, BLOCK).to(tl.int32)
    tl.store(integers + at, (centered + zero_point).to(tl.int8), mask=inside)


def centered_integers(x: Tensor, scale: float, zero_point: int, block: int = _BLOCK) -> Tensor:
    """Return bytes in the shape of ``x``; see :func:`.definitions.centered_integers`."""
    integers = x.new_empty(x.shape, dtype=torch.int8)
    if numel := x.numel():
        with torch.cuda.device_of(x):
            _centered_integers_kernel[(triton.cdiv(numel, block),)](
                x.contiguous(),
                integers,
                numel,
                scale,
                zero_point,
                BLOCK=block,
                enable_fp_fusion=False,
            )
    return integers
