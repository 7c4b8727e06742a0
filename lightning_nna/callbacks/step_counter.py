"""Counting optimiser steps, whoever calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer


class StepCounter:
    """Counts the steps of the optimiser that steps most: with several, a batch is one step.

    It counts by the optimisers' own hooks, so that accumulation, manual optimisation and steps
    that a gradient scaler skips are right.

    Args:
        stepped: Called after every step of any optimiser, with whether the count has advanced.

    Attributes:
        steps: The count.
    """

    def __init__(self, stepped: Callable[[bool], None]) -> None:
        self.steps = 0
        self._stepped = stepped
        self._counts: dict[int, int] = {}
        self._handles: list[Any] = []

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Count the steps of these from now on, beside those counted before."""
        self._counts = {}
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._count))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle counts on, but hangs on no optimiser."""
        return {**self.__dict__, "_counts": {}, "_handles": []}

    def _count(self, optimizer: Optimizer, *_: Any) -> None:
        before = max(self._counts.values(), default=0)
        self._counts[id(optimizer)] = self._counts.get(id(optimizer), 0) + 1
        advanced = max(self._counts.values()) > before
        self.steps += int(advanced)
        self._stepped(advanced)
