"""Cumulative sums: a product with a triangular matrix of ones, which is part of the program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.constants import Kind
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.driver import gives_float32
from lightning_nna.emulation.operators.matmul import matmul
from lightning_nna.emulation.operators.record import Operator, register_operator


def cumsum(call: Call, input: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Emulate ``torch.cumsum``; the result is float32.

    Args:
        call: The call.
        input: Activation of any shape.
        dim: Axis along which values are added up.
        dtype: None or float32, see :func:`supports_cumsum`.
    """
    length = input.shape[dim]
    # Row (1, 2, 3) times columns (1, 0, 0), (1, 1, 0) and (1, 1, 1) is (1, 3, 6).
    ones = torch.ones(length, length, device=input.device).triu()
    call.state.constants.mark(ones, Kind.CONSTANT)
    rows = call.viewed(input.movedim(dim, -1), input)
    sums = matmul(call, rows, ones)
    return call.viewed(sums.movedim(-1, dim), sums)


def supports_cumsum(
    input: Any, dim: int, *, dtype: torch.dtype | None = None, **_: Any
) -> bool | str:
    """Tell whether there is anything to add up, to a result of float32."""
    has_terms = isinstance(input, Tensor) and input.dim() > 0 and input.numel() > 0
    return has_terms and gives_float32(dtype)


register_operator(
    Operator(
        "cumsum",
        torch=("cumsum", "cumsum_"),
        emulate=cumsum,
        supports=supports_cumsum,
        arithmetic="a matrix product with a triangular constant of ones",
    )
)
