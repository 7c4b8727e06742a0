"""Numbers that Python needs of parameters on a device, read together, once a step.

The scale of a constant, as a gain of a normalization, and that of a table of embeddings are numbers
of Python that follow from a parameter's values. Reading one makes Python wait for the device. So
whoever has asked once is read ahead: all in one copy, when the outermost block begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor

#: Function from a parameter to one number, a tensor without axes.
Number = Callable[[Tensor], Tensor]


def magnitude(x: Tensor) -> Tensor:
    """Return the largest absolute value of a tensor of any shape, 0 if it is empty."""
    return x.detach().abs().amax() if x.numel() else x.new_zeros(())


@dataclass
class _Entry:
    tensor: ref[Tensor]
    version: int
    value: float


class ParameterNumbers:
    """Hold numbers of tensors of a device until these are written to.

    Example:
        >>> numbers, x = ParameterNumbers(), torch.tensor([1.0, -3.0])
        >>> numbers.read(x, magnitude)
        3.0
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[int, Number], _Entry] = {}

    def read(self, x: Tensor, number: Number) -> float:
        """Return a number of a tensor of any shape; waits for the device if it is not known yet."""
        key = id(x), number
        entry = self._entries.get(key)
        if entry is None or entry.tensor() is not x or entry.version != _version(x):
            self._entries[key] = entry = _Entry(ref(x), _version(x), 0.0)
            entry.value = float(number(x))
        return entry.value

    def refresh(self) -> None:
        """Read every number again that was asked for, in one copy for each device."""
        alive: dict[torch.device, list[tuple[_Entry, Tensor]]] = {}
        for key, entry in list(self._entries.items()):
            x = entry.tensor()
            if x is None:
                del self._entries[key]
                continue
            entry.version = _version(x)
            alive.setdefault(x.device, []).append((entry, key[1](x).double()))
        for entries in alive.values():
            values = torch.stack([value for _, value in entries]).cpu().tolist()
            for (entry, _), value in zip(entries, values, strict=True):
                entry.value = value


def _version(x: Tensor) -> int:
    """Number of writes that autograd has seen; tensors of the inference mode have none."""
    return -1 if x.is_inference() else x._version
