"""S8BQAT on spoken commands: strength of the regularizer, schedules, compression, and sizes.

    python -m recipes.benchmark.s8bqat                                # run what is missing
    python -m recipes.benchmark.s8bqat --tables strength hard         # a part of the grid
    python -m recipes.benchmark.s8bqat --page-only

Settings are compared on the validation part, from the float weights in ``recipes/pretrained`` and
with float activations; what is claimed is emulated in 8 bits, with three seeds, on the test part.
The table of sizes trains a smaller network in float first, and compiles both with Vela.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib.ticker import FixedLocator

from recipes.asr.decoding import greedy_decode
from recipes.asr.scoring import RateDifference
from recipes.benchmark.deployment import SYSTEMS
from recipes.benchmark.exported import export_checkpoint
from recipes.benchmark.grid import Study, axis, threads_option
from recipes.benchmark.plots import saved_figure
from recipes.benchmark.recipe_runs import (
    COMMANDS_RNNT,
    SEEDS,
    STEPS,
    RecipeRun,
    compressed,
    evaluation,
    metrics_of,
    packed_errors,
    summary_of,
    training,
    wer_difference,
)
from recipes.benchmark.report import Fields, line, mean_loss, met, percent, points, word_errors
from recipes.benchmark.rows import Row, select
from recipes.deploy import compile_for, cost

RUNS = Path("runs/s8bqat")
BITS = (5, 4, 3, 2)
STRENGTHS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
#: Learning rate of ``experiment=commands_finetune``.
RATE = 3e-4
#: Factor of the strength over the run.
SCHEDULES = {
    "rising": "rising until 80 %",
    "constant": "constant",
    "off": "constant, off from 80 % on",
}
_SCHEDULES = {
    "rising": "{start: 0.0, end: 1.0, begin: 0.0, until: 0.8, shape: linear}",
    "constant": "{start: 1.0, end: 1.0, begin: 0.0, until: 0.8, shape: linear}",
    "off": "{start: 1.0, end: 0.0, begin: 0.0, until: 0.8, shape: step}",
}
#: Steps between two compressions, and the time of the first.
HARD = {
    "end": "at the end only",
    "late": "every 25 steps, from 80 % on",
    "rarely": "every 120 steps",
    "often": "every 25 steps",
}
_HARD = {"end": (25, 1.0), "late": (25, 0.8), "rarely": (120, 0), "often": (25, 0)}


@dataclass(frozen=True)
class SettingRun(RecipeRun):
    """One setting of S8BQAT at one width.

    Attributes:
        bits: Bits of every weight.
        strength: Strength of the regularizer; None rounds the float weights without training.
        scaled: Whether the arches of the regularizer have slope 1, or height 1.
        schedule: A key of :data:`SCHEDULES`.
        hard: A key of :data:`HARD`.
        rate: Greatest learning rate.
        steps: Number of optimizer steps.
        seed: Seed of the training.
        part: Part of the corpus that is scored, ``"validation"`` or ``"test"``.
        emulated: Whether activations and arithmetic are those of the accelerator, in 8 bits.
    """

    bits: int
    strength: float | None
    scaled: bool = True
    schedule: str = "rising"
    hard: str = "end"
    rate: float = RATE
    steps: int = STEPS
    seed: int = 1
    part: str = "validation"
    emulated: bool = False

    @property
    def folder(self) -> Path:
        """Run folder."""
        values = (getattr(self, each.name) for each in fields(self) if not each.kw_only)
        return RUNS / "_".join(str(value) for value in values)

    @property
    def command(self) -> list[str]:
        """Module and overrides of the run."""
        settings = [*compressed("s8bqat"), f"bits={self.bits}", f"data.test_part={self.part}"]
        if not self.emulated:
            settings = ["callbacks.nna=null", *(s for s in settings if not s.startswith("nna="))]
        if self.strength is None:
            return evaluation(self.folder, *settings, start=COMMANDS_RNNT)
        every, start = _HARD[self.hard]
        return training(
            self.seed,
            self.folder,
            *settings,
            f"callbacks.mracos.strength={self.strength}",
            f"++callbacks.mracos.scaled={str(self.scaled).lower()}",
            f"++callbacks.mracos.schedule={_SCHEDULES[self.schedule]}",
            f"callbacks.hard.every_n_steps={every}",
            f"callbacks.hard.start_step={start}",
            f"model.optimizer.lr={self.rate}",
            start=COMMANDS_RNNT,
            steps=self.steps,
        )

    def row(self, summary: Mapping[str, Any]) -> Row:
        """Make the row of a finished run from its summary."""
        return {
            "table": "settings",
            **self.keys[0],
            **metrics_of(summary),
            **logged(self.folder),
            "utterance_errors": packed_errors(self.folder),
        }

    @property
    def keys(self) -> list[dict[str, Any]]:
        """Values that identify the row of this run."""
        return [{"table": "settings", **super().keys[0]}]


def logged(folder: Path) -> dict[str, float | None]:
    """Read what the callbacks have logged in a run.

    Args:
        folder: Folder of a run, trained or not.

    Returns:
        ``distance``: root of the mean square of the distance of weights and centroids, relative to
        the weights, some steps before the end. ``pull``: median over the run of the norm of the
        regularizer's gradient relative to the loss's. ``changed``: mean fraction of weights that
        took another centroid from one compression to the next. None for what was not logged.
    """
    keys = {
        "distance": "nna/hard_compression/distance",
        "pull": "nna/mracos_regularization/pull",
        "changed": "nna/hard_compression/changed",
        "compressions": "nna/hard_compression/compressions",
    }
    lines: list[dict[str, float]] = []
    for path in folder.glob("metrics/**/metrics.csv"):
        with path.open(encoding="utf-8") as file:
            for each in csv.DictReader(file):
                found = {name: each.get(key) for name, key in keys.items()}
                if all(found.values()):
                    lines.append({name: float(str(value)) for name, value in found.items()})
    pulls = [each["pull"] for each in lines]
    # The last line is that of the last step, in which weights were compressed.
    distances = [each["distance"] for each in lines[:-1]]
    changed = {each["compressions"]: each["changed"] for each in lines if each["compressions"] > 1}
    return {
        "distance": distances[-1] if distances else None,
        "pull": median(pulls) if pulls else None,
        "changed": fmean(changed.values()) if changed else None,
    }


#: Units of each layer of the encoder, by the name of the network.
SIZES = {"small": 160, "pretrained": 192}
#: Float weights of each size, trained for the same number of epochs.
_STARTS = {
    "small": COMMANDS_RNNT.weights.with_name("commands_rnnt_160.safetensors"),
    "pretrained": COMMANDS_RNNT.weights,
}
#: Settings that were chosen on the validation part, by width, as they are claimed.
_CHOSEN = {5: (1e-3, "end"), 4: (1e-3, "end"), 3: (1e-2, "end"), 2: (1e-2, "often")}
CHOSEN = {
    bits: SettingRun(bits, strength, hard=hard, part="test", emulated=True)
    for bits, (strength, hard) in _CHOSEN.items()
}
#: Batches of the test part that are decoded through the programs.
_COMPARED_BATCHES = 4


@dataclass(frozen=True)
class SizeRun(RecipeRun):
    """One network of one size, trained for the accelerator and compiled by Vela.

    Attributes:
        network: A key of :data:`SIZES`.
        bits: Bits of every weight; 8 without a method of low-bit weights.
        seed: Seed of the training; the float weights are the same.
    """

    network: str
    bits: int
    seed: int = 1

    @property
    def keys(self) -> list[dict[str, Any]]:
        """Values that identify the rows of this run, one for each system."""
        own = {"network": self.network, "bits": self.bits, "seed": self.seed}
        return [{"table": "sizes", **own, "system": system} for _, system, _ in SYSTEMS]

    @property
    def folder(self) -> Path:
        """Run folder."""
        return RUNS / f"{self.network}_{self.bits}" / f"seed{self.seed}"

    @property
    def command(self) -> list[str]:
        """Module and overrides of the training for the accelerator."""
        settings = [f"model.network.encoder_size={SIZES[self.network]}"]
        if self.bits == 8:
            settings += compressed("nna8")
        else:
            settings += [
                each
                for each in CHOSEN[self.bits].command
                if each.startswith(("compression=", "nna=", "bits=", "callbacks", "++callbacks"))
            ]
        start = replace(COMMANDS_RNNT, weights=_STARTS[self.network])
        return training(self.seed, self.folder, *settings, start=start)

    def rows(self) -> Iterator[Row]:
        """Train, export and compile the network, and yield a row for every system."""
        summary = summary_of(self.folder, self.command, threads=self.threads)
        own = {
            "units": SIZES[self.network],
            **metrics_of(summary),
            "parameters": summary["parameters"],
            "utterance_errors": packed_errors(self.folder),
        }
        for key, estimate in zip(self.keys, compiled(self.checkpoint, self.folder), strict=True):
            yield {**key, **own, **estimate}


def compiled(checkpoint: Path, folder: Path) -> list[dict[str, Any]]:
    """Export a recognizer, compare its programs with the emulation, and compile them with Vela.

    Args:
        checkpoint: Checkpoint of a run that was trained emulated.
        folder: Folder that gets ``programs``.

    Returns:
        Vela's estimates for each of :data:`SYSTEMS`, with the fraction of equal outputs on some
        batches.
    """
    datamodule, models, deployed, batches, comparison = export_checkpoint(
        checkpoint, folder / "programs", batches=_COMPARED_BATCHES
    )
    for batch in batches:
        greedy_decode(deployed, batch.features, batch.feature_lengths)
    frames = sum(float(batch.feature_lengths.sum()) for batch in batches)
    seconds = frames * datamodule.log_mel.hop_ms / 1000
    calls = {part: count / seconds for part, count in deployed.calls.items()}
    equal = comparison.equal_outputs / comparison.outputs
    sizes = {part: model.size_bytes for part, model in models.items()}
    estimates = [cost(compile_for(models, *system), calls) for system in SYSTEMS]
    return [
        {**each, "equal_outputs": equal, "outputs": comparison.outputs, "programs": sizes}
        for each in estimates
    ]


def settings_runs() -> dict[str, list[SettingRun]]:
    """List the runs of the tables of settings, by the name of the table."""
    strength = [SettingRun(bits, strength) for bits in BITS for strength in STRENGTHS]
    return {
        "strength": [*(SettingRun(bits, None) for bits in BITS), *strength],
        "hard": [
            SettingRun(bits, strength, hard=hard)
            for bits, hard, strength in itertools.product(
                (4, 2), ("often", "rarely", "late"), (0.0, 1e-3, 1e-2)
            )
        ],
        "unscaled": [
            SettingRun(bits, strength, scaled=False)
            for bits, strength in itertools.product((4, 2), (1e-5, 1e-4, 1e-3))
        ],
        "schedule": [
            SettingRun(bits, 1e-2, schedule=schedule)
            for bits, schedule in itertools.product((4, 2), ("constant", "off"))
        ],
        "rate": [SettingRun(2, strength, rate=1e-3) for strength in (0.0, 1e-3, 1e-2)],
    }


def claim_runs(seeds: Sequence[int]) -> list[SettingRun]:
    """List the emulated runs on the test part."""
    rounded = [replace(chosen, strength=None) for chosen in CHOSEN.values()]
    trained = [
        replace(chosen, seed=seed, strength=strength)
        for seed in seeds
        for chosen in CHOSEN.values()
        for strength in (0.0, chosen.strength)
    ]
    return [*rounded, *trained]


def size_runs(seeds: Sequence[int]) -> list[SizeRun]:
    """List the runs of the table of sizes."""
    networks = (("small", 8), ("pretrained", 5), ("pretrained", 4))
    return [SizeRun(network, bits, seed) for seed in seeds for network, bits in networks]


TABLES = (*settings_runs(), "claims", "sizes")


def runs(
    *, tables: Sequence[str] = TABLES, seeds: Sequence[int] = SEEDS, threads: int = 1
) -> list[RecipeRun]:
    """List the grid, or a part of it.

    Args:
        tables: Names of tables.
        seeds: Seeds of the claims and of the sizes; settings have seed 1.
        threads: Number of CPU threads of each run.
    """
    grids: dict[str, Sequence[RecipeRun]] = {
        **settings_runs(),
        "claims": claim_runs(seeds),
        "sizes": size_runs(seeds),
    }
    return [replace(run, threads=threads) for table in tables for run in grids[table]]


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report."""
    settings = select(rows, table="settings")
    swept = select(settings, part="validation", emulated=False)
    plain = _default(swept)
    tables = settings_runs()
    others = [run for name, each in tables.items() if name != "strength" for run in each]
    return {
        "steps": STEPS,
        "strengths": [_strength_line(plain, bits, _cell) for bits in BITS],
        "distances": [_strength_line(plain, bits, _distance) for bits in BITS],
        "pulls": pulls(plain),
        "variants": [
            variant_line(row, swept) for run in others for row in select(swept, **run.keys[0])
        ],
        "claims": claim_lines(select(settings, part="test")),
        "sizes": size_lines(select(rows, table="sizes")),
        "checks": checks(rows),
    }


