"""Runs of recipes on AN4 that the studies of compression share: start, budget, summary, row."""

from __future__ import annotations

import json
import runpy
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.benchmark.grid import Run
from recipes.benchmark.rows import Row

#: Seeds of the training; the float weights that all runs start from are the same.
SEEDS = (1, 2, 3)
#: Float weights of seed 1, in half precision.
START = Path("recipes/pretrained/an4_rnnt.safetensors")
#: Optimizer steps of a run.
STEPS = 480
#: Four epochs of 120 batches: some methods act after each epoch.
BUDGET = ("trainer.max_epochs=4", f"+trainer.limit_train_batches={STEPS // 4}")

#: Preset of the published rows.
PRESET = "litert-int8"


@dataclass(frozen=True, kw_only=True)
class RecipeRun(Run):
    """A run of ``recipes.train``, ``recipes.evaluate`` or ``recipes.deploy`` in its own folder."""

    @property
    def folder(self) -> Path:
        """Run folder."""
        raise NotImplementedError

    @property
    def command(self) -> list[str]:
        """Module and overrides of the run."""
        raise NotImplementedError

    @property
    def checkpoint(self) -> Path:
        """Last checkpoint of the run."""
        return self.folder / "checkpoints" / "last.ckpt"

    def rows(self) -> Iterator[Row]:
        """Run unless it has finished, and yield its row."""
        yield self.row(summary_of(self.folder, self.command, threads=self.threads))

    def row(self, summary: Mapping[str, Any]) -> Row:
        """Make the row of a finished run from its summary."""
        raise NotImplementedError


def compressed(compression: str) -> list[str]:
    """Return the overrides that choose a group of compression, emulated on :data:`PRESET`.

    Example:
        >>> compressed("nna8"), compressed("none")
        (['compression=nna8', 'nna=litert-int8'], ['compression=none'])
    """
    preset = [] if compression == "none" else [f"nna={PRESET}"]
    return [f"compression={compression}", *preset]


def training(seed: int, folder: Path, *settings: str, start: Path = START) -> list[str]:
    """Build module and overrides of a training run of the shared budget.

    Args:
        seed: Seed of the training.
        folder: Run folder.
        settings: Overrides that say what is trained.
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
        *settings,
        f"hydra.run.dir={folder}",
    ]


def evaluation(folder: Path, *settings: str) -> list[str]:
    """Build module and overrides of a run that scores the float weights without training."""
    scored = ["recipes.evaluate", f"ckpt={START}", "beam_width=1"]
    return [*scored, *settings, f"hydra.run.dir={folder}"]


def summary_of(folder: Path, command: Sequence[str], *, threads: int | None) -> dict[str, Any]:
    """Return the summary of a run; run it first if it has not finished.

    Args:
        folder: Run folder; what the run prints goes to ``run.log`` there.
        command: Module and overrides.
        threads: Number of CPU threads; None leaves the recipe's own.

    Returns:
        Content of ``summary.json``, with ``cpu_seconds`` if the whole run was done now.
    """
    path = folder / "summary.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    is_new = not (folder / "checkpoints").exists()
    start = time.process_time()
    more = [] if threads is None else [f"threads={threads}"]
    run_recipe(*command, *more, log=folder / "run.log")
    seconds = round(time.process_time() - start, 1) if is_new else None
    return {**json.loads(path.read_text()), "cpu_seconds": seconds}


def run_recipe(module: str, *overrides: str, log: Path) -> None:
    """Run a recipe in this process, as ``python -m`` does.

    Args:
        module: Name of the recipe's module, as ``"recipes.train"``.
        overrides: Overrides of its configuration.
        log: File that its output goes to.

    Raises:
        RuntimeError: If the recipe exits with an error; it resumes the next time.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.argv = [module, *overrides]
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as exit_:
            if exit_.code not in (None, 0):
                raise RuntimeError(f"{module} failed, see {log}") from exit_


def metrics_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Take from a summary what the rows of compression and pruning have."""
    required = ("command", "commit", "wer", "wer_low", "wer_high", "loss_per_token")
    optional = ("train_seconds", "cpu_seconds", "threads")
    return {
        **{name: summary[name] for name in required},
        **{name: summary.get(name) for name in optional},
    }
