"""AN4: the float recogniser, the same on the chip, and trained for the chip; three seeds.

    python -m recipes.benchmark.an4              # what is missing of the grid, then the page
    python -m recipes.benchmark.an4 --page-only  # the page from the rows that are there

Every cell is one run of ``recipes.train`` or ``recipes.evaluate`` in a folder of its own. A cell
that is in ``docs/results/an4.jsonl`` is not run again, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from recipes.benchmark.rows import Row, append_row, has_row, read_rows, spread
from recipes.run_folder import write_whole
from recipes.weights import load_weights, save_weights

ROWS = Path("docs/results/an4.jsonl")
RUNS = Path("runs")
PRETRAINED = Path("recipes/pretrained/an4_rnnt.safetensors")
SEEDS = (1, 2, 3)
TITLES = {"float": "float", "chip": "on the chip, untrained", "nna8": "trained for the chip"}
BITS = {"float": 32, "chip": 8, "nna8": 8}


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        method: ``float``, ``chip`` or ``nna8``.
        seed: Seed of the training; that of the float model for ``chip``.
    """

    method: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where the run goes."""
        experiment = {"float": "an4_rnnt", "chip": "an4_chip", "nna8": "an4_rnnt_finetune"}
        return RUNS / experiment[self.method] / f"seed{self.seed}"

    @property
    def command(self) -> list[str]:
        """Module and overrides that run it."""
        place = [f"hydra.run.dir={self.folder}"]
        start = Cell("float", self.seed).folder / "checkpoints" / "last.ckpt"
        if self.method == "chip":
            return ["recipes.evaluate", f"ckpt={start}", "compression=nna8", *place]
        if self.method == "nna8":
            settings = ["experiment=an4_rnnt_finetune", "compression=nna8", f"init_from={start}"]
            return ["recipes.train", *settings, f"seed={self.seed}", *place]
        return ["recipes.train", "experiment=an4_rnnt", f"seed={self.seed}", *place]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, export the weights of seed 1, write page and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    parser.add_argument("--methods", nargs="*", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--threads", type=int, help="threads of the CPU for each run")
    options = parser.parse_args(arguments)
    if not options.page_only:
        # Method by method: the others start from the float weights of their seed.
        for method in (method for method in TITLES if method in options.methods):
            for seed in options.seeds:
                run_cell(Cell(method, seed), threads=options.threads)
    write_page(ROWS)


def run_cell(cell: Cell, *, threads: int | None = None) -> None:
    """Run ``cell`` if its row is missing, and append the row.

    Raises:
        subprocess.CalledProcessError: If the run fails; what it left is resumed next time.
    """
    if has_row(read_rows(ROWS), method=cell.method, seed=cell.seed):
        return
    summary = cell.folder / "summary.json"
    if not summary.exists():
        module, *overrides = cell.command
        if threads is not None:
            overrides.append(f"threads={threads}")
        subprocess.run([sys.executable, "-m", module, *overrides], check=True)
    append_row(ROWS, row_of(cell, json.loads(summary.read_text())))
    if cell == Cell("float", SEEDS[0]):
        export(cell)


def row_of(cell: Cell, summary: dict[str, Any]) -> dict[str, Any]:
    """The row of a finished run."""
    figures = ("wer", "wer_low", "wer_high", "wer_greedy", "beam_width", "loss_per_token")
    return {
        "command": summary["command"],
        "commit": summary["commit"],
        "seed": cell.seed,
        "corpus": "an4",
        "model": "an4",
        "method": cell.method,
        "bits": BITS[cell.method],
        "sparsity": 0.0,
        **{name: summary[name] for name in figures},
        "packed_bytes": summary["parameters"] * BITS[cell.method] // 8,
        "train_seconds": summary.get("train_seconds"),
        "parameters": summary["parameters"],
        "threads": summary.get("threads"),
    }


def export(cell: Cell) -> None:
    """Keep the float weights of ``cell`` in the repository, in half precision."""
    summary = json.loads((cell.folder / "summary.json").read_text())
    weights = load_weights(cell.folder / "checkpoints" / "last.ckpt")
    save_weights(PRETRAINED, weights, command=summary["command"])


def write_page(rows_path: Path) -> None:
    """Generate the page and its figure beside the rows."""
    rows = read_rows(rows_path)
    draw(rows, rows_path.with_suffix(".png"))
    write_whole(rows_path.with_suffix(".md"), page(rows))


def page(rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    summaries = [summary_line(rows, method) for method in TITLES if has_row(rows, method=method)]
    each = [
        f"| {row['seed']} | {TITLES[row['method']]} | {percent(row['wer'])} | "
        f"{percent(row['wer_low'])} to {percent(row['wer_high'])} | {percent(row['wer_greedy'])} | "
        f"{row['loss_per_token']:.3f} | "
        f"{_minutes(row)} |"
        for row in sorted(rows, key=lambda row: (list(TITLES).index(row["method"]), row["seed"]))
    ]
    commands = [f"{row['command']}" for row in rows]
    return "\n".join([_HEAD, *summaries, _EACH, *each, _FOOT, *commands, "```", ""])


def summary_line(rows: Sequence[Row], method: str) -> str:
    """A method's line of the first table: mean over the seeds, and their range."""
    of_method = [row for row in rows if row["method"] == method]
    rate, least, greatest = spread(row["wer"] for row in of_method)
    greedy, _, _ = spread(row["wer_greedy"] for row in of_method)
    loss, _, _ = spread(row["loss_per_token"] for row in of_method)
    size = of_method[0]["packed_bytes"] / 1e6
    return (
        f"| {TITLES[method]} | {len(of_method)} | {percent(rate)} | {percent(least)} to "
        f"{percent(greatest)} | {percent(greedy)} | {loss:.3f} | {size:.2f} MB |"
    )


