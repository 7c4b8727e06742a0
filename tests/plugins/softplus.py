"""Softplus as an operator from outside of the package: a table of 256 entries.

An accelerator looks up the entry of an 8-bit integer. In a program that is a GATHER, whose indices
are 32-bit integers from 0:

    CAST (int8 -> int32) -> ADD 128 -> GATHER (table)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna import elementary
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.driver import real, table
from lightning_nna.emulation.operators.record import Kernel, Operator
from lightning_nna.emulation.program import Activation, Stored

_INT8, _INT32 = 9, 2  # As the TensorFlow Lite schema numbers types.


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """Softplus of tensors of any shape, with the signature of ``F.softplus``."""
    return F.softplus(input, beta, threshold)


def supports_softplus(input: Any, beta: float = 1.0, threshold: float = 20.0) -> bool:
    """Tell whether the accelerator has this form: the table is made for a slope of 1."""
    return beta == 1 and threshold == 20


def _reals(x: Tensor, **parameters: float) -> Tensor:
    """Softplus with the same bits on every processor: max(x, 0) + log(1 + exp(-|x|))."""
    return x.relu() + elementary.log1p(elementary.exp(-x.abs())).float()


_integers = table(real(_reals))


def _instructions(
    operator: Operator,
    call: Call,
    operands: tuple[Activation, ...],
    y: Activation,
    **parameters: float,
) -> None:
    """Record the three instructions."""
    (x,) = operands
    low, high = x.qparams.bounds
    inputs = Activation(torch.arange(low, high + 1) * x.qparams.scale, x.qparams)
    entries = _integers(inputs, y=y.qparams, call=call, **parameters).clamp(*y.qparams.bounds)
    integers, scale, zero_point = x.stored().integers, y.qparams.scale, y.qparams.zero_point
    rows = Stored(entries.long() + zero_point, "int8", scale, zero_point, constant=True)
    offset = Stored(torch.tensor(128), "int32", constant=True)
    cast = Stored(integers, "int32", source=integers)
    raised = integers + 128
    index = Stored(raised, "int32", source=raised)
    call.record("CAST", [x.stored()], [cast], inDataType=_INT8, outDataType=_INT32)
    call.record("ADD", [cast, offset], [index])
    call.record("GATHER", [rows, index], [y.stored()], axis=0)


#: For ``register_operator``.
SOFTPLUS = Operator(
    "softplus",
    torch=("softplus",),
    float=softplus,
    integers=_integers,
    instructions=_instructions,
    supports=supports_softplus,
    litert=(Kernel("CAST", versions={"int8": 3}),),
    widths=(8,),
    learns_scale=True,
    arithmetic="table of 256 entries",
)
