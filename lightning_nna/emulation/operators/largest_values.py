"""The largest values of an axis in their order, and their indices.

The kernel chooses among integers of the last axis. Of equal values the first comes first, which
`torch.topk` leaves open.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.record import Form, Kernel, Operator, register_operator
from lightning_nna.emulation.program import Activation, Stored

_DESCENDING = "the kernel has the largest values alone: negate the input, or sort it descending"


def topk(
    call: Call, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> Any:
    """Emulate ``torch.topk`` over one axis of any shape; the values are sorted in any case."""
    call.require("TOPK_V2")
    x = call.operand(input, "input")
    with float32_arithmetic(input):
        ordered = torch.sort(x.value, dim=dim, descending=True, stable=True)
        values, indices = (each.narrow(dim, 0, k).clone() for each in ordered)
    call.unchanged(values, x)
    if call.recording:
        # Views, with the axis last.
        source = Activation(x.value.transpose(dim, -1), x.qparams)
        result = Activation(values.transpose(dim, -1), x.qparams)
        order = indices.transpose(dim, -1)
        count = Stored(torch.tensor(k), "int32", constant=True)
        results = [result.stored(), Stored(order, "int32", source=order)]
        call.record("TOPK_V2", [source.stored(), count], results)
    return torch.return_types.topk((values, indices))


def sort(
    call: Call,
    input: Tensor,
    dim: int = -1,
    descending: bool = False,
    stable: bool | None = False,
) -> Any:
    """Emulate ``torch.sort`` over one axis of any shape, descending."""
    values, indices = topk(call, input, input.shape[dim], dim)
    return torch.return_types.sort((values, indices))


def argsort(
    call: Call,
    input: Tensor,
    dim: int = -1,
    descending: bool = False,
    stable: bool | None = False,
) -> Tensor:
    """Emulate ``torch.argsort`` over one axis of any shape, descending."""
    indices: Tensor = topk(call, input, input.shape[dim], dim)[1]
    return indices


def _supports_topk(
    input: Any, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True, **kwargs: Any
) -> bool | str:
    """Tell whether the largest values of an axis are asked for."""
    return input.dim() > 0 and input.numel() > 0 and k > 0 and (largest or _DESCENDING)


def _supports_sort(
    input: Any, dim: int = -1, descending: bool = False, stable: Any = None, **kwargs: Any
) -> bool | str:
    """Tell whether an axis is sorted descending."""
    return input.dim() > 0 and input.numel() > 0 and (descending or _DESCENDING)


register_operator(
    Operator(
        "topk",
        torch=("topk",),
        emulate=topk,
        supports=_supports_topk,
        forms=(
            Form(("sort",), sort, _supports_sort),
            Form(("argsort",), argsort, _supports_sort),
        ),
        litert=(Kernel("TOPK_V2", options="TopKV2Options", versions={"int8": 2, "int16": 3}),),
        arithmetic="chooses among the integers; of equal ones the first comes first",
    )
)
