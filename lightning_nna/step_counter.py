"""The clock of a callback: optimizer steps, whoever calls them, and how many the run will have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer


class StepCounter:
    """Counts the steps of the optimizer that steps most: with several, a batch is one step.

    It counts by the optimizers' own hooks, so that accumulation, manual optimization and steps
    that a gradient scaler skips are right. A callback that joins a run, such as one resumed from a
    float checkpoint, counts from there, and its run is what is left.

    Args:
        stepped: Called after every step of any optimizer, with whether the count has advanced.

    Attributes:
        steps: The count.
        total: Steps of the whole run in the same unit; infinite for a run without an end.
    """

    def __init__(self, stepped: Callable[[bool], None]) -> None:
        self.steps = 0
        self.total = math.inf
        self._stepped = stepped
        self._counts: list[int] = []
        self._handles: list[Any] = []
        # Batches that have begun, and the Trainer's two counts when the callback joined.
        self._batches = 0
        self._joined: tuple[int, int] | None = None
        self._is_new = False
        # What the Trainer allows: optimizer steps, and batches.
        self._limits = (math.inf, math.inf)

    # --- a run --------------------------------------------------------------------------------

    def start(self, trainer: pl.Trainer) -> None:
        """Count the steps of a Trainer's optimizers, and find the length of the run."""
        if self._joined is None:
            self._is_new = True
        # Loads the data where that has not happened, and refuses what has no length.
        estimated = trainer.estimated_stepping_batches
        steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
        batches = math.inf if math.isinf(estimated) else _all_batches(trainer)
        self._limits = (steps, batches)
        self.attach(trainer.optimizers)
        self.measure(trainer)

    def locate(self, trainer: pl.Trainer) -> bool:
        """Find out where the run is, once the Trainer knows; a checkpoint tells it after the start.

        Returns:
            Whether the callback joins a run that has begun without it.
        """
        joins = False
        if self._is_new:
            # Without a record of it: what was counted, was counted since the run began.
            self._joined = _position(trainer) if self.steps == 0 else (0, 0)
            self._is_new, joins = False, any(self._joined)
        self.measure(trainer)
        return joins

    def batch_begins(self) -> None:
        """Count a batch of training."""
        self._batches += 1

    def measure(self, trainer: pl.Trainer) -> None:
        """Find the length of the run again, from what a step has cost so far of its limits.

        In automatic optimization it is known. In manual optimization a step, that of the optimizer
        that steps most, may be several steps of the Trainer, and more or less than a batch.
        """
        joined = self._joined or (0, 0)
        left = [limit - before for limit, before in zip(self._limits, joined, strict=True)]
        if trainer.lightning_module.automatic_optimization:
            self.total = min(left)
            return
        if self.steps == 0:
            # Nothing is known yet: every optimizer steps once for every batch.
            each = float(max(len(self._counts), 1)), 1.0
        else:
            of_trainer = trainer.global_step - joined[0]
            each = of_trainer / self.steps, self._batches / self.steps
        # An optimizer that is stepped behind the Trainer's back costs it nothing.
        totals = [
            limit if cost == 1 else limit / cost
            for limit, cost in zip(left, each, strict=True)
            if cost > 0
        ]
        self.total = min(totals, default=math.inf)

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Count the steps of these from now on, besides those counted before."""
        optimizers = list(optimizers)
        if len(self._counts) != len(optimizers):
            self._counts = [self.steps] * len(optimizers)
        for index, optimizer in enumerate(optimizers):
            # By position: an optimizer that wraps another may pass the hook on to it.
            hook = partial(self._count, index)
            self._handles.append(optimizer.register_step_post_hook(hook))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # --- state --------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every run: another module is trained."""
        self.steps = self._batches = 0
        self._counts, self._joined, self.total = [], None, math.inf

    def state_dict(self) -> dict[str, Any]:
        """Counts as plain values."""
        joined = None if self._joined is None else list(self._joined)
        return {
            "steps": self.steps,
            "counts": list(self._counts),
            "batches": self._batches,
            "joined": joined,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        self.steps = int(state["steps"])
        self._counts = [int(count) for count in state.get("counts", [])]
        self._batches = int(state.get("batches", self.steps))
        joined = state.get("joined")
        self._joined = None if joined is None else (int(joined[0]), int(joined[1]))

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle counts on, but hangs on no optimizer."""
        return {**self.__dict__, "_handles": []}

    def _count(self, index: int, *_: Any) -> None:
        self._counts[index] += 1
        advanced = max(self._counts) > self.steps
        self.steps = max(self._counts)
        self._stepped(advanced)


def _position(trainer: pl.Trainer) -> tuple[int, int]:
    """Optimizer steps and batches so far; in automatic optimization a step counts as its batch."""
    step = int(trainer.global_step)
    if trainer.lightning_module.automatic_optimization:
        return step, step
    return step, int(trainer.fit_loop.epoch_loop.batch_progress.total.completed)


def _all_batches(trainer: pl.Trainer) -> float:
    """Batches after which optimizers will have stepped when every epoch is over."""
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs in (None, -1) or math.isinf(batches):
        return math.inf
    return math.ceil(batches / trainer.accumulate_grad_batches) * max(epochs, 1)
