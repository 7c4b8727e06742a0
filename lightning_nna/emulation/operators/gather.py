"""Values read at indices that a program computes: ``gather``, ``take``, ``x[argmax]``.

They are moved and not changed, so the parameters of the tensor go along. A read along one axis is a
``GATHER``, perhaps with batch axes; several indices, as in ``x[rows, columns]``, are a
``GATHER_ND``. Indices count from 0: no kernel knows negative ones.

Reads at indices that the program fixes are data movement (see :mod:`.layout`), and rows of
parameters are embeddings (see :mod:`.linear`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_nna.emulation.operators.call import Call, UnsupportedError
from lightning_nna.emulation.operators.linear import LOOK_UP
from lightning_nna.emulation.operators.record import Form, Kernel, Operator, register_operator
from lightning_nna.emulation.program import Activation, Stored
from lightning_nna.emulation.ranges import PENDING


class _View(NamedTuple):
    """Views of an instruction: the source, the indices and the result, and where they lie.

    Args:
        kernel: Name of the kernel.
        source: Values, any shape.
        numbers: Integers, any shape.
        result: Result, in the shape that the kernel gives.
        options: Options of the instruction.
    """

    kernel: str
    source: Tensor
    numbers: Tensor
    result: Tensor
    options: dict[str, Any]


def gather(
    call: Call, input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False
) -> Tensor:
    """Emulate ``torch.gather`` at computed indices, of any shape."""
    return _along(call, input, dim, index, lambda x, i: torch.gather(x, dim, i))


def take_along_dim(call: Call, input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """Emulate ``torch.take_along_dim`` at computed indices, of shapes that broadcast."""
    if dim is None:
        flat = call.viewed(input.reshape(-1), input)
        return _along(call, flat, 0, indices.reshape(-1), lambda x, i: torch.gather(x, 0, i))
    axis = dim % input.dim()
    shape = torch.broadcast_shapes(
        *((*x.shape[:axis], 1, *x.shape[axis + 1 :]) for x in (input, indices))
    )
    before, after = shape[:axis], shape[axis + 1 :]
    both = [x.expand((*before, x.shape[axis], *after)) for x in (input, indices)]
    source = call.viewed(both[0], input)
    return _along(call, source, axis, both[1], lambda x, i: torch.gather(x, axis, i))


def index_select(call: Call, input: Tensor, dim: int, index: Tensor) -> Tensor:
    """Emulate ``torch.index_select`` at computed indices, of any shape."""
    axis = dim % input.dim() if input.dim() else 0

    def read(x: Tensor, result: Tensor) -> _View:
        return _View("GATHER", x, index, result, {"axis": axis})

    return _look_up(call, input, lambda x: torch.index_select(x, dim, index), read)


def take(call: Call, input: Tensor, index: Tensor) -> Tensor:
    """Emulate ``torch.take`` at computed indices, of any shape."""
    _require_from_zero(call, [index], input.numel())

    def read(x: Tensor, result: Tensor) -> _View:
        return _View("GATHER", x.reshape(-1), index, result, {"axis": 0})

    return _look_up(call, input, lambda x: torch.take(x, index), read)


def get_item(call: Call, input: Tensor, index: Any) -> Tensor:
    """Emulate ``input[index]`` of any shape; some entries of the index are computed integers."""
    view, axes, numbers, is_first = _parsed(input, index)
    for axis, number in zip(axes, numbers, strict=True):
        _require_from_zero(call, [number], input[view].shape[axis])

    def read(x: Tensor, result: Tensor) -> _View:
        source = x[view]
        if len(axes) == 1:
            return _View("GATHER", source, numbers[0], result, {"axis": axes[0]})
        several = torch.stack(torch.broadcast_tensors(*numbers), -1)
        count = several.dim() - 1
        first = 0 if is_first else axes[0]
        moved = result.movedim(tuple(range(first, first + count)), tuple(range(count)))
        return _View("GATHER_ND", source.movedim(axes, tuple(range(len(axes)))), several, moved, {})

    kernel = "GATHER" if len(axes) == 1 else "GATHER_ND"
    return _look_up(call, input, lambda x: x[index], read, kernel)


def _parsed(x: Tensor, index: Any) -> tuple[tuple[Any, ...], list[int], list[Tensor], bool]:
    """Split an index of a tensor of any shape into a view and tensors of integers.

    Returns:
        Index of the view; its axes that the integers read; the integers; and whether their axes
        come first in the result, as they do where they are not side by side.

    Example:
        >>> view, axes, numbers, is_first = _parsed(torch.zeros(4, 5, 6), (..., torch.tensor([2])))
        >>> view, axes, is_first
        ((slice(None, None, None), slice(None, None, None), slice(None, None, None)), [2], False)
    """
    items = list(index) if isinstance(index, tuple) else [index]
    items = [torch.tensor(each) if isinstance(each, list) else each for each in items]
    tensors = [each for each in items if isinstance(each, Tensor)]
    if any(each.dtype == torch.bool for each in tensors):
        raise UnsupportedError("a program has one shape: select with torch.where, not with a mask")
    used = sum(each is not None and each is not Ellipsis for each in items)
    place = next((k for k, each in enumerate(items) if each is Ellipsis), len(items))
    items[place : place + 1] = [slice(None)] * (x.dim() - used)
    view = tuple(slice(None) if isinstance(each, Tensor) else each for each in items)
    # A plain number takes an axis away, as the view does.
    left = [each for each in items if not isinstance(each, int)]
    axes = [axis for axis, each in enumerate(left) if isinstance(each, Tensor)]
    return view, axes, tensors, axes[-1] - axes[0] >= len(axes)


def _require_from_zero(call: Call, numbers: Sequence[Tensor], count: int) -> None:
    """Raise if an index of any shape counts from the end."""
    for each in numbers:
        if each.numel() and int(each.min()) < 0:
            raise IndexError(
                f"{call.site} reads at {int(each.min())} of {count}, and a program counts from 0: "
                f"write index % {count}"
            )


def _along(
    call: Call,
    input: Tensor,
    dim: int,
    index: Tensor,
    function: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Read along an axis, at other indices for each position of the other axes."""
    if not input.dim():
        raise UnsupportedError("there is nothing to choose from: leave gather out")
    axis = dim % input.dim()

    def read(x: Tensor, result: Tensor) -> _View:
        # Axes along which the index repeats are read at once: of x (2, 9, 4) at an index (2, 3, 1)
        # that was expanded to (2, 3, 4) three rows of 4 for each of the 2.
        others = [k for k in range(x.dim()) if k != axis]
        rows = [k for k in others if index.shape[k] > 1 and index.stride(k) == 0]
        batch = [k for k in others if k not in rows]
        order = (*batch, axis, *rows)
        within = tuple(slice(None if k == axis else index.shape[k]) for k in range(x.dim()))
        once: tuple[Any, ...] = (..., *(0 for _ in rows))
        numbers = index.permute(order)[once]
        options = {"axis": len(batch), "batchDims": len(batch)}
        return _View("GATHER", x[within].permute(order), numbers, result.permute(order), options)

    return _look_up(call, input, lambda x: function(x, index), read)


