r"""Square roots of integers and their inverses, as the reference kernels compute them.

The kernel of a square root computes in single precision and drops the fraction of the quotient,

.. math:: q_y - o_y = \lfloor \sqrt{s_x (q_x - o_x)} / s_y \rfloor

The 8-bit kernel of the inverse is in fixed point: five Newton steps give
:math:`v^{-1/2}` of the integer :math:`v = q_x - o_x` in units of :math:`2^{-20}`, which are
rescaled by :math:`1 / (\sqrt{s_x} s_y)`. Zero gives the largest integer.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lightning_nna.elementary import square_root
from lightning_nna.emulation.arithmetic.fixed_point import (
    INT32_MAX,
    INT32_MIN,
    multiply_by_quantized_multiplier,
    quantize_multiplier,
)

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


def inverse_roots(largest: int, scale: float, output_scale: float) -> Float[Tensor, " entries"]:
    """Tabulate the inverse square root of 8-bit numbers.

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
    entries = [INT32_MAX]
    for value in range(1, largest + 1):
        inverse = torch.tensor(_inverse_root(value))
        scaled = multiply_by_quantized_multiplier(inverse, multiplier, shift - _UNITS)
        entries.append(int(scaled))
    return torch.tensor(entries, dtype=torch.float32)


def _inverse_root(value: int) -> int:
    """The inverse root of a positive integer of up to 29 bits in units of 2^-20."""
    if value == 1:
        mantissa, exponent = INT32_MAX, 0
    else:
        # Shifted left by an even number of bits, so that the number lies in [2^27, 2^29).
        pairs = (31 - value.bit_length()) // 2 - 1
        exponent = pairs - 11
        # With three integer bits, between 1/4 and 1 for the Newton steps: y (3 - x y^2) / 2.
        x = (value << 2 * pairs) >> 1
        half = (x + 1) >> 1
        y = 1 << 28
        for _ in range(_NEWTON_STEPS):
            cube = _shifted(_high(_high(y, y), y), 6)
            y = _shifted(_high(_THREE_HALVES, y) - _high(half, cube), 3)
        mantissa = _high(y, _ROOT_OF_HALF)
    # For 4: the mantissa is 2^30 times a half, and 2^20 / 2 = 524288.
    one = torch.tensor(1)
    return int(multiply_by_quantized_multiplier(one, mantissa, exponent + _UNITS))


def _high(a: int, b: int) -> int:
    """Rounded high half of twice a product of 32-bit integers, ties of negative ones to zero."""
    product = a * b
    magnitude = abs(product + (2**30 if product >= 0 else 1 - 2**30)) >> 31
    return magnitude if product >= 0 else -magnitude


def _shifted(x: int, bits: int) -> int:
    """A saturating left shift."""
    return max(INT32_MIN, min(INT32_MAX, x << bits))
