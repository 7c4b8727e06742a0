"""From addresses to movements: which instructions put elements where an operand has them.

An operand is an array of codes, each a tensor of the program and an element of it. One tensor's
elements in regular steps are a view: a reshape, a slice, a transposition, a reversal, a broadcast.
What is no view is cut along an axis into parts that are, and concatenated. What is not even that is
gathered, which no accelerator does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Code of an element that belongs to the program.
NO_TENSOR = -1
# The lower bits of a code are the element.
_ELEMENT_BITS = 40
# Cuts beyond which elements are gathered, and axes that the kernels of slices take.
_MOST_PARTS = 32
_MOST_AXES = 5

Codes = NDArray[np.int64]


def codes_of(tensor: int, elements: NDArray[np.int64]) -> Codes:
    """Codes of elements of one tensor."""
    return (tensor << _ELEMENT_BITS) + elements


def tensors_in(codes: Codes) -> list[int]:
    """Tensors that codes refer to, ascending."""
    return [int(x) for x in np.unique(codes[codes >= 0] >> _ELEMENT_BITS)]


def tensor_of(codes: Codes) -> Codes:
    """The tensor that each code refers to; negative where it refers to none."""
    return codes >> _ELEMENT_BITS


def elements_in(codes: Codes) -> NDArray[np.int64]:
    """Elements that codes refer to."""
    return codes & ((1 << _ELEMENT_BITS) - 1)


def belong(codes: Codes, tensor: int) -> NDArray[np.bool_]:
    """Which codes refer to a tensor."""
    return codes >> _ELEMENT_BITS == tensor


def same(a: Codes, b: Codes) -> bool:
    """Whether codes are equal, in whatever shape."""
    return a.size == b.size and bool((a.reshape(-1) == b.reshape(-1)).all())


@dataclass(frozen=True)
class View:
    """Regular steps through a tensor: a box of it, its axes in another order.

    Args:
        shape: Shape as which the source is read.
        begin: First index of the box on each axis.
        sizes: Indices of the box on each axis.
        steps: From one index of the box to the next.
        order: Axes of the result as axes of the box without those of size 1.
        reversed: Axes of the result that run backwards.
        spread: Shape of the result before it is broadcast, with ones.
        result: Shape of the result.
    """

    shape: tuple[int, ...]
    begin: tuple[int, ...]
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    order: tuple[int, ...]
    reversed: tuple[int, ...]
    spread: tuple[int, ...]
    result: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the box is all of the source."""
        return self.sizes == self.shape


def view_of(elements: NDArray[np.int64], source: Sequence[int]) -> View | None:
    """The view of a tensor of shape ``source`` that has these elements, if there is one.

    Example:
        >>> view = view_of(np.arange(24).reshape(2, 3, 4)[:, 1:].transpose(2, 1, 0), (2, 3, 4))
        >>> view.shape, view.begin, view.sizes, view.order
        ((2, 3, 4), (0, 1, 0), (2, 2, 4), (2, 1, 0))
    """
    first = int(elements.flat[0])
    steps = _steps(elements, first)
    if steps is None:
        return None
    axes = [(n, s) for n, s in zip(elements.shape, steps, strict=True) if n > 1 and s != 0]
    for count, step in axes:
        first += min(step, 0) * (count - 1)
    pairs = zip(elements.shape, steps, strict=True)
    spread = tuple(1 if step == 0 else count for count, step in pairs)
    # As the source is, if that will do: it needs no other shape first.
    for merged, place in ((axes, _by_axes), (_merged(axes), _by_radix)):
        order = sorted(range(len(merged)), key=lambda axis: -abs(merged[axis][1]))
        box = [(merged[axis][0], abs(merged[axis][1])) for axis in order]
        found = place(box, first, tuple(source))
        if found is not None and len(found[0]) <= _MOST_AXES:
            return View(
                *found,
                order=tuple(order.index(axis) for axis in range(len(merged))),
                reversed=tuple(axis for axis, (_, step) in enumerate(merged) if step < 0),
                spread=spread,
                result=elements.shape,
            )
    return None


def _steps(elements: NDArray[np.int64], first: int) -> list[int] | None:
    """Steps along every axis, 0 along axes of size 1; None if they are not regular."""
    steps, predicted = [], np.full(elements.shape, first)
    for axis, count in enumerate(elements.shape):
        step = 0
        if count > 1:
            at = [0] * elements.ndim
            at[axis] = 1
            step = int(elements[tuple(at)]) - first
        steps.append(step)
        form = [1] * elements.ndim
        form[axis] = count
        predicted += step * np.arange(count).reshape(form)
    return steps if np.array_equal(predicted, elements) else None


