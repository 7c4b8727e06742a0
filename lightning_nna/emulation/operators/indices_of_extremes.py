"""Indices of extremes, and the largest values in their order.

They choose among integers and need no arithmetic. The kernel of minima has no 16 bits: integers
go to 32 before. Of equal values the first comes first, as in the kernels: `torch.topk` leaves their
order open.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.record import Kernel, Operator, register_operator
from lightning_nna.emulation.operators.table_look_up import record_cast
from lightning_nna.emulation.program import SCHEMA_TYPES, Activation, Stored


def _index_of(
    kernel: str,
    function: Callable[..., Tensor],
    call: Call,
    input: Tensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    axis: int | None = None,
    keepdims: bool = False,
) -> Tensor:
    """Emulate ``argmax`` or ``argmin`` over one axis, or of all values, of any shape."""
    call.require(kernel if call.bits == 8 else "TOPK_V2")
    dim, keepdim = axis if dim is None else dim, keepdim or keepdims
    x = call.operand(input, "input")
    if call.observing:
        return function(input, dim, keepdim)
    value = x.value.reshape(-1) if dim is None else x.value
    over = 0 if dim is None else dim % value.dim()
    index = function(value, over)
    if call.recording:
        record_index(call, kernel, Activation(value, x.qparams), over, index)
    if not keepdim:
        return index
    return index.reshape([1] * input.dim()) if dim is None else index.unsqueeze(over)


def record_index(call: Call, kernel: str, x: Activation, axis: int, index: Tensor) -> None:
    """Record the instruction that has the indices of extremes over an axis, which goes away.

    In 16 bits the kernel of the largest values has one for a maximum; for a minimum integers go to
    32 bits before.

    Args:
        call: The call.
        kernel: Name of the kernel.
        x: Activation of any shape.
        axis: Axis, from 0.
        index: Indices, in the shape of ``x`` without the axis.
    """
    if x.qparams.bits == 16 and kernel == "ARG_MAX":
        _record_largest(call, x, axis, index)
        return
    operand = x.stored() if x.qparams.bits == 8 else record_cast(call, x)
    over = Stored(torch.tensor(axis), "int32", constant=True)
    result = Stored(index.long(), "int32", source=index)
    call.record(kernel, [operand, over], [result], outputType=SCHEMA_TYPES["int32"])


def _record_largest(call: Call, x: Activation, axis: int, index: Tensor) -> None:
    """Record the instruction that has the largest value of an axis, and its index."""
    last = Activation(x.value.movedim(axis, -1), x.qparams)
    largest = Activation(last.value.amax(-1, keepdim=True), x.qparams)
    numbers = index.unsqueeze(-1)
    count = Stored(torch.tensor(1), "int32", constant=True)
    results = [largest.stored(), Stored(numbers.long(), "int32", source=numbers)]
    call.record("TOPK_V2", [last.stored(), count], results)


def supports_index(input: Any, *args: Any, **kwargs: Any) -> bool:
    """Tell whether there are values to choose among."""
    return input.dim() > 0 and input.numel() > 0 and "out" not in kwargs


register_operator(
    Operator(
        "argmax",
        torch=("argmax",),
        emulate=partial(_index_of, "ARG_MAX", torch.argmax),
        supports=supports_index,
        litert=(
            Kernel("ARG_MAX", versions={"int8": 2}),
            Kernel("TOPK_V2", options="TopKV2Options", versions={"int8": 2, "int16": 3}),
        ),
        arithmetic="the first index of the largest integer",
    )
)
register_operator(
    Operator(
        "argmin",
        torch=("argmin",),
        emulate=partial(_index_of, "ARG_MIN", torch.argmin),
        supports=supports_index,
        litert=(Kernel("ARG_MIN", versions={"int8": 2}),),
        arithmetic="the first index of the smallest integer; integers of 16 bits go to 32 before",
    )
)
