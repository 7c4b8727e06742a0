r"""Functions of one activation, as the reference kernels compute them.

Most functions of 8 bits are tables of 256 entries, made in single precision; hard swish and leaky
ReLU have integer arithmetic of their own. Sigmoid and tanh of 16 bits are a table of 256 entries of
:math:`\sigma(i / 24)` with straight lines between. All are equal to LiteRT's reference kernels in
every bit.

LiteRT takes exponentials and their relatives from the C library that it runs on. Here they are
those of :mod:`.elementary`, rounded to single precision: the same on every processor, and nearest
to the true value. Where a C library's last bit is another one, an entry of a table is another one
only if it lies within that bit of a tie: one entry in a hundred thousand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_nna import elementary
from lightning_nna.emulation.arithmetic.device_tables import on_device_of
from lightning_nna.emulation.arithmetic.fixed_point import (
    INT16_MAX,
    INT16_MIN,
    INT32_MIN,
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    round_half_away,
    rounding_divide_by_power_of_two,
    wrapped_int32,
)

_F = np.float32


def tabulate(
    function: Callable[[Tensor], Tensor],
    first: int,
    scale: float,
    output_scale: float,
    *,
    bits: int = 8,
) -> Float[Tensor, " entries"]:
    """Tabulate a function of integers of a few bits, in single precision.

    Args:
        function: Takes and gives real numbers, float32.
        first: Smallest integer of the input, less its zero point.
        scale: Scale of the input.
        output_scale: Scale of the output.
        bits: Width of the input; the table has ``2**bits`` entries.

    Returns:
        Integers of the output less its zero point, not clipped, float32.

    Example:
        >>> tabulate(torch.abs, -128, 0.5, 0.25)[[0, 128, 255]]
        tensor([256.,   0., 254.])
    """
    reals = torch.arange(first, first + 2**bits, dtype=torch.float32) * scale
    return round_half_away(function(reals) * float(_F(1) / _F(output_scale)))


def logistic(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Sigmoid in single precision.

    Example:
        >>> logistic(torch.zeros(1))
        tensor([0.5000])
    """
    return 1 / (1 + elementary.exp(-x).float())


def tanh(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Hyperbolic tangent in single precision.

    Example:
        >>> tanh(torch.ones(1))
        tensor([0.7616])
    """
    return elementary.tanh(x).float()


def elu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x, or exp(x) - 1 where it is negative, in single precision.

    Example:
        >>> elu(torch.tensor([2.0, -1.0]))
        tensor([ 2.0000, -0.6321])
    """
    return torch.where(x < 0, elementary.expm1(x).float(), x)


def gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Gaussian error linear unit in single precision.

    Example:
        >>> gelu(torch.ones(1))
        tensor([0.8413])
    """
    return 0.5 * x * elementary.erfc(x * -math.sqrt(0.5)).float()


def gelu_tanh(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Its approximation with a tanh, in single precision.

    Example:
        >>> gelu_tanh(torch.ones(1))
        tensor([0.8412])
    """
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1 + tanh(inner))


def hard_swish(
    x: Int[Tensor, "*shape"],
    scale: float,
    output_scale: float,
    *,
    precision: type[np.floating] = np.float32,
) -> Int[Tensor, "*shape"]:
    """X relu6(x + 3) / 6 in 16-bit fixed point.

    Args:
        x: 8-bit integers less the zero point, int64.
        scale: Scale of the input.
        output_scale: Scale of the output, at least 1/64 of the input's: the kernel has no left
            shift.
        precision: In which the kernel forms its factors: TFLite-Micro's has float64.

    Returns:
        Integers of the output less its zero point, not clipped, int64.

    Example:
        >>> hard_swish(torch.tensor([-100, 0, 100]), 0.05, 0.05)
        tensor([  0,   0, 100])
    """
    fine = precision(1 / 128) * precision(scale)
    output, output_shift = _sixteen_bits(float(fine / precision(output_scale)))
    gate, gate_shift = _sixteen_bits(float(fine / precision(3 / 32768)))
    wide = x << 7
    linear = _high_multiply(wide, output)
    relu = wide
    if gate_shift > 0:
        relu = _saturate(relu << (gate_shift - 1))
    relu = _high_multiply(relu, gate)
    if gate_shift > 0:
        relu = _saturate(relu << 1)
    elif gate_shift < 0:
        relu = rounding_divide_by_power_of_two(relu, -gate_shift)
    relu = (relu + 2**15) >> 1
    product = torch.div(relu * linear, 2**15, rounding_mode="trunc")
    return rounding_divide_by_power_of_two(product, -output_shift)


def leaky_relu(
    x: Int[Tensor, "*shape"],
    slope: float,
    scale: float,
    output_scale: float,
    *,
    precision: type[np.floating] = np.float32,
) -> Int[Tensor, "*shape"]:
    """x, or slope x where it is negative, rescaled.

    Args:
        x: Integers less the zero point, int64.
        slope: Of the negative side, at least 0.
        scale: Scale of the input.
        output_scale: Scale of the output.
        precision: In which the kernel forms its factors: TFLite-Micro's has float64.

    Returns:
        Integers of the output less its zero point, not clipped, int64.

    Example:
        >>> leaky_relu(torch.tensor([-100, 100]), 0.1, 0.5, 0.5)
        tensor([-10, 100])
    """
    first, last = precision(_F(scale)), precision(_F(output_scale))
    same = quantize_multiplier(float(first / last))
    leak = quantize_multiplier(float(first * precision(_F(slope)) / last))
    return torch.where(
        x >= 0,
        multiply_by_quantized_multiplier(x, *same),
        multiply_by_quantized_multiplier(x, *leak),
    )


