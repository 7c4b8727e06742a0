"""What the grids of few bits and of zeros share: the same start and the same budget on AN4."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

from recipes.benchmark.an4 import PRETRAINED

C = TypeVar("C")

#: Of the training; the float weights that all runs start from are the same.
SEEDS = (1, 2, 3)
START = PRETRAINED
STEPS = 480
#: Four parts of 120 batches: methods that do something after each epoch have epochs.
BUDGET = ("trainer.max_epochs=4", f"+trainer.limit_train_batches={STEPS // 4}")


def training(seed: int, folder: Path, *chosen: str, start: Path = START) -> list[str]:
    """Module and overrides of a run of the budget.

    Args:
        seed: Of the training.
        folder: Where the run goes.
        chosen: Overrides that say what is done.
        start: Float weights that it starts from.
    """
    return [
        "recipes.train",
        "experiment=an4_rnnt_finetune",
        f"seed={seed}",
        f"init_from={start}",
        *BUDGET,
        "+trainer.limit_val_batches=0",
        "beam_width=1",
        *chosen,
        f"hydra.run.dir={folder}",
    ]


def evaluation(folder: Path, *chosen: str) -> list[str]:
    """Module and overrides that score the float weights."""
    return [
        "recipes.evaluate",
        f"ckpt={START}",
        "beam_width=1",
        *chosen,
        f"hydra.run.dir={folder}",
    ]


def run_cells(cells: Iterable[C], run_cell: Callable[[C], None], *, workers: int) -> None:
    """Run cells side by side, each in a process of its own that has the imports already.

    Args:
        cells: What to run.
        run_cell: Runs one; a function of a module.
        workers: Cells at a time.

    Raises:
        Exception: What the first cell that fails raises; cells that wait are not begun.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recipes.train", "recipes.evaluate"])
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(run_cell, cell) for cell in cells]):
            if (error := done.exception()) is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                raise error


def summary_of(folder: Path, command: Sequence[str], *, threads: int) -> dict[str, Any]:
    """The summary of a run, which is made if it is missing.

    Args:
        folder: Of the run; what it prints goes to ``run.log`` there.
        command: Module and overrides.
        threads: Of the CPU.

    Returns:
        What ``summary.json`` holds; with ``cpu_seconds`` of the run if it was made now and whole.
    """
    path = folder / "summary.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    is_new = not (folder / "checkpoints").exists()
    began = time.process_time()
    run(*command, f"threads={threads}", log=folder / "run.log")
    seconds = round(time.process_time() - began, 1) if is_new else None
    return {**json.loads(path.read_text()), "cpu_seconds": seconds}


def run(module: str, *overrides: str, log: Path) -> None:
    """Run a recipe in this process, as ``python -m`` does.

    Args:
        module: As ``"recipes.train"``.
        overrides: Of its configuration.
        log: Where its output goes.

    Raises:
        RuntimeError: If the recipe exits with an error; what it left is resumed next time.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.argv = [module, *overrides]
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as exit_:
            if exit_.code not in (None, 0):
                raise RuntimeError(f"{module} failed, see {log}") from exit_


def figures_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a row keeps of a summary."""
    kept = ("command", "commit", "wer", "wer_low", "wer_high", "loss_per_token")
    return {
        **{name: summary[name] for name in kept},
        "train_seconds": summary.get("train_seconds"),
        "cpu_seconds": summary.get("cpu_seconds"),
        "threads": summary.get("threads"),
    }
