"""Tensors that are no activations: their values are part of the program, whatever comes in.

- *Constants* are parameters, buffers, what a forward makes of numbers (``arange``, ``zeros``), and
  what is computed of these alone.
- *Integers* are arguments that are no floats (lengths, positions, masks), and what is computed of
  them and of constants: they steer the program, which is made for their values.
- *Data* are floats that come in, activations, and the integers and masks that are computed of them.

What depends on constants and integers alone runs in float and is folded into a constant of the
program: position encodings, normalized weights, lengths. It is quantized where it meets an
activation, as a parameter is. A layer with weights is different: what it takes in is an
activation, so that images of bytes are data as soon as a layer reads them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nna.emulation.marks import Marks, Writes


class Kind(Enum):
    """Dependence of the values of a tensor."""

    CONSTANT = "constant"
    INTEGER = "integer"
    #: Only integers and buffers need the mark: floats of which nothing is known are data.
    DATA = "data"


class _Forward(threading.local):
    """The outermost forward of a thread, by its number."""

    number = 0


class Constants:
    """Kinds of tensors, for the time of one outermost forward.

    What a backward computes again, as activation checkpointing does, it finds as it was.

    Args:
        names: Names of the module's parameters and buffers by ``id``.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names
        # A table of zeros stays a constant when constants are written to it.
        self._writes = Writes()
        self._kinds = Marks(self._writes, seen=True)
        self._forward = _Forward()
        self._numbers = count(1)

    def rename(self, names: Mapping[int, str]) -> None:
        """Take other tensors for the module's parameters and buffers, by ``id``."""
        self._names = names

    def begin(self) -> None:
        """An outermost forward begins: what it is given is data, wherever it has come from."""
        if not _in_backward():
            self._forward.number = next(self._numbers)

    def is_own(self, x: Tensor) -> bool:
        """Tell whether a tensor is itself a parameter or buffer."""
        return id(x) in self._names or isinstance(x, nn.Parameter)

    def is_constant(self, x: Tensor) -> bool:
        """Tell whether the values of a tensor depend on the module alone."""
        return self._kind(x) is Kind.CONSTANT

    def in_program(self, x: Tensor) -> bool:
        """Tell whether the values of a tensor are no data: a constant, or computed of integers."""
        return self._kind(x) in (Kind.CONSTANT, Kind.INTEGER)

    def _kind(self, x: Tensor) -> Kind | None:
        held: tuple[Kind, int] | None = self._kinds.get(x)
        if held is not None and (held[1] == self._forward.number or _in_backward()):
            return held[0]
        return Kind.CONSTANT if self.is_own(x) else None

    def kind_of(self, values: Any) -> Kind | None:
        """Return what a function of some arguments, nested, depends on; None for data.

        Also None where there is no tensor at all.
        """
        found: Kind | None = None
        for x in _tensors(values):
            kind = self._kind(x)
            if kind is None:
                if x.is_floating_point() or x.is_complex():
                    return None
                kind = Kind.INTEGER
            if kind is Kind.DATA:
                return None
            found = Kind.INTEGER if Kind.INTEGER in (found, kind) else kind
        return found

    def mark(self, results: Any, kind: Kind | None) -> None:
        """Note what results depend on: floats if they are no data, integers if they are."""
        for x in _tensors(results):
            is_float = x.is_floating_point() or x.is_complex()
            if is_float and kind is not None:
                self._set(x, kind)
            elif not is_float and kind is None:
                self._set(x, Kind.DATA)

    def _set(self, x: Tensor, kind: Kind) -> None:
        self._kinds[x] = (kind, self._forward.number)

    def made(self, result: Tensor, filled: Any) -> None:
        """Note a tensor of the code's own values, filled with some of these."""
        holds = any(True for _ in _tensors(filled))
        kind = self.kind_of(filled) if holds else Kind.CONSTANT
        self.mark(result, kind)

    def follow(self, result: Any, given: Any, in_scope: Callable[[], bool]) -> None:
        """Note the result of a function of integers, or of one that decides.

        Args:
            result: Its result, nested.
            given: Its arguments.
            in_scope: Whether the code that calls is emulated; asked only if it matters.
        """
        if not any(True for _ in _tensors(result)):
            return
        kind = self.kind_of(given)
        if kind is None and not any(True for _ in _tensors(given)):
            return
        if kind is None or in_scope():
            self.mark(result, kind)

    def enters(self, args: tuple[Any, ...]) -> None:
        """A layer takes arguments in: what was computed of integers is data from now on."""
        for x in args:
            if isinstance(x, Tensor) and self._kind(x) is Kind.INTEGER:
                self._kinds.pop(x)

    def note_write(self, target: Tensor) -> None:
        """Data have been written to a tensor: neither it nor its views are the program's."""
        self._writes.note(target)
        for x in (target, target._base):
            if x is not None and id(x) in self._names and not isinstance(x, nn.Parameter):
                self._set(x, Kind.DATA)


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
