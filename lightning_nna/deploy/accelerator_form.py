"""Write instructions in a form that an Ethos-U computes.

Arm's compiler leaves a ``MEAN`` to the CPU that has several batches, reduces more than 4,096
elements along one axis, or reduces the last of several long axes. The same sums of as many elements
in another shape stay on the accelerator, with equal integers. It rejects one whose last axis is
longer than 65,536:

    (8, 16, 49) over axis 2        becomes    (1, 128, 49, 1) over axis 2
    (2, 7, 7, 16) over 1 and 2     becomes    (1, 2, 49, 16) over axis 2
    (1, 3, 128, 128) over 2 and 3  becomes    (1, 4, 4096, 3) over 1 and 2, transposed before
    (4, 70000) over axis 0         becomes    (1, 4, 2, 35000) over axis 1

It rejects a program that resizes several images; channels of one image are resized apart, too:

    (4, 12, 12, 5)                 becomes    (1, 12, 12, 20), transposed before and after

Means of more than 65,536 elements of 16 bits stay on the CPU.

Slopes of a ``PRELU`` have one axis fewer than its operand, without the batch, as the converter to
TOSA asks for:

    (3, 6, 5) with slopes (1, 1, 5)  becomes  (3, 6, 5) with slopes (1, 5)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from lightning_nna.deploy.element_order import Arrangement

_RESIZINGS = ("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR")
# Most elements along an axis that is reduced.
_MOST_ELEMENTS = 4096
_MOST_AXES = 4
# Most elements of 16 bits in a sum.
_MOST_LONG = 65536
# Most channels that the sums of one instruction may have.
_MOST_CHANNELS = 65536
# Position of the columns among batch, rows, columns and channels.
_COLUMNS = 2


@dataclass(frozen=True)
class _Form:
    """Describe a mean over axes 1 and 2 of batch, rows, columns and channels, or over axis 2.

    Args:
        order: Axes of the operand in the order in which they are reshaped.
        shape: Shape of the operand, four axes.
        axes: Axes that are reduced.
    """

    order: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def with_accelerator_form(operator: str, instruction: Arrangement) -> Arrangement:
    """Return an instruction in a form that an Ethos-U computes.

    Args:
        operator: Name of the kernel.
        instruction: Its operands and results.

    Returns:
        An instruction that computes the same numbers; what was passed where it has such a form, or
        none exists.
    """
    if operator == "MEAN":
        return _mean(instruction)
    if operator == "PRELU":
        return _slopes(instruction)
    return _one_image(instruction) if operator in _RESIZINGS else instruction


def _slopes(instruction: Arrangement) -> Arrangement:
    """Return a PReLU whose slopes have one axis fewer than its operand."""
    x, slopes = instruction.operands
    (result,) = instruction.results
    assert x is not None
    assert slopes is not None
    axes, shape = x.values.ndim, slopes.values.shape
    if axes == 1:  # There is one slope.
        row = _reshaped((1, x.values.size))
        return replace(instruction, operands=(x.moved(row), slopes), results=(result.moved(row),))
    if slopes.values.size != prod(shape[-(axes - 1) :]):
        return instruction
    form = (*(1 for _ in range(axes - 1 - len(shape))), *shape[-(axes - 1) :])
    return replace(instruction, operands=(x, slopes.moved(_reshaped(form))))


def _one_image(instruction: Arrangement) -> Arrangement:
    """Return a resizing of several images as one of as many times more channels."""
    x, sizes = instruction.operands
    (result,) = instruction.results
    assert x is not None
    images, channels = x.values.shape[0], x.values.shape[3]
    if images == 1 or images * channels > _MOST_CHANNELS:
        return instruction

    def move(y: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.ascontiguousarray(y.transpose(1, 2, 0, 3)).reshape(1, *y.shape[1:3], -1)

    return replace(instruction, operands=(x.moved(move), sizes), results=(result.moved(move),))


def _mean(instruction: Arrangement) -> Arrangement:
    """Return a mean over axes of a shape that an Ethos-U takes."""
    x, over = instruction.operands
    (result,) = instruction.results
    assert x is not None
    assert over is not None
    shape = x.values.shape
    axes = tuple(sorted({int(axis) % len(shape) for axis in over.values.reshape(-1)}))
    count = prod(shape[axis] for axis in axes)
    if x.form.dtype == "int16" and count > _MOST_LONG:
        return instruction
    if _is_computed(shape, axes) or (form := _form(shape, axes)) is None:
        return instruction
    reduced = tuple(1 if k in form.axes else size for k, size in enumerate(form.shape))
    return replace(
        instruction,
        operands=(
            x.moved(_reshaped(form.shape, form.order)),
            over.of(np.array(form.axes, np.int64), None),
        ),
        results=(result.moved(_reshaped(reduced)),),
        options={**instruction.options, "keepDims": True},
    )


def _is_computed(shape: Sequence[int], axes: Sequence[int]) -> bool:
    """Tell if an Ethos-U computes a mean over axes of a shape."""
    if not 2 <= len(shape) <= _MOST_AXES:
        return False
    lengths = [1] * (_MOST_AXES - len(shape)) + list(shape)
    is_last = len(shape) - 1 in axes and 1 not in lengths[1:]
    is_wide = shape[-1] > _MOST_CHANNELS
    is_short = all(shape[k] <= _MOST_ELEMENTS for k in axes)
    return lengths[0] == 1 and not is_last and not is_wide and is_short


def _form(shape: Sequence[int], axes: Sequence[int]) -> _Form | None:
    """Return a form that is computed; None if there is none."""
    long = [axis for axis, size in enumerate(shape) if size > 1]
    reduced = [axis for axis in long if axis in axes]
    other = [axis for axis in long if axis not in axes]
    if not reduced:
        return None
    count = prod(shape[axis] for axis in reduced)
    before = [axis for axis in other if axis < reduced[0]]
    behind = [axis for axis in other if axis > reduced[-1]]
    short = [axis for axis in range(len(shape)) if axis not in long]
    if count <= _MOST_ELEMENTS:
        if len(before) + len(behind) < len(other):  # Others are between the reduced ones.
            before, behind = other, []
        rows, channels = (prod(shape[axis] for axis in each) for each in (before, behind))
        if channels > _MOST_CHANNELS:
            if before and shape[-1] <= _MOST_CHANNELS:
                return None  # It would be transposed on the CPU.
            last = _largest_divisor(channels, _MOST_CHANNELS)
            order = (*short, *reduced, *before, *behind)
            return _Form(order, (1, count, rows * channels // last, last), (1,))
        order = (*short, *before, *reduced, *behind)
        return _Form(order, (1, rows, count, channels), (_COLUMNS,))
    # 128 * 128 elements are 4 rows of 4,096, each sum of which has the same terms.
    columns = _largest_divisor(count, _MOST_ELEMENTS)
    channels = prod(shape[axis] for axis in other)
    if count // columns > _MOST_ELEMENTS or channels > _MOST_CHANNELS:
        return None
    order = (*short, *reduced, *other)
    return _Form(order, (1, count // columns, columns, channels), (1, _COLUMNS))


def _largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor that is not above a limit."""
    return next(size for size in range(most, 0, -1) if number % size == 0)


def _reshaped(
    shape: Sequence[int], order: Sequence[int] | None = None
) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
    """Return what transposes elements, where an order is given, and reshapes them."""

    def move(x: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.ascontiguousarray(x.transpose(order) if order else x).reshape(shape)

    return move
