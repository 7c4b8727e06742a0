"""What the grids of few bits and of zeros share: the same start and the same budget on AN4."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.benchmark.an4 import Cell as FloatCell

SEEDS = (1, 2, 3)
#: Two epochs of nine tenths of the batches: 1442 steps, about four minutes of a core.
BUDGET = ("trainer.max_epochs=2", "+trainer.limit_train_batches=0.9")


def start_of(seed: int) -> Path:
    """The float weights that the runs of a seed start from."""
    return FloatCell("rnnt", "float", seed).folder / "checkpoints" / "last.ckpt"


def training(seed: int, folder: Path, *chosen: str) -> list[str]:
    """Module and overrides of a run of the budget.

    Args:
        seed: Of the float weights, and of the training.
        folder: Where the run goes.
        chosen: Overrides that say what is done.
    """
    return [
        "recipes.train",
        "experiment=an4_rnnt_finetune",
        f"seed={seed}",
        f"init_from={start_of(seed)}",
        *BUDGET,
        "+trainer.limit_val_batches=0",
        "beam_width=1",
        *chosen,
        f"hydra.run.dir={folder}",
    ]


def evaluation(seed: int, folder: Path, *chosen: str) -> list[str]:
    """Module and overrides that score the float weights of a seed."""
    start = f"ckpt={start_of(seed)}"
    return ["recipes.evaluate", start, "beam_width=1", *chosen, f"hydra.run.dir={folder}"]


def summary_of(folder: Path, command: Sequence[str], *, threads: int) -> dict[str, Any]:
    """The summary of a run, which is made if it is missing.

    Raises:
        subprocess.CalledProcessError: If the run fails; what it left is resumed next time.
    """
    path = folder / "summary.json"
    if not path.exists():
        run(*command, f"threads={threads}")
    return dict(json.loads(path.read_text()))


def run(module: str, *overrides: str) -> None:
    """Run a recipe.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    subprocess.run([sys.executable, "-m", module, *overrides], check=True)


def figures_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a row keeps of a summary."""
    kept = ("command", "commit", "wer", "wer_low", "wer_high", "loss_per_token")
    return {
        **{name: summary[name] for name in kept},
        "train_seconds": summary.get("train_seconds"),
        "threads": summary.get("threads"),
    }
