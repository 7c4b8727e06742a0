"""Let an instruction compute in the order of elements that its operand has in the program.

PyTorch's images are ``(batch, channels, height, width)``; a convolution of the program reads and
writes ``(batch, height, width, channels)``. An operator between two convolutions is recorded in
PyTorch's order. Where its kernel gives the same numbers in another order, it takes the order of
its operand instead, and no transposition is needed before it or after:

    CONV_2D -> (1, 8, 8, 16) -> ADD over (1, 8, 8, 16) -> CONV_2D

Which orders a kernel allows is a field of its record, :attr:`.record.Kernel.order`. Codes (see
:mod:`.layout`) tell in which order the program has an operand; those of the results are defined by
their provenance ids, which move along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_nna.deploy.flatbuffer import TensorSpec
from lightning_nna.deploy.layout import (
    Codes,
    elements_in,
    regular_shape,
    tensor_of,
    tensors_in,
)
from lightning_nna.emulation.operators.catalog import kernels

# Most axes of operands that a kernel broadcasts.
_MOST_AXES = 4


#: Function of an array that only moves its elements.
Move = Callable[[NDArray[np.int64]], NDArray[np.int64]]


@dataclass(frozen=True)
class Operand:
    """Describe an operand or a result before it is a tensor of the program.

    Args:
        values: Integers in the forward, int64, any shape.
        form: Type and quantization parameters.
        name: Name.
        codes: Codes in the shape of ``values``; None for a constant.
        ids: Provenance ids of a result, in the shape of ``values``; None for an operand.
    """

    values: NDArray[np.int64]
    form: TensorSpec
    name: str
    codes: Codes | None = None
    ids: NDArray[np.int64] | None = None

    def moved(self, move: Move) -> Operand:
        """Return the operand after a function has moved its elements.

        Args:
            move: Function of an array of the operand's shape that only moves elements.
        """
        codes = None if self.codes is None else move(self.codes)
        ids = None if self.ids is None else move(self.ids)
        return self.of(move(self.values), codes, ids)

    def of(self, values: Any, codes: Any, ids: Any = None) -> Operand:
        """Return the operand with other elements, whose shape may be another one."""
        return replace(
            self,
            values=values,
            codes=codes,
            ids=ids,
            form=replace(self.form, shape=tuple(values.shape)),
        )


@dataclass(frozen=True)
class Arrangement:
    """Describe an instruction with its operands in some order of elements.

    Args:
        operands: Operands; None for an absent one.
        results: Results.
        options: Options of the instruction.
    """

    operands: tuple[Operand | None, ...]
    results: tuple[Operand, ...]
    options: Mapping[str, Any]


def in_order_of_operand(
    operator: str, instruction: Arrangement, shape_of: Callable[[int], tuple[int, ...]]
) -> Arrangement:
    """Return an instruction in the order in which the program has its operand.

    Args:
        operator: Name of its kernel.
        instruction: Instruction in the order of the forward.
        shape_of: Function that returns the shape of a tensor of the program, given its number.

    Returns:
        The same instruction; unchanged where the kernel allows no other order, or none fits.
    """
    follow = _FOLLOW.get(kernels()[operator].order)
    return instruction if follow is None else follow(instruction, shape_of)


ShapeOf = Callable[[int], tuple[int, ...]]


def _elements(instruction: Arrangement, shape_of: ShapeOf) -> Arrangement:
    """Follow the elements of an operand that is all of a tensor, or else the axes of the largest.

    Operands that broadcast are expanded, moved, and reduced to the axes along which they differ:

        x of (1, 3, 2, 2) is a tensor (1, 2, 2, 3); slopes of (3, 1, 1) become (1, 1, 1, 3)
    """
    instruction = _with_axes(instruction)
    (result,) = instruction.results
    shape = result.values.shape
    several = [each for each in instruction.operands if each is not None and each.values.size > 1]
    is_broadcast = any(each.values.shape != shape for each in several)
    move = _move_to_tensor(several, shape, shape_of, is_broadcast)
    if move is None:
        return instruction

    def move_operand(each: Operand | None) -> Operand | None:
        if each is None or each.values.size == 1:
            return each
        moved = each.moved(lambda x: move(np.broadcast_to(x, shape)))
        return moved if each.values.shape == shape else _reduced(moved)

    operands = tuple(move_operand(each) for each in instruction.operands)
    if any(map(_is_spread, instruction.operands, operands)):
        return instruction
    return replace(instruction, operands=operands, results=(result.moved(move),))


def _with_axes(instruction: Arrangement) -> Arrangement:
    """Give data without axes an axis of one element, since no NPU computes it otherwise."""

    def is_without(each: Operand | None) -> bool:
        if each is None or each.values.ndim > 0:
            return False
        return each.codes is not None or each.ids is not None

    def widened(each: Operand) -> Operand:
        return each.moved(lambda x: x.reshape(1)) if is_without(each) else each

    if not any(map(is_without, (*instruction.operands, *instruction.results))):
        return instruction
    return replace(
        instruction,
        operands=tuple(None if each is None else widened(each) for each in instruction.operands),
        results=tuple(map(widened, instruction.results)),
    )


def _is_spread(before: Operand | None, after: Operand | None) -> bool:
    """Tell whether data would have to be broadcast, which no NPU does by itself."""
    if before is None or after is None or after.codes is None:
        return False
    return after.values.size > before.values.size


def _move_to_tensor(
    operands: Sequence[Operand], shape: tuple[int, ...], shape_of: ShapeOf, is_broadcast: bool
) -> Move | None:
    """Return what moves elements of a shape to the order of an operand; None if nothing does."""
    sources = (_complete_tensor(each, shape, shape_of) for each in operands)
    complete = [source for source in sources if source is not None and _is_regular(source[1])]
    if not complete:
        largest = [
            each for each in operands if each.codes is not None and each.codes.shape == shape
        ]
        axes = _axes_of(largest[0], shape_of) if largest else None
        return None if axes is None else _transposition(axes)
    number, elements = max(complete, key=lambda each: not _is_sorted(each[1]))
    order, target = np.argsort(elements), shape_of(number)
    if _is_sorted(elements) and target == shape:
        return None
    if is_broadcast and len(target) > max(_MOST_AXES, len(shape)):
        return None
    return lambda x: x.reshape(-1)[order].reshape(target)


def _table(instruction: Arrangement, shape_of: ShapeOf) -> Arrangement:
    """Follow the elements of the indices into a table of one axis."""
    table, *indices = instruction.operands
    if table is None or table.values.ndim != 1:
        return instruction
    moved = _elements(replace(instruction, operands=tuple(indices)), shape_of)
    return replace(moved, operands=(table, *moved.operands))


def _rows(instruction: Arrangement, shape_of: ShapeOf) -> Arrangement:
    """Follow the order of rows, where a row is a run of elements along the last axis."""
    x, *rest = instruction.operands
    (result,) = instruction.results
    assert x is not None
    shape = x.values.shape
    if len(shape) < 2 or (source := _complete_tensor(x, shape, shape_of)) is None:
        return instruction
    number, elements = source
    rows, target = elements.reshape(-1, shape[-1]), shape_of(number)
    starts = rows[:, 0]
    leading = target[:-1] if target[-1:] == shape[-1:] else (len(rows),)
    if not 1 <= len(leading) < _MOST_AXES:
        leading = (len(rows),)
    if _is_sorted(starts) and (leading == shape[:-1] or target[-1:] != shape[-1:]):
        return instruction
    if not np.array_equal(rows, starts[:, None] + np.arange(rows.shape[1])):
        return instruction
    order = np.argsort(starts)

    def move(y: NDArray[np.int64]) -> NDArray[np.int64]:
        return y.reshape(len(rows), -1)[order].reshape(*leading, -1)

    return replace(instruction, operands=(x.moved(move), *rest), results=(result.moved(move),))


def _columns(instruction: Arrangement, shape_of: ShapeOf) -> Arrangement:
    """Follow the order of the columns, which those of the weight are moved to, and then of rows.

    A flattened image is one row, whose columns go by height, width and channel in the program:

        x of (1, 3 * 2 * 2), a tensor (1, 2, 2, 3): columns 0 4 8 1 5 9 ... become 0 1 2 3 ...
    """
    x, weight, *rest = instruction.operands
    assert x is not None
    assert weight is not None
    if (
        weight.codes is None
        and (source := _complete_tensor(x, x.values.shape, shape_of)) is not None
    ):
        rows = source[1].reshape(-1, x.values.shape[-1])
        order = np.argsort(rows[0])
        if not _is_sorted(rows[0]) and bool((np.diff(rows[:, order], axis=1) == 1).all()):

            def move(y: NDArray[np.int64]) -> NDArray[np.int64]:
                return y[..., order]

            operands = (x.moved(move), weight.moved(move), *rest)
            instruction = replace(instruction, operands=operands)
    moved = _rows(instruction, shape_of)
    if moved is not instruction and "keepNumDims" in instruction.options:
        assert moved.operands[0] is not None
        several = moved.operands[0].values.ndim > 2
        moved = replace(moved, options={**instruction.options, "keepNumDims": several})
    return moved


def _concatenation(instruction: Arrangement, shape_of: ShapeOf) -> Arrangement:
    """Follow the axes of the largest operand; the axis of the concatenation is renamed."""
    parts = [each for each in instruction.operands if each is not None and each.codes is not None]
    axes = None
    if parts:
        axes = _axes_of(max(parts, key=lambda each: each.values.size), shape_of)
    if axes is None:
        return instruction
    axis = axes.index(instruction.options["axis"] % len(axes))
    return Arrangement(
        tuple(
            None if each is None else each.moved(_transposition(axes))
            for each in instruction.operands
        ),
        tuple(each.moved(_transposition(axes)) for each in instruction.results),
        {**instruction.options, "axis": axis},
    )


def _reduction(instruction: Arrangement, shape_of: ShapeOf) -> Arrangement:
    """Follow the axes of the operand; those of the reduction, its second operand, are renamed."""
    x, over, *rest = instruction.operands
    (result,) = instruction.results
    assert x is not None
    assert over is not None
    axes = _axes_of(x, shape_of)
    if axes is None or over.codes is not None:
        return instruction
    removed = [int(axis) % len(axes) for axis in over.values.reshape(-1)]
    renamed = np.sort([axes.index(axis) for axis in removed])
    rest_axes = [axis for axis in axes if axis not in removed]
    order = axes
    if not instruction.options.get("keepDims"):
        order = tuple(sorted(rest_axes).index(axis) for axis in rest_axes)
    return replace(
        instruction,
        operands=(x.moved(_transposition(axes)), over.of(renamed, None), *rest),
        results=(result.moved(_transposition(order)),),
    )


def _padding(instruction: Arrangement, shape_of: ShapeOf) -> Arrangement:
    """Follow the axes of the operand, and move the rows of the paddings, its second operand."""
    x, sides, *rest = instruction.operands
    assert x is not None
    assert sides is not None
    axes = _axes_of(x, shape_of)
    if axes is None or sides.codes is not None:
        return instruction
    return replace(
        instruction,
        operands=(
            x.moved(_transposition(axes)),
            sides.moved(lambda rows: rows[list(axes)]),
            *rest,
        ),
        results=tuple(each.moved(_transposition(axes)) for each in instruction.results),
    )


_FOLLOW: dict[str, Callable[[Arrangement, ShapeOf], Arrangement]] = {
    "columns": _columns,
    "concatenation": _concatenation,
    "elements": _elements,
    "padding": _padding,
    "reduction": _reduction,
    "rows": _rows,
    "table": _table,
}


def _complete_tensor(
    each: Operand, shape: tuple[int, ...], shape_of: ShapeOf
) -> tuple[int, NDArray[np.int64]] | None:
    """Return the tensor whose elements, each once, an operand has, and these; None otherwise."""
    codes = each.codes
    if codes is None or codes.shape != shape or not codes.size or codes.min() < 0:
        return None
    sources, elements = tensors_in(codes), elements_in(codes).reshape(-1)
    if len(sources) != 1 or prod(shape_of(sources[0])) != codes.size:
        return None
    return (sources[0], elements) if np.bincount(elements).max() == 1 else None


def _is_regular(elements: NDArray[np.int64]) -> bool:
    """Tell whether an order is one of axes; results in that of a roll would be rolled back."""
    return _is_sorted(elements) or regular_shape(elements) is not None


def _is_sorted(elements: NDArray[np.int64]) -> bool:
    return bool((np.diff(elements) > 0).all())


def _reduced(each: Operand) -> Operand:
    """Return an operand with one element along every axis on which all are equal."""
    arrays = [each.values] if each.codes is None else [each.values, each.codes]
    keep = tuple(
        slice(0, 1) if all(bool((x == x.take([0], axis)).all()) for x in arrays) else slice(None)
        for axis in range(each.values.ndim)
    )
    return each.moved(lambda x: x[keep])


def _axes_of(each: Operand, shape_of: ShapeOf) -> tuple[int, ...] | None:
    """Return the axes of an operand in the order in which the program has them.

    The axis with the longest stride comes first. Axes of one element go where the tensor of the
    program has such axes:

        x of (1, 16, 5, 1), a tensor (1, 5, 1, 16): (0, 2, 3, 1)

    Returns:
        None where that is the order of the operand, or where it has no regular strides.
    """
    codes = each.codes
    if codes is None or not codes.size or codes.flat[0] < 0:
        return None
    strides = {}
    for axis, count in enumerate(codes.shape):
        if count == 1:
            continue
        first = codes.reshape(-1)[:1]
        second = codes[tuple(slice(int(k == axis), int(k == axis) + 1) for k in range(codes.ndim))]
        stride = int(second.item() - first.item())
        if tensor_of(second).item() != tensor_of(first).item() or stride <= 0:
            return None
        strides[axis] = stride
    long = sorted(strides, key=lambda axis: -strides[axis])
    short = [axis for axis in range(codes.ndim) if axis not in strides]
    source = shape_of(int(tensor_of(codes).flat[0]))
    pattern = [size > 1 for size in source]
    if len(source) != codes.ndim or sum(pattern) != len(long):
        pattern = [axis in strides for axis in range(codes.ndim)]
    axes = tuple((long if is_long else short).pop(0) for is_long in pattern)
    return None if axes == tuple(range(codes.ndim)) else axes


def _transposition(axes: Sequence[int]) -> Move:
    return lambda x: np.ascontiguousarray(x.transpose(axes))
