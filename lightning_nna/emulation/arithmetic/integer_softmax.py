r"""Softmax in 32-bit fixed point, as the 8-bit kernels of LiteRT compute it.

The difference to the row's largest input, at most 0, is brought to Q5.26 and its exponential to
Q0.31; the sum of a row is kept in Q12.19, and its reciprocal found by three Newton steps:

.. math:: e_i = \exp(\beta s (q_i - q_{max})), \qquad p_i = \frac{e_i}{\sum_j e_j}

An 8-bit difference has 256 values, so the exponential is a table for each scale; the sum and its
reciprocal are one number a row. Every function here is equal to the reference's in every bit.

Reference:
    The softmax kernel of the TensorFlow Lite reference operators and the fixed-point header of
    gemmlowp.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lightning_nna import elementary
from lightning_nna.emulation.arithmetic.fixed_point import (
    INT16_MAX,
    INT16_MIN,
    INT32_MAX,
    INT32_MIN,
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    rounding_divide_by_power_of_two,
)
from lightning_nna.emulation.arithmetic.interpolated_tables import (
    interpolate,
    interpolation_table,
    table_between,
)

#: Integer bits of a difference.
DIFFERENCE_BITS = 5
#: Integer bits of a sum.
SUM_BITS = 12

# exp(-2^k) in Q0.31 for k = -2 … 4.
_EXP_FACTORS = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)


@lru_cache(maxsize=256)
def exp_table(scale: float) -> Int[Tensor, "256"]:
    """Exponential of an 8-bit difference, 0 to -255, in Q0.31.

    Args:
        scale: Scale of the inputs, times beta.

    Returns:
        int64 table; entry ``d`` is exp(-scale d), 0 where the kernel leaves the difference out.

    Example:
        >>> (exp_table(0.5)[:3] / 2**31).round(decimals=4)
        tensor([1.0000, 0.6065, 0.3679])
    """
    differences = -torch.arange(256)
    multiplier, shift = difference_multiplier(scale)
    table = exp_on_negative(multiply_by_quantized_multiplier(differences, multiplier, shift))
    return table.masked_fill(differences < smallest_difference(shift), 0)


def difference_multiplier(scale: float) -> tuple[int, int]:
    """Multiplier and left shift that bring a difference of integers to Q5.26.

    Example:
        >>> difference_multiplier(2.0**-26)
        (1073741824, 1)
    """
    return quantize_multiplier(min(scale * 2.0 ** (31 - DIFFERENCE_BITS), 2.0**31 - 1))


def smallest_difference(shift: int, integer_bits: int = DIFFERENCE_BITS) -> int:
    """The smallest difference that still fits Q5.26 after a left shift.

    Args:
        shift: Left shift.
        integer_bits: Integer bits, of 31, if not 5.

    Example:
        >>> smallest_difference(20)
        -1984
    """
    radius = ((1 << integer_bits) - 1) * 2.0 ** (31 - integer_bits) / 2.0**shift
    return -math.floor(radius)


def reciprocal(
    sums: Int[Tensor, "*rows"],
) -> tuple[Int[Tensor, "*rows"], Int[Tensor, "*rows"]]:
    """One over sums of exponentials.

    Args:
        sums: Positive sums in Q12.19, int64.

    Returns:
        ``(r, n)`` with 1 / sum = r 2^-31 2^-n, int64; n can be negative.

    Example:
        >>> r, n = reciprocal(torch.tensor([3 << 19]))
        >>> (r / 2.0 ** (31 + n)).round(decimals=6)
        tensor([0.3333])
    """
    bits = torch.frexp(sums.double()).exponent.long()
    headroom = 32 - bits
    above_unit = SUM_BITS - headroom
    return one_over_one_plus((sums << headroom) - 2**31), above_unit


def softmax_int16(
    scores: Int[Tensor, "*rows n"], scale: float, *, single: bool = False, wraps: bool = False
) -> Int[Tensor, "*rows n"]:
    """Softmax of 16-bit scores along the last axis, in steps of 2^-15.

    The exponential on [-10, 0] and 1 / (1 + x) on [0, 1] are interpolated tables.

    Args:
        scores: Integers, zero point taken off or not: only differences count.
        scale: Scale of the scores, times beta.
        single: Whether the tables are made in single precision, as those of TFLite-Micro.
        wraps: Whether what leads beyond a table wraps around, as in TOSA: scores that are more than
            10 below the largest; otherwise it takes the table's end.

    Returns:
        int64 integers, 0 to 32767.

    Example:
        >>> softmax_int16(torch.tensor([[0, 0]]), 1e-3)
        tensor([[16384, 16384]])
    """
    into_table = _wrapped if wraps else _saturated
    exponential, inverse = _single_tables() if single else _wide_tables()
    multiplier, shift = quantize_multiplier(scale / (10.0 / 65535.0))
    differences = scores - scores.amax(-1, keepdim=True)
    scaled = multiply_by_quantized_multiplier(differences, multiplier, shift)
    exps = interpolate(exponential, into_table(scaled + INT16_MAX))
    sums = exps.sum(-1, keepdim=True)
    headroom = 32 - torch.frexp(sums.double()).exponent.long()
    shifted = ((sums << (headroom - 1)) + (1 << 13)) >> 14
    offset = into_table(shifted - (1 << 16) - (1 << 15))
    right = 31 - headroom
    half = torch.ones_like(right) << (right - 1)
    return ((exps * interpolate(inverse, offset) + half) >> right).clamp(0, INT16_MAX)


def _saturated(x: Tensor) -> Tensor:
    return x.clamp(INT16_MIN, INT16_MAX)


def _wrapped(x: Tensor) -> Tensor:
    return ((x - INT16_MIN) & (2**16 - 1)) + INT16_MIN


@lru_cache(maxsize=1)
def _wide_tables() -> tuple[Tensor, Tensor]:
    """Exp on [-10, 0] and 1 / (1 + x) on [0, 1]; both have steps of 2/65535."""
    steps = 2.0**16 - 1
    exponential = interpolation_table(
        lambda x, _: elementary.exp(torch.from_numpy(x)).numpy(),
        10 / steps,
        2 / steps,
        zero_point=INT16_MAX,
        precision=np.float64,
    )
    inverse = interpolation_table(
        lambda x, _: 1 / (1 + x), 1 / steps, 2 / steps, zero_point=INT16_MIN, precision=np.float64
    )
    return exponential, inverse


@lru_cache(maxsize=1)
def _single_tables() -> tuple[Tensor, Tensor]:
    """The same in single precision, with steps of 2^-15."""
    exponential = table_between(
        lambda x: elementary.exp(torch.from_numpy(x)).float().numpy(), -10.0, 0.0
    )
    return exponential, table_between(lambda x: 1 / (1 + x), 0.0, 1.0)


def exp_on_negative(
    x: Int[Tensor, "*shape"], integer_bits: int = DIFFERENCE_BITS
) -> Int[Tensor, "*shape"]:
    """Exponential of Q5.26 numbers that are at most 0, in Q0.31.

    Args:
        x: Integers, at most 0, int64.
        integer_bits: Integer bits, of 31, at most 5.

    Example:
        >>> round(int(exp_on_negative(torch.tensor(-(1 << 26)))) / 2**31, 6)
        0.367879
    """
    fraction_bits = 31 - integer_bits
    quarter = 1 << (fraction_bits - 2)
    near = (x & (quarter - 1)) - quarter
    result = _exp_near_zero(near << integer_bits)
    remainder = near - x
    for k, factor in zip(range(-2, integer_bits), _EXP_FACTORS, strict=False):
        bit = (remainder >> (fraction_bits + k)) & 1
        result = torch.where(bit > 0, high_multiply(result, factor), result)
    return result.masked_fill(x == 0, INT32_MAX)


def one_over_one_plus(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """1 / (1 + x) for x in [0, 1), both in Q0.31.

    Example:
        >>> one_over_one_plus(torch.tensor([0, 2**30])) / 2**31
        tensor([1.0000, 0.6667])
    """
    return (_reciprocal_of_half_sum(x) << 1).clamp(INT32_MIN, INT32_MAX)


def one_minus_over_one_plus(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """(1 - x) / (1 + x) for x in [0, 1), both in Q0.31.

    Example:
        >>> one_minus_over_one_plus(torch.tensor([0, 2**30])) / 2**31
        tensor([1.0000, 0.3333])
    """
    return ((_reciprocal_of_half_sum(x) - (1 << 29)) << 2).clamp(INT32_MIN, INT32_MAX)


def _reciprocal_of_half_sum(x: Tensor) -> Tensor:
    """1 / ((1 + x) / 2) in Q2.29 for x in Q0.31, three Newton steps."""
    half_denominator = torch.div(x + INT32_MAX + 1, 2, rounding_mode="trunc")
    estimate = 1515870810 + high_multiply(half_denominator, -1010580540)
    for _ in range(3):
        error = (1 << 29) - high_multiply(half_denominator, estimate)
        correction = high_multiply(estimate, error) << 2
        estimate = estimate + correction.clamp(INT32_MIN, INT32_MAX)
    return estimate


def to_sum(exponentials: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """From Q0.31 to the format of sums, Q12.19, rounded.

    Example:
        >>> to_sum(torch.tensor([2**31 - 1, 2**11]))
        tensor([524288,      1])
    """
    return rounding_divide_by_power_of_two(exponentials, SUM_BITS)


def high_multiply(a: Int[Tensor, "*shape"], b: Tensor | int) -> Int[Tensor, "*shape"]:
    """Rounded high half of twice a product of 32-bit integers.

    Example:
        >>> high_multiply(torch.tensor([2**30, -(2**30)]), 2**30)
        tensor([ 536870912, -536870912])
    """
    return (a * b + 2**30) >> 31


def _exp_near_zero(x: Tensor) -> Tensor:
    """exp(x) in Q0.31 for x in [-1/4, 0): a Taylor polynomial about -1/8."""
    center = x + (1 << 28)
    square = high_multiply(center, center)
    cube = high_multiply(square, center)
    fourth = high_multiply(square, square)
    inner = high_multiply(rounding_divide_by_power_of_two(fourth, 2) + cube, 715827883)
    tail = rounding_divide_by_power_of_two(inner + square, 1)
    constant = 1895147668
    return constant + high_multiply(center + tail, constant)
