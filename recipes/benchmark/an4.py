"""AN4: float recognizers, the same emulated, and trained for the accelerator; three seeds.

    python -m recipes.benchmark.an4              # run what is missing, then write the report
    python -m recipes.benchmark.an4 --page-only  # write the report from the rows that exist

Each run is one of ``recipes.train`` or ``recipes.evaluate`` in its own folder.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.benchmark.grid import Study, axis, threads_option
from recipes.benchmark.plots import saved_figure
from recipes.benchmark.recipe_runs import AVERAGE, SEEDS, START, RecipeRun, compressed
from recipes.benchmark.report import (
    Fields,
    interval,
    line,
    mean_loss,
    met,
    percent,
    word_errors,
)
from recipes.benchmark.rows import Row, has_row, select, spread
from recipes.weights import load_weights, save_weights

RUNS = Path("runs")
MODELS = {"rnnt": "RNN-T", "conformer": "Conformer"}
#: Titles by method, in the order in which they run: the others start from the float weights.
METHODS = {
    "float": "float",
    "chip": "emulated, untrained",
    "nna8": "emulated, trained",
    "tuned": "float, trained further",
    "nna8_average": "emulated, trained, averaged",
}
#: Methods that the grid runs by default, and that the figure has.
COMPARED = ("float", "chip", "nna8")
EMULATED = ("chip", "nna8", "nna8_average")
#: Largest relative increase of the loss by training for the accelerator, mean over the seeds.
TARGET = 0.02


@dataclass(frozen=True)
class AN4Run(RecipeRun):
    """One recognizer, trained or scored.

    Attributes:
        model: A key of :data:`MODELS`.
        method: A key of :data:`METHODS`.
        seed: Seed of the training; for ``chip`` that of the float model.
    """

    model: str
    method: str
    seed: int

    @property
    def experiment(self) -> str:
        """Name of the configuration in ``recipes/conf/experiment``."""
        return f"an4_{self.model}" + ("_finetune" if self.is_tuned else "")

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return 8 if self.method in EMULATED else 32

    @property
    def is_tuned(self) -> bool:
        """Whether the run goes on from the float weights."""
        return self.method not in ("float", "chip")

    @property
    def folder(self) -> Path:
        """Run folder."""
        suffix = "" if self.method in ("float", "nna8") else f"_{self.method}"
        return RUNS / f"{self.experiment}{suffix}" / f"seed{self.seed}"

    @property
    def command(self) -> list[str]:
        """Module and overrides of the run."""
        settings = [f"hydra.run.dir={self.folder}"]
        start = AN4Run(self.model, "float", self.seed).checkpoint
        if self.method == "chip":
            return ["recipes.evaluate", f"ckpt={start}", *compressed("nna8"), *settings]
        if self.is_tuned:
            compression = "nna8" if self.method in EMULATED else "none"
            settings = [*compressed(compression), f"init_from={start}", *settings]
        if self.method == "nna8_average":
            settings.append(AVERAGE)
        return ["recipes.train", f"experiment={self.experiment}", f"seed={self.seed}", *settings]

    def rows(self) -> Iterator[Row]:
        """Run unless it has finished; the float RNN-T of seed 1 becomes the pretrained weights."""
        for row in super().rows():
            yield row
            if (self.model, self.method, self.seed) == ("rnnt", "float", SEEDS[0]):
                save_weights(START, load_weights(self.checkpoint), command=row["command"])

    def row(self, summary: Mapping[str, Any]) -> Row:
        """Make the row of a finished run from its summary."""
        metrics = ("wer", "wer_low", "wer_high", "wer_greedy", "beam_width", "loss_per_token")
        return {
            "command": summary["command"],
            "commit": summary["commit"],
            "seed": self.seed,
            "corpus": "an4",
            "model": self.model,
            "method": self.method,
            "bits": self.bits,
            "sparsity": 0.0,
            **{name: summary[name] for name in metrics},
            "packed_bytes": summary["parameters"] * self.bits // 8,
            "train_seconds": summary.get("train_seconds"),
            "parameters": summary["parameters"],
            "threads": summary.get("threads"),
        }


def runs(
    *,
    methods: Sequence[str] = COMPARED,
    models: Sequence[str] = tuple(MODELS),
    seeds: Sequence[int] = SEEDS,
    threads: int | None = None,
) -> list[AN4Run]:
    """List the grid, method by method."""
    ordered = [method for method in METHODS if method in methods]
    return [
        AN4Run(model, method, seed, threads=threads)
        for method, model, seed in itertools.product(ordered, models, seeds)
    ]


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report."""
    pairs = [
        pair
        for pair in itertools.product(MODELS, METHODS)
        if has_row(rows, model=pair[0], method=pair[1])
    ]
    each = [row for pair in pairs for row in sorted(_of(rows, *pair), key=lambda row: row["seed"])]
    return {
        "means": [mean_line(rows, *pair) for pair in pairs],
        "checks": [check(rows, model) for model, method in pairs if method == "nna8"],
        "runs": [
            line(
                MODELS[row["model"]],
                row["seed"],
                METHODS[row["method"]],
                percent(row["wer"]),
                interval(row),
                percent(row["wer_greedy"]),
                f"{row['loss_per_token']:.4f}",
                _minutes(row),
            )
            for row in each
        ],
    }


