"""AN4: float recognizers, the same on the chip, and trained for the chip; three seeds.

    python -m recipes.benchmark.an4              # what is missing of the grid, then the page
    python -m recipes.benchmark.an4 --page-only  # the page from the rows that are there

Every cell is one run of ``recipes.train`` or ``recipes.evaluate`` in a folder of its own. A cell
that is in ``docs/results/an4.jsonl`` is not run again, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from lightning_nna.files import write_whole
from recipes.benchmark.rows import Row, append_row, has_row, read_rows, spread
from recipes.weights import load_weights, save_weights

ROWS = Path("docs/results/an4.jsonl")
RUNS = Path("runs")
PRETRAINED = Path("recipes/pretrained/an4_rnnt.safetensors")
SEEDS = (1, 2, 3)
MODELS = {"rnnt": "RNN-T", "conformer": "Conformer"}
TITLES = {"float": "float", "chip": "on the chip, untrained", "nna8": "trained for the chip"}
#: Most that the loss may rise when a model is trained for the chip, mean over the seeds.
TARGET = 0.02
BITS = {"float": 32, "chip": 8, "nna8": 8}


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        model: ``rnnt`` or ``conformer``.
        method: ``float``, ``chip`` or ``nna8``.
        seed: Seed of the training; that of the float model for ``chip``.
    """

    model: str
    method: str
    seed: int

    @property
    def experiment(self) -> str:
        """The configuration it is a run of."""
        return f"an4_{self.model}" + ("_finetune" if self.method == "nna8" else "")

    @property
    def folder(self) -> Path:
        """Where the run goes."""
        suffix = "_chip" if self.method == "chip" else ""
        return RUNS / f"{self.experiment}{suffix}" / f"seed{self.seed}"

    @property
    def command(self) -> list[str]:
        """Module and overrides that run it."""
        place = [f"hydra.run.dir={self.folder}"]
        start = Cell(self.model, "float", self.seed).folder / "checkpoints" / "last.ckpt"
        if self.method == "chip":
            return ["recipes.evaluate", f"ckpt={start}", "compression=nna8", *place]
        if self.method == "nna8":
            place = ["compression=nna8", f"init_from={start}", *place]
        return ["recipes.train", f"experiment={self.experiment}", f"seed={self.seed}", *place]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, export the weights of seed 1, write page and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="*", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--threads", type=int, help="threads of the CPU for each run")
    options = parser.parse_args(arguments)
    if not options.page_only:
        # Method by method: the others start from the float weights of their seed.
        for method in (method for method in TITLES if method in options.methods):
            for model, seed in itertools.product(options.models, options.seeds):
                run_cell(Cell(model, method, seed), threads=options.threads)
    write_page(ROWS)


def run_cell(cell: Cell, *, threads: int | None = None) -> None:
    """Run ``cell`` if its row is missing, and append the row.

    Raises:
        subprocess.CalledProcessError: If the run fails; what it left is resumed next time.
    """
    if has_row(read_rows(ROWS), model=cell.model, method=cell.method, seed=cell.seed):
        return
    summary = cell.folder / "summary.json"
    if not summary.exists():
        module, *overrides = cell.command
        if threads is not None:
            overrides.append(f"threads={threads}")
        subprocess.run([sys.executable, "-m", module, *overrides], check=True)
    append_row(ROWS, row_of(cell, json.loads(summary.read_text())))
    if cell == Cell("rnnt", "float", SEEDS[0]):
        export(cell)


