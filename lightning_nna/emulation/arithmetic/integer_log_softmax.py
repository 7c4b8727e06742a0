r"""Log-softmax in 32-bit fixed point, as the 8-bit reference kernel of LiteRT computes it.

Differences to the row's largest input and the sum of their exponentials are those of
:mod:`.softmax`; then

.. math:: y_i = \beta s (q_i - q_{max}) - \ln \sum_j e_j

in steps of 1/16 from 0 down to -255/16, both terms in Q5.26. The logarithm of a sum in Q12.19
splits off a power of two and takes a rational function of what is left, a number :math:`r` near
:math:`2^{-1/4}`: with :math:`q = 2 (r - 2^{-1/4})`,

.. math:: \ln z = n \ln 2 + \frac{q r + a_n q^3}{1 + p (a_i + q + a_d q^2) + a_f q}, \qquad
          p = \frac{r + 2^{-1/4}}{2}

Nothing is a table, and nothing is float: the other kernels of LiteRT have a float table of
exponentials and a float logarithm, and differ in some outputs by one step.

Reference:
    The log-softmax kernel of the TensorFlow Lite reference integer operators and the fixed-point
    header of gemmlowp.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_nna.emulation.arithmetic.device_tables import on_device_of
from lightning_nna.emulation.arithmetic.fixed_point import (
    INT32_MAX,
    INT32_MIN,
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    rounding_divide_by_power_of_two,
)
from lightning_nna.emulation.arithmetic.integer_softmax import (
    DIFFERENCE_BITS,
    SUM_BITS,
    difference_multiplier,
    exp_table,
    high_multiply,
    one_over_one_plus,
    smallest_difference,
    to_sum,
)

#: The smallest output, in steps of 1/16; the largest is 0.
LOWEST = -255
_OUTPUT_BITS = 4  # Integer bits of an output.
_LOGARITHM_BITS = DIFFERENCE_BITS + 1  # While it is put together: its terms may not saturate.

# Constants of the logarithm in Q0.31.
_LN_2 = 1488522236
_FOURTH_ROOT_OF_HALF = 1805811301
_ROOT_OF_HALF = 1518500250
_QUARTER = 1 << 29
_A_N = 117049297  # 11/240 2^(1/4)
_A_D = 127690142  # 1/20 2^(1/4)
_A_I = 1057819769  # 2 2^(-1/4) - 2^(1/4)
_A_F = 638450708  # 1/4 2^(1/4)


def log_softmax_int8(scores: Int[Tensor, "*rows n"], scale: float) -> Int[Tensor, "*rows n"]:
    """Log-softmax of 8-bit scores along the last axis, in steps of 1/16.

    Args:
        scores: Integers, zero point taken off or not: only differences count. A row's sum of
            exponentials must stay below 4096.
        scale: Scale of the scores.

    Returns:
        int64 integers, -255 to 0.

    Example:
        >>> log_softmax_int8(torch.tensor([[0, 0], [0, -10]]), 0.5)
        tensor([[-11, -11],
                [  0, -80]])
    """
    differences = scores.amax(-1, keepdim=True) - scores
    exponentials, steps = _tables(scale)
    sums = on_device_of(scores, exponentials)[differences].sum(-1, keepdim=True)
    logarithm = log_of_sum(sums)
    result = on_device_of(scores, steps)[differences] - logarithm
    result = rounding_divide_by_power_of_two(result, 31 - DIFFERENCE_BITS - _OUTPUT_BITS)
    beyond = -differences <= _smallest_shown(logarithm, scale)
    return result.clamp(LOWEST, 0).masked_fill(beyond, LOWEST)


def log_of_sum(sums: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Natural logarithm of sums in Q12.19 that are at least 1, in Q5.26.

    Example:
        >>> (log_of_sum(torch.tensor([1 << 19, 10 << 19])) / 2**26).round(decimals=6)
        tensor([0.0000, 2.3026])
    """
    # With a headroom of the sum itself, and with one of the sum times the root of a half: the
    # reduced number is the smaller, so that it comes near the fourth root of a half.
    headroom = _leading_zeros(sums)
    first = high_multiply(_shift(sums, headroom - 1), _ROOT_OF_HALF)
    first = _saturate(first << 1)
    other_headroom = _leading_zeros(high_multiply(sums, _ROOT_OF_HALF)) - 1
    second = _shift(sums, other_headroom)
    reduced = torch.minimum(first, second)
    quarter = rounding_divide_by_power_of_two(torch.tensor(_QUARTER), _LOGARITHM_BITS)
    unit = 31 - _LOGARITHM_BITS
    power = torch.maximum(
        _saturate(_saturate((SUM_BITS - headroom) << unit) + quarter),
        _saturate(_saturate((SUM_BITS - other_headroom) << unit) - quarter),
    )
    remainder = rounding_divide_by_power_of_two(_numerator(reduced), _LOGARITHM_BITS)
    remainder = high_multiply(remainder, one_over_one_plus(_denominator_less_one(reduced)))
    return _saturate((high_multiply(power, _LN_2) + remainder) << 1)


def _numerator(r: Tensor) -> Tensor:
    q = 2 * (r - _FOURTH_ROOT_OF_HALF)
    cube = high_multiply(q, high_multiply(q, q))
    return high_multiply(q, r) + high_multiply(cube, _A_N)


def _denominator_less_one(r: Tensor) -> Tensor:
    total = r + _FOURTH_ROOT_OF_HALF
    p = torch.div(total + 1, 2, rounding_mode="trunc")
    q = 2 * (r - _FOURTH_ROOT_OF_HALF)
    inner = _A_I + q + high_multiply(high_multiply(q, q), _A_D)
    return high_multiply(p, inner) + high_multiply(q, _A_F)


@lru_cache(maxsize=256)
def _tables(scale: float) -> tuple[Tensor, Tensor]:
    """Exponentials in the format of sums, and differences in Q5.26, by difference (0 to 255)."""
    multiplier, shift = difference_multiplier(scale)
    steps = multiply_by_quantized_multiplier(-torch.arange(256), multiplier, shift)
    return to_sum(exp_table(scale)), steps


def _smallest_shown(logarithm: Tensor, scale: float) -> Tensor:
    """The difference from which on an output is the lowest, whatever it would come to."""
    multiplier, shift = difference_multiplier(scale)
    backward = quantize_multiplier(2.0 ** (31 - shift) / multiplier)
    least = multiply_by_quantized_multiplier(logarithm + INT32_MIN, *backward)
    return least.clamp_min(smallest_difference(shift) - 1)


def _leading_zeros(x: Tensor) -> Tensor:
    """Of positive numbers of 32 bits."""
    return 32 - torch.frexp(x.double()).exponent.long()


def _shift(x: Tensor, exponents: Tensor) -> Tensor:
    return _saturate(x << exponents)


def _saturate(x: Tensor) -> Tensor:
    return x.clamp(INT32_MIN, INT32_MAX)