def mean_line(rows: Sequence[Row], model: str, method: str) -> str:
    """Format a line of means over the seeds, compared with the same seeds in float."""
    selected = _of(rows, model, method)
    seeds = {row["seed"] for row in selected}
    reference = [row for row in _of(rows, model, "float") if row["seed"] in seeds]
    change = "-"
    if method != "float" and len(reference) == len(selected):
        change = f"{100 * (mean_loss(selected) / mean_loss(reference) - 1):+.1f} %"
    return line(
        MODELS[model],
        METHODS[method],
        len(selected),
        *word_errors(selected),
        percent(spread(row["wer_greedy"] for row in selected)[0]),
        f"{mean_loss(selected):.4f}",
        change,
        f"{selected[0]['packed_bytes'] / 1e6:.2f} MB",
    )


def check(rows: Sequence[Row], model: str) -> str:
    """Check that training for the accelerator comes near enough to float."""
    float_loss = {row["seed"]: row["loss_per_token"] for row in _of(rows, model, "float")}
    loss = {
        row["seed"]: row["loss_per_token"]
        for row in _of(rows, model, "nna8")
        if row["seed"] in float_loss
    }
    if not loss:
        return f"- {MODELS[model]}: no float run of the same seeds to compare with."
    change = sum(loss.values()) / sum(float_loss[seed] for seed in loss) - 1
    by_seed = _changes(loss, float_loss)
    untrained = {row["seed"]: row["loss_per_token"] for row in _of(rows, model, "chip")}
    shares = ""
    if untrained.keys() >= loss.keys():
        shares = (
            f"; of these, emulating the float weights changes it by "
            f"{_changes({seed: untrained[seed] for seed in loss}, float_loss)}, and the training "
            f"by {_changes(loss, untrained)}"
        )
    return (
        f"- {MODELS[model]}, emulated and trained: the loss per token changes by "
        f"{100 * change:+.1f} % against float (by seed: {by_seed}{shares}); the target, at most "
        f"+{100 * TARGET:.0f} % in the mean, is {met(change <= TARGET)}."
    )


def _changes(loss: Mapping[int, float], reference: Mapping[int, float]) -> str:
    """Format the relative changes of a loss by seed."""
    return ", ".join(f"{100 * (loss[s] / reference[s] - 1):+.1f} %" for s in sorted(loss))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot word error rates: bars are means over seeds, dots the seeds."""
    models = [model for model in MODELS if has_row(rows, model=model)]
    methods = [method for method in COMPARED if has_row(rows, method=method)]
    with saved_figure(path, (6.4, 3.4)) as figure:
        axes = figure.subplots()
        for method, offset, color in zip(methods, _OFFSETS, _COLORS, strict=False):
            bars = [(x + offset, _of(rows, model, method)) for x, model in enumerate(models)]
            bars = [(x, selected) for x, selected in bars if selected]
            means = [100 * spread(row["wer"] for row in selected)[0] for _, selected in bars]
            axes.bar([x for x, _ in bars], means, 0.24, color=color, label=METHODS[method])
            dots = [(x, 100 * row["wer"]) for x, selected in bars for row in selected]
            positions, rates = zip(*dots, strict=True)
            axes.scatter(positions, rates, color="black", s=12, zorder=3)
        axes.set_xticks(range(len(models)), [MODELS[model] for model in models])
        axes.set_ylabel("word error rate on AN4 test, %")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3, frameon=False)


def _of(rows: Sequence[Row], model: str, method: str) -> list[Row]:
    return select(rows, model=model, method=method)


def _minutes(row: Row) -> str:
    if row["train_seconds"] is None:
        return "-"
    return f"{row['train_seconds'] / 60:.0f} min, {row['threads']} thread(s)"


_OFFSETS = (-0.26, 0.0, 0.26)
_COLORS = ("#1f3b5c", "#7fa6cf", "#e0a458")

STUDY = Study(
    name="an4",
    runs=runs,
    report=report,
    plot=plot,
    options={
        "models": axis(MODELS),
        "methods": {**axis(METHODS), "default": list(COMPARED)},
        "seeds": axis(SEEDS, is_open=True),
        "threads": threads_option(None),
    },
    workers=1,
)

if __name__ == "__main__":
    STUDY.main()