def _default(rows: Sequence[Row]) -> list[Row]:
    """Select the runs of the default settings, of every strength."""
    default = {"scaled": True, "schedule": "rising", "hard": "end", "rate": RATE, "steps": STEPS}
    return select(rows, **default)


def _strength_line(rows: Sequence[Row], bits: int, cell: Any) -> str:
    selected = {row["strength"]: row for row in select(rows, bits=bits)}
    return line(
        bits, *(cell(selected[each]) if each in selected else "-" for each in (None, *STRENGTHS))
    )


def pulls(rows: Sequence[Row]) -> str:
    """List the relative pull of each strength, as its range over the widths."""
    found = {
        strength: [row["pull"] for row in select(rows, strength=strength) if row["pull"]]
        for strength in STRENGTHS
    }
    return ", ".join(
        f"{min(each):.2g} to {max(each):.2g} at {strength:g}"
        for strength, each in found.items()
        if each
    )


def _cell(row: Row) -> str:
    return f"{percent(row['wer'])}, {row['loss_per_token']:.3f}"


def _distance(row: Row) -> str:
    return "-" if row["distance"] is None else f"{row['distance']:.3f}"


def variant_line(row: Row, rows: Sequence[Row]) -> str:
    """Format a run with other settings than the default ones, next to the default's.

    Args:
        row: Row of the run.
        rows: Rows of all runs of its part.
    """
    default = select(_default(rows), bits=row["bits"], strength=row["strength"])
    return line(
        row["bits"],
        f"{row['strength']:g}",
        "slope 1" if row["scaled"] else "height 1",
        SCHEDULES[row["schedule"]],
        HARD[row["hard"]],
        f"{row['rate']:g}",
        "-" if row["changed"] is None else f"{row['changed']:.2%}",
        _distance(row),
        _cell(row),
        _cell(default[0]) if default else "-",
    )


