"""Constants of the program: tensors whose values do not depend on the data.

- *Constants* are parameters, buffers, tensors that a forward creates from numbers (``arange``,
  ``zeros``), and results of functions of these alone.
- *Integers* are arguments that are not floats (lengths, positions, masks), and results of functions
  of them and of constants. A program is exported for their values.
- *Data* are float arguments, activations, and integers and masks that are computed from them.

A function of constants and integers alone runs in float, and its result is a constant of the
program: position encodings, normalized weights, lengths. It is quantized as an operand of an
operator, as a parameter is. The input of a layer with weights is always an activation, so images of
bytes are data as soon as a layer consumes them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from enum import Enum
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nna.emulation.arguments import tensors_in
from lightning_nna.emulation.marks import Marks, Writes


class Kind(Enum):
    """Name what the values of a tensor depend on."""

    CONSTANT = "constant"
    INTEGER = "integer"
    #: Mark of integers and buffers alone: floats without a mark are data.
    DATA = "data"


class _Forward(threading.local):
    """Number the outermost forwards of a thread."""

    number = 0


class Constants:
    """Hold the kinds of tensors during one outermost forward.

    In a backward, where activation checkpointing runs forwards again, kinds stay valid.

    Args:
        names: Names of the module's parameters and buffers by ``id``.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names
        # Counts writes of data alone: zeros stay a constant when constants are written to them.
        self._writes = Writes()
        self._kinds = Marks(self._writes, noted_only=True)
        self._forward = _Forward()
        self._numbers = count(1)

    def rename(self, names: Mapping[int, str]) -> None:
        """Replace the names of the module's parameters and buffers by ``id``."""
        self._names = names

    def begin_forward(self) -> None:
        """Start an outermost forward: kinds of an earlier one are no longer valid."""
        if not _in_backward():
            self._forward.number = next(self._numbers)

    def is_own(self, x: Tensor) -> bool:
        """Tell whether a tensor of any shape is itself a parameter or buffer."""
        if id(x) in self._names:
            return True
        # A parameter is of a class of its own; to ask for it is slow.
        return type(x) is not Tensor and isinstance(x, nn.Parameter)

    def is_constant(self, x: Tensor) -> bool:
        """Tell whether the values of a tensor of any shape depend on the module alone."""
        return self._kind(x) is Kind.CONSTANT

    def in_program(self, x: Tensor) -> bool:
        """Tell whether a tensor of any shape is a constant, or computed from integers: no data."""
        return self._kind(x) in (Kind.CONSTANT, Kind.INTEGER)

    def _kind(self, x: Tensor) -> Kind | None:
        mark: tuple[Kind, int] | None = self._kinds.get(x)
        if mark is not None and (mark[1] == self._forward.number or _in_backward()):
            return mark[0]
        return Kind.CONSTANT if self.is_own(x) else None

    def kind_of(self, values: Any) -> Kind | None:
        """Return the kind of a function's result.

        Args:
            values: Arguments of the function, nested.

        Returns:
            None if the result depends on data, or if no argument is a tensor.
        """
        result: Kind | None = None
        for value in values if isinstance(values, tuple) else (values,):
            # One by one: most often the first is an activation, which tells all.
            for x in (value,) if isinstance(value, Tensor) else tensors_in(value):
                kind = self._kind(x)
                if kind is None:
                    if x.is_floating_point() or x.is_complex():
                        return None
                    kind = Kind.INTEGER
                if kind is Kind.DATA:
                    return None
                result = Kind.INTEGER if Kind.INTEGER in (result, kind) else kind
        return result

    def mark(self, results: Any, kind: Kind | None) -> None:
        """Note the kind of results: of floats unless they are data, of integers if they are.

        Args:
            results: Results of a function, nested.
            kind: Kind of the results; None for data.
        """
        for x in tensors_in(results):
            is_float = _is_float(x)
            if is_float and kind is not None:
                self._set(x, kind)
            elif not is_float and kind is None:
                self._set(x, Kind.DATA)

    def _set(self, x: Tensor, kind: Kind) -> None:
        self._kinds[x] = (kind, self._forward.number)

    def mark_created(self, result: Tensor, contents: Any) -> None:
        """Note a tensor that the module's code creates.

        Args:
            result: New tensor of any shape.
            contents: Values that it is filled with, nested; numbers or tensors.
        """
        kind = self.kind_of(contents) if tensors_in(contents) else Kind.CONSTANT
        self.mark(result, kind)

    def mark_decision(
        self, result: Any, kind: Kind | None, arguments: Any, in_scope: Callable[[], bool]
    ) -> None:
        """Note the result of a comparison, or of a function of integers.

        Args:
            result: Result of the function, nested.
            kind: Kind of the arguments before the call, see :meth:`kind_of`.
            arguments: Arguments of the function, nested.
            in_scope: Function that tells whether the calling code is emulated; slow, so it is
                called only if needed.
        """
        results = tensors_in(result)
        if not results or (kind is None and not tensors_in(arguments)):
            return
        # A kind other than data is noted of floats alone.
        if kind is None or (any(_is_float(x) for x in results) and in_scope()):
            self.mark(results, kind)

    def mark_layer_inputs(self, args: tuple[Any, ...]) -> None:
        """Note that a layer consumes its arguments: results of integers are data from now on."""
        for x in args:
            if id(x) in self._kinds.entries and self._kind(x) is Kind.INTEGER:
                self._kinds.pop(x)

    def note_write(self, target: Tensor) -> None:
        """Note data written to a tensor of any shape: it and its views are data from now on."""
        self._writes.note(target)
        for x in (target, target._base):
            if x is not None and id(x) in self._names and not isinstance(x, nn.Parameter):
                self._set(x, Kind.DATA)


def _is_float(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
