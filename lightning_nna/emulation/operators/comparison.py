r"""Comparisons of activations, whose results are conditions that the data decide.

The 8-bit kernel brings both sides to a scale of :math:`2^{-8}`, whatever their own scales are, and
compares the integers (so do those of equality in 16 bits):

.. math:: M(s_a;\ 2^8 (q_a - o_a)) \lessgtr M(s_b;\ 2^8 (q_b - o_b))

It wants scales below 1, and merges values of a scale below :math:`2^{-8}`. There both sides are
multiplied by a power of two before, which changes no integer. Other 16-bit kernels compare the
integers themselves. In 16 bits both sides are requantized to common parameters.

A condition is for ``torch.where``, ``masked_fill`` and products; Python cannot branch by it in a
program.
"""

from __future__ import annotations

import math
import operator as python
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.rescaling import rescale
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators.call import (
    Call,
    UnsupportedError,
    quantize,
    requantize,
    with_any_integer,
)
from lightning_nna.emulation.operators.record import (
    Form,
    Kernel,
    Operator,
    register_operator,
)
from lightning_nna.emulation.program import Activation, Stored
from lightning_nna.emulation.ranges import QParams, symmetric_qparams

# Left shift of the 8-bit kernel, and axes over which the kernels broadcast.
_SHIFT, _AXES = 8, 4

Compare = Callable[[Any, Any], Any]
#: Kernel and function by the names of the torch functions.
COMPARISONS: dict[tuple[str, ...], tuple[str, Compare]] = {
    ("eq", "__eq__"): ("EQUAL", python.eq),
    ("ne", "__ne__", "not_equal"): ("NOT_EQUAL", python.ne),
    ("lt", "__lt__", "less"): ("LESS", python.lt),
    ("le", "__le__", "less_equal"): ("LESS_EQUAL", python.le),
    ("gt", "__gt__", "greater"): ("GREATER", python.gt),
    ("ge", "__ge__", "greater_equal"): ("GREATER_EQUAL", python.ge),
}
_EQUALITY = (python.eq, python.ne)
# Kernels that 16 bits do not have, and those of swapped operands, which they do.
_SWAPPED = {"GREATER": "LESS", "LESS_EQUAL": "GREATER_EQUAL"}


def compare(
    kernel: str, function: Compare, call: Call, input: Tensor, other: Tensor | float
) -> Tensor:
    """Compare two activations, or one with a constant, elementwise.

    Args:
        kernel: Name of the kernel.
        function: The comparison.
        call: The call.
        input: Activation or constant of any shape.
        other: The same, of a shape that broadcasts, or a number.

    Returns:
        Booleans of the broadcast shape.
    """
    shape = other.shape if isinstance(other, Tensor) else input.shape
    if max(input.dim(), len(shape)) > _AXES and input.shape != shape:
        raise UnsupportedError("broadcast over four axes at most: flatten the others")
    if not isinstance(other, Tensor) and not math.isfinite(other):
        raise UnsupportedError("results of an accelerator are finite")
    is_swapped = call.bits == 16 and kernel in _SWAPPED
    kernel = _SWAPPED[kernel] if is_swapped else kernel
    call.require(kernel)
    a, b = call.operand(input, "input"), call.operand(other, "other")
    if call.observing:
        result: Tensor = function(input, other)
        return result
    with float32_arithmetic(a.value), torch.no_grad():
        if call.bits == 16:
            a, b = _common(call, a, b)
        if call.bits == 8 or function in _EQUALITY:
            a, b = _scaled(call, a, b)
            result = function(*(_shifted(call, x) for x in (a, b)))
        else:
            result = function(a.integers(), b.integers())
    if call.recording:
        operands = [a.stored(), b.stored()]
        operands = operands[::-1] if is_swapped else operands
        call.record(kernel, operands, [Stored(result, "bool", source=result)])
    return result


def _shifted(call: Call, x: Activation) -> Tensor:
    """Integers that the kernel compares, float64, in the shape of ``x``."""
    # On a scale of 0.01 the integers 1 and 2, 0.01 and 0.02, become 256 * 0.01 = 3 and 5.
    rounding = call.state.spec.rounding_of("double")
    largest = float(x.qparams.largest * 2**_SHIFT)
    shifted = x.integers().double() * 2.0**_SHIFT
    return rescale(shifted, x.qparams.scale, rounding=rounding, largest=largest)


def _scaled(call: Call, a: Activation, b: Activation) -> tuple[Activation, Activation]:
    """Both sides of a kernel that rescales on scales that it can tell apart."""
    a, b = _constant_like(b, a), _constant_like(a, b)
    scales = a.qparams.scale, b.qparams.scale
    if max(scales) < 1 and min(scales) >= 2.0**-_SHIFT:
        return a, b
    # The larger scale from 0.5 to 1.
    power = -math.frexp(max(scales))[1]
    return _times(call, a, power), _times(call, b, power)