def claim_lines(rows: Sequence[Row]) -> list[str]:
    """Format the emulated runs on the test part, means over seeds."""
    lines = []
    for bits in CHOSEN:
        here = select(rows, bits=bits)
        without = select(here, strength=0.0)
        for strength in sorted(
            {row["strength"] for row in here}, key=lambda x: -1 if x is None else x
        ):
            selected = select(here, strength=strength)
            title = "rounded" if strength is None else f"{strength:g}"
            compared = None if strength == 0.0 else wer_difference(without, selected)
            lines.append(
                line(
                    bits,
                    title,
                    len(selected),
                    *word_errors(selected),
                    f"{mean_loss(selected):.4f}",
                    "-" if compared is None else points(_negative(compared)),
                )
            )
    return lines


def _negative(difference: RateDifference) -> RateDifference:
    return RateDifference(-difference.mean, -difference.high, -difference.low)


def size_lines(rows: Sequence[Row]) -> list[str]:
    """Format Vela's estimates of the first seed and the word errors of all, by system."""
    lines = []
    for _, system, _ in SYSTEMS:
        for network, bits in dict.fromkeys((row["network"], row["bits"]) for row in rows):
            selected = select(rows, network=network, bits=bits, system=system)
            small = select(rows, network="small", bits=8, system=system)
            ratios = [
                mean_of(selected, name) / mean_of(small, name)
                for name in ("inference_ms", "memory_bytes")
            ]
            lines.append(
                line(
                    system,
                    SIZES[network],
                    bits,
                    len(selected),
                    *word_errors(selected),
                    f"{mean_of(selected, 'encoded_bytes') / 1024:.0f}",
                    f"{mean_of(selected, 'memory_bytes') / 1024:.0f}",
                    f"{mean_of(selected, 'inference_ms'):.2f}",
                    *(f"{ratio - 1:+.1%}" for ratio in ratios),
                )
            )
    return lines


