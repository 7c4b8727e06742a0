r"""Fixed-point arithmetic of integer inference engines, exact on ordinary tensors.

A neural network accelerator has no floating point: a real factor :math:`d` is carried as a 31-bit
mantissa and a power of two,

.. math:: d \approx m \cdot 2^{e - 31}, \qquad 2^{30} \le m < 2^{31},

and a product with it is rounded twice: once after the high half of the multiplication and once
after the shift. Sigmoid and tanh of the 16-bit LSTM are polynomial and Newton approximations in
the same arithmetic. Every function here works on integer tensors and restates, bit for bit, what
the reference kernels of LiteRT and gemmlowp compute.

Reference:
    Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-
    only inference", CVPR 2018, arXiv 1712.05877; the fixed-point header of gemmlowp.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_nna.elementary import power_of_two
from lightning_nna.emulation.arithmetic.deferred_checks import DEFERRED
from lightning_nna.emulation.arithmetic.on_host import on_host

INT16_MIN, INT16_MAX = -(2**15), 2**15 - 1
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def quantize_multiplier(factor: float) -> tuple[int, int]:
    r"""Write a positive factor as a 31-bit mantissa and a shift.

    .. math:: d \approx m \cdot 2^{e-31}

    Args:
        factor: :math:`d \ge 0`, dimensionless.

    Returns:
        ``(m, e)``: the mantissa in :math:`[2^{30}, 2^{31})`, or 0, and the exponent.

    Raises:
        ValueError: If ``factor`` is negative or not finite.

    Example:
        >>> quantize_multiplier(0.75)
        (1610612736, 0)
    """
    if not math.isfinite(factor) or factor < 0:
        raise ValueError(f"a rescaling factor must be finite and at least 0, got {factor}")
    mantissa, exponent = math.frexp(factor)
    fixed = math.floor(mantissa * 2**31 + 0.5)
    if fixed == 2**31:
        fixed, exponent = fixed // 2, exponent + 1
    if exponent < -31:
        return 0, 0
    return fixed, exponent


def quantize_multipliers(
    factors: Float[Tensor, "*shape"],
) -> tuple[Int[Tensor, "*shape"], Int[Tensor, "*shape"]]:
    """Apply :func:`quantize_multiplier` to every entry of a small float64 tensor.

    Args:
        factors: Non-negative factors, float64.

    Returns:
        Two int64 tensors of the same shape: mantissas and exponents.

    Raises:
        ValueError: If an entry is negative or not finite.

    Example:
        >>> quantize_multipliers(torch.tensor([0.75, 1.0], dtype=torch.float64))
        (tensor([1610612736, 1073741824]), tensor([0, 1]))
    """
    if not on_host(factors):
        is_valid = (torch.isfinite(factors) & (factors >= 0)).all()
        DEFERRED.require(is_valid, ValueError("rescaling factors must be finite and at least 0"))
        return multipliers_of(factors)
    exact = factors.detach().numpy()
    if exact.size and not (exact.min() >= 0 and exact.max() < math.inf):
        raise ValueError(f"rescaling factors must be finite and at least 0, got {factors}")
    mantissas, exponents = np.frexp(exact)
    fixed = np.floor(mantissas * 2.0**31 + 0.5)
    carried = fixed == 2.0**31
    exponents = exponents.astype(np.int64) + carried
    representable = exponents >= -31
    fixed = (fixed * np.where(carried, 0.5, 1.0) * representable).astype(np.int64)
    return torch.from_numpy(np.asarray(fixed)), torch.from_numpy(
        np.asarray(exponents * representable)
    )


def multipliers_of(
    factors: Float[Tensor, "*shape"],
) -> tuple[Int[Tensor, "*shape"], Int[Tensor, "*shape"]]:
    """Do what :func:`quantize_multipliers` does in functions of PyTorch, without a check.

    Args:
        factors: Factors that are finite and at least 0, float64.

    Returns:
        Two int64 tensors of the same shape: mantissas and exponents.
    """
    mantissas, exponents = torch.frexp(factors)
    fixed = (mantissas * 2**31 + 0.5).floor().long()
    # A mantissa that rounds up to 1 is one half of the next power of two.
    carried = fixed >> 31
    fixed, exponents = fixed >> carried, exponents.long() + carried
    vanishes = exponents < -31
    return fixed.masked_fill(vanishes, 0), exponents.masked_fill(vanishes, 0)


def rounding_divide_by_power_of_two(
    x: Int[Tensor, "*shape"], exponent: int | Int[Tensor, "..."]
) -> Int[Tensor, "*shape"]:
    r"""Divide by :math:`2^e` and round to nearest, ties away from zero.

    Args:
        x: Integers of 32 bits or less, or int64 with values that fit 32 bits.
        exponent: :math:`e \ge 0`, one number or one that broadcasts with ``x``.

    Returns:
        Integers of the dtype of ``x``.

    Example:
        >>> rounding_divide_by_power_of_two(torch.tensor([5, 6, -6, -5]), 2)
        tensor([ 1,  2, -2, -1])
    """
    if not isinstance(exponent, Tensor):
        # The sign bit, spread over all bits, is -1: a negative tie must round down.
        half = (1 << exponent) >> 1
        return ((x >> 31).add_(x).add_(half) if half else x) >> exponent
    halves = (torch.ones_like(exponent) << exponent) >> 1
    # With e = 0 there is no tie, and nothing may be taken away.
    below = (x < 0).to(x.dtype) * (halves > 0).to(x.dtype)
    return (x + halves - below) >> exponent


def multiply_by_quantized_multiplier(
    x: Int[Tensor, "*shape"],
    multiplier: int | Int[Tensor, "..."],
    shift: int | Int[Tensor, "..."],
    zero_point: int | None = None,
) -> Int[Tensor, "*shape"]:
    r"""Multiply integers by :math:`m \cdot 2^{e-31}` with the two roundings of the reference.

    A positive shift is applied to ``x`` first; then the high half of twice the product is rounded
    (ties up); then a negative shift divides and rounds (ties away from zero).

    Args:
        x: Accumulators of 32 bits, as int64; the left shift wraps around where it leaves them.
        multiplier: Mantissa from :func:`quantize_multiplier`; a tensor broadcasts (per channel).
        shift: Exponent from :func:`quantize_multiplier`.
        zero_point: Zero point that the kernel adds to the result, which wraps around, and that is
            taken off again; None if nothing is added.

    Returns:
        int64 integers of the shape of ``x``.

    Example:
        >>> m, e = quantize_multiplier(0.0625)
        >>> multiply_by_quantized_multiplier(torch.tensor([8, 24, -8]), m, e)
        tensor([ 1,  2, -1])
    """
    if isinstance(shift, Tensor):
        # A processor shifts by the lowest five bits of what it is told.
        left, right = shift.clamp_min(0) % 32, (-shift).clamp_min(0)
        high = (wrapped_int32(x << left) * multiplier + 2**30) >> 31
        result = rounding_divide_by_power_of_two(high, right)
    else:
        shifted = wrapped_int32(x << shift) if shift > 0 else x
        high = (shifted * multiplier + 2**30) >> 31
        result = rounding_divide_by_power_of_two(high, max(-shift, 0))
    if zero_point is None:
        return result
    return wrapped_int32(result.add_(zero_point)).sub_(zero_point)


def wrapped_int32(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Wrap int64 values around, as integers of 32 bits do.

    Example:
        >>> wrapped_int32(torch.tensor([2**31, -5]))
        tensor([-2147483648,          -5])
    """
    return ((x + 2**31) & (2**32 - 1)) - 2**31


