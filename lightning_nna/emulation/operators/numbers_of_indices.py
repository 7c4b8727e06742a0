"""Indices of the data as numbers: ``argmax(x).float()``, ``one_hot(index).float()``.

A program casts the 32-bit integers to activations on a scale of 1, which changes no value. Where 8
bits do not hold what calibration has seen, it casts to 16 and requantizes. Integers beyond take the
ends of the range; a cast alone would wrap around.
"""

from __future__ import annotations

from torch import Tensor

from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.record import Operator, register_operator


def numbers(call: Call, input: Tensor) -> Tensor:
    """Emulate ``index.float()`` of any shape."""
    x = call.operand(input, "input")
    return call.with_qparams(x.value, x.qparams)


NUMBERS = register_operator(
    Operator(
        "numbers_of_indices",
        torch=(),
        emulate=numbers,
        arithmetic="32-bit integers cast to a scale of 1; 16 bits between where 8 do not hold them",
    )
)
