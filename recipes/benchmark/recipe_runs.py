"""Runs of recipes that the studies of compression share: start, budget, summary, row."""

from __future__ import annotations

import base64
import json
import runpy
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from recipes.asr.scoring import RateDifference, paired_difference
from recipes.asr.spoken_words import SpokenWords
from recipes.benchmark.grid import Run
from recipes.benchmark.rows import Row
from recipes.settings import CONF

#: Seeds of the training; the float weights that all runs start from are the same.
SEEDS = (1, 2, 3)
#: Float weights of seed 1, in half precision.
START = Path("recipes/pretrained/an4_rnnt.safetensors")
#: Optimizer steps of a run.
STEPS = 480
#: Batches of an epoch of the smallest corpus.
_LARGEST_EPOCH = 700
#: Epochs of a run, at least: some methods act after each epoch.
_EPOCHS = 4


def budget(steps: int) -> tuple[str, str]:
    """Return the overrides that train for a number of steps.

    Example:
        >>> budget(480)
        ('trainer.max_epochs=4', 'trainer.limit_train_batches=120')

    Raises:
        ValueError: If the steps are not a multiple of the number of epochs that they need.
    """
    epochs = max(_EPOCHS, -(-steps // _LARGEST_EPOCH))
    if steps % epochs:
        raise ValueError(f"{steps} steps are no multiple of {epochs} epochs")
    return f"trainer.max_epochs={epochs}", f"trainer.limit_train_batches={steps // epochs}"


#: Four epochs of 120 batches.
BUDGET = budget(STEPS)


@dataclass(frozen=True)
class Method:
    """A method of compression.

    Attributes:
        title: Name in tables.
        compression: Choice of the configuration group ``compression``.
        settings: Overrides of the configuration.
        trains: Whether the weights are trained; else they are rounded.
        from_scratch: Whether training starts from random weights, with the method from its first
            step on.
    """

    title: str
    compression: str
    settings: tuple[str, ...] = ()
    trains: bool = field(default=True, kw_only=True)
    from_scratch: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Start:
    """A float recognizer that the methods of a study start from.

    Attributes:
        title: Name in tables.
        experiment: Experiment that trains it further.
        weights: Its weights.
        corpus: Corpus.
        model: Kind of the network.
    """

    title: str
    experiment: str
    weights: Path
    corpus: str
    model: str


_PRETRAINED = Path("recipes/pretrained")
AN4_RNNT = Start("AN4, RNN-T", "an4_rnnt_finetune", START, "an4", "rnnt")
COMMANDS_RNNT = Start(
    "commands, RNN-T",
    "commands_finetune",
    _PRETRAINED / "commands_rnnt.safetensors",
    "commands",
    "rnnt",
)
COMMANDS_CONFORMER = Start(
    "commands, Conformer",
    "commands_conformer_finetune",
    _PRETRAINED / "commands_conformer.safetensors",
    "commands",
    "conformer",
)
STARTS = {"rnnt": COMMANDS_RNNT, "conformer": COMMANDS_CONFORMER}

#: Average of the weights, as in the float training; fine-tuning has none else.
AVERAGE = (
    "callbacks.average={_target_:lightning.pytorch.callbacks.EMAWeightAveraging,"
    "decay:0.99,use_buffers:false}"
)
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


def training(
    seed: int, folder: Path, *settings: str, start: Start = AN4_RNNT, steps: int = STEPS
) -> list[str]:
    """Build module and overrides of a training run.

    Args:
        seed: Seed of the training.
        folder: Run folder.
        settings: Overrides that say what is trained.
        start: Float recognizer that it starts from.
        steps: Number of optimizer steps.
    """
    return _training(
        seed, folder, f"init_from={start.weights}", *settings, of=start.experiment, steps=steps
    )


def training_from_scratch(
    seed: int, folder: Path, *settings: str, start: Start, steps: int
) -> list[str]:
    """Build module and overrides of a training run from random weights, as the float weights' own.

    Args:
        seed: Seed of the weights and of the training.
        folder: Run folder.
        settings: Overrides that say what is trained.
        start: Float recognizer of the same network.
        steps: Number of optimizer steps.
    """
    experiment = start.experiment.removesuffix("_finetune")
    # The trained weights are scored, as in a fine-tuning.
    return _training(seed, folder, "callbacks.average=null", *settings, of=experiment, steps=steps)


def _training(seed: int, folder: Path, *settings: str, of: str, steps: int) -> list[str]:
    """Build module and overrides of a run of an experiment."""
    return [
        "recipes.train",
        f"experiment={of}",
        f"seed={seed}",
        *budget(steps),
        "trainer.limit_val_batches=0",
        "beam_width=1",
        *settings,
        f"hydra.run.dir={folder}",
    ]


def evaluation(folder: Path, *settings: str, start: Start = AN4_RNNT) -> list[str]:
    """Build module and overrides of a run that scores the float weights without training."""
    scored = ["recipes.evaluate", f"ckpt={start.weights}", "beam_width=1"]
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


def packed_errors(folder: Path) -> str:
    """Read the word errors of each utterance of a run, in the order of their names.

    Args:
        folder: Folder of a run that was tested.

    Returns:
        What :func:`pack_errors` makes of them.
    """
    lines = (folder / "transcripts.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return pack_errors(int(line.split("\t")[1]) for line in sorted(lines))


def pack_errors(errors: Iterable[int]) -> str:
    """Pack the word errors of utterances for a row: a byte each, compressed by zlib, in base64.

    Example:
        >>> utterance_errors({"utterance_errors": pack_errors([0, 2])})
        array([0, 2])
    """
    return base64.b64encode(zlib.compress(bytes(errors), 9)).decode()


def utterance_errors(row: Row) -> np.ndarray:
    """Unpack the word errors of each utterance of a row, shape ``(utterances,)``."""
    packed = zlib.decompress(base64.b64decode(row["utterance_errors"]))
    return np.frombuffer(packed, dtype=np.uint8).astype(int)


@cache
def commands_words(part: str = "test") -> np.ndarray:
    """Count the words of each utterance of the commands, in the order of their names.

    Args:
        part: Name of the part, ``"validation"`` or ``"test"``.

    Returns:
        Numbers of words, shape ``(utterances,)``.
    """
    settings = yaml.safe_load((CONF / "data" / "commands.yaml").read_text(encoding="utf-8"))
    corpus = SpokenWords(
        vocabulary=settings["vocabulary"],
        validation_size=settings["validation_size"],
        test_size=settings["test_size"],
        max_words=settings["max_words"],
        corpus_seed=settings["corpus_seed"],
    )
    takes = sorted(corpus.takes(part), key=lambda take: take.id)
    return np.array([len(take.words) for take in takes])


def wer_difference(
    rows: Sequence[Row], others: Sequence[Row], part: str = "test"
) -> RateDifference | None:
    """Compare the word errors of two methods on the commands; see :func:`error_difference`.

    Args:
        rows: Rows of the one method; those with a seed of the other are compared.
        others: Rows of the other method. One that was not trained is compared with every seed.
        part: Part of the corpus that both were scored on.
    """
    return error_difference(rows, others, commands_words(part))


def error_difference(
    rows: Sequence[Row], others: Sequence[Row], words: np.ndarray
) -> RateDifference | None:
    """Compare the word errors of two methods on the same utterances, over utterances and seeds.

    Args:
        rows: Rows of the one method; those with a seed of the other are compared.
        others: Rows of the other method. One that was not trained is compared with every seed.
        words: Numbers of words, shape ``(utterances,)``.

    Returns:
        Difference with its paired bootstrap interval; None where no seed is in both.
    """
    untrained = next((row for row in others if row["train_seconds"] is None), None)
    by_seed = {row["seed"]: row for row in others}
    pairs = [(row, by_seed.get(row["seed"], untrained)) for row in rows]
    both = [(utterance_errors(a), utterance_errors(b)) for a, b in pairs if b is not None]
    if not both:
        return None
    errors, other = (np.stack(column) for column in zip(*both, strict=True))
    return paired_difference(errors, other, words)
