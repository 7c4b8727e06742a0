"""Folded batch norms and softmax in Triton, equal in every bit to :mod:`.reference`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_nna.emulation.kernels.triton_kernels import _integers, divided, lowest

_BLOCK = 1024


@triton.jit
def _fold_batch_norm_kernel(
    stored,
    scales,
    layer_bias,
    mean,
    variance,
    weight,
    bias,
    folded,
    folded_scales,
    shift,
    inverse,
    row_size,
    eps: tl.float32,
    HAS_LAYER_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # Vectors of one element: scalars have other roundings in the interpreter.
    one = row + tl.arange(0, 1)
    # A root in float64, rounded to float32, is that of float32.
    root = tl.sqrt((tl.load(variance + one) + eps).to(tl.float64)).to(tl.float32)
    inverse_root = tl.div_rn(tl.full((1,), 1.0, tl.float32), root)
    tl.store(inverse + one, inverse_root)
    factor = inverse_root
    if HAS_WEIGHT:
        factor = factor * tl.load(weight + one)
    offset = -tl.load(mean + one)
    if HAS_LAYER_BIAS:
        offset = tl.load(layer_bias + one) + offset
    moved = offset * factor
    if HAS_BIAS:
        moved = tl.load(bias + one) + moved
    tl.store(shift + one, moved)
    real = tl.load(scales + one).to(tl.float64) * tl.abs(factor.to(tl.float64))
    bits = real.to(tl.int64, bitcast=True)
    # The significand rounded to 16 bits, ties to even; a carry raises the exponent.
    bits = ((bits + 0xFFFFFFFFF + ((bits >> 37) & 1)) >> 37) << 37
    scale = bits.to(tl.float64, bitcast=True)
    is_nothing = scale < 8.673617379884035e-19
    signs = tl.where(factor > 0, 1, 0) - tl.where(factor < 0, 1, 0)
    signs = tl.where(is_nothing, 0, signs)
    scale = tl.where(is_nothing, 8.673617379884035e-19, scale)
    tl.store(folded_scales + one, scale.to(tl.float32))
    for chunk in range(CHUNKS):
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        integers = tl.load(stored + row * row_size + at, mask=at < row_size, other=0)
        signed = (integers.to(tl.int32) * signs).to(tl.int8)
        tl.store(folded + row * row_size + at, signed, mask=at < row_size)


def fold_batch_norm(
    stored: Tensor,
    scales: Tensor,
    layer_bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    block: int = _BLOCK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fold a norm into a weight ``(channels, ...)``; see :func:`.definitions.fold_batch_norm`."""
    stored, rows = stored.contiguous(), stored.shape[0]
    folded, row_size = torch.empty_like(stored), stored.numel() // rows
    folded_scales, shift, inverse = (mean.new_empty(rows) for _ in range(3))
    block = min(block, triton.next_power_of_2(row_size))
    vectors = (layer_bias, mean, variance, weight, bias)
    with torch.cuda.device_of(stored):
        _fold_batch_norm_kernel[(rows,)](
            stored,
            scales.contiguous(),
            # An absent vector is not read.
            *(mean if x is None else x.contiguous() for x in vectors),
            folded,
            folded_scales,
            shift,
            inverse,
            row_size,
            eps,
            HAS_LAYER_BIAS=layer_bias is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            CHUNKS=triton.cdiv(row_size, block),
            BLOCK=block,
            enable_fp_fusion=False,
        )
    return folded, folded_scales, shift, inverse


@triton.jit
def _high_multiply(a, b):
    return (a * b + 0x40000000) >> 31


