"""Marks of tensors, valid until something writes to their memory.

Quantization parameters, or the site that has produced a result, are stored by tensor. Views share
memory: a write through one of them changes all, so that the marks of the others are wrong from then
on. Therefore a mark has the time at which it was set, and is valid only if the storage of its
tensor has not been written to since. PyTorch counts writes itself, but not those to tensors of
inference mode nor those through ``.data``; :class:`Writes` counts all that pass the dispatch. A
mark is valid only if both counts are unchanged.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor

#: See :meth:`Writes.stamp`.
Stamp = tuple[int, int, int, int]


class Writes:
    """Record the times of writes to storages, by address.

    Freed memory is used again for other tensors. Times only grow, so that marks of a new tensor are
    later than any write to an old one in its place.
    """

    def __init__(self) -> None:
        self.now = 0
        self._last: dict[int, int] = {}

    def note(self, x: Tensor) -> None:
        """Record a write to the memory of a tensor of any shape."""
        self.now += 1
        self._last[_storage_of(x)] = self.now

    def last(self, x: Tensor) -> int:
        """Return the time of the last write to the memory of a tensor of any shape; 0 for none."""
        return self._last.get(_storage_of(x), 0) if self._last else 0

    def stamp(self, x: Tensor) -> Stamp:
        """Return a value that changes with a write to a tensor, and with other memory for it.

        Args:
            x: Tensor of any shape.

        Example:
            >>> writes, x = Writes(), torch.zeros(4)
            >>> before = writes.stamp(x)
            >>> writes.stamp(x) == before
            True
            >>> x.data = torch.ones(4)
            >>> writes.stamp(x) == before
            False
        """
        storage = _storage_of(x)
        offset = int(x.storage_offset()) if x.layout is torch.strided else 0
        return _version(x), self._last.get(storage, 0), storage, offset


class Marks:
    """Map tensors to values; an entry ends with its tensor or with a write to its memory.

    Args:
        writes: Writes that the emulator records.
        noted_only: Whether the writes that PyTorch counts are ignored.

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

    def __init__(self, writes: Writes, *, noted_only: bool = False) -> None:
        self._writes, self._noted_only = writes, noted_only
        #: Entries by ``id`` of the tensor; some may not be valid any more.
        self.entries: dict[int, tuple[ref[Tensor], Any, int, int]] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __setitem__(self, x: Tensor, value: Any) -> None:
        # The entry is removed before an ``id`` is used again. A tensor that only autograd holds is
        # not dead: Python gives it the same ``id`` again.
        key = id(x)
        reference = ref(x, partial(_forget, self.entries, key))
        version = 0 if self._noted_only else _version(x)
        self.entries[key] = (reference, value, self._writes.now, version)

    def get(self, x: Tensor) -> Any:
        """Return the value of a tensor of any shape, or None."""
        mark = self.entries.get(id(x))
        if mark is None:
            return None
        _, value, since, version = mark
        if not self._noted_only:
            try:
                if version != x._version:
                    return None
            except RuntimeError:  # A tensor of inference mode has no count.
                pass
        # Most often nothing at all has been written to since.
        is_valid = self._writes.now <= since or self._writes.last(x) <= since
        return value if is_valid else None

    def pop(self, x: Tensor) -> None:
        """Remove the entry of a tensor of any shape."""
        self.entries.pop(id(x), None)

    def clear(self) -> None:
        """Remove all entries."""
        self.entries.clear()


def _forget(table: dict[int, Any], key: int, _: Any) -> None:
    """Remove the entry of a tensor that has died from a table by ``id``."""
    table.pop(key, None)


def _version(x: Tensor) -> int:
    """Return PyTorch's count of writes; tensors of inference mode have none."""
    try:
        return x._version
    except RuntimeError:
        return -1


def _storage_of(x: Tensor) -> int:
    try:
        return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)
    except ValueError:  # The parameter of a lazy module, before its first forward.
        return id(x)