def leaky_relu_of_tosa(
    x: Int[Tensor, "*shape"], slope: float, scale: float, output_scale: float
) -> Int[Tensor, "*shape"]:
    """Leaky ReLU as TOSA has it: the larger of x and slope x, with factors in double precision.

    Args:
        x: Integers less the zero point, int64.
        slope: Of the negative side; above 1 the smaller is taken.
        scale: Scale of the input.
        output_scale: Scale of the output.

    Returns:
        Integers of the output less its zero point, not clipped, int64.

    Example:
        >>> leaky_relu_of_tosa(torch.tensor([-100, 100]), 0.1, 0.5, 0.5)
        tensor([-10, 100])
    """
    ratio = scale / output_scale
    same = multiply_by_quantized_multiplier(x, *quantize_multiplier(ratio))
    leak = multiply_by_quantized_multiplier(x, *quantize_multiplier(ratio * float(_F(slope))))
    return torch.maximum(same, leak) if slope <= 1 else torch.minimum(same, leak)


def logistic_int16(x: Int[Tensor, "*shape"], scale: float) -> Int[Tensor, "*shape"]:
    """Sigmoid of 16-bit numbers, in steps of 2^-15.

    Args:
        x: Integers, zero point 0, int64.
        scale: Their scale.

    Example:
        >>> logistic_int16(torch.tensor([0, 4096]), 2.0**-12)
        tensor([16384, 23956])
    """
    value = _to_table(x, scale)
    # For x = 1: 3 * 4096 units are segment 24 of 512 units each, with nothing left, and the entry
    # is 2^16 sigmoid(1) = 47911. Times 2^9, plus half of 2^10, over 2^10: 23956, or 0.7311.
    result = _between_entries(value.abs(), bits=9, last=0x7FFF << 10)
    return torch.where(value >= 0, result + 2**9, 2**25 - result + 2**9 - 1) >> 10


def tanh_int16(x: Int[Tensor, "*shape"], scale: float) -> Int[Tensor, "*shape"]:
    """Hyperbolic tangent of 16-bit numbers, in steps of 2^-15.

    Args:
        x: Integers, zero point 0, int64.
        scale: Their scale.

    Example:
        >>> tanh_int16(torch.tensor([0, 4096]), 2.0**-12)
        tensor([    0, 24956])
    """
    value = _to_table(x, scale)
    # tanh(x) = 2 sigmoid(2 x) - 1: segments of half the width, and 2^23 is a half.
    # For x = 1: segment 48 of 256 units, whose entry is 2^16 sigmoid(2) = 57724. Times 2^8, less
    # 2^23, plus half of 2^8, over 2^8: 24956, or 0.7616.
    result = _between_entries(value.abs(), bits=8, last=0xFFFF << 8)
    return torch.where(value >= 0, result - 2**23 + 2**7, -result + 2**23 + 2**7 - 1) >> 8


def _between_entries(magnitude: Tensor, *, bits: int, last: int) -> Tensor:
    """Straight line between two entries of the table of the sigmoid, times 2^bits.

    Args:
        magnitude: Absolute values of the input in units of the table, int64.
        bits: Logarithm to base 2 of the units in a segment.
        last: Value beyond the table.
    """
    table = on_device_of(magnitude, _sigmoid_table())
    segment = (magnitude >> bits).clamp_max(254)
    low = table[segment]
    line = (low << bits) + (magnitude & (2**bits - 1)) * (table[segment + 1] - low)
    return line.masked_fill_(magnitude >> bits >= 255, last)


# Where the reference's table is one above the nearest integer to 2^16 sigmoid(i / 24).
_ONE_ABOVE = (
    4, 8, 12, 14, 15, 16, 17, 19, 20, 21, 22, 25, 27, 28, 29, 30, 31, 33, 34, 35, 37, 39, 40, 41,
    43, 44, 45, 46, 49, 50, 54, 62, 63, 64, 66, 82, 86, 93, 100, 103, 112, 116, 135, 255,
)  # fmt: skip


@lru_cache(maxsize=1)
def _sigmoid_table() -> Tensor:
    indices = torch.arange(256, dtype=torch.float64)
    table = (2**16 * elementary.sigmoid(indices / 24)).round().long()
    table[torch.tensor(_ONE_ABOVE)] += 1
    return table


def _to_table(x: Tensor, scale: float) -> Tensor:
    """Inputs in units of 1 / (3 * 4096), as 16 bits times a 16-bit multiplier."""
    mantissa, exponent = math.frexp(scale)
    shift = 12 + exponent - 1
    if mantissa == 0.5 and shift in (0, 1):
        return x * (3 << shift)
    factor, right = _F(scale) * 4096.0 * 3.0, 0
    while factor <= INT16_MAX / 2 and right <= 30:
        factor, right = factor * 2, right + 1
    # The kernel works in 32 bits, which hold inputs up to about 1.7e5, and wraps around beyond.
    multiplier = int(factor) if factor < 2**31 else INT32_MIN
    half = (1 << right) >> 1
    return wrapped_int32(x * multiplier + half) >> right


def _sixteen_bits(factor: float) -> tuple[int, int]:
    """A 16-bit mantissa and a shift."""
    multiplier, shift = quantize_multiplier(factor)
    return min((multiplier + 2**15) >> 16, INT16_MAX), shift


def _high_multiply(a: Tensor, b: int) -> Tensor:
    """Rounded high half of twice a product of 16-bit integers."""
    return _saturate((a * b + 2**14) >> 15)


def _saturate(x: Tensor) -> Tensor:
    return x.clamp(INT16_MIN, INT16_MAX)
