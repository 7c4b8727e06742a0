r"""Exponentials, logarithms and their relatives in the same bits on every processor.

The exponential of a C library, of a vector library and of PyTorch differ in the last bit from one
processor to the next: with instructions that multiply and add at once and without, in a long tensor
and in a short one. Where such a number is rounded to an integer of the emulation (an entry of a
table, a scale, a centroid), the last bit decides now and then.

The functions here use what IEEE 754 rounds correctly everywhere, in float64: sums, products,
quotients, and powers of two that are put together from their bits. Arguments are reduced, the rest
is a polynomial,

.. math::
    2^x = 2^n e^{f \ln 2},\quad n = \lfloor x \rceil,\quad |f| \le \tfrac12, \qquad
    \log_2 x = n + \frac{2}{\ln 2} \operatorname{artanh} \frac{m - 1}{m + 1},\quad x = 2^n m.

A result is within 4 units of the last place of float64 (:func:`erfc` within 2^-43): rounded to
float32 it is the correctly rounded value except for one argument in :math:`2^{19}` at the very
most, and in all cases the same value on every processor. Powers of two and their logarithms are
exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

# A C library has these, too, but none promises their last bit.
LN_2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
_TWO_OVER_ROOT_OF_PI = 1.1283791670955126
# The logarithm of 2 in two parts: 33 bits, so that multiples up to 2^20 are exact, and the rest.
_LN_2_HIGH, _LN_2_LOW = 0.6931471803691238, 1.9082149292705877e-10

# exp on ±ln(2)/2 is a Taylor series: what is left out is below 2^-57.
_EXP = [1.0 / math.factorial(k) for k in range(14)]
# artanh(s) / s in s², for |s| up to 0.1716.
_ARTANH = [1.0 / (2 * k + 1) for k in range(12)]
# erf(x) / (x exp(-x²)) as nested products; erfc beyond 2 as a continued fraction.
_ERF_TERMS, _ERFC_TERMS = 40, 56

_Number = TypeVar("_Number", float, Tensor, NDArray[np.float64])


@overload
def power_of_two(exponent: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]: ...
@overload
def power_of_two(exponent: NDArray[np.int64]) -> NDArray[np.float64]: ...
def power_of_two(exponent: Tensor | NDArray[np.int64]) -> Tensor | NDArray[np.float64]:
    """Put powers of two together from their bits, exact in float64.

    Args:
        exponent: Whole numbers of any integer dtype, limited to -1022 … 1023: a tensor or an array
            of any shape.

    Returns:
        float64, of the kind and shape of ``exponent``.

    Example:
        >>> power_of_two(torch.tensor([-1, 0, 10]))
        tensor([5.0000e-01, 1.0000e+00, 1.0240e+03], dtype=torch.float64)
    """
    if isinstance(exponent, Tensor):
        return ((exponent.long().clamp(-1022, 1023) + 1023) << 52).view(torch.float64)
    powers: NDArray[np.float64] = np.ldexp(1.0, np.clip(exponent, -1022, 1023))
    return powers


def square_root(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Take the square root of float32 numbers, correctly rounded.

    A vector library's own root may be one last bit off. Here it is taken in float64, where that bit
    cannot matter. Between 1 and 2 no root of a float32 lies within 2^-50 of the middle m of two
    float32 numbers: the square of m is an odd multiple of 2^-48, a float32 there one of 2^-23.

    Args:
        x: float32; negative ones give NaN.

    Returns:
        float32 of the shape of ``x``.

    Example:
        >>> square_root(torch.tensor([2.0, 9.0]))
        tensor([1.4142, 3.0000])
    """
    return x.double().sqrt().float()


@overload
def exp2(x: float) -> float: ...
@overload
def exp2(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]: ...
def exp2(x: float | Tensor) -> float | Tensor:
    """Raise 2 to a power.

    Args:
        x: A number, or any float tensor; from -1022 to 1023.

    Returns:
        A float, or float64 of the shape of ``x``.

    Example:
        >>> round(exp2(0.5), 9), exp2(-3.0)
        (1.414213562, 0.125)
    """
    if isinstance(x, Tensor):
        x = x.double()
        exponent = x.round()
        return _polynomial(_EXP, (x - exponent) * LN_2) * power_of_two(exponent.long())
    number = round(x)
    return math.ldexp(_polynomial(_EXP, (x - number) * LN_2), number)


@overload
def log2(x: float) -> float: ...
@overload
def log2(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]: ...
@overload
def log2(x: NDArray[np.float64]) -> NDArray[np.float64]: ...
def log2(x: float | Tensor | NDArray[np.float64]) -> float | Tensor | NDArray[np.float64]:
    """Take the logarithm to base 2.

    Args:
        x: A positive number, an array or any float tensor of them.

    Returns:
        A float, or float64 of the kind and shape of ``x``.

    Example:
        >>> log2(8.0), log2(torch.tensor([0.25, 3.0])).float()
        (3.0, tensor([-2.0000,  1.5850]))
    """
    if isinstance(x, Tensor):
        exponent, mantissa = _split(x.double())
        return exponent + _artanh(mantissa) * (2 / LN_2)
    if isinstance(x, np.ndarray):
        parts, powers = np.frexp(x)
        low = parts < _SQRT_HALF
        return (powers - low) + _artanh(parts * (1.0 + low)) * (2 / LN_2)
    part, power = math.frexp(x)
    if part < _SQRT_HALF:
        part, power = 2 * part, power - 1
    return power + _artanh(part) * (2 / LN_2)


