"""Accelerator-aware training where accelerators hurt: float, emulated untrained, and trained.

    python -m recipes.benchmark.awareness               # run what is missing, then report
    python -m recipes.benchmark.awareness --page-only
    python -m recipes.benchmark.awareness --models keywords --chips shift

Four networks: three recognizers of spoken commands (an RNN-T, a Conformer, and one that is trained
three times as long) and a keyword spotter. Each is emulated on every chip as it is, and fine-tuned
in that chip's arithmetic. The *control* has the same fine-tuning in float and is emulated then: it
tells awareness from further training.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from lightning_nna import coverage
from lightning_nna.emulation.coverage import Coverage
from recipes.asr.scoring import RateDifference
from recipes.benchmark.awareness_runs import (
    CHIPS,
    METHODS,
    MODELS,
    RECOGNIZERS,
    STEPS,
    AwarenessRun,
    KeywordRun,
    RecognizerRun,
    built,
)
from recipes.benchmark.grid import Run, Study, axis, threads_option
from recipes.benchmark.recipe_runs import (
    SEEDS,
    STARTS,
    commands_words,
    error_difference,
    utterance_errors,
)
from recipes.benchmark.report import Fields, line, percent, points
from recipes.benchmark.rows import Row, select
from recipes.keywords.data import LOG_MEL
from recipes.keywords.network import KeywordNetwork

_PRODUCTS = (
    *("fully_connected", "convolution", "transposed_convolution", "batch_norm", "embedding"),
    *("relu", "relu6", "hardtanh", "max_pool", "average_pool", "concatenation"),
)
#: Operators of accelerators that leave the others to the CPU, by title.
OPERATORS: dict[str, tuple[str, ...] | None] = {
    "layers, ReLU and pooling": _PRODUCTS,
    "these, sums, products and means": (*_PRODUCTS, "add", "sub", "mul", "mean"),
    "all that is emulated": None,
}
#: Accelerators that each network is trained for; on the others it loses next to nothing untrained.
TRAINED = {
    "rnnt": ("weights4", "weights4_per_tensor", "accumulator16"),
    "conformer": ("weights4", "weights4_per_tensor", "accumulator16"),
    "conformer_long": ("weights4", "weights4_per_tensor"),
    "keywords": ("per_tensor", "weights4", "weights4_per_tensor", "shift", "accumulator16"),
}
#: Accelerators that a network is trained for with an average of the weights, too.
AVERAGED = dict.fromkeys(("conformer", "conformer_long"), ("weights4", "weights4_per_tensor"))


@dataclass(frozen=True)
class FallbackRun(Run):
    """Operators of one network that an accelerator without them leaves to the CPU.

    Attributes:
        model: A key of :data:`MODELS`.
        operators: A key of :data:`OPERATORS`.
    """

    model: str
    operators: str

    def rows(self) -> Iterator[Row]:
        """Count the sites, their calls and the bytes that cross, for one second of sound."""
        torch.manual_seed(0)
        spec = {"preset": "tflm-int8", "operators": OPERATORS[self.operators]}
        seconds, table = _keyword_coverage(spec)
        if self.model in STARTS:
            seconds, table = _recognizer_coverage(self.model, spec)
        sites = [row for row in table.rows if row.where != "constant"]
        yield {
            **self.keys[0],
            "sites": len(sites),
            "cpu_sites": len(table.fallbacks),
            "cpu_calls_per_second": sum(row.calls for row in table.fallbacks) / seconds,
            "crossing_bytes_per_second": sum(row.crossing_bytes for row in table.fallbacks)
            / seconds,
            "cpu_operators": sorted({row.operator for row in table.fallbacks}),
        }


def _keyword_coverage(spec: dict[str, Any]) -> tuple[float, Coverage]:
    frames = 64
    sound = torch.randn(1, 1, frames, LOG_MEL.num_mels)
    seconds = frames * LOG_MEL.hop_ms / 1000
    return seconds, coverage(KeywordNetwork(50).eval(), sound, spec=spec)


def _recognizer_coverage(model: str, spec: dict[str, Any]) -> tuple[float, Coverage]:
    """Decode one second of speech after another, as the device does: a batch of one utterance."""
    adapter = built(STARTS[model])
    datamodule, recognizer = adapter.speech, adapter.recognizer.eval()
    batch = next(iter(datamodule.test_dataloader()))
    frames = int(batch.feature_lengths[0])
    features, lengths = batch.features[:1, :frames], batch.feature_lengths[:1]
    single = batch._replace(features=features, feature_lengths=lengths)
    table = coverage(
        recognizer, single, spec=spec, forward=lambda module, batch: module.decode(batch)
    )
    return frames * datamodule.log_mel.hop_ms / 1000, table


def runs(
    *,
    models: Sequence[str] = tuple(MODELS),
    chips: Sequence[str] = tuple(CHIPS),
    methods: Sequence[str] = tuple(METHODS),
    seeds: Sequence[int] = SEEDS,
    threads: int = 1,
) -> list[Run]:
    """List the grid: what is untrained first, then the trained networks, seed by seed.

    Args:
        models: Keys of :data:`MODELS`.
        chips: Keys of :data:`CHIPS`.
        methods: Keys of :data:`METHODS`.
        seeds: Seeds of the fine-tuning.
        threads: Number of CPU threads of each run.
    """
    ordered = [model for model in ("keywords", *RECOGNIZERS) if model in models]
    grid: list[Run] = []
    for model in ordered:
        if "float" in methods:
            grid.append(_run(model, "none", "float", SEEDS[0], threads))
        if "untrained" in methods:
            grid += [_run(model, chip, "untrained", SEEDS[0], threads) for chip in chips]
    for seed, model, chip in itertools.product(seeds, ordered, chips):
        if chip in TRAINED[model] and "trained" in methods:
            grid.append(_run(model, chip, "trained", seed, threads))
        if chip in AVERAGED.get(model, ()) and "averaged" in methods:
            grid.append(_run(model, chip, "averaged", seed, threads))
    for seed, model, chip in itertools.product(seeds, ordered, chips):
        # The recognizers' control is one seed: its decoding costs as much as a training.
        is_measured = model == "keywords" or seed == SEEDS[0]
        if chip in TRAINED[model] and "control" in methods and is_measured:
            grid.append(_run(model, chip, "control", seed, threads))
    # A longer training leaves the operators as they are.
    counted = [model for model in ordered if model in ("keywords", *STARTS)]
    return [*grid, *(FallbackRun(m, o, threads=threads) for m in counted for o in OPERATORS)]


def _run(model: str, chip: str, method: str, seed: int, threads: int) -> AwarenessRun:
    kind = KeywordRun if model == "keywords" else RecognizerRun
    return kind(model, chip, method, seed, threads=threads)


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report."""
    pairs = list(itertools.product(MODELS, CHIPS))
    scored = [row for row in rows if "wer" in row]
    return {
        "steps": ", ".join(f"{count} ({MODELS[model]})" for model, count in STEPS.items()),
        "networks": [text for model, chip in pairs if (text := network_line(scored, model, chip))],
        "verdicts": [text for model, chip in pairs if (text := verdict(scored, model, chip))],
        "seeds": [
            line(
                MODELS[row["model"]],
                CHIPS[row["chip"]].title,
                METHODS[row["method"]],
                row["seed"],
                percent(row["wer"]),
                f"{row['loss_per_token']:.4f}",
                f"{row['train_seconds']:.0f}",
                f"{row['cpu_seconds']:.0f}",
            )
            for model, chip in pairs
            for method in ("control", "trained", "averaged")
            for row in _of(scored, model, chip, method)
        ],
        "averaged": [text for model, chip in pairs if (text := average_line(scored, model, chip))],
        "outliers": [
            outlier_line(row)
            for model in MODELS
            for row in _of(scored, model, "none", "float")
            if "outliers" in row
        ],
        "programs": [program_line(row) for row in scored if "equal_outputs" in row],
        "fallbacks": [
            fallback_line(row)
            for model in MODELS
            for row in rows
            if "cpu_sites" in row and row["model"] == model
        ],
        "channels": channel_text(scored),
        "missing": missing_lines(rows),
    }