def _merged(axes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Axes that run on into the next as one."""
    merged: list[tuple[int, int]] = []
    for count, step in axes:
        if merged and merged[-1][1] == step * count:
            merged[-1] = (merged[-1][0] * count, step)
        else:
            merged.append((count, step))
    return merged


Box = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _by_radix(box: list[tuple[int, int]], first: int, source: tuple[int, ...]) -> Box | None:
    """Read the source with an axis for every step; steps must divide one another."""
    shape, begin, sizes = [], [], []
    outer = prod(source)
    for count, step in box:
        if outer % step:
            return None
        shape.append(outer // step)
        begin.append(first % outer // step)
        sizes.append(count)
        if begin[-1] + count > shape[-1]:
            return None
        outer = step
    if outer > 1:
        shape.append(outer)
        begin.append(first % outer)
        sizes.append(1)
    return tuple(shape), tuple(begin), tuple(sizes), (1,) * len(shape)


def _by_axes(box: list[tuple[int, int]], first: int, source: tuple[int, ...]) -> Box | None:
    """Read the source as it is, with steps along its own axes."""
    begin, sizes, steps = [], [], []
    left = list(box)
    for axis, size in enumerate(source):
        inner = prod(source[axis + 1 :])
        start = first // inner % size
        count, step = 1, 1
        if left and left[0][1] % inner == 0 and left[0][1] < inner * size:
            count, step = left[0][0], left[0][1] // inner
            left.pop(0)
        if start + (count - 1) * step >= size:
            return None
        begin.append(start)
        sizes.append(count)
        steps.append(step)
    return None if left else (source, tuple(begin), tuple(sizes), tuple(steps))


def moved_integers(
    operator: str, inputs: Sequence[Any], shape: Any, options: Mapping[str, Any]
) -> NDArray[np.int64]:
    """What a movement does to integers."""
    x = inputs[0]
    match operator:
        case "RESHAPE":
            return x.reshape(shape)
        case "TRANSPOSE":
            return x.transpose(inputs[1])
        case "STRIDED_SLICE":
            return x[tuple(slice(b, e, s) for b, e, s in zip(*inputs[1:], strict=True))]
        case "REVERSE_V2":
            return np.flip(x, inputs[1])
        case "BROADCAST_TO":
            return np.broadcast_to(x, shape)
        case "GATHER":
            return x[inputs[1]]
        case _:
            return np.concatenate(inputs, options["axis"])


Emit = Callable[[str, Sequence[Any], Sequence[int], dict[str, Any]], int]


class Movements:
    """Makes operands of what a program has.

    Args:
        emit: Called with an operator, its inputs (tensors of the program, or NumPy arrays for
            constants that say how), the shape of its result and its options; returns the result.
        constant: Called with integers; returns a constant on the grid of the others.
        shape_of: Shape of a tensor of the program.
    """

    def __init__(
        self,
        emit: Emit,
        constant: Callable[[NDArray[np.int64]], int],
        shape_of: Callable[[int], tuple[int, ...]],
    ) -> None:
        self.emit, self.constant, self.shape_of = emit, constant, shape_of

    def make(self, codes: Codes, values: NDArray[np.int64]) -> int:
        """The tensor with these elements.

        Args:
            codes: Of the shape of the operand; :data:`NO_TENSOR` for what belongs to the program.
            values: Its integers, for the latter.
        """
        if bool((codes == NO_TENSOR).all()):
            return self.constant(values)
        view = self._view(codes)
        if view is not None:
            return self._viewed(*view)
        cuts = self._cuts(codes)
        if cuts is None:
            return self._gathered(codes, values)
        axis, bounds = cuts
        places = [(slice(None),) * axis + (slice(*pair),) for pair in pairwise(bounds)]
        parts = [self.make(codes[place], values[place]) for place in places]
        return self.emit("CONCATENATION", parts, codes.shape, {"axis": axis})

    def _view(self, codes: Codes) -> tuple[int, View] | None:
        """The tensor and the view of it that codes are, if they are one."""
        if codes.min() < 0:
            return None
        source = int(codes.flat[0]) >> _ELEMENT_BITS
        view = view_of(codes - (source << _ELEMENT_BITS), self.shape_of(source))
        inside = tensors_in(codes) == [source]
        return (source, view) if view is not None and inside else None

    def _viewed(self, source: int, view: View) -> int:
        if view.is_whole and view.order == tuple(range(len(view.order))) and not view.reversed:
            return self._broadcast(source, view)
        held = source
        if not view.is_whole:
            held = self._reshaped(source, view.shape)
            ends = [
                b + (n - 1) * s + 1
                for b, n, s in zip(view.begin, view.sizes, view.steps, strict=True)
            ]
            bounds = [np.array(x, np.int32) for x in (view.begin, ends, view.steps)]
            held = self.emit("STRIDED_SLICE", [held, *bounds], view.sizes, {})
        sizes = [size for size in view.sizes if size > 1]
        if view.order != tuple(range(len(view.order))):
            held = self._reshaped(held, sizes)
            sizes = [sizes[axis] for axis in view.order]
            held = self.emit("TRANSPOSE", [held, np.array(view.order, np.int32)], sizes, {})
        if view.reversed:
            held = self._reshaped(held, sizes)
            axes = np.array(view.reversed, np.int32)
            for axis in axes:  # The kernel takes adjacent axes alone.
                held = self.emit("REVERSE_V2", [held, axis[None]], sizes, {})
        return self._broadcast(held, view)

    def _broadcast(self, held: int, view: View) -> int:
        held = self._reshaped(held, view.spread)
        if view.spread == view.result:
            return held
        form = np.array(view.result, np.int32)
        return self.emit("BROADCAST_TO", [held, form], view.result, {})

    def _reshaped(self, held: int, shape: Sequence[int]) -> int:
        if tuple(shape) == self.shape_of(held):
            return held
        form = np.array(shape, np.int32)
        return self.emit("RESHAPE", [held, form], tuple(shape), {"newShape": list(shape)})

    def _cuts(self, codes: Codes) -> tuple[int, list[int]] | None:
        """The axis along which the fewest parts are views, and where they begin and end."""
        found = [(axis, self._bounds(codes, axis)) for axis in range(codes.ndim)]
        simple = [(axis, bounds) for axis, bounds in found if bounds is not None]
        if simple:
            return min(simple, key=lambda each: len(each[1]))
        # Parts that have to be cut again, along another axis.
        axes = [axis for axis, count in enumerate(codes.shape) if 1 < count <= _MOST_PARTS]
        if len(axes) < 2:
            return None
        axis = min(axes, key=lambda axis: codes.shape[axis])
        return axis, list(range(codes.shape[axis] + 1))

    def _bounds(self, codes: Codes, axis: int) -> list[int] | None:
        """Where to cut along an axis so that every part is a view; None if that is no way."""
        along = np.moveaxis(codes, axis, 0)
        bounds = [0]
        while bounds[-1] < len(along):
            end = self._end(along, axis, bounds[-1])
            if end == bounds[-1] or len(bounds) > _MOST_PARTS:
                return None
            bounds.append(end)
        return bounds

    def _end(self, along: Codes, axis: int, start: int) -> int:
        """End of the longest part from ``start`` on that is a view, or a constant."""

        def is_simple(end: int) -> bool:
            part = np.moveaxis(along[start:end], 0, axis)
            return bool((part == NO_TENSOR).all()) or self._view(part) is not None

        known, reach = start, 1
        while start + reach <= len(along) and is_simple(start + reach):
            known, reach = start + reach, 2 * reach
        beyond = min(start + reach, len(along) + 1)
        while beyond - known > 1:
            middle = (known + beyond) // 2
            if is_simple(middle):
                known = middle
            else:
                beyond = middle
        return known

    def _gathered(self, codes: Codes, values: NDArray[np.int64]) -> int:
        """Any elements of any tensors, one by one."""
        parts, index = [], np.zeros(codes.shape, np.int32)
        start = 0
        for source in tensors_in(codes):
            size = prod(self.shape_of(source))
            parts.append(self._reshaped(source, (size,)))
            here = belong(codes, source)
            index[here] = elements_in(codes[here]) + start
            start += size
        fixed = codes == NO_TENSOR
        if fixed.any():
            levels, places = np.unique(values[fixed], return_inverse=True)
            parts.append(self.constant(levels))
            index[fixed] = start + places
            start += len(levels)
        held = parts[0]
        if len(parts) > 1:
            held = self.emit("CONCATENATION", parts, (start,), {"axis": 0})
        return self.emit("GATHER", [held, index], codes.shape, {"axis": 0})
