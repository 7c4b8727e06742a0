"""What pruning costs: time and memory of a whole training run on AN4, beside the same without.

    python -m recipes.benchmark.pruning_cost               # what is missing, then the page
    python -m recipes.benchmark.pruning_cost --page-only

Runs are those of ``recipes.benchmark.pruning``, in float: choices of masks included, scoring not.
They go one after the other, each in a process of its own, and a run's figures are divided by those
of the float run of the same round.
"""

from __future__ import annotations

import argparse
import itertools
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lightning_nna.files import write_whole
from recipes.benchmark.emulation import machine
from recipes.benchmark.fine_tuning import STEPS, run_cells, summary_of, training
from recipes.benchmark.rows import Row, append_row, has_row, read_rows, select

ROWS = Path("docs/results/pruning_cost.jsonl")
RUNS = Path("runs/pruning_cost")
ROUNDS = 3
SPARSITY = 0.8
#: Of CSP: time and peak memory over those of float.
TIME_TARGET, MEMORY_TARGET = 1.15, 1.3
TITLES = {
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
class Cell:
    """One run.

    Attributes:
        method: A key of :data:`TITLES`.
        round: From 1.
    """

    method: str
    round: int

    @property
    def command(self) -> list[str]:
        """Module and overrides that run it."""
        chosen = [*_SETTINGS[self.method], "test=false"]
        if self.method != "float":
            chosen += ["callbacks.nna=null", f"sparsity={SPARSITY}"]
        return training(self.round, self.folder, *chosen)

    @property
    def folder(self) -> Path:
        """Where the run goes."""
        return RUNS / self.method / f"round{self.round}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    if not options.page_only:
        grid = (Cell(m, r) for r, m in itertools.product(range(1, ROUNDS + 1), TITLES))
        cells = [cell for cell in grid if not has_row(read_rows(ROWS), **asdict(cell))]
        run_cells(cells, run_cell, workers=1)
    write_whole(ROWS.with_suffix(".md"), page(read_rows(ROWS)))


def run_cell(cell: Cell) -> None:
    """Run ``cell``, whose figures are worth nothing unless it runs whole, and append its row."""
    if cell.folder.exists():
        raise FileExistsError(f"{cell.folder} holds a run that was stopped: remove it")
    summary = summary_of(cell.folder, cell.command, threads=1)
    row = {
        **{key: summary[key] for key in ("command", "commit")},
        **asdict(cell),
        "device": machine(torch.device("cpu")),
        "threads": 1,
        "sparsity": 0.0 if cell.method == "float" else SPARSITY,
        "train_seconds": summary["train_seconds"],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    append_row(ROWS, row)


def page(rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    lines = [_HEAD]
    for method, title in TITLES.items():
        here = select(rows, method=method)
        if here:
            seconds = median(row["train_seconds"] for row in here)
            peak = median(row["peak_bytes"] for row in here) / 1e6
            times, memory = (_ratios(rows, method, key) for key in ("train_seconds", "peak_bytes"))
            lines.append(
                f"| {title} | {seconds:.0f} s | {_spread(times)} | {peak:.0f} MB | "
                f"{_spread(memory)} |"
            )
    commands = [row["command"] for row in rows]
    return "\n".join([*lines, "", *verdicts(rows), "", "```bash", *commands, "```", ""])


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Whether the targets are met by CSP."""
    figures = (
        ("train_seconds", "time", TIME_TARGET),
        ("peak_bytes", "peak memory", MEMORY_TARGET),
    )
    lines = []
    for method, (key, name, target) in itertools.product(("csp", "csp_100"), figures):
        if ratios := _ratios(rows, method, key):
            word = "met" if median(ratios) <= target else "missed"
            lines.append(
                f"- {TITLES[method]}: {name} of a run at most {target:g} times that of float: "
                f"{median(ratios):.2f}, {word}."
            )
    return lines


def _ratios(rows: Sequence[Row], method: str, key: str) -> list[float]:
    base: dict[Any, float] = {row["round"]: row[key] for row in select(rows, method="float")}
    return [r[key] / base[r["round"]] for r in select(rows, method=method) if r["round"] in base]


def _spread(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


_HEAD = f"""# Cost of pruning

Generated by `python -m recipes.benchmark.pruning_cost` from `pruning_cost.jsonl`.

Training runs of [Pruning on AN4](pruning.md) in float, {STEPS} steps on one thread, {SPARSITY:.0%}
of zeros, with every choice of masks on the way. Times and peaks of memory are of the whole run, the
peak with all that the process has loaded; ratios to the float run of the same round, their median
and range. Nothing else ran beside them; even so float runs differ by 18 % on the machine these were
taken on. Timed by themselves, the seven choices every 50 steps take 5.4 s; with 16 iterations of
ADMM instead of ten one of them took 1.2 s instead of 0.8. A profile counts 5 % of float's time for
all else: masks, measuring, logs.
What was tried to save more, and why it was taken back, is in [the design](../design.md).

| method | training | of float | peak memory | of float |
|---|---|---|---|---|"""


if __name__ == "__main__":
    main()
