"""Arithmetic of indices: integers that a program computes, as those of extremes, and counts.

``argmax + 1``, ``index // width``, ``index == other`` and one-hot vectors are instructions of
32-bit integers. PyTorch computes the same integers in 64 bits, so there is nothing to emulate; here
are the instructions. Indices that no data decide, as positions and lengths, are constants of a
program and have none.
"""

from __future__ import annotations

import operator as python
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.operators.call import Call, UnsupportedError
from lightning_nna.emulation.operators.comparison import COMPARISONS
from lightning_nna.emulation.operators.record import Form, Kernel, Operator, register_operator
from lightning_nna.emulation.program import SCHEMA_TYPES, Stored

# Axes over which the kernels broadcast.
_MOST_AXES = 4
_LIMIT = 2**31
_QUOTIENT = (
    "no kernel rounds a quotient of activations: compute with integers, as indices are, or before "
    "the emulated modules, which targets= selects"
)
_CLASSES = "a program has one shape: pass num_classes"

Operand = Tensor | int
Emulate = Callable[..., Tensor]


def _binary(
    kernel: str,
    function: Callable[[Any, Any], Any],
    call: Call,
    input: Operand,
    other: Operand,
    *,
    alpha: int = 1,
) -> Tensor:
    """Compute a function of two operands of shapes that broadcast; one may be a number."""
    if alpha != 1:
        other = _binary("MUL", python.mul, call, other, alpha)
    shapes = {x.shape for x in (input, other) if isinstance(x, Tensor)}
    if len(shapes) > 1 and max(map(len, shapes)) > _MOST_AXES:
        raise UnsupportedError("broadcast over four axes at most: flatten the others")
    result: Tensor = function(input, other)
    return _recorded(call, kernel, (input, other), result)


def _swapped(
    kernel: str,
    function: Callable[[Any, Any], Any],
    call: Call,
    input: Tensor,
    other: Operand,
    *,
    alpha: int = 1,
) -> Tensor:
    """Compute a function of the second operand and the first one."""
    if alpha != 1:
        input = _binary("MUL", python.mul, call, input, alpha)
    return _binary(kernel, function, call, other, input)


def negative(call: Call, input: Tensor) -> Tensor:
    """Subtract indices of any shape from 0."""
    return _binary("SUB", python.sub, call, 0, input)


def divide(
    call: Call, input: Operand, other: Operand, *, rounding_mode: str | None = None
) -> Tensor:
    """Divide indices of any shape, rounded down."""
    if rounding_mode != "floor":
        raise UnsupportedError("an index has no fraction: write //, or .float() before")
    return _binary("FLOOR_DIV", python.floordiv, call, input, other)


def clamp(
    call: Call, input: Tensor, min: Operand | None = None, max: Operand | None = None
) -> Tensor:
    """Bound indices of any shape."""
    result = input
    if min is not None:
        result = _binary("MAXIMUM", torch.clamp_min, call, result, min)
    return result if max is None else _binary("MINIMUM", torch.clamp_max, call, result, max)


def where(call: Call, *args: Any, **kwargs: Any) -> Tensor:
    """Select indices of any shape by a condition; the method has the condition second."""
    values = dict(zip(("condition", "input", "other"), args, strict=False))
    if args and args[0].dtype != torch.bool:
        values = dict(zip(("input", "condition", "other"), args, strict=False))
    return _selected(call, **{**values, **kwargs})


def _selected(call: Call, condition: Tensor, input: Operand, other: Operand) -> Tensor:
    result = torch.where(condition, input, other)
    if call.recording and result.dtype != torch.bool:
        inputs = [_stored_condition(condition), *(_stored(call, x) for x in (input, other))]
        call.record("SELECT_V2", inputs, [_stored_result(result)])
    return result


def masked_fill(call: Call, input: Tensor, mask: Tensor, value: Operand) -> Tensor:
    """Fill a number into indices of any shape."""
    return _selected(call, mask, value, input)