def ceil_log2(x: float) -> int:
    """Find the exponent of the smallest power of two that is not below a positive number.

    Example:
        >>> ceil_log2(4.0), ceil_log2(4.1), ceil_log2(0.3)
        (2, 3, -1)
    """
    mantissa, exponent = math.frexp(x)
    return exponent - (mantissa == 0.5)


def exp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Take the exponential.

    Args:
        x: Any float tensor; what lies beyond ±700 counts as ±700.

    Returns:
        float64 of the shape of ``x``.

    Example:
        >>> exp(torch.tensor([0.0, 1.0])).tolist()
        [1.0, 2.718281828459045]
    """
    exponent, rest = _reduced(x)
    return _polynomial(_EXP, rest) * power_of_two(exponent.long())


def expm1(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Take the exponential less 1, precise near 0; arguments are those of :func:`exp`.

    Example:
        >>> expm1(torch.tensor([1e-10], dtype=torch.float64)).tolist()
        [1.00000000005e-10]
    """
    exponent, rest = _reduced(x)
    small = rest * _polynomial(_EXP[1:], rest)
    power = power_of_two(exponent.long())
    # 2^n (1 + small) - 1, and for n = 0 small itself.
    return small * power + (power - 1)


def log1p(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Take the natural logarithm of 1 + x, precise near 0.

    Args:
        x: Any float tensor above -1.

    Returns:
        float64 of the shape of ``x``.

    Example:
        >>> log1p(torch.tensor([1e-10, 1.0], dtype=torch.float64)).tolist()
        [9.9999999995e-11, 0.6931471805599453]
    """
    x = x.double()
    total = 1 + x
    exponent, mantissa = _split(total)
    # What the sum has lost.
    lost = (x - (total - 1)) / total
    return exponent * _LN_2_HIGH + (exponent * _LN_2_LOW + (2 * _artanh(mantissa) + lost))


def sigmoid(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Take the logistic function; float64 of the shape of ``x``.

    Example:
        >>> sigmoid(torch.tensor([0.0, -1.0])).tolist()
        [0.5, 0.2689414213699951]
    """
    return 1 / (1 + exp(-x.double()))


def tanh(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Take the hyperbolic tangent; float64 of the shape of ``x``.

    Example:
        >>> tanh(torch.tensor([0.0, -1.0])).tolist()
        [0.0, -0.7615941559557649]
    """
    grown = expm1(2 * x.double().abs().clamp_max(20.0))
    return torch.copysign(grown / (grown + 2), x.double())


def erfc(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Take the complementary error function; float64 of the shape of ``x``.

    Example:
        >>> erfc(torch.tensor([0.0, 1.0])).float()
        tensor([1.0000, 0.1573])
    """
    x = x.double()
    size = x.abs()
    square = size * size
    bell = exp(-square)
    near = square.clamp_max(4.0)
    series = torch.ones_like(size)
    for k in range(_ERF_TERMS, 0, -1):
        series = 1 + near * (2 / (2 * k + 1)) * series
    inner = 1 - size * bell * series * _TWO_OVER_ROOT_OF_PI
    far = size.clamp_min(2.0)
    twice = 2 * far * far
    fraction = torch.ones_like(size)
    for k in range(_ERFC_TERMS, 0, -1):
        fraction = 1 + k / (twice * fraction)
    outer = bell * (_TWO_OVER_ROOT_OF_PI / 2) / (far * fraction)
    complement = torch.where(size < 2, inner, outer)
    return torch.where(x < 0, 2 - complement, complement)


def _polynomial(coefficients: Sequence[float], x: _Number) -> _Number:
    """Evaluate a polynomial by Horner's rule; the constant term comes first."""
    result = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        result = result * x + coefficient
    return result


def _artanh(mantissa: _Number) -> _Number:
    """The area tangent of (m - 1) / (m + 1): half the natural logarithm of m."""
    s = (mantissa - 1) / (mantissa + 1)
    return s * _polynomial(_ARTANH, s * s)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Exponent and mantissa of positive numbers, the mantissa about 1."""
    mantissa, exponent = torch.frexp(x)
    low = mantissa < _SQRT_HALF
    return exponent.double() - low.double(), torch.where(low, 2 * mantissa, mantissa)


def _reduced(x: Tensor) -> tuple[Tensor, Tensor]:
    """Multiples of ln 2, and what is left of x, at most half of it."""
    x = x.double().clamp(-700.0, 700.0)
    exponent = (x * (1 / LN_2)).round()
    return exponent, (x - exponent * _LN_2_HIGH) - exponent * _LN_2_LOW