def multiply_in_float(
    x: Float[Tensor, "*shape"],
    multiplier: int | Int[Tensor, "..."],
    shift: int | Int[Tensor, "..."],
) -> Float[Tensor, "*shape"]:
    r"""Do what :func:`multiply_by_quantized_multiplier` does, in the float dtype of ``x``.

    Both roundings are kept: with few bits to shift, the second meets a tie that the first has
    made in every :math:`2^{-e}`-th case, and rounding once would miss half of these. The factor of
    the second is raised by :math:`2^{-22}`, which turns ties away from zero. float32 differs from
    the integers only within its rounding error of a tie of the first.

    Args:
        x: Accumulators; overwritten.
        multiplier: Mantissa from :func:`quantize_multiplier`; a tensor broadcasts (per channel).
        shift: Exponent from :func:`quantize_multiplier`.

    Returns:
        ``x``, now rescaled whole numbers.

    Example:
        >>> m, e = quantize_multiplier(0.0625)
        >>> multiply_in_float(torch.tensor([8.0, 24.0, -8.0]), m, e)
        tensor([ 1.,  2., -1.])
    """
    first, second = float_factors(multiplier, shift)
    return x.mul_(first.to(x.device)).round_().mul_(second.to(x.device)).round_()


def float_factors(
    multiplier: int | Int[Tensor, "..."], shift: int | Int[Tensor, "..."]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Two float32 factors of :func:`multiply_in_float`: before the first rounding, and after it.

    Example:
        >>> float_factors(2**30, -3)
        (tensor(0.5000), tensor(0.1250))
    """
    mantissa = torch.as_tensor(multiplier, dtype=torch.float64) * 2.0**-31
    exponent = torch.as_tensor(shift)
    first = mantissa * power_of_two(exponent.clamp_min(0))
    second = power_of_two(exponent.clamp_max(0)) * (1 + 2.0**-22)
    return first.float(), second.float()


def round_half_away(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round to the nearest integer, ties away from zero, as C's ``round`` does.

    Args:
        x: Any floating tensor.

    Returns:
        Integers in the dtype of ``x``.

    Example:
        >>> round_half_away(torch.tensor([0.5, 1.5, -2.5, 0.49999997]))
        tensor([ 1.,  2., -3.,  0.])
    """
    integral = x.trunc()
    # x - trunc(x) is exact, so the comparison sees true ties only; adding 0.5 first would not.
    return integral + ((x - integral).abs() >= 0.5).to(x.dtype) * x.sign()


@lru_cache(maxsize=16)
def lstm_sigmoid_table() -> Int[Tensor, "65536"]:
    """Sigmoid of the 16-bit LSTM for every input: Q3.12 in, Q0.15 out.

    Returns:
        int32 table; entry ``x + 32768`` is the output for input ``x``.

    Example:
        >>> lstm_sigmoid_table()[[0, 32768, 65535]]
        tensor([   11, 16384, 32756], dtype=torch.int32)
    """
    x = torch.arange(INT16_MIN, INT16_MAX + 1, dtype=torch.int64)
    magnitude = x.abs().clamp_max(INT16_MAX)
    positive = _one_over_one_plus(_exp_of_negative(-magnitude, integer_bits=3))
    table = torch.where(x > 0, positive, INT16_MAX - positive)
    return torch.where(x == 0, torch.tensor(2**14), table).to(torch.int32)


@lru_cache(maxsize=16)
def lstm_tanh_table(integer_bits: int) -> Int[Tensor, "65536"]:
    r"""Tanh of the 16-bit LSTM for every input, Q0.15 out.

    Args:
        integer_bits: Integer bits :math:`k` of the input format :math:`Qk.(15-k)`, 0 to 6: 3 for
            the cell gate, 15 plus the exponent of the cell's scale for the cell state.

    Returns:
        int32 table; entry ``x + 32768`` is the output for input ``x``.

    Raises:
        ValueError: If ``integer_bits`` is not in 0 to 6.

    Example:
        >>> lstm_tanh_table(3)[[0, 32768, 36864]]  # -8, 0 and 1
        tensor([-32767,      0,  24964], dtype=torch.int32)
    """
    if not 0 <= integer_bits <= 6:
        raise ValueError(f"integer_bits must be 0 to 6 (a 16-bit format), got {integer_bits}")
    x = torch.arange(INT16_MIN, INT16_MAX + 1, dtype=torch.int64)
    negative = -x.abs()
    # Doubling the argument is a change of format: the same bits with one more integer bit.
    minus_tanh = _one_minus_over_one_plus(_exp_of_negative(negative, integer_bits + 1))
    table = torch.where(x < 0, -minus_tanh, minus_tanh)
    return torch.where(x == 0, torch.zeros_like(x), table).to(torch.int32)


def _high_multiply(a: Tensor, b: Tensor | int) -> Tensor:
    """Rounded high half of twice a 16-bit product, saturated: Q0.15 times any format."""
    product = a * b
    # Truncating division, as the reference does: ties of negative products go toward zero.
    return ((product + 2**14) >> 15).clamp(INT16_MIN, INT16_MAX)


def _sixteen(q31: int) -> int:
    """A 32-bit constant of the reference, rounded to 16 bits."""
    return (q31 + 2**15) >> 16


# exp(-2^k) in Q0.31 for k = -2 … 4, as the reference tabulates them.
_EXP_FACTORS = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)


