"""End a run at a SIGTERM: one process alone after its step, several at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

#: Status of a process that a SIGTERM has ended, as shells have it.
STATUS = 128 + signal.SIGTERM


def report_stop(name: str) -> None:
    """Tell the user of a program that it was stopped.

    Args:
        name: Name of the recipe, such as ``"train"``.
    """
    text = "stopped by SIGTERM; the same command goes on, from the last checkpoint if it trains"
    print(f"recipes.{name}: {text}", file=sys.stderr, flush=True)


class EndTogether(Callback):
    """End all processes of a run at a SIGTERM of the first, or of each.

    Lightning lets the first process tell the others by a broadcast out of its signal handler. Where
    the others are in another collective by then, such as that of a gradient, a process waits for
    what no other sends, or loses its connection. Runs are made to be killed anywhere, so several
    processes end at once. With one process Lightning's handler stays: it ends after the step.
    """

    # Lightning sets its handler after `on_fit_start`, for each of fit, validate and test.

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_over(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_over(trainer)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_over(trainer)

    def _take_over(self, trainer: Trainer) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        if trainer.world_size < 2 or not is_main:
            return

        def end(number: int, frame: FrameType | None) -> None:
            rank_zero_only(report_stop)("train")
            launcher = trainer.strategy.launcher
            if launcher is not None:  # It has started the others on this machine.
                launcher.kill(signal.SIGKILL)
            os._exit(STATUS)

        signal.signal(signal.SIGTERM, end)
