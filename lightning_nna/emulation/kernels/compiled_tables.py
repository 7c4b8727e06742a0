"""Table look-ups, compiled for processors; equal in every bit to :mod:`.reference`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_nna.emulation.kernels.compiled import (
    array,
    compiled,
    integers_of,
    mask_of,
    over_rows,
)

# Elements whose positions in the table are computed at once.
_BLOCK = 1024
_NO_MASK = np.zeros(0, np.bool_)
# Strides of operands of one shape.
_ONE_AXIS = np.array([[0, 0, 1], [0, 0, 1]])


@compiled
def _read(positions, table, mask_table, values, mask):
    """Read the entries at positions, which lie inside; return how many of them were clipped."""
    count = 0
    for i in range(len(values)):
        values[i] = table[positions[i]]
    if len(mask_table):
        for i in range(len(values)):
            clipped = mask_table[positions[i]]
            mask[i] = clipped
            count += clipped
    return count


@compiled
def _look_up(x, table, mask_table, scale, first_entry, values, mask, first, last):
    positions, count = np.empty(min(_BLOCK, last - first), np.int64), 0
    has_mask = len(mask_table) > 0
    for start in range(first, last, _BLOCK):
        stop = min(start + _BLOCK, last)
        block = positions[: stop - start]
        integers_of(x[start:stop], np.float32(scale), block)
        for i in range(len(block)):
            block[i] = min(max(block[i] - first_entry, 0), len(table) - 1)
        part = mask[start:stop] if has_mask else mask
        count += _read(block, table, mask_table, values[start:stop], part)
    return count


def look_up(
    x: Tensor, table: Tensor, mask_table: Tensor | None, scale: float, first: int
) -> tuple[Tensor, Tensor | None]:
    """Look integers of any shape up; see :func:`.definitions.look_up`."""
    real = array(x)
    values = np.empty(real.shape, np.float32)
    entries, masks, mask = _tables(table, mask_table, values.shape)
    clipped = over_rows(
        *(values.size, values.size, _look_up, real.reshape(-1), entries, masks),
        *(scale, first, values.reshape(-1), mask.reshape(-1)),
    )
    return torch.from_numpy(values), mask_of(mask, clipped)


def _tables(
    table: Tensor, mask_table: Tensor | None, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the memory of a table, of the table of its mask, and of a mask of a shape."""
    if mask_table is None:
        return array(table), _NO_MASK, _NO_MASK
    return array(table), array(mask_table), np.empty(shape, np.bool_)


@compiled
def _add_integers(x, start, stride, scale, first_entry, factor, integers, positions):
    """Add the integers of an operand times a factor to positions in a table."""
    if stride:
        integers_of(x[start : start + len(positions)], np.float32(scale), integers)
        for i in range(len(positions)):
            positions[i] += factor * (integers[i] - first_entry)
    else:
        integers_of(x[start : start + 1], np.float32(scale), integers[:1])
        positions += factor * (integers[0] - first_entry)


@compiled
def _look_up_pair(
    a, b, strides, middle, inner, table, mask_table,
    scale_a, first_a, scale_b, first_b, values, mask, first, last,
):  # fmt: skip
    size = min(_BLOCK, inner, last - first)
    positions, integers, count = np.empty(size, np.int64), np.empty(size, np.int64), 0
    has_mask, start = len(mask_table) > 0, first
    while start < last:
        row, column = start // inner, start % inner
        stop = min(start + min(_BLOCK, inner - column), last)
        outer, row = row // middle, row % middle
        at = strides[:, 0] * outer + strides[:, 1] * row + strides[:, 2] * column
        block, own = positions[: stop - start], integers[: stop - start]
        block[:] = 0
        _add_integers(a, at[0], strides[0, 2], scale_a, first_a, 256, own, block)
        _add_integers(b, at[1], strides[1, 2], scale_b, first_b, 1, own, block)
        for i in range(len(block)):
            block[i] = min(max(block[i], 0), len(table) - 1)
        part = mask[start:stop] if has_mask else mask
        count += _read(block, table, mask_table, values[start:stop], part)
        start = stop
    return count


def look_up_pair(
    a: Tensor,
    b: Tensor,
    table: Tensor,
    mask_table: Tensor | None,
    scale_a: float,
    first_a: int,
    scale_b: float,
    first_b: int,
) -> tuple[Tensor, Tensor | None]:
    """Look pairs of integers up, shapes that broadcast; see :func:`.definitions.look_up_pair`."""
    strides, middle, shape = _ONE_AXIS, 1, tuple(a.shape)
    inner = a.numel()
    if a.shape != b.shape:
        shape = torch.broadcast_shapes(a.shape, b.shape)
        axes, of_axes = _merged_axes(tuple(a.shape), tuple(b.shape), shape)
        if len(axes) > 3:  # Rare: their values stand in memory once more.
            a, b = a.expand(shape), b.expand(shape)
            inner = a.numel()
        else:
            (_, middle, inner), strides = axes, of_axes
    values = np.empty(shape, np.float32)
    entries, masks, mask = _tables(table, mask_table, shape)
    clipped = 0
    if values.size:
        clipped = over_rows(
            *(values.size, values.size, _look_up_pair, array(a).reshape(-1), array(b).reshape(-1)),
            *(strides, middle, inner, entries, masks, scale_a, first_a, scale_b, first_b),
            *(values.reshape(-1), mask.reshape(-1)),
        )
    return torch.from_numpy(values), mask_of(mask, clipped)


def _merged_axes(
    a: tuple[int, ...], b: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[list[int], np.ndarray]:
    """Merge axes along which the same operands are repeated.

    Args:
        a: Shape of the first operand.
        b: Shape of the second operand.
        shape: Shape that both broadcast to.

    Returns:
        Sizes of at least three axes, the outermost first, and the strides of both operands along
        these, in elements, int64, shape ``(2, axes)``; 0 where an operand is repeated.

    Example:
        >>> _merged_axes((4, 1, 1), (4, 5, 6), (4, 5, 6))
        ([1, 4, 30], array([[ 0,  1,  0],
               [ 0, 30,  1]]))
    """
    sizes: list[int] = []
    repeated: list[tuple[bool, bool]] = []
    for position, size in enumerate(shape, start=-len(shape)):
        own = tuple(-position > len(x) or x[position] != size for x in (a, b))
        if size == 1:
            continue
        if repeated and repeated[-1] == own:
            sizes[-1] *= size
        else:
            sizes.append(size)
            repeated.append((own[0], own[1]))
    missing = max(3 - len(sizes), 0)
    sizes, repeated = [1] * missing + sizes, [(True, True)] * missing + repeated
    strides = np.zeros((2, len(sizes)), np.int64)
    steps = [1, 1]
    for axis in reversed(range(len(sizes))):
        for operand in range(2):
            if not repeated[axis][operand]:
                strides[operand, axis] = steps[operand]
                steps[operand] *= sizes[axis]
    return sizes, strides
