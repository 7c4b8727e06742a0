"""Lay out the elements of an operand by instructions of a program.

An operand is an array of codes, each a tensor of the program and an element of it. One tensor's
elements at regular strides are a view: a reshape, a slice, a transposition, a reversal, a
broadcast. An operand that is no view is cut along an axis into parts that are, and concatenated. If
that fails, too, it is gathered, which no accelerator does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Code of an element that belongs to the program.
NO_TENSOR = -1
# The lower bits of a code are the element.
_ELEMENT_BITS = 40
# Most parts of a concatenation, beyond which elements are gathered.
_MOST_PARTS = 32
#: Most axes of a slice.
MOST_SLICED_AXES = 5
# Most elements of a broadcast for which a constant of as many is worth its memory.
_LARGEST_BROADCAST = 2**14
# Most axes that a kernel pads.
_MOST_PADDED_AXES = 4

Codes = NDArray[np.int64]


def codes_of(tensor: int, elements: NDArray[np.int64]) -> Codes:
    """Return the codes of elements of one tensor.

    Args:
        tensor: Number of the tensor.
        elements: Flat indices into the tensor, int64, any shape.

    Example:
        >>> codes_of(1, np.array([0, 5])).tolist()  # 1 * 2 ** 40 + element
        [1099511627776, 1099511627781]
    """
    return (tensor << _ELEMENT_BITS) + elements


def tensors_in(codes: Codes) -> list[int]:
    """Return the numbers of the tensors that codes refer to, ascending."""
    return [int(x) for x in np.unique(codes[codes >= 0] >> _ELEMENT_BITS)]


def tensor_of(codes: Codes) -> Codes:
    """Return the number of the tensor of each code; negative if it refers to none."""
    return codes >> _ELEMENT_BITS


def elements_in(codes: Codes) -> NDArray[np.int64]:
    """Return the flat indices of the elements that codes refer to."""
    return codes & ((1 << _ELEMENT_BITS) - 1)


def refers_to(codes: Codes, tensor: int) -> NDArray[np.bool_]:
    """Tell for each code if it refers to a tensor."""
    return codes >> _ELEMENT_BITS == tensor


def equal_codes(a: Codes, b: Codes) -> bool:
    """Tell if codes are equal, whatever their shapes."""
    return a.size == b.size and bool((a.reshape(-1) == b.reshape(-1)).all())


@dataclass(frozen=True)
class View:
    """Regular strides through a tensor: a box of it, its axes in another order.

    Args:
        shape: Shape that the source is reshaped to.
        begin: First index of the box on each axis.
        sizes: Number of indices of the box on each axis.
        strides: Distance from one index of the box to the next on each axis.
        order: Axes of the result as axes of the box without those of size 1.
        reversed: Axes of the result that run backwards.
        spread: Shape of the result before it is broadcast, with ones.
        result: Shape of the result.
    """

    shape: tuple[int, ...]
    begin: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    order: tuple[int, ...]
    reversed: tuple[int, ...]
    spread: tuple[int, ...]
    result: tuple[int, ...]

    @property
    def is_full(self) -> bool:
        """Tell if the box is all of the source."""
        return self.sizes == self.shape


def most_sliced_axes(runtime: str) -> int:
    """Return the number of axes of a slice at most that the kernel of a runtime takes.

    Args:
        runtime: Name of the runtime.

    Example:
        >>> most_sliced_axes("tflm")
        4
    """
    return 4 if runtime == "tflm" else MOST_SLICED_AXES


def view_of(
    elements: NDArray[np.int64], source: Sequence[int], most_axes: int = MOST_SLICED_AXES
) -> View | None:
    """Find the view of a tensor that has these elements, if there is one.

    Args:
        elements: Flat indices into the tensor, int64, in the shape of the result.
        source: Shape of the tensor.
        most_axes: Most axes of a slice.

    Example:
        >>> view = view_of(np.arange(24).reshape(2, 3, 4)[:, 1:].transpose(2, 1, 0), (2, 3, 4))
        >>> view.shape, view.begin, view.sizes, view.order
        ((2, 3, 4), (0, 1, 0), (2, 2, 4), (2, 1, 0))
    """
    first = int(elements.flat[0])
    strides = _strides(elements, first)
    if strides is None:
        return None
    axes = [(n, s) for n, s in zip(elements.shape, strides, strict=True) if n > 1 and s != 0]
    for count, stride in axes:
        first += min(stride, 0) * (count - 1)
    pairs = zip(elements.shape, strides, strict=True)
    spread = tuple(1 if stride == 0 else count for count, stride in pairs)
    # The source in its own shape first: this needs no RESHAPE before.
    for merged, read_source in ((axes, _by_axes), (_merged(axes), _by_radix)):
        order = sorted(range(len(merged)), key=lambda axis: -abs(merged[axis][1]))
        sorted_axes = [(merged[axis][0], abs(merged[axis][1])) for axis in order]
        box = read_source(sorted_axes, first, tuple(source))
        if box is not None and _is_sliced(box, most_axes):
            return View(
                *box,
                order=tuple(order.index(axis) for axis in range(len(merged))),
                reversed=tuple(axis for axis, (_, stride) in enumerate(merged) if stride < 0),
                spread=spread,
                result=elements.shape,
            )
    return None


def _strides(elements: NDArray[np.int64], first: int) -> list[int] | None:
    """Return the strides along all axes, 0 along axes of size 1; None if they are not regular."""
    # x[:, 1:3] of shape (3, 2) from x of shape (3, 4) has the elements
    #     1 2
    #     5 6      first 1, strides (4, 1)
    #     9 10
    strides, predicted = [], np.full(elements.shape, first)
    for axis, count in enumerate(elements.shape):
        stride = 0
        if count > 1:
            second = [0] * elements.ndim
            second[axis] = 1
            stride = int(elements[tuple(second)]) - first
        strides.append(stride)
        form = [1] * elements.ndim
        form[axis] = count
        predicted += stride * np.arange(count).reshape(form)
    return strides if np.array_equal(predicted, elements) else None


def regular_shape(elements: NDArray[np.int64]) -> tuple[int, ...] | None:
    """Find a shape in which elements have regular strides along all axes, if there is one.

    Args:
        elements: Flat indices into a tensor, int64, any shape.

    Example:
        >>> regular_shape(np.arange(24).reshape(2, 3, 4).transpose(0, 2, 1).reshape(2, 12))
        (2, 4, 3)
    """
    # Of 0 4 8 1 5 9 2 … the first three are one stride apart, and so are the next three: an axis
    # of 3. The first of each three, 0 1 2 …, are an axis of all that is left.
    shape: list[int] = []
    first = elements.reshape(-1)
    while len(first) > 1:
        steps = np.diff(first)
        (turns,) = np.nonzero(steps != steps[0])
        count = gcd(int(turns[0]) + 1 if len(turns) else len(first), len(first))
        if count == 1:
            return None
        parts = first.reshape(-1, count)
        if not np.array_equal(np.diff(parts, axis=1), np.full_like(parts[:, 1:], steps[0])):
            return None
        shape.insert(0, count)
        first = parts[:, 0]
    return tuple(shape)


def _merged(axes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge axes that run on into the next: (3, 4) and (4, 1), size and stride, are (12, 1)."""
    merged: list[tuple[int, int]] = []
    for count, stride in axes:
        if merged and merged[-1][1] == stride * count:
            merged[-1] = (merged[-1][0] * count, stride)
        else:
            merged.append((count, stride))
    return merged


