"""Check values of a device without waiting for it, once a step.

A check on the host raises at once. On a device Python would have to wait for the value, and the
device for Python: such a check is noted, and all are read together when the outermost block that
emulates ends, which is once a step in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.on_host import in_memory

# What a loop inside of one block may collect before it is read.
_MOST = 2048


@dataclass
class _Waiting:
    """Describe a number that a device has not computed yet, and what to do with it."""

    number: Tensor
    error: Exception | None
    report: Callable[[int], None] | None = None
    explain: Callable[[Exception], Exception] | None = None

    def settle(self, number: float) -> None:
        """Report a count, or raise the error of a condition that does not hold."""
        if self.report is not None:
            self.report(int(number))
        elif self.error is not None and not number:
            raise self.error if self.explain is None else self.explain(self.error)


class DeferredChecks:
    """Hold conditions and counts that a device has not computed yet.

    Attributes:
        noted: Number of conditions that were noted so far.

    Example:
        >>> checks = DeferredChecks()
        >>> checks.require(torch.tensor(False), FloatingPointError("a weight is not finite"))
        Traceback (most recent call last):
        FloatingPointError: a weight is not finite
    """

    def __init__(self) -> None:
        self.noted = 0
        self._waiting: list[_Waiting] = []

    def require(self, condition: Tensor, error: Exception) -> None:
        """Raise an error if a condition does not hold: at once on the host, else when it is read.

        Args:
            condition: Booleans, or numbers that are not 0; any shape on a device, elsewhere one.
            error: Error that says what is wrong, and the remedy.
        """
        self._note(_Waiting(condition, error))

    def count(self, number: Tensor, report: Callable[[int], None]) -> None:
        """Report a count: at once on the host, else when it is read.

        Args:
            number: Whole number, without axes.
            report: Function of the number.
        """
        self._note(_Waiting(number, None, report))

    def explain(self, since: int, function: Callable[[Exception], Exception]) -> None:
        """Let a function make the errors of what was noted more precise.

        Args:
            since: :attr:`noted` before.
            function: Function from an error to the one that is raised.
        """
        new = self.noted - since
        for waiting in self._waiting[len(self._waiting) - new :] if new else []:
            waiting.explain = function

    def read(self) -> None:
        """Read all, in one copy for each device, and raise the first error.

        Raises:
            Exception: The error of the first condition that does not hold.
        """
        # Threads of autograd's engine may note checks at the same time.
        waiting, self._waiting = self._waiting, []
        by_device: dict[torch.device, list[_Waiting]] = {}
        for each in waiting:
            by_device.setdefault(each.number.device, []).append(each)
        for group in by_device.values():
            numbers = torch.cat([each.number.double().flatten() for each in group]).cpu()
            parts = numbers.split([each.number.numel() for each in group])
            for each, part in zip(group, parts, strict=True):
                each.settle(float(part.min()))

    def forget(self) -> None:
        """Drop what waits: an error has ended the block already."""
        self._waiting.clear()

    def _note(self, waiting: _Waiting) -> None:
        if in_memory(waiting.number):
            waiting.settle(float(waiting.number))
            return
        self.noted += 1
        self._waiting.append(waiting)
        if len(self._waiting) >= _MOST:
            self.read()


#: Checks of this process: what is checked has no reference to the module that it belongs to.
DEFERRED = DeferredChecks()
