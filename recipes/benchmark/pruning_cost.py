"""Cost of pruning: time and memory of a whole training run on AN4, compared with float.

    python -m recipes.benchmark.pruning_cost               # run what is missing, then report
    python -m recipes.benchmark.pruning_cost --page-only

Runs are those of ``recipes.benchmark.pruning``, in float: with mask updates, without scoring. They
go one after the other, each in a process of its own, and the metrics of a run are divided by those
of the float run of the same round.
"""

from __future__ import annotations

import itertools
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from recipes.benchmark.grid import Study
from recipes.benchmark.recipe_runs import STEPS, RecipeRun, training
from recipes.benchmark.report import Fields, line, median_range, met
from recipes.benchmark.rows import Row, select
from recipes.benchmark.timing import machine

RUNS = Path("runs/pruning_cost")
ROUNDS = 3
SPARSITY = 0.8
#: Largest time and peak memory of CSP over those of float.
TIME_TARGET, MEMORY_TARGET = 1.15, 1.3
METHODS = {
    "float": "float",
    "csp": "CSP, activations",
    "csp_100": "CSP, activations, every 100 steps",
    "gmp": "gradual magnitude",
}
_SETTINGS = {
    "float": ("compression=none",),
    "csp": ("compression=csp",),
    "csp_100": ("compression=csp", "+callbacks.prune.every_n_steps=100"),
    "gmp": ("compression=gmp",),
}


@dataclass(frozen=True)
class CostRun(RecipeRun):
    """One training run in float, pruned or not.

    Attributes:
        method: A key of :data:`METHODS`.
        round: Number of the round, from 1; also the seed.
    """

    method: str
    round: int

    @property
    def command(self) -> list[str]:
        """Module and overrides of the run."""
        settings = [*_SETTINGS[self.method], "test=false"]
        if self.method != "float":
            settings += ["callbacks.nna=null", f"sparsity={SPARSITY}"]
        return training(self.round, self.folder, *settings)

    @property
    def folder(self) -> Path:
        """Run folder."""
        return RUNS / self.method / f"round{self.round}"

    def rows(self) -> Iterator[Row]:
        """Run; the metrics of a run that was stopped and resumed would be worth nothing.

        Raises:
            FileExistsError: If the run was stopped.
        """
        if self.folder.exists():
            raise FileExistsError(f"{self.folder} holds a run that was stopped: remove it")
        yield from super().rows()

    def row(self, summary: Mapping[str, Any]) -> Row:
        """Make the row of a finished run from its summary and this process's peak memory."""
        return {
            **{name: summary[name] for name in ("command", "commit")},
            "method": self.method,
            "round": self.round,
            "device": machine(torch.device("cpu")),
            "threads": 1,
            "sparsity": 0.0 if self.method == "float" else SPARSITY,
            "train_seconds": summary["train_seconds"],
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def runs() -> list[CostRun]:
    """List the grid, round by round."""
    rounds = range(1, ROUNDS + 1)
    return [CostRun(method, number) for number, method in itertools.product(rounds, METHODS)]


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report."""
    lines = []
    for method, title in METHODS.items():
        if selected := select(rows, method=method):
            seconds = median(row["train_seconds"] for row in selected)
            peak = median(row["peak_bytes"] for row in selected) / 1e6
            time, memory = (_range(_ratios(rows, method, key)) for key in _CHECKED)
            lines.append(line(title, f"{seconds:.0f} s", time, f"{peak:.0f} MB", memory))
    return {
        "steps": STEPS,
        "sparsity": f"{SPARSITY:.0%}",
        "methods": lines,
        "checks": checks(rows),
    }


def checks(rows: Sequence[Row]) -> list[str]:
    """Check time and memory of CSP."""
    lines = []
    for method, (key, (name, target)) in itertools.product(("csp", "csp_100"), _CHECKED.items()):
        if ratios := _ratios(rows, method, key):
            lines.append(
                f"- {METHODS[method]}: {name} of a run at most {target:g} times that of float: "
                f"{median(ratios):.2f}, {met(median(ratios) <= target)}."
            )
    return lines


#: Metrics that are checked, with their titles and targets.
_CHECKED = {
    "train_seconds": ("time", TIME_TARGET),
    "peak_bytes": ("peak memory", MEMORY_TARGET),
}


def _ratios(rows: Sequence[Row], method: str, key: str) -> list[float]:
    base: dict[Any, float] = {row["round"]: row[key] for row in select(rows, method="float")}
    return [r[key] / base[r["round"]] for r in select(rows, method=method) if r["round"] in base]


def _range(ratios: Sequence[float]) -> str:
    return median_range(ratios) if ratios else "-"


# One at a time: a run's peak memory is that of its process.
STUDY = Study(name="pruning_cost", runs=runs, report=report, workers=1)

if __name__ == "__main__":
    STUDY.main()