def missing_lines(rows: Sequence[Row]) -> list[str]:
    """List the runs of the grid that have no row yet, with the seeds of each."""
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for run in runs():
        if isinstance(run, AwarenessRun) and run.missing_keys(rows):
            seeds.setdefault((run.model, run.chip, run.method), []).append(str(run.seed))
    return [
        f"- {MODELS[model]}, {CHIPS[chip].title if chip in CHIPS else 'float'}, "
        f"{METHODS[method]}: seed {', '.join(numbers)}."
        for (model, chip, method), numbers in seeds.items()
    ]


def network_line(rows: Sequence[Row], model: str, chip: str) -> str | None:
    """Format one network on one chip; None if it was not measured there."""
    start, untrained = _of(rows, model, "none", "float"), _of(rows, model, chip, "untrained")
    if not start or not untrained:
        return None
    control, trained = _of(rows, model, chip, "control"), _of(rows, model, chip, "trained")
    return line(
        MODELS[model],
        CHIPS[chip].title,
        percent(start[0]["wer"]),
        percent(untrained[0]["wer"]),
        points(difference(untrained, start)),
        _mean(control),
        _mean(trained),
        len(trained) or "-",
        points(difference(trained, start)),
        points(difference(trained, untrained)),
        points(difference(trained, control)),
    )


