"""Record the instructions that look up a table of one entry for every integer.

In a program such a table is a GATHER, whose indices are 32-bit integers from 0:

    CAST (int8 -> int32) -> ADD 128 -> GATHER (table of 256 bytes)
    CAST (int16 -> int32) -> ADD 32768 -> GATHER (table of 128 KiB)

In 16 bits each pair of scales has a table of its own. Where a runtime looks up 8 bits alone,
entries of 16 are the sum of two tables. Every function of one number is such a table, also one
whose own kernel a runtime lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.record import Kernel, Operator, register_kernel
from lightning_nna.emulation.operators.tables import LookedUp
from lightning_nna.emulation.program import SCHEMA_TYPES, Activation, Stored


def record_table(
    integers: Callable[..., Tensor | LookedUp],
    operator: Operator,
    call: Call,
    operands: tuple[Activation, ...],
    y: Activation,
    **parameters: Any,
) -> None:
    """Record the instructions that look a table up; see :attr:`.Operator.instructions`.

    Args:
        integers: Arithmetic of the operator.
        operator: Record of the operator.
        call: The call.
        operands: Activation of 8 or 16 bits, any shape.
        y: Result, of the same shape, of 8 or 16 bits.
        parameters: Other arguments of the function.
    """
    (x,) = operands
    half = 2 ** (x.qparams.bits - 1)
    # The first entry stands for -128, which weights of an embedding, symmetric, never are.
    first = -half - x.qparams.zero_point
    centered = torch.arange(first, first + 2 * half).clamp(*x.qparams.bounds)
    # In float64, which holds every integer of 16 bits times the scale of one of 8.
    inputs = Activation(centered.double() * x.qparams.scale, x.qparams)
    entries = integers(inputs, y=y.qparams, call=call, **parameters)
    if isinstance(entries, LookedUp):
        values, _ = entries.clipped(y.qparams, keep=False)
    else:
        values = entries.clamp(*y.qparams.bounds) * y.qparams.scale
    record_look_up(call, x, values, y, raised_by=half)


def record_look_up(
    call: Call, x: Activation, values: Tensor, y: Activation, *, raised_by: int = 0
) -> None:
    """Record the instructions that look integers up.

    Args:
        call: The call.
        x: Activation of 8 or 16 bits, any shape.
        values: Real values of the result, one axis, for the integers of ``x``, with the zero
            point, from ``-raised_by`` on.
        y: Result, of the same shape, of 8 or 16 bits.
        raised_by: Number that makes indices of the integers.
    """
    rows = Activation(values, y.qparams, constant=True).stored()
    index = record_cast(call, x, raised_by=raised_by)
    if y.qparams.bits == 8 or call.has("GATHER", "int16"):
        call.record("GATHER", [rows, index], [y.stored()], axis=0)
    else:
        _record_halves(call, rows, index, y)


def _record_halves(call: Call, rows: Stored, index: Stored, y: Activation) -> None:
    """Record two tables of 8 bits, whose sum, exact, is the result of 16.

    The entry 1000 is 3 * 256 + 232: the first table has 3, on a scale of 256 steps, and the second
    232, as -128 + 232 = 104 with a zero point of -128.
    """
    values, scale, results = y.stored().integers, y.qparams.scale, []
    for part, unit, zero_point in ((_upper, 256 * scale, 0), (_lower, scale, -128)):
        narrow, wide = part(values) + zero_point, part(values)
        table = Stored(part(rows.integers) + zero_point, "int8", unit, zero_point, constant=True)
        entry = Stored(narrow, "int8", unit, zero_point, source=narrow)
        call.record("GATHER", [table, index], [entry], axis=0)
        results.append(Stored(wide, "int16", unit, source=wide))
        call.record("QUANTIZE", [entry], [results[-1]])
    call.record("ADD", results, [y.stored()], potScaleInt16=False)


def _upper(x: Tensor) -> Tensor:
    return x >> 8


def _lower(x: Tensor) -> Tensor:
    return x & 255


def _version_of_cast(version: int, operator: Any, tensors: Any) -> int:
    """Version 3 with integers of 8 bits."""
    return 3 if tensors[operator.outputs[0]].dtype == "int8" else version


def record_cast(call: Call, x: Activation, *, raised_by: int = 0) -> Stored:
    """Record the instructions that make 32-bit integers of an activation.

    Args:
        call: The call.
        x: Activation of 8 or 16 bits, any shape.
        raised_by: Number that is added.

    Returns:
        The same integers, with the zero point, and the number added. They stand for no scale any
        more.
    """
    operand = x.stored()
    # TOSA takes the zero point of a quantized tensor off.
    taken_off = x.qparams.zero_point if call.state.spec.runtime == "tosa" else 0
    integers = operand.integers - taken_off
    cast = Stored(integers, "int32", source=integers)
    before, after = (SCHEMA_TYPES[stored.dtype] for stored in (operand, cast))
    call.record("CAST", [operand], [cast], inDataType=before, outDataType=after)
    added = taken_off + raised_by
    if not added:
        return cast
    integers = cast.integers + added
    result = Stored(integers, "int32", source=integers)
    call.record("ADD", [cast, Stored(torch.tensor(added), "int32", constant=True)], [result])
    return result


CAST = register_kernel(
    Kernel("CAST", order="elements", versions={"int8": 3}, version=_version_of_cast)
)