@triton.jit
def _reciprocal(sums):
    """Return one over positive sums in Q12.19, and the bits above the unit; int64 both."""
    bits = ((sums.to(tl.float64).to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1022
    headroom = 32 - bits
    # Between 1/2 and 1.
    half = (((sums << headroom) - 0x80000000) + 0x80000000) >> 1
    zeros = tl.full(sums.shape, 0, tl.int64)
    estimate = 1515870810 + _high_multiply(half, zeros - 1010580540)
    for _ in range(3):
        error = (1 << 29) - _high_multiply(half, estimate)
        correction = _high_multiply(estimate, error) << 2
        estimate += tl.minimum(tl.maximum(correction, -0x80000000), 0x7FFFFFFF)
    return tl.minimum(tl.maximum(estimate << 1, -0x80000000), 0x7FFFFFFF), 12 - headroom


@triton.jit
def _exponentials(x, table, base, at, columns, largest, scale, BLOCK: tl.constexpr):
    inside = at < columns
    q = _integers(x, base + at, inside, scale, BLOCK).to(tl.int32)
    difference = tl.minimum(tl.maximum(largest - q, 0), 255)
    return tl.load(table + difference, mask=inside, other=0)


@triton.jit
def _softmax_rows_kernel(
    x,
    table,
    values,
    columns,
    scale: tl.float32,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * columns
    largest = tl.full((BLOCK,), -0x80000000, tl.int32)
    for chunk in range(CHUNKS):
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        q = _integers(x, base + at, at < columns, scale, BLOCK).to(tl.int32)
        largest = tl.maximum(largest, tl.where(at < columns, q, -0x80000000))
    maximum = tl.max(largest, 0)
    sums = tl.full((BLOCK,), 0, tl.int64)
    for chunk in range(CHUNKS):
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        exponentials = _exponentials(x, table, base, at, columns, maximum, scale, BLOCK)
        sums += tl.where(at < columns, (exponentials + 0x800) >> 12, 0)
    total = tl.full((1,), 0, tl.int64) + tl.sum(sums, 0)
    inverse, above_unit = _reciprocal(total)
    # From 31 fractional bits to 8.
    exponent = -(above_unit + 23)
    left, right = tl.maximum(exponent, 0) & 31, tl.maximum(-exponent, 0)
    for chunk in range(CHUNKS):
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        exponentials = _exponentials(x, table, base, at, columns, maximum, scale, BLOCK)
        high = (lowest(exponentials << left, 32) * inverse + 0x40000000) >> 31
        rounded = lowest(divided(high, right), 32)
        probabilities = tl.minimum(tl.maximum(rounded, 0), 255).to(tl.float32) * 0.00390625
        tl.store(values + base + at, probabilities, mask=at < columns)


def softmax_rows(x: Tensor, table: Tensor, scale: float, block: int = _BLOCK) -> Tensor:
    """Compute the softmax of rows ``(rows, n)``; see :func:`.definitions.softmax_rows`."""
    values = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        rows, columns = x.shape
        block = min(block, triton.next_power_of_2(columns))
        with torch.cuda.device_of(x):
            _softmax_rows_kernel[(rows,)](
                x.contiguous(),
                table,
                values,
                columns,
                scale,
                CHUNKS=triton.cdiv(columns, block),
                BLOCK=block,
                enable_fp_fusion=False,
            )
    return values


@triton.jit
def _whole_numbers_kernel(x, values, numel, scale: tl.float32, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    integers = _integers(x, at, inside, scale, BLOCK)
    # By way of an integer, which has no negative zero.
    tl.store(values + at, integers.to(tl.int32).to(tl.float32), mask=inside)


def whole_numbers(x: Tensor, scale: float, block: int = _BLOCK) -> Tensor:
    """Return integers in the shape of ``x``; see :func:`.definitions.whole_numbers`."""
    values = x.new_empty(x.shape, dtype=torch.float32)
    if numel := x.numel():
        with torch.cuda.device_of(x):
            _whole_numbers_kernel[(triton.cdiv(numel, block),)](
                x.contiguous(), values, numel, scale, BLOCK=block, enable_fp_fusion=False
            )
    return values


@triton.jit
def _dequantize_kernel(
    sums,
    scales,
    bias,
    values,
    numel,
    inner,
    channels,
    scale: tl.float32,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    channel = (at // inner) % channels
    x = tl.load(sums + at, mask=inside, other=0.0)
    factors = tl.load(scales + channel, mask=inside, other=1.0) * scale
    # In the type of the sums, then rounded to float32.
    real = (x * factors.to(x.dtype)).to(tl.float32)
    if HAS_BIAS:
        real = real + tl.load(bias + channel, mask=inside, other=0.0)
    tl.store(values + at, real, mask=inside)


def dequantize(
    sums: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    scale: float,
    inner: int,
    block: int = _BLOCK,
) -> Tensor:
    """Return real values of sums of any shape; see :func:`.definitions.dequantize`."""
    values = sums.new_empty(sums.shape, dtype=torch.float32)
    if numel := sums.numel():
        with torch.cuda.device_of(sums):
            _dequantize_kernel[(triton.cdiv(numel, block),)](
                sums.contiguous(),
                scales.contiguous(),
                # An absent vector is not read.
                scales if bias is None else bias.contiguous(),
                values,
                numel,
                inner,
                len(scales),
                scale,
                HAS_BIAS=bias is not None,
                BLOCK=block,
                enable_fp_fusion=False,
            )
    return values
