r"""Square roots of integers and their inverses, as the reference kernels compute them.

The kernel of a square root computes in single precision and drops the fraction of the quotient,

.. math:: q_y - o_y = \lfloor \sqrt{s_x (q_x - o_x)} / s_y \rfloor

The 8-bit kernel of the inverse, and TFLite-Micro's of 16 bits, are in fixed point: five Newton
steps give :math:`v^{-1/2}` of the integer :math:`v = q_x - o_x` in units of :math:`2^{-20}`, which
are rescaled by :math:`1 / (\sqrt{s_x} s_y)`. Zero gives the largest integer.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_nna.elementary import square_root
from lightning_nna.emulation.arithmetic.fixed_point import (
    INT32_MAX,
    INT32_MIN,
    multiply_by_quantized_multiplier,
    quantize_multiplier,
)
from lightning_nna.emulation.arithmetic.integer_softmax import high_multiply

# Units of the inverse root before it is rescaled.
_UNITS = 20
_NEWTON_STEPS = 5
# 3/2 with three integer bits, and the root of 1/2 with none.
_THREE_HALVES = (1 << 28) + (1 << 27)
_ROOT_OF_HALF = 1518500250


def truncated_root(
    x: Float[Tensor, "*shape"], scale: float, output_scale: float
) -> Float[Tensor, "*shape"]:
    """Take the square root of integers, with the fraction dropped.

    Args:
        x: Integers less the zero point, at least 0, float32.
        scale: Scale of the input.
        output_scale: Scale of the output.

    Returns:
        Integers of the output less its zero point, not clipped, float32.

    Example:
        >>> truncated_root(torch.tensor([0.0, 8.0, 9.0]), 1.0, 1.0)
        tensor([0., 2., 3.])
    """
    # By a tensor: a GPU would multiply by the inverse of a number.
    divisor = torch.full((), float(np.float32(output_scale)), device=x.device)
    return (square_root(x * float(np.float32(scale))) / divisor).trunc_()


@lru_cache(maxsize=128)
def inverse_roots(largest: int, scale: float, output_scale: float) -> Float[Tensor, " entries"]:
    """Tabulate the inverse square root of integers that are not negative.

    Args:
        largest: Largest integer of the input, less its zero point.
        scale: Scale of the input.
        output_scale: Scale of the output.

    Returns:
        Integers of the output less its zero point for the inputs 0 to ``largest``, not clipped,
        float32; the first one lies beyond every range.

    Example:
        >>> inverse_roots(4, 1.0, 1.0 / 64)[1:]
        tensor([64., 45., 37., 32.])
    """
    factor = 1.0 / (math.sqrt(np.float32(scale)) * float(np.float32(output_scale)))
    multiplier, shift = quantize_multiplier(factor)
    inverses = _inverse_roots(torch.arange(1, largest + 1))
    scaled = multiply_by_quantized_multiplier(inverses, multiplier, shift - _UNITS)
    return torch.cat([torch.tensor([INT32_MAX]), scaled]).float()


def _inverse_roots(values: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Inverse roots of positive integers of up to 29 bits in units of 2^-20."""
    # Shifted left by an even number of bits, so that the numbers lie in [2^27, 2^29).
    bits = torch.frexp(values.double()).exponent.long()
    pairs = (31 - bits) // 2 - 1
    # With three integer bits, between 1/4 and 1 for the Newton steps: y (3 - x y^2) / 2.
    x = (values << 2 * pairs) >> 1
    half = (x + 1) >> 1
    y = torch.full_like(x, 1 << 28)
    for _ in range(_NEWTON_STEPS):
        cube = _shifted(high_multiply(high_multiply(y, y), y), 6)
        y = _shifted(high_multiply(y, _THREE_HALVES) - high_multiply(half, cube), 3)
    # The kernel takes the root of 1 to be 1, less what 31 bits cannot hold.
    mantissas = torch.where(values == 1, INT32_MAX, high_multiply(y, _ROOT_OF_HALF))
    exponents = torch.where(values == 1, 0, pairs - 11)
    # For 4: the mantissa is 2^30 times a half, and 2^20 / 2 = 524288.
    one = torch.ones_like(values)
    return multiply_by_quantized_multiplier(one, mantissas, exponents + _UNITS)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A saturating left shift."""
    return (x << bits).clamp(INT32_MIN, INT32_MAX)