def cast(function: Emulate, call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Make integers of a condition of any shape; those of integers are the same."""
    result = function(input, *args, **kwargs)
    return _cast(call, input, result) if input.dtype == torch.bool else result


def one_hot(call: Call, tensor: Tensor, num_classes: int = -1) -> Tensor:
    """Emulate ``F.one_hot`` of indices of any shape: ones where they are, and zeros."""
    if num_classes < 0:
        raise UnsupportedError(_CLASSES)
    call.require("ONE_HOT", "int32")
    result = F.one_hot(tensor, num_classes)
    if call.recording:
        numbers = [_stored(call, number) for number in (num_classes, 1, 0)]
        inputs = [_stored(call, tensor), *numbers]
        call.record("ONE_HOT", inputs, [_stored_result(result)], axis=-1)
    return result


def total(
    call: Call,
    input: Tensor,
    dim: int | tuple[int, ...] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Add up indices over axes of any shape, or count where a condition holds."""
    if dtype is not None and dtype.is_floating_point:
        raise UnsupportedError("write .float() before the sum")
    axes = tuple(range(input.dim())) if dim is None else (dim,) if isinstance(dim, int) else dim
    call.require("SUM", "int32")
    result = input.sum(axes, keepdim) if axes else input.long()
    if call.recording and axes:
        over = Stored(torch.tensor([axis % input.dim() for axis in axes]), "int32", constant=True)
        inputs = [_stored(call, input), over]
        call.record("SUM", inputs, [_stored_result(result)], keepDims=keepdim)
    return result


def _recorded(call: Call, kernel: str, operands: tuple[Operand, ...], result: Tensor) -> Tensor:
    """Record an instruction of integers with its result, of any shape, and return the result."""
    call.require(kernel, "int32")
    if call.recording:
        inputs = [_stored(call, operand) for operand in operands]
        call.record(kernel, inputs, [_stored_result(result)])
    return result


def _stored(call: Call, x: Operand) -> Stored:
    """An operand of any shape as a 32-bit integer."""
    if not isinstance(x, Tensor):
        return Stored(torch.tensor(int(x)), "int32", constant=True)
    if x.dtype == torch.bool:
        x = _cast(call, x, x.long())
    return _stored_integers(x)


def _cast(call: Call, condition: Tensor, result: Tensor) -> Tensor:
    """Record the ones and zeros, of any shape, that a condition becomes, and return them."""
    if call.recording:
        types: dict[str, Any] = {
            "inDataType": SCHEMA_TYPES["bool"],
            "outDataType": SCHEMA_TYPES["int32"],
        }
        call.record("CAST", [_stored_condition(condition)], [_stored_result(result)], **types)
    return result


def _stored_condition(x: Tensor) -> Stored:
    return Stored(x, "bool", source=x)


def _stored_result(x: Tensor) -> Stored:
    """A result of any shape, which has 32 bits in a program."""
    if x.dtype == torch.bool:
        return _stored_condition(x)
    wide = x.long()
    if x.numel() and not bool(((wide >= -_LIMIT) & (wide < _LIMIT)).all()):
        raise OverflowError(
            f"indices from {int(x.min())} to {int(x.max())}, and those of a program have 32 bits"
        )
    return _stored_integers(x)


def _stored_integers(x: Tensor) -> Stored:
    # A copy: what works in place on an index would change what was recorded.
    return Stored(x.long().clone(), "int32", source=x)


_REMAINDER = partial(_binary, "FLOOR_MOD", python.mod)
_FLOOR = partial(_binary, "FLOOR_DIV", python.floordiv)
_INTEGERS = frozenset({torch.int32, torch.int64})
#: Methods that cast, with the types that a call must have among its arguments.
CASTS: dict[str, frozenset[Any]] = {
    "int": frozenset(),
    "long": frozenset(),
    "to": _INTEGERS,
    "type": _INTEGERS,
}
_BY_NAMES: dict[tuple[str, ...], Emulate] = {
    ("add", "__add__", "__radd__", "__iadd__"): partial(_binary, "ADD", python.add),
    ("sub", "subtract", "__sub__", "__isub__"): partial(_binary, "SUB", python.sub),
    ("rsub", "__rsub__"): partial(_swapped, "SUB", python.sub),
    ("mul", "multiply", "__mul__", "__rmul__"): partial(_binary, "MUL", python.mul),
    ("neg", "negative", "__neg__"): negative,
    ("div", "divide"): divide,
    ("maximum",): partial(_binary, "MAXIMUM", torch.maximum),
    ("minimum",): partial(_binary, "MINIMUM", torch.minimum),
    ("clamp", "clip"): clamp,
    ("clamp_min",): partial(_binary, "MAXIMUM", torch.clamp_min),
    ("clamp_max",): partial(_binary, "MINIMUM", torch.clamp_max),
    ("where",): where,
    ("masked_fill",): masked_fill,
    ("sum",): total,
    **{names: partial(_binary, *form) for names, form in COMPARISONS.items()},
}
# Functions that no other record has.
_OWN: dict[tuple[str, ...], Emulate] = {
    ("floor_divide", "__floordiv__"): _FLOOR,
    ("__rfloordiv__",): partial(_swapped, "FLOOR_DIV", python.floordiv),
    ("remainder", "__mod__"): _REMAINDER,
    ("__rmod__",): partial(_swapped, "FLOOR_MOD", python.mod),
    ("one_hot",): one_hot,
}


def _supports(*args: Any, **kwargs: Any) -> bool | str:
    """Tell whether there are no floats of any shape among the operands."""
    values = [x for x in (*args, *kwargs.values()) if isinstance(x, (Tensor, float))]
    floats = [x for x in values if isinstance(x, float) or x.is_floating_point()]
    return _QUOTIENT if floats else True


INDEX_ARITHMETIC = register_operator(
    Operator(
        "index_arithmetic",
        torch=(),
        emulate=_FLOOR,
        forms=tuple(Form(names, emulate, _supports) for names, emulate in _OWN.items()),
        litert=(
            Kernel("FLOOR_DIV", order="elements", options="FloorDivOptions"),
            Kernel("FLOOR_MOD", order="elements", options="FloorModOptions"),
            Kernel("ONE_HOT"),
            Kernel("SUM", options="ReducerOptions"),
        ),
        arithmetic="32-bit integers: indices of extremes, sums, products, quotients, comparisons",
    )
)
#: The record by the names of torch functions, with what emulates each of them.
OF_INDICES: dict[str, Operator] = {
    name: replace(INDEX_ARITHMETIC, emulate=emulate)
    for names, emulate in {**_BY_NAMES, **_OWN}.items()
    for name in names
}
# In place.
OF_INDICES.update(
    (f"{name}_", operator) for name, operator in [*OF_INDICES.items()] if not name.endswith("_")
)
OF_INDICES.update(
    (name, replace(INDEX_ARITHMETIC, emulate=partial(cast, getattr(torch.Tensor, name))))
    for name in CASTS
)
#: Names of functions that make integers of conditions alone.
OF_CONDITIONS = frozenset({*CASTS, "sum"})
