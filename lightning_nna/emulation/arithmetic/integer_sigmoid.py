r"""Sigmoid and tanh of 8 bits in 32-bit fixed point, as TFLite-Micro's kernels compute them.

The input is brought to Q4.27, and exponential and reciprocal are those of the softmax
(:mod:`.integer_softmax`):

.. math:: \sigma(x) = \frac{1}{1 + e^{-x}}, \qquad \tanh x = \frac{1 - e^{-2 x}}{1 + e^{-2 x}}

for :math:`x > 0`, and by symmetry for the others. What lies at :math:`\pm 15` or beyond is the end
of the range. LiteRT's kernels of 8 bits look a table up instead, made in single precision
(:mod:`.pointwise`), which differs in few entries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_nna.emulation.arithmetic.fixed_point import (
    INT32_MAX,
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    rounding_divide_by_power_of_two,
)
from lightning_nna.emulation.arithmetic.integer_softmax import (
    exp_on_negative,
    one_minus_over_one_plus,
    one_over_one_plus,
    smallest_difference,
)

_INTEGER_BITS = 4


def logistic_int8(x: Int[Tensor, "*shape"], scale: float) -> Int[Tensor, "*shape"]:
    """Sigmoid of 8-bit numbers, in steps of 2^-8.

    Args:
        x: Integers less the zero point, int64.
        scale: Their scale.

    Returns:
        Integers less the zero point, 0 to 255, int64.

    Example:
        >>> logistic_int8(torch.tensor([-100, 0, 10]), 0.1)
        tensor([  0, 128, 187])
    """

    def function(value: Tensor) -> Tensor:
        positive = one_over_one_plus(exp_on_negative(-value.abs(), _INTEGER_BITS))
        result = torch.where(value > 0, positive, INT32_MAX - positive)
        return torch.where(value == 0, 1 << 30, result)

    return _rounded(function, x, scale, 8, (0, 255))


def tanh_int8(x: Int[Tensor, "*shape"], scale: float) -> Int[Tensor, "*shape"]:
    """Hyperbolic tangent of 8-bit numbers, in steps of 2^-7.

    Args:
        x: Integers less the zero point, int64.
        scale: Their scale.

    Returns:
        Integers, -128 to 127, int64.

    Example:
        >>> tanh_int8(torch.tensor([-100, 0, 10]), 0.1)
        tensor([-128,    0,   97])
    """

    def function(value: Tensor) -> Tensor:
        # Twice the number has the same bits with one integer bit more.
        positive = one_minus_over_one_plus(exp_on_negative(-value.abs(), _INTEGER_BITS + 1))
        result = torch.where(value < 0, -positive, positive)
        return torch.where(value == 0, 0, result)

    return _rounded(function, x, scale, 7, (-128, 127))


def _rounded(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    scale: float,
    bits: int,
    ends: tuple[int, int],
) -> Tensor:
    """A function from Q4.27 to Q0.31, rounded to so many bits."""
    multiplier, shift = quantize_multiplier(scale * 2.0 ** (31 - _INTEGER_BITS))
    radius = -smallest_difference(shift, _INTEGER_BITS)
    inner = x.clamp(-radius, radius)
    value = multiply_by_quantized_multiplier(inner, multiplier, shift)
    result = rounding_divide_by_power_of_two(function(value), 31 - bits).clamp(*ends)
    result = torch.where(x >= radius, ends[1], result)
    return torch.where(x <= -radius, ends[0], result)