def row_of(cell: Cell, summary: dict[str, Any]) -> dict[str, Any]:
    """The row of a finished run."""
    figures = ("wer", "wer_low", "wer_high", "wer_greedy", "beam_width", "loss_per_token")
    return {
        "command": summary["command"],
        "commit": summary["commit"],
        "seed": cell.seed,
        "corpus": "an4",
        "model": cell.model,
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
    pairs = [
        (model, method)
        for model, method in itertools.product(MODELS, TITLES)
        if has_row(rows, model=model, method=method)
    ]
    summaries = [summary_line(rows, *pair) for pair in pairs]
    each = [
        f"| {MODELS[row['model']]} | {row['seed']} | {TITLES[row['method']]} | "
        f"{percent(row['wer'])} | {percent(row['wer_low'])} to {percent(row['wer_high'])} | "
        f"{percent(row['wer_greedy'])} | {row['loss_per_token']:.4f} | {_minutes(row)} |"
        for model, method in pairs
        for row in sorted(_of(rows, model, method), key=lambda row: int(row["seed"]))
    ]
    commands = [f"{row['command']}" for row in rows]
    verdicts = [verdict(rows, model) for model, method in pairs if method == "nna8"]
    return "\n".join([_HEAD, *summaries, "", *verdicts, _EACH, *each, _FOOT, *commands, "```", ""])


def summary_line(rows: Sequence[Row], model: str, method: str) -> str:
    """A line of the first table: means over the seeds, and against the same seeds in float."""
    here = _of(rows, model, method)
    rate, least, greatest = spread(row["wer"] for row in here)
    greedy, _, _ = spread(row["wer_greedy"] for row in here)
    loss, _, _ = spread(row["loss_per_token"] for row in here)
    seeds = {row["seed"] for row in here}
    reference = [row for row in _of(rows, model, "float") if row["seed"] in seeds]
    against = "-"
    if method != "float" and len(reference) == len(here):
        against = (
            f"{100 * (loss / spread(row['loss_per_token'] for row in reference)[0] - 1):+.1f} %"
        )
    size = here[0]["packed_bytes"] / 1e6
    return (
        f"| {MODELS[model]} | {TITLES[method]} | {len(here)} | {percent(rate)} | "
        f"{percent(least)} to {percent(greatest)} | {percent(greedy)} | {loss:.4f} | {against} | "
        f"{size:.2f} MB |"
    )


def verdict(rows: Sequence[Row], model: str) -> str:
    """Whether training for the chip comes as near to float as the project asks of itself."""
    here = _of(rows, model, "nna8")
    floats = {row["seed"]: row["loss_per_token"] for row in _of(rows, model, "float")}
    trained = {row["seed"]: row["loss_per_token"] for row in here if row["seed"] in floats}
    if not trained:
        return f"- {MODELS[model]}: no float run of the same seeds to compare with."
    change = sum(trained.values()) / sum(floats[seed] for seed in trained) - 1
    each = ", ".join(f"{100 * (trained[s] / floats[s] - 1):+.1f} %" for s in sorted(trained))
    word = "met" if change <= TARGET else "missed"
    return (
        f"- {MODELS[model]}: trained for the chip, nats per label change by {100 * change:+.1f} % "
        f"against float (by seed: {each}); the target, at most +{100 * TARGET:.0f} % in the mean, "
        f"is {word}."
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
    models = [model for model in MODELS if has_row(rows, model=model)]
    methods = [method for method in TITLES if has_row(rows, method=method)]
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        for method, offset, color in zip(methods, _OFFSETS, _COLORS, strict=False):
            bars = [(at + offset, _of(rows, model, method)) for at, model in enumerate(models)]
            bars = [(at, here) for at, here in bars if here]
            means = [100 * spread(row["wer"] for row in here)[0] for _, here in bars]
            axes.bar([at for at, _ in bars], means, 0.24, color=color, label=TITLES[method])
            dots = [(at, 100 * row["wer"]) for at, here in bars for row in here]
            places, rates = zip(*dots, strict=True)
            axes.scatter(places, rates, color="black", s=12, zorder=3)
        axes.set_xticks(range(len(models)), [MODELS[model] for model in models])
        axes.set_ylabel("word error rate on AN4 test, %")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3, frameon=False)
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _of(rows: Sequence[Row], model: str, method: str) -> list[Row]:
    return [row for row in rows if (row["model"], row["method"]) == (model, method)]


def _minutes(row: Row) -> str:
    if row["train_seconds"] is None:
        return "-"
    return f"{row['train_seconds'] / 60:.0f} min, {row['threads']} thread(s)"


_OFFSETS = (-0.26, 0.0, 0.26)
_COLORS = ("#1f3b5c", "#7fa6cf", "#e0a458")

_HEAD = """# AN4

Generated by `python -m recipes.benchmark.an4` from `an4.jsonl`.

CMU AN4: people who spell names and read numbers; 948 utterances (50 minutes) to train on, of which
5 % of the speakers are held out for validation, 130 utterances (773 words) of other speakers to
test. Streaming transducers with characters as units, one with LSTMs (`conf/model/an4.yaml`), one
with Conformer layers of limited context (`conf/model/conformer_small.yaml`), decoded with a beam
of five hypotheses; the rate of greedy search stands beside it. The width of the beam was settled
after seeing what it does to seed 1 of the RNN-T on the test set; the greedy rates are free of that
choice. They were taken before a choice of the greedy search (`torch.where`) kept the chip's grid,
which moves the rate of a model on the chip by up to a point either way, and neither the beam's nor
the loss.

![Word error rate of float models, on the chip untrained, and trained for the chip](an4.png)

The intervals of single runs are wider than the differences between the rows; the seeds are the same
models throughout, so compare row by row. The loss per label is less noisy; *against float* compares
its mean with that of the same seeds in float.

*On the chip* means that every operator of the network, recurrent layers included, computes what the
8-bit accelerator computes (`litert-int8`). *Untrained*: the float weights after observing ranges on
training batches. *Trained for the chip*: fine-tuned in that arithmetic from the float weights.

| model | arithmetic | seeds | WER | range | greedy | nats per label | against float | weights |
|---|---|---|---|---|---|---|---|---|"""

_EACH = """
The interval of each run is the 95 % bootstrap over utterances.

| model | seed | arithmetic | WER | interval | greedy | nats per label | training |
|---|---|---|---|---|---|---|---|"""

_FOOT = """
The commands, in the order in which they finished:

```bash"""


if __name__ == "__main__":
    main()
