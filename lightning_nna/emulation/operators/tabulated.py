"""Functions that no kernel computes: a table that a program looks up.

Every entry is the function of a real number in single precision, rounded once, so that the error is
at most half a step of the output. In a program such a table is a GATHER, whose indices are 32-bit
integers from 0:

    CAST (int8 -> int32) -> ADD 128 -> GATHER (table of 256 bytes)
    CAST (int16 -> int32) -> ADD 32768 -> GATHER (table of 128 KiB)

In 16 bits each pair of scales has a table of its own.

An operator of one's own is one line:

    register_operator(tabulated("erf", F.erf, lambda x: 1 - elementary.erfc(x).float()))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.driver import real, table
from lightning_nna.emulation.operators.record import Kernel, Operator, register_kernel
from lightning_nna.emulation.program import Activation, Stored

_TYPES = {"int8": 9, "int16": 7, "int32": 2}  # As the TensorFlow Lite schema numbers types.


def tabulated(
    name: str,
    function: Callable[..., Tensor],
    reals: Callable[..., Tensor],
    *,
    torch: Sequence[str | Callable[..., Any]] | None = None,
    learns_scale: bool = True,
    **fields: Any,
) -> Operator:
    """Return the record of a function of one tensor as a table of 256 entries, or 65,536.

    Args:
        name: Name of the operator.
        function: The function on tensors of any shape, with the signature of the torch function.
        reals: The same for the entries, float32, of one axis, with the same bits on every
            processor (see :mod:`lightning_nna.elementary`); takes the other arguments by name.
        torch: Torch functions; None for ``function`` alone.
        learns_scale: Whether the scale of its output can be learned.
        fields: Other fields of the record.

    Example:
        >>> tabulated("halved", lambda input: input / 2, lambda x: x / 2, torch=("halved",)).widths
        (8, 16)
    """
    integers = table(real(reals))
    settings = {
        "arithmetic": "table of 256 entries, in 16 bits of 65,536 (128 KiB), looked up by GATHER"
    }
    return Operator(
        name,
        torch=(function,) if torch is None else torch,
        float=function,
        integers=integers,
        instructions=partial(record_table, integers),
        learns_scale=learns_scale,
        **{**settings, **fields},
    )


def record_table(
    integers: Callable[..., Tensor],
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
    entries = integers(inputs, y=y.qparams, call=call, **parameters).clamp(*y.qparams.bounds)
    rows = Activation(entries * y.qparams.scale, y.qparams, constant=True).stored()
    index = record_cast(call, x, raised_by=half)
    call.record("GATHER", [rows, index], [y.stored()], axis=0)


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
    given, wanted = (_TYPES[stored.dtype] for stored in (operand, cast))
    call.record("CAST", [operand], [cast], inDataType=given, outDataType=wanted)
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