#: Shape, first index, sizes and strides of a box, as of :class:`View`.
Box = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _is_sliced(box: Box, most_axes: int) -> bool:
    """Tell if a box has few enough axes for a slice; one that is the whole source needs none."""
    shape, _, sizes, _ = box
    return len(shape) <= (MOST_SLICED_AXES if shape == sizes else most_axes)


def _by_radix(axes: list[tuple[int, int]], first: int, source: tuple[int, ...]) -> Box | None:
    """Reshape the source to an axis for every stride; strides must divide one another."""
    # 24 elements, axes (2, 6) and (3, 1) as size and stride, first 8: shape (4, 6), because 24 / 6
    # = 4 and 6 / 1 = 6; begin (1, 2), because 8 = 1 * 6 + 2; sizes (2, 3).
    shape, begin, sizes = [], [], []
    outer = prod(source)
    for count, stride in axes:
        if outer % stride:
            return None
        shape.append(outer // stride)
        begin.append(first % outer // stride)
        sizes.append(count)
        if begin[-1] + count > shape[-1]:
            return None
        outer = stride
    if outer > 1:
        shape.append(outer)
        begin.append(first % outer)
        sizes.append(1)
    return tuple(shape), tuple(begin), tuple(sizes), (1,) * len(shape)


def _by_axes(axes: list[tuple[int, int]], first: int, source: tuple[int, ...]) -> Box | None:
    """Read the source in its own shape, with strides along its own axes."""
    begin, sizes, strides = [], [], []
    remaining = list(axes)
    for axis, size in enumerate(source):
        inner = prod(source[axis + 1 :])
        start = first // inner % size
        count, stride = 1, 1
        if remaining and remaining[0][1] % inner == 0 and remaining[0][1] < inner * size:
            count, stride = remaining[0][0], remaining[0][1] // inner
            remaining.pop(0)
        if start + (count - 1) * stride >= size:
            return None
        begin.append(start)
        sizes.append(count)
        strides.append(stride)
    return None if remaining else (source, tuple(begin), tuple(sizes), tuple(strides))


def apply_layout_operator(
    operator: str, inputs: Sequence[Any], shape: Any, options: Mapping[str, Any], zero: int = 0
) -> NDArray[np.int64]:
    """Apply a layout operator to integers.

    Args:
        operator: Name of the operator in the schema.
        inputs: Integers of its inputs, the data first.
        shape: Shape of the result.
        options: Options of the operator.
        zero: Integer that stands for 0.

    Returns:
        The result, int64, shape ``shape``.
    """
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
        case "MAXIMUM":
            return np.maximum(x, inputs[1])
        case "PAD":
            return np.pad(x, inputs[1], constant_values=zero)
        case _:
            return np.concatenate(inputs, options["axis"])


Emit = Callable[[str, Sequence[Any], Sequence[int], dict[str, Any]], int]


class LayoutBuilder:
    """Build operands from the tensors of a program.

    Args:
        emit: Function that appends an operator, given its name, its inputs (numbers of tensors, or
            NumPy arrays for constants such as shapes), the shape of its result and its options;
            returns the number of the result.
        constant: Function that adds integers as a constant with the quantization parameters of the
            operand, and returns its number.
        shape_of: Function that returns the shape of a tensor, given its number.
        zero: Integer of the operand that stands for 0; None for an operand that is not quantized.
        lowest: Lowest integer of its type; None for an operand that is not quantized.
        most_axes: Most axes of a slice.
    """

    def __init__(
        self,
        emit: Emit,
        constant: Callable[[NDArray[np.int64]], int],
        shape_of: Callable[[int], tuple[int, ...]],
        zero: int | None = None,
        lowest: int | None = None,
        most_axes: int = MOST_SLICED_AXES,
    ) -> None:
        self.emit, self.constant, self.shape_of = emit, constant, shape_of
        self.zero, self.lowest, self.most_axes = zero, lowest, most_axes

    def build(self, codes: Codes, values: NDArray[np.int64]) -> int:
        """Return the tensor with these elements.

        Args:
            codes: Codes in the shape of the operand; :data:`NO_TENSOR` for elements that belong to
                the program.
            values: Integers of the operand, in its shape, for the latter.
        """
        if bool((codes == NO_TENSOR).all()):
            return self.constant(values)
        view = self._view(codes) or self._view_of_merged(codes)
        if view is not None:
            return self._reshaped(self._build_view(*view), codes.shape)
        if (box := self._padded_box(codes, values)) is not None:
            return self._build_padding(codes, values, box)
        cuts = self._cuts(codes)
        if cuts is None:
            return self._build_gather(codes, values)
        axis, bounds = cuts
        slices = [(slice(None),) * axis + (slice(*pair),) for pair in pairwise(bounds)]
        parts = [self.build(codes[each], values[each]) for each in slices]
        return self.emit("CONCATENATION", parts, codes.shape, {"axis": axis})

    def _view(self, codes: Codes) -> tuple[int, View] | None:
        """Return the tensor and the view of it that codes are, if they are one."""
        if codes.min() < 0:
            return None
        source = int(codes.flat[0]) >> _ELEMENT_BITS
        view = view_of(codes - (source << _ELEMENT_BITS), self.shape_of(source), self.most_axes)
        inside = tensors_in(codes) == [source]
        return (source, view) if view is not None and inside else None

    def _view_of_merged(self, codes: Codes) -> tuple[int, View] | None:
        """Return a view that has these codes after a reshape, which merges axes of it."""
        shape = regular_shape(codes)
        split = None if shape is None else self._view(codes.reshape(shape))
        if split is None or split[1].spread != split[1].result:
            return split
        return split[0], replace(split[1], spread=codes.shape, result=codes.shape)

    def _build_view(self, source: int, view: View) -> int:
        if view.is_full and view.order == tuple(range(len(view.order))) and not view.reversed:
            return self._broadcast(source, view)
        number = source
        if not view.is_full:
            number = self._reshaped(source, view.shape)
            ends = [
                b + (n - 1) * s + 1
                for b, n, s in zip(view.begin, view.sizes, view.strides, strict=True)
            ]
            bounds = [np.array(x, np.int32) for x in (view.begin, ends, view.strides)]
            number = self.emit("STRIDED_SLICE", [number, *bounds], view.sizes, {})
        sizes = [size for size in view.sizes if size > 1]
        if view.order != tuple(range(len(view.order))):
            number = self._reshaped(number, sizes)
            sizes = [sizes[axis] for axis in view.order]
            number = self.emit("TRANSPOSE", [number, np.array(view.order, np.int32)], sizes, {})
        if view.reversed:
            number = self._reshaped(number, sizes)
            axes = np.array(view.reversed, np.int32)
            for axis in axes:  # The kernel takes adjacent axes alone.
                number = self.emit("REVERSE_V2", [number, axis[None]], sizes, {})
        return self._broadcast(number, view)

    def _broadcast(self, number: int, view: View) -> int:
        """Broadcast axes, by MAXIMUM with the lowest integers: no NPU has BROADCAST_TO.

        (4, 1, 5) and a constant of shape (4, 3, 5), -128 throughout, have the maximum (4, 3, 5).
        More elements are a concatenation of so many equal parts.
        """
        if view.spread == view.result:
            return self._reshaped(number, view.spread)
        wide = [k for k, size in enumerate(view.result) if view.spread[k] != size]
        is_small = self.lowest is not None and prod(view.result) <= _LARGEST_BROADCAST
        if not is_small and any(view.result[axis] > _MOST_PARTS for axis in wide):
            number = self._reshaped(number, view.spread)
            form = np.array(view.result, np.int32)
            return self.emit("BROADCAST_TO", [number, form], view.result, {})
        # The last axis first, while there are the fewest elements.
        for axis in reversed(wide):
            count = view.result[axis]
            outer, inner = prod(view.spread[:axis]), prod(view.result[axis + 1 :])
            shape = (outer, count, inner)
            number = self._reshaped(number, (outer, 1, inner))
            if is_small:
                lowest = self.constant(np.full(shape, self.lowest))
                number = self.emit("MAXIMUM", [number, lowest], shape, {})
            else:
                number = self.emit("CONCATENATION", [number] * count, shape, {"axis": 1})
        return self._reshaped(number, view.result)

    def _reshaped(self, number: int, shape: Sequence[int]) -> int:
        if tuple(shape) == self.shape_of(number):
            return number
        form = np.array(shape, np.int32)
        return self.emit("RESHAPE", [number, form], tuple(shape), {"newShape": list(shape)})

    def _padded_box(self, codes: Codes, values: NDArray[np.int64]) -> tuple[slice, ...] | None:
        """Return the box outside of which all elements are constants that stand for 0."""
        fixed = codes == NO_TENSOR
        if codes.ndim > _MOST_PADDED_AXES or not fixed.any():
            return None
        bounds = [
            np.flatnonzero(~fixed.all(tuple(k for k in range(codes.ndim) if k != axis)))
            for axis in range(codes.ndim)
        ]
        box = tuple(slice(int(x[0]), int(x[-1]) + 1) for x in bounds)
        outside = np.ones(codes.shape, bool)
        outside[box] = False
        zeros = bool((fixed & (values == self.zero))[outside].all())
        return box if zeros and outside.any() else None

    def _build_padding(
        self, codes: Codes, values: NDArray[np.int64], box: tuple[slice, ...]
    ) -> int:
        pairs = zip(box, codes.shape, strict=True)
        sides = np.array([(each.start, size - each.stop) for each, size in pairs], np.int32)
        return self.emit("PAD", [self.build(codes[box], values[box]), sides], codes.shape, {})

    def _cuts(self, codes: Codes) -> tuple[int, list[int]] | None:
        """Return the axis along which the fewest parts are views, and the bounds of the parts."""
        cuts = [(axis, self._bounds(codes, axis)) for axis in range(codes.ndim)]
        simple = [(axis, bounds) for axis, bounds in cuts if bounds is not None]
        if simple:
            return min(simple, key=lambda each: len(each[1]))
        # Parts that have to be cut again, along another axis.
        axes = [axis for axis, count in enumerate(codes.shape) if 1 < count <= _MOST_PARTS]
        if len(axes) < 2:
            return None
        axis = min(axes, key=lambda axis: codes.shape[axis])
        return axis, list(range(codes.shape[axis] + 1))

    def _bounds(self, codes: Codes, axis: int) -> list[int] | None:
        """Return the bounds along an axis between which every part is a view; None without such."""
        along = np.moveaxis(codes, axis, 0)
        bounds = [0]
        while bounds[-1] < len(along):
            end = self._end(along, axis, bounds[-1])
            if end == bounds[-1] or len(bounds) > _MOST_PARTS:
                return None
            bounds.append(end)
        return bounds

    def _end(self, along: Codes, axis: int, start: int) -> int:
        """Return the end of the longest part from ``start`` on that is a view, or a constant."""

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

    def _build_gather(self, codes: Codes, values: NDArray[np.int64]) -> int:
        """Gather any elements of any tensors, one by one, unless all joined have a view of them."""
        parts, index = [], np.zeros(codes.shape, np.int32)
        start = 0
        for source in tensors_in(codes):
            size = prod(self.shape_of(source))
            parts.append(self._reshaped(source, (size,)))
            here = refers_to(codes, source)
            index[here] = elements_in(codes[here]) + start
            start += size
        fixed = codes == NO_TENSOR
        if fixed.any():
            constants, inverse = np.unique(values[fixed], return_inverse=True)
            parts.append(self.constant(constants))
            index[fixed] = start + inverse
            start += len(constants)
        number = parts[0]
        if len(parts) > 1:
            number = self.emit("CONCATENATION", parts, (start,), {"axis": 0})
            joined = codes_of(number, index.astype(np.int64))
            if self._view(joined) or self._view_of_merged(joined):
                return self.build(joined, values)
        return self.emit("GATHER", [number, index], codes.shape, {"axis": 0})
