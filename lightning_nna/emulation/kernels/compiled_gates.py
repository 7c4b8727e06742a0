"""Gates of recurrent layers, in the loops of :mod:`.compiled_lstm` and :mod:`.compiled_gru`.

A step is some short loops over a row, each over few arrays: a compiler turns a loop into vector
instructions only where a few comparisons tell that its arrays lie apart.

A sequence calls the same kernel with the same arrays at every step. What depends on these alone is
prepared once: each kernel has a function ``prepared_*`` of its buffers and numbers, without the
rows, which returns a function of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from lightning_nna.emulation.kernels.compiled import compiled, inlined
from lightning_nna.emulation.kernels.compiled_elements import multipliers, rescaled

#: Runs a step of certain rows, and tells whether the backward needs its masks; see
#: :func:`.library.prepared`.
RunStep = Callable[..., bool]

INT16_MIN, INT16_MAX = -(2**15), 2**15 - 1
GATE_SCALE = np.float32(2.0**-15)
SQUARED_SCALE = np.float32(2.0**-30)
ONE = np.float32(1.0)


def _fused_multiply_add(typing_context, a, b, c):
    """Return a b + c of float32, rounded once."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    number = numba.float32
    return number(number, number, number), generate


fused_multiply_add: Any = intrinsic(_fused_multiply_add)


@inlined
def clipped_16(x):
    """Clip an integer to 16 bits."""
    return min(max(x, INT16_MIN), INT16_MAX)


@inlined
def is_inside_16(x):
    """Tell by 1 or 0 whether 16 bits hold an integer."""
    return np.int64((x >= INT16_MIN) & (x <= INT16_MAX))


@inlined
def flag(flags, bit):
    """Return a bit of int32 as float32."""
    return np.float32((np.int32(flags) >> bit) & np.int32(1))


@inlined
def gate_slope(integer):
    """Return y - y^2 of Q0.15, rounded once: 24576 (0.75) has (2^15 - 24576) 24576 2^-30."""
    y = np.int32(integer)
    return np.float32(y * (np.int32(32768) - y)) * SQUARED_SCALE


@inlined
def tanh_slope(integer):
    """Return 1 - y^2 of Q0.15, rounded once."""
    y = np.int32(integer)
    return np.float32(np.int32(1073741824) - y * y) * SQUARED_SCALE


@inlined
def real_gate(integer):
    """Return the real value of Q0.15."""
    return np.float32(integer) * GATE_SCALE


@compiled
def rescaled_product(x, factor, mantissa, exponent, rounding):
    """Rescale without a zero point; a function of its own takes less time to compile."""
    return rescaled(x, factor, mantissa, exponent, rounding, 0, False)


def multipliers_of(factors: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Write factors, shape ``(n,)``, as mantissas and exponents."""
    mantissas, exponents = (np.empty(factors.shape, np.int64) for _ in range(2))
    multipliers(factors, mantissas, exponents)
    return mantissas, exponents


def array_of(x: Tensor) -> NDArray[Any]:
    """Return the memory of a tensor without gaps, any shape."""
    assert x.is_contiguous()
    return x.detach().numpy()