def _constant_like(x: Activation, y: Activation) -> Activation:
    """``y`` on the parameters of ``x`` if it is a constant that these hold exactly."""
    if not y.constant or x.constant:
        return y
    integers = y.value.detach().double() / x.qparams.scale
    low, high = x.qparams.bounds
    exact = (integers == integers.round()) & (integers >= low) & (integers <= high)
    return Activation(y.value, x.qparams, constant=True) if bool(exact.all()) else y


def _times(call: Call, x: Activation, power: int) -> Activation:
    """Multiply by a power of two: the same integers on another scale."""
    factor, grid = 2.0**power, x.qparams
    y = replace(grid, scale=grid.scale * factor)
    result = Activation(x.value.detach() * factor, y, x.constant)
    if call.recording and power and not x.constant:
        # The constant is the integer 1 on a scale of the factor.
        one = Activation(
            torch.tensor(factor), replace(grid, scale=factor, zero_point=0), constant=True
        )
        call.record("MUL", [x.stored(), one.stored()], [result.stored()])
    return result


def _common(call: Call, a: Activation, b: Activation) -> tuple[Activation, Activation]:
    """Both sides of the 16-bit kernel on the same parameters, those of the larger range."""
    if a.qparams == b.qparams:
        return a, b
    a, b = with_any_integer(call, a), with_any_integer(call, b)
    fixed = [float(x.value.detach().abs().max()) for x in (a, b) if x.constant]
    largest = max(fixed, default=0.0)
    y = max((x.qparams for x in (a, b) if not x.constant), key=lambda q: q.scale)
    if largest > y.scale * y.bounds[1]:
        y = symmetric_qparams(largest, bits=16)
    return _onto(call, a, y), _onto(call, b, y)


def _onto(call: Call, x: Activation, y: QParams) -> Activation:
    if x.constant:
        return Activation(quantize(x.value, y), y, constant=True)
    return Activation(requantize(call, x, y), y)


def _logical(kernel: str, function: Callable[..., Tensor], call: Call, *operands: Tensor) -> Tensor:
    """Emulate a function of conditions, of shapes that broadcast."""
    shapes = {x.shape for x in operands}
    if len(shapes) > 1 and max(x.dim() for x in operands) > _AXES:
        raise UnsupportedError("broadcast over four axes at most: flatten the others")
    result = function(*operands)
    if call.recording:
        constants = call.state.constants
        inputs = [Stored(x, "bool", constant=constants.is_constant(x), source=x) for x in operands]
        call.record(kernel, inputs, [Stored(result, "bool", source=result)])
    return result


def logical_not(call: Call, condition: Tensor) -> Tensor:
    """Negate a condition of any shape."""
    return _logical("LOGICAL_NOT", torch.logical_not, call, condition)


def _bool_kernel(name: str, **settings: Any) -> Kernel:
    options = name.title().replace("_", "") + "Options"
    return Kernel(name, order="elements", options=options, **settings)


register_operator(
    Operator(
        "comparison",
        torch=(),
        emulate=compare,
        forms=tuple(Form(names, partial(compare, *form)) for names, form in COMPARISONS.items()),
        litert=tuple(
            _bool_kernel(name, versions={"int8": 2, "int16": 4 if function in _EQUALITY else 3})
            for name, function in COMPARISONS.values()
        ),
        arithmetic="both sides at a scale of $2^{-8}$; 16 bits: on common parameters",
    )
)
#: Torch functions of conditions by their kernel; exclusive or is that two are not equal.
LOGICAL: dict[tuple[str, ...], tuple[str, Callable[..., Tensor]]] = {
    ("logical_not", "bitwise_not", "__invert__"): ("LOGICAL_NOT", torch.logical_not),
    ("logical_and", "bitwise_and", "__and__", "__rand__"): ("LOGICAL_AND", torch.logical_and),
    ("logical_or", "bitwise_or", "__or__", "__ror__"): ("LOGICAL_OR", torch.logical_or),
    ("logical_xor", "bitwise_xor", "__xor__", "__rxor__"): ("NOT_EQUAL", torch.logical_xor),
}
register_operator(
    Operator(
        "logical",
        torch=(),
        emulate=_logical,
        forms=tuple(Form(names, partial(_logical, *form)) for names, form in LOGICAL.items()),
        litert=tuple(_bool_kernel(name) for name in ("LOGICAL_NOT", "LOGICAL_AND", "LOGICAL_OR")),
        arithmetic="of booleans",
    )
)