def _exp_of_negative(x: Tensor, integer_bits: int) -> Tensor:
    """exp(x) in Q0.15 for x <= 0 in Q(integer_bits).(15 - integer_bits)."""
    fractional_bits = 15 - integer_bits
    quarter = 1 << (fractional_bits - 2)
    remainder_mod = (x & (quarter - 1)) - quarter
    result = _exp_near_zero(remainder_mod << integer_bits)
    remainder = remainder_mod - x
    for k, factor in zip(range(-2, 5), _EXP_FACTORS, strict=True):
        if integer_bits > k:
            bit = (remainder >> (fractional_bits + k)) & 1
            result = torch.where(bit > 0, _high_multiply(result, _sixteen(factor)), result)
    if integer_bits > 5:
        result = torch.where(x < -(1 << (fractional_bits + 5)), torch.zeros_like(x), result)
    return torch.where(x == 0, torch.tensor(INT16_MAX), result)


def _exp_near_zero(x: Tensor) -> Tensor:
    """exp(x) in Q0.15 for x in [-1/4, 0), Taylor polynomial about -1/8."""
    center = x + (1 << 12)
    square = _high_multiply(center, center)
    cube = _high_multiply(square, center)
    fourth = _high_multiply(square, square)
    third = _sixteen(715827883)
    inner = rounding_divide_by_power_of_two(fourth, 2) + cube
    tail = rounding_divide_by_power_of_two(_high_multiply(inner, third) + square, 1)
    constant = _sixteen(1895147668)
    return (constant + _high_multiply(center + tail, constant)).clamp(INT16_MIN, INT16_MAX)