def verdict(rows: Sequence[Row], model: str, chip: str) -> str | None:
    """Say what an accelerator costs a network, and what training for it returns."""
    start, untrained = _of(rows, model, "none", "float"), _of(rows, model, chip, "untrained")
    trained, control = _of(rows, model, chip, "trained"), _of(rows, model, chip, "control")
    if not start or not untrained:
        return None
    name = f"- {MODELS[model]}, {CHIPS[chip].title}:"
    cost, gain = difference(untrained, start), difference(trained, untrained)
    aware = difference(trained, control)
    assert cost is not None
    is_harmed = cost.low > 0
    harm = f"costs {points(cost)}" if is_harmed else f"costs nothing that shows ({points(cost)})"
    if gain is None:
        return f"{name} {harm}; not trained."
    rest = difference(trained, start)
    assert rest is not None
    if gain.is_tied:
        outcome = f"training is tied with none ({points(gain)})"
    else:
        outcome = f"training {'wins' if gain.mean < 0 else 'loses'} {points(gain)}"
        if is_harmed and gain.mean < 0:
            outcome += f", {-gain.mean / cost.mean:.0%} of the cost"
    text = f"{name} {harm}; {outcome}; against float {points(rest)}"
    if aware is not None:
        seeds = len({row["seed"] for row in control} & {row["seed"] for row in trained})
        text += f"; against the control {points(aware)} ({seeds} seed{'s' * (seeds > 1)})"
    return f"{text}."


def average_line(rows: Sequence[Row], model: str, chip: str) -> str | None:
    """Format what an average of the weights changes; None if it was not measured."""
    averaged, trained = _of(rows, model, chip, "averaged"), _of(rows, model, chip, "trained")
    if not averaged:
        return None
    return line(
        MODELS[model],
        CHIPS[chip].title,
        _mean(trained),
        _mean(averaged),
        len(averaged),
        points(difference(averaged, trained)),
        points(difference(averaged, _of(rows, model, chip, "untrained"))),
        points(difference(averaged, _of(rows, model, "none", "float"))),
    )


def outlier_line(row: Row) -> str:
    """Format by how much the largest values of a float network exceed the usual ones."""
    ratios = (sorted(row["outliers"][kind]) for kind in ("weights", "inputs"))
    return line(
        MODELS[row["model"]],
        len(row["outliers"]["weights"]),
        *(f"{value:.1f}" for each in ratios for value in (median(each), each[-1])),
    )


def difference(rows: Sequence[Row], others: Sequence[Row]) -> RateDifference | None:
    """Compare two methods on one network; None where no seed is in both."""
    if not rows or not others:
        return None
    if rows[0]["model"] == "keywords":
        words = np.ones(len(utterance_errors(rows[0])), dtype=int)
    else:
        words = commands_words()
    return error_difference(rows, others, words)


def program_line(row: Row) -> str:
    """Format the comparison of a network's programs with the emulation."""
    return line(
        MODELS[row["model"]],
        CHIPS[row["chip"]].title,
        row["runtime"],
        f"{row['equal_outputs']:,} of {row['outputs']:,}",
        row["utterances"],
        f"{row['tflite_bytes']:,}",
    )


def fallback_line(row: Row) -> str:
    """Format what an accelerator without some operators leaves to the CPU."""
    return line(
        MODELS[row["model"]],
        row["operators"],
        row["sites"],
        row["cpu_sites"],
        f"{row['cpu_calls_per_second']:.0f}",
        f"{row['crossing_bytes_per_second']:,.0f}",
        ", ".join(row["cpu_operators"]) or "none",
    )


def channel_text(rows: Sequence[Row]) -> str:
    """List by how much the widest channel of each convolution exceeds the median one."""
    ratios = [row["channel_ratios"] for row in rows if "channel_ratios" in row]
    return ", ".join(f"{each:.1f}" for each in ratios[0]) if ratios else "not measured"


def _of(rows: Sequence[Row], model: str, chip: str, method: str) -> list[Row]:
    selected = select(rows, model=model, chip=chip, method=method)
    return sorted(selected, key=lambda row: row["seed"])


def _mean(rows: Sequence[Row]) -> str:
    return percent(fmean(row["wer"] for row in rows)) if rows else "-"


STUDY = Study(
    name="awareness",
    runs=runs,
    report=report,
    options={
        "models": axis(MODELS),
        "chips": axis(CHIPS),
        "methods": axis(METHODS),
        "seeds": axis(SEEDS, is_open=True),
        "threads": threads_option(),
    },
)

if __name__ == "__main__":
    STUDY.main()
