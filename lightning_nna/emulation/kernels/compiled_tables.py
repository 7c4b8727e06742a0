"""Table look-ups, compiled for processors; equal in every bit to :mod:`.reference`."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
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
# Of a table without a mask.
_EMPTY_MASK = torch.empty(0, dtype=torch.bool)


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
    return torch.from_numpy(values), _EMPTY_MASK if mask_table is None else mask_of(mask, clipped)


def _tables(
    table: Tensor, mask_table: Tensor | None, shape: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the memory of a table, of the table of its mask, and of a mask of a shape."""
    if mask_table is None:
        return array(table), _NO_MASK, _NO_MASK
    return array(table), array(mask_table), np.empty(shape, np.bool_)


@compiled
def _add_integers(x, start, stride, scale, first_entry, factor, integers, positions):
    """Add the integers of an operand times a factor to positions in a table."""
    if stride:
        integers_of(x[start : start + len(positions)], scale, integers)
        for i in range(len(positions)):
            positions[i] += factor * (integers[i] - first_entry)
    else:
        integers_of(x[start : start + 1], scale, integers[:1])
        more = factor * (integers[0] - first_entry)
        for i in range(len(positions)):
            positions[i] += more


@compiled
def _look_up_pair(
    a, b, sizes, strides_a, strides_b, table, mask_table,
    scale_a, first_a, scale_b, first_b, values, mask, first, last,
):  # fmt: skip
    _, middle, inner = sizes
    scale_a, scale_b = np.float32(scale_a), np.float32(scale_b)
    size = min(_BLOCK, inner, last - first)
    positions, integers, count = np.empty(size, np.int64), np.empty(size, np.int64), 0
    has_mask, start = len(mask_table) > 0, first
    while start < last:
        row, column = start // inner, start % inner
        stop = min(start + min(_BLOCK, inner - column), last)
        outer, row = row // middle, row % middle
        block, own = positions[: stop - start], integers[: stop - start]
        block[:] = 0
        at_a = strides_a[0] * outer + strides_a[1] * row + strides_a[2] * column
        at_b = strides_b[0] * outer + strides_b[1] * row + strides_b[2] * column
        _add_integers(a, at_a, strides_a[2], scale_a, first_a, 256, own, block)
        _add_integers(b, at_b, strides_b[2], scale_b, first_b, 1, own, block)
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
    shape, axes = a.shape, _Axes((1, 1, a.numel()), (0, 0, 1), (0, 0, 1))
    if a.shape != b.shape:
        shape, merged = _broadcast(a.shape, b.shape)
        if merged is None:  # Rare: the operands stand in memory once more.
            a, b = a.expand(shape), b.expand(shape)
            merged = axes._replace(sizes=(1, 1, a.numel()))
        axes = merged
    values = np.empty(shape, np.float32)
    entries, masks, mask = _tables(table, mask_table, shape)
    clipped = 0
    if values.size:
        clipped = over_rows(
            *(values.size, values.size, _look_up_pair, array(a).reshape(-1), array(b).reshape(-1)),
            *(*axes, entries, masks, scale_a, first_a, scale_b, first_b),
            *(values.reshape(-1), mask.reshape(-1)),
        )
    return torch.from_numpy(values), _EMPTY_MASK if mask_table is None else mask_of(mask, clipped)


class _Axes(NamedTuple):
    """Sizes of three axes, and the strides of two operands: 0 where an operand is repeated."""

    sizes: tuple[int, ...]
    strides_a: tuple[int, ...]
    strides_b: tuple[int, ...]


@lru_cache(maxsize=1024)
def _broadcast(a: torch.Size, b: torch.Size) -> tuple[torch.Size, _Axes | None]:
    """Merge the axes along which the same of two operands are repeated.

    Args:
        a: Shape of the first operand.
        b: Shape of the second operand.

    Returns:
        The shape that both broadcast to, and the merged axes; None if they are more than three.

    Example:
        >>> shape, axes = _broadcast(torch.Size((4, 1, 1)), torch.Size((4, 5, 6)))
        >>> axes
        _Axes(sizes=(1, 4, 30), strides_a=(0, 1, 0), strides_b=(0, 30, 1))
    """
    shape = torch.broadcast_shapes(a, b)
    sizes: list[int] = []
    is_own: list[list[bool]] = []
    for position, size in enumerate(shape, start=-len(shape)):
        own = [-position <= len(x) and x[position] == size for x in (a, b)]
        if size == 1:
            continue
        if is_own and is_own[-1] == own:
            sizes[-1] *= size
        else:
            sizes.append(size)
            is_own.append(own)
    if len(sizes) > 3:
        return shape, None
    absent = 3 - len(sizes)
    sizes, is_own = [1] * absent + sizes, [[False, False]] * absent + is_own
    strides = [_strides(sizes, [own[k] for own in is_own]) for k in range(2)]
    return shape, _Axes(tuple(sizes), *strides)


def _strides(sizes: list[int], is_own: list[bool]) -> tuple[int, ...]:
    """Return the strides of an operand, which has some of the axes as its own."""
    return tuple(
        math.prod(size for size, own in zip(sizes[k + 1 :], is_own[k + 1 :], strict=True) if own)
        if is_own[k]
        else 0
        for k in range(len(sizes))
    )