def _reciprocal_of_half_denominator(x: Tensor) -> Tensor:
    """1 / ((1 + x) / 2) in Q2.13 for x in Q0.15, three Newton steps."""
    total = x + INT16_MAX
    half_denominator = torch.div(total + 1, 2, rounding_mode="trunc")
    estimate = _sixteen(1515870810) + _high_multiply(half_denominator, _sixteen(-1010580540))
    for _ in range(3):
        error = (1 << 13) - _high_multiply(half_denominator, estimate)
        # A Q2 times a Q2 number is Q4; back to Q2 is a saturating left shift.
        correction = (_high_multiply(estimate, error) << 2).clamp(INT16_MIN, INT16_MAX)
        estimate = estimate + correction
    return estimate


def _one_over_one_plus(x: Tensor) -> Tensor:
    """1 / (1 + x) in Q0.15: the reciprocal halved, Q2.13 with its exponent lowered by one."""
    return (_reciprocal_of_half_denominator(x) << 1).clamp(INT16_MIN, INT16_MAX)


def _one_minus_over_one_plus(x: Tensor) -> Tensor:
    """(1 - x) / (1 + x) in Q0.15."""
    return ((_reciprocal_of_half_denominator(x) - (1 << 13)) << 2).clamp(INT16_MIN, INT16_MAX)