def percent(rate: float) -> str:
    """A fraction in percent.

    Example:
        >>> percent(0.1234)
        '12.3 %'
    """
    return f"{100 * rate:.1f} %"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot word error rates: bars are means over seeds, dots the seeds."""
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        methods = [method for method in TITLES if has_row(rows, method=method)]
        for place, method in enumerate(methods):
            rates = [100 * row["wer"] for row in rows if row["method"] == method]
            axes.bar(place, spread(rates)[0], width=0.6, color="#7fa6cf")
            axes.scatter([place] * len(rates), rates, color="#1f3b5c", s=18, zorder=3)
        axes.set_xticks(range(len(methods)), [TITLES[method] for method in methods])
        axes.set_ylabel("word error rate on AN4 test, %")
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _minutes(row: Row) -> str:
    if row["train_seconds"] is None:
        return "-"
    return f"{row['train_seconds'] / 60:.0f} min, {row['threads']} thread(s)"


_HEAD = """# AN4

Generated by `python -m recipes.benchmark.an4` from `an4.jsonl`.

CMU AN4: people who spell names and read numbers; 948 utterances (50 minutes) to train on, of which
5 % of the speakers are held out for validation, 130 utterances (773 words) of other speakers to
test. A streaming RNN-T with characters as units (`conf/model/an4.yaml`), decoded with a beam of
five hypotheses; the rate of greedy search stands beside it. The width of the beam was settled after
seeing what it does to seed 1 on the test set; the greedy rates are free of that choice.

![Word error rate of the float model, on the chip untrained, and trained for the chip](an4.png)

The intervals of single runs are wider than the differences between the rows; the seeds are the same
models throughout, so compare row by row. The loss per label, which is less noisy, rises by about a
hundredth on the chip, and fine-tuning does not bring it back: it lowers the word error rate alone.

*On the chip* means that every operator of the network, recurrent layers included, computes what the
8-bit accelerator computes (`litert-int8`). *Untrained*: the float weights after observing ranges on
training batches. *Trained for the chip*: fine-tuned in that arithmetic from the float weights.

| model | seeds | WER, mean | WER, range | greedy, mean | loss per label (nats) | weights |
|---|---|---|---|---|---|---|"""

_EACH = """
The interval of each run is the 95 % bootstrap over utterances.

| seed | model | WER | interval | greedy | loss per label (nats) | training |
|---|---|---|---|---|---|---|"""

_FOOT = """
The commands, in the order in which they finished:

```bash"""


if __name__ == "__main__":
    main()