def _look_up(
    call: Call,
    input: Tensor,
    function: Callable[[Tensor], Tensor],
    read: Callable[[Tensor, Tensor], _View],
    kernel: str = "GATHER",
) -> Tensor:
    """Run a function that moves values of a tensor of any shape, and record its instruction."""
    call.require(kernel, None if input.is_floating_point() else "int32")
    if not input.is_floating_point():
        result = function(input)
        if call.recording:
            each = read(input, result)
            _record(call, each, *(Stored(x.long(), "int32", source=x) for x in each[1:4:2]))
        return result
    x = call.operand(input, "input")
    result = function(x.value)
    if call.observing:
        return call.with_qparams(result, PENDING)
    if call.recording:
        each = read(x.value, result)
        source = replace(x, value=each.source).stored()
        _record(call, each, source, Activation(each.result, x.qparams).stored())
    return call.with_qparams(result, x.qparams)


def _record(call: Call, view: _View, source: Stored, result: Stored) -> None:
    index = Stored(view.numbers.long(), "int32", source=view.numbers)
    call.record(view.kernel, [source, index], [result], **view.options)


def _version_of_gather_nd(version: int, operator: Any, tensors: Any) -> int:
    """Version 3 of 16 bits."""
    return 3 if tensors[operator.inputs[0]].dtype == "int16" else 1


GATHER = register_operator(
    Operator(
        "gather",
        torch=("gather",),
        emulate=gather,
        forms=(Form(("take_along_dim",), take_along_dim), Form(("take",), take)),
        litert=(LOOK_UP, Kernel("GATHER_ND", version=_version_of_gather_nd)),
        arithmetic="values at computed indices, moved unchanged",
    )
)
#: The record by the names of functions that read at indices, with what emulates each of them.
READS: dict[str, Operator] = {
    "gather": GATHER,
    "take_along_dim": replace(GATHER, emulate=take_along_dim),
    "take": replace(GATHER, emulate=take),
    "index_select": replace(GATHER, emulate=index_select),
    "__getitem__": replace(GATHER, emulate=get_item),
}