def mean_of(rows: Sequence[Row], name: str) -> float:
    """Average a number over rows."""
    return fmean(row[name] for row in rows)


#: What the paper reports: latency saved by the larger network.
TIME_SAVED = 0.05


def checks(rows: Sequence[Row]) -> list[str]:
    """Run the acceptance checks."""
    sizes = select(rows, table="sizes")
    lines = []
    if sizes:
        equal = min(row["equal_outputs"] for row in sizes)
        lines.append(
            f"- Outputs of the programs equal to the emulation's in every bit: {equal:.6%}, "
            f"{met(equal == 1)}."
        )
    for bits in sorted({row["bits"] for row in sizes} - {8}, reverse=True):
        lines += [_check_larger(sizes, bits, system) for _, system, _ in SYSTEMS]
    return lines


def _check_larger(rows: Sequence[Row], bits: int, system: str) -> str:
    """Check that the larger low-bit network is faster than the smaller 8-bit one, and better."""
    large = select(rows, network="pretrained", bits=bits, system=system)
    small = select(rows, network="small", bits=8, system=system)
    difference = wer_difference(large, small)
    assert difference is not None, "every size has every seed"
    saved, memory = (
        1 - mean_of(large, name) / mean_of(small, name) for name in ("inference_ms", "memory_bytes")
    )
    better = difference.high < 0
    relative = difference.mean / mean_of(small, "wer")
    return (
        f"- {SIZES['pretrained']} units at {bits} bits better in WER than {SIZES['small']} at 8 "
        f"and at least {TIME_SAVED:.0%} faster on {system}, {len(large)} seeds: "
        f"{points(difference)} points, {relative:+.0%} relative, {saved:.1%} of time and "
        f"{memory:.1%} of memory saved, {met(better and saved >= TIME_SAVED)}."
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot loss and distance over the strength of the regularizer, a curve for each width."""
    swept = select(rows, table="settings", part="validation", emulated=False)
    plain = _default(swept)
    smallest = STRENGTHS[1] / 10  # Where zero stands on the logarithmic axis.
    with saved_figure(path, (9.0, 3.8)) as figure:
        axes = figure.subplots(1, 2)
        labels = ("loss per token (nats), validation", "distance of weights and centroids")
        for panel, name, label in zip(axes, ("loss_per_token", "distance"), labels, strict=True):
            for bits in BITS:
                selected = [row for row in select(plain, bits=bits) if row["strength"] is not None]
                curve = sorted((max(row["strength"], smallest), row[name]) for row in selected)
                if curve:
                    panel.plot(*zip(*curve, strict=True), marker="o", ms=4, label=f"{bits} bits")
            panel.set_xscale("log")
            panel.set_xlabel("strength of the regularizer")
            panel.set_ylabel(label)
            panel.set_ylim(bottom=0)
            ticks = [smallest, *STRENGTHS[1:]]
            panel.xaxis.set_major_locator(FixedLocator(ticks))
            panel.set_xticklabels(["0", *(f"{each:g}" for each in STRENGTHS[1:])])
        axes[0].legend(frameon=False)


STUDY = Study(
    name="s8bqat",
    runs=runs,
    report=report,
    plot=plot,
    options={
        "tables": axis(TABLES),
        "seeds": axis(SEEDS, is_open=True),
        "threads": threads_option(),
    },
)

if __name__ == "__main__":
    STUDY.main()
