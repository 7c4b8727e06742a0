"""Embedding bags: rows of a table that are added up, averaged, or compared for the largest values.

They consist of a look-up and of the reduction's own instructions. Bags of one length are one
reduction; others have one each, and their number and lengths are those of the program.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor

from lightning_nna.emulation.operators import elementwise, linear, reduction
from lightning_nna.emulation.operators.call import Call, UnsupportedError
from lightning_nna.emulation.operators.concatenation import stack
from lightning_nna.emulation.operators.record import Operator, register_operator

_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "mean": reduction.mean,
    "sum": reduction.sum,
    "max": reduction.amax,
}


def embedding_bag(
    call: Call,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Emulate ``F.embedding_bag`` of row numbers ``(bags, n)`` or ``(n,)`` and a table.

    Args:
        call: The call.
        input: Row numbers, shape ``(bags, n)``; shape ``(n,)`` with offsets.
        weight: Table, shape ``(rows, width)``.
        offsets: First element of each bag, shape ``(bags,)``.
        max_norm: None, see :func:`supports_bag`.
        norm_type: Of no effect without ``max_norm``.
        scale_grad_by_freq: Whether gradients of rows are divided by how often they are read.
        mode: ``"mean"``, ``"sum"`` or ``"max"``.
        sparse: False, see :func:`supports_bag`.
        per_sample_weights: Factors of the rows, in the shape of ``input``.
        include_last_offset: Whether the last offset is the end of the last bag.
        padding_idx: None, see :func:`supports_bag`.

    Returns:
        Tensor of shape ``(bags, width)``.
    """
    lengths = _lengths(input, offsets, include_last_offset)
    is_even = len(set(lengths)) == 1
    if not lengths or not all(lengths):
        raise UnsupportedError("an empty bag has no rows to reduce: leave it out")
    if is_even:
        input = input.reshape(len(lengths), lengths[0])
    rows = linear.embedding(call, input, weight, scale_grad_by_freq=scale_grad_by_freq)
    if per_sample_weights is not None:
        shape = (*input.shape, 1)
        factors = call.viewed(per_sample_weights.reshape(shape), per_sample_weights)
        rows = elementwise.mul(call.child("weighted"), rows, factors)
    reduce, reducing = _REDUCTIONS[mode], call.child(mode)
    if is_even:
        result: Tensor = reduce(reducing, rows, 1)
        return result
    bags = [call.viewed(bag, rows) for bag in rows.split(lengths)]
    return stack(call.child("joined"), [reduce(reducing, bag, 0) for bag in bags])


def _lengths(input: Tensor, offsets: Tensor | None, include_last_offset: bool) -> list[int]:
    """Return the number of rows of every bag, which is part of a program."""
    if offsets is None:
        return [input.shape[1]] * len(input)
    ends = [] if include_last_offset else [len(input)]
    return [end - start for start, end in pairwise([*offsets.tolist(), *ends])]


def supports_bag(
    input: Any,
    weight: Any,
    offsets: Any = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: Any = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> bool | str:
    """Tell whether rows are reduced as they are, all of them, with dense gradients."""
    if max_norm is not None:
        return (
            "max_norm scales rows as they are looked up: scale the table itself, and leave it out"
        )
    if padding_idx is not None:
        return "no reduction leaves rows out: give padding a weight of 0 by per_sample_weights"
    if sparse:
        return "gradients of an emulated table are dense: leave sparse=True out"
    # ``torch.embedding_bag`` has the table first, and numbers of modes.
    return not input.is_floating_point() and mode in _REDUCTIONS


register_operator(
    Operator(
        "embedding_bag",
        torch=("embedding_bag",),
        emulate=embedding_bag,
        supports=supports_bag,
        has_weights=True,
        arithmetic="rows of an 8-bit table, and their mean, sum or largest values",
    )
)
