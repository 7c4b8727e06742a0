"""Marks of a tensor, for as long as nobody writes to its memory.

A grid, or the site that has made a result, is remembered by tensor. Views share memory: what is
written through one of them changes all, and what was known of the others is wrong from then on. So
every mark has the time at which it was set, and holds only if its tensor's storage has not been
written to since. PyTorch counts writes itself, but not those to tensors of inference mode nor those
through ``.data``; :class:`Writes` counts all that pass the dispatch. Both counts must agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

#: See :meth:`Writes.stamp`.
Stamp = tuple[int, int, int, int]


class Writes:
    """Times at which storages were written to, by address.

    Memory that is freed becomes another tensor's. Time never runs back, so that marks of the new
    tensor are later than any write to the old one.
    """

    def __init__(self) -> None:
        self.now = 0
        self._last: dict[int, int] = {}

    def note(self, x: Tensor) -> None:
        """The memory of a tensor has been written to."""
        self.now += 1
        self._last[_storage_of(x)] = self.now

    def last(self, x: Tensor) -> int:
        """When the memory of a tensor was last written to; 0 for never."""
        return self._last.get(_storage_of(x), 0) if self._last else 0

    def stamp(self, x: Tensor) -> Stamp:
        """Return a value that differs once a tensor has been written to or given other memory.

        Example:
            >>> writes, x = Writes(), torch.zeros(4)
            >>> before = writes.stamp(x)
            >>> writes.stamp(x) == before
            True
            >>> x.data = torch.ones(4)
            >>> writes.stamp(x) == before
            False
        """
        return _version(x), self.last(x), _storage_of(x), _offset(x)


class Marks:
    """A value for each of some tensors, forgotten with the tensor or with a write to its memory.

    Args:
        writes: Of the same emulator.
        seen: Whether only writes that are noted count, and not those that PyTorch counts.

    Example:
        >>> writes = Writes()
        >>> marks, x = Marks(writes), torch.zeros(4)
        >>> marks[x] = "zeros"
        >>> marks.get(x)
        'zeros'
        >>> _ = x[:2].fill_(1.0)
        >>> marks.get(x) is None
        True
    """

    def __init__(self, writes: Writes, *, seen: bool = False) -> None:
        self._writes, self._version = writes, _no_version if seen else _version
        self._table = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._table)

    def __setitem__(self, x: Tensor, value: Any) -> None:
        self._table[x] = (value, self._writes.now, self._version(x))

    def get(self, x: Tensor) -> Any:
        """The value of a tensor, or None."""
        mark = self._table.get(x)
        if mark is None:
            return None
        value, since, version = mark
        return value if version == self._version(x) and self._writes.last(x) <= since else None

    def pop(self, x: Tensor) -> None:
        """Forget a tensor."""
        self._table.pop(x, None)

    def clear(self) -> None:
        """Forget all."""
        self._table = WeakTensorKeyDictionary()


def _version(x: Tensor) -> int:
    """PyTorch's own count of writes; those to tensors of inference mode have none."""
    return -1 if x.is_inference() else x._version


def _no_version(x: Tensor) -> int:
    return 0


def _offset(x: Tensor) -> int:
    return int(x.storage_offset()) if x.layout is torch.strided else 0


def _storage_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)
