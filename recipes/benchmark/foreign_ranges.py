"""Ranges of activations that training makes larger: a margin, in networks that others wrote.

    python -m recipes.benchmark.foreign_ranges                    # run what is missing, then report
    python -m recipes.benchmark.foreign_ranges --modules resnet8  # a part of the grid
    python -m recipes.benchmark.foreign_ranges --page-only

Each network is trained in float, and from there trained on in float and emulated, as in
:mod:`recipes.benchmark.foreign`, with several seeds of weights and data.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch

from lightning_nna.callbacks import NNAEmulation
from recipes.benchmark.foreign import (
    CALIBRATION_STEPS,
    EMULATED_STEPS,
    FOREIGN,
    INSTALLED,
    LAST_STEPS,
    SPECS,
    fit,
    quiet,
    warmed_up,
)
from recipes.benchmark.grid import Run, Study, axis, threads_option
from recipes.benchmark.report import Fields, line, ruled
from recipes.benchmark.rows import Row, select

MODULES = ("resnet8", "t5", "voice_detector", "conformer")
MARGINS = (0.0, 0.25, 1.0)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class RangesRun(Run):
    """One network with one seed, trained with every margin on both accelerators.

    Attributes:
        module: A key of :data:`~recipes.benchmark.foreign.FOREIGN`.
        seed: Seed of the weights and of the data.
    """

    module: str
    seed: int

    def rows(self) -> Iterator[Row]:
        """Train in float and emulated from the same weights."""
        torch.set_num_threads(self.threads or 1)
        with quiet():
            row = self.row()
        yield row

    def row(self) -> Row:
        """Make the row: the loss in float, and the relative change of each emulated run."""
        start = warmed_up(FOREIGN[self.module], self.seed)
        steps = CALIBRATION_STEPS + EMULATED_STEPS
        float_loss = fmean(fit(copy.deepcopy(start), steps)[-LAST_STEPS:])
        changes = {}
        for spec in SPECS:
            for margin in MARGINS:
                emulation = NNAEmulation(
                    spec,
                    calibration_steps=CALIBRATION_STEPS,
                    range_margin=margin,
                    telemetry_every_n_steps=0,
                )
                emulated = fmean(fit(copy.deepcopy(start), steps, emulation)[-LAST_STEPS:])
                changes[f"{spec} {margin}"] = round(emulated / float_loss - 1, 4)
        return {**self.keys[0], "float_loss": round(float_loss, 5), "changes": changes}


def runs(
    *, modules: Sequence[str] = MODULES, seeds: Sequence[int] = SEEDS, threads: int = 1
) -> list[RangesRun]:
    """List the grid, one run a network and a seed."""
    return [RangesRun(module, seed, threads=threads) for module in modules for seed in seeds]


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report: a table with a column for each accelerator and margin."""
    cases = [f"{spec} {margin}" for spec in SPECS for margin in MARGINS]
    titles = [f"{spec}, {margin:g}" for spec in SPECS for margin in MARGINS]
    table = ruled(["network", "seeds", "loss, float", *titles])
    for module in dict.fromkeys(row["module"] for row in rows):
        selected = select(rows, module=module)
        columns = [_spread([row["changes"][case] for row in selected]) for case in cases]
        float_loss = fmean(row["float_loss"] for row in selected)
        table.append(line(FOREIGN[module].title, len(selected), f"{float_loss:.4f}", *columns))
    return {"table": table}


def _spread(changes: Sequence[float]) -> str:
    """Format a mean in percent, and the standard deviation of several values."""
    mean = f"{100 * fmean(changes):+.1f}"
    return f"{mean} ± {100 * stdev(changes):.1f} %" if len(changes) > 1 else f"{mean} %"


STUDY = Study(
    name="ranges",
    runs=runs,
    report=report,
    options={
        "modules": axis(INSTALLED) | {"default": list(MODULES)},
        "seeds": axis(SEEDS, is_open=True),
        "threads": threads_option(),
    },
)

if __name__ == "__main__":
    STUDY.main()
