"""Low-bit weights on AN4: every method from the same float weights, with the same budget.

    python -m recipes.benchmark.compression --workers 2          # run what is missing, then report
    python -m recipes.benchmark.compression --seeds 1 --bits 2   # a part of the grid
    python -m recipes.benchmark.compression --page-only

Each run is one of ``recipes.train`` (from ``recipes/pretrained/an4_rnnt.safetensors``, emulated,
with the settings of ``experiment=an4_rnnt_finetune``) or of ``recipes.evaluate`` (rounding without
training). PARQ needs the extra ``bench``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_nna.weights.selection import matches_path
from recipes.benchmark.grid import Study, axis, threads_option
from recipes.benchmark.plots import plot_losses
from recipes.benchmark.recipe_runs import (
    SEEDS,
    START,
    STEPS,
    Method,
    RecipeRun,
    compressed,
    evaluation,
    metrics_of,
    run_recipe,
    training,
)
from recipes.benchmark.report import (
    Fields,
    against,
    difference,
    hardest_rival,
    interval,
    line,
    loss_change,
    mean_loss,
    outcome,
    paired,
    percent,
    relative,
    wer_change,
    word_errors,
)
from recipes.benchmark.rows import Row, select, spread
from recipes.weights import load_weights

RUNS = Path("runs/compression")
BITS = (5, 4, 3, 2)
#: Mixed allocations: settings of ``recipes.allocate``, by the name that stands for the bits. With
#: all widths to choose from, 4 bits in the mean need no tensor of 1 bit.
MIXED, ONE_BIT = "mixed", "one_bit"
ALLOCATIONS = {
    MIXED: ("target_mean_bits=4",),
    ONE_BIT: ("target_mean_bits=3.6", "candidates=[1,4,5,8]"),
}
#: A fixed allocation: 4 bits except for the tensor that loses least by 1 bit.
SMALL_ONE_BIT = "small_one_bit"
_SMALLEST_COST = {"model.predictor.lstm.weight_ih_l0": 1}


@dataclass(frozen=True)
class WidthsMethod(Method):
    """A method of low-bit weights.

    Attributes:
        widths: Bits of a weight, or names of allocations, that it is run at.
    """

    widths: tuple[int | str, ...] = BITS


_CODEBOOK = "callbacks.codebook"
#: Entropies of a 5-bit weight: one that saves a third of the accelerator's memory and time with a
#: margin, and one that saves hardly more than a third.
RATE_BITS, HIGHER_RATE_BITS = 4.25, 4.4
METHODS: dict[str, WidthsMethod] = {
    "float": WidthsMethod("float", "none", trains=False, widths=(32,)),
    "float_tuned": WidthsMethod("float, trained further", "none", widths=(32,)),
    "chip": WidthsMethod("8 bits, untrained", "nna8", trains=False, widths=(8,)),
    "nna8": WidthsMethod("8 bits, accelerator-aware", "nna8", widths=(8,)),
    "rtn": WidthsMethod("rounded, uniform", "ste", trains=False),
    "lloyd": WidthsMethod("rounded, Lloyd-Max", "s8bqat", trains=False, widths=(*BITS, MIXED)),
    "ste": WidthsMethod("straight-through, uniform", "ste"),
    "lsq": WidthsMethod("LSQ", "lsq", widths=(*BITS, MIXED)),
    "parq": WidthsMethod("PARQ (torchao)", "parq"),
    "s8bqat": WidthsMethod("S8BQAT", "s8bqat"),
    "gq": WidthsMethod("GQ", "gq"),
    "codebook": WidthsMethod(
        "fixed codebook", "codebook", widths=(*BITS, MIXED, ONE_BIT, SMALL_ONE_BIT)
    ),
    "codebook_distilled": WidthsMethod(
        "fixed codebook with distillation",
        "codebook",
        settings=("callbacks=distillation",),
        widths=(3, 2),
    ),
    "codebook_rate": WidthsMethod(
        f"fixed codebook, entropy of at most {RATE_BITS} bits",
        "codebook",
        settings=(f"{_CODEBOOK}.max_entropy_bits={RATE_BITS}",),
        widths=(5,),
    ),
    "codebook_higher_rate": WidthsMethod(
        f"fixed codebook, entropy of at most {HIGHER_RATE_BITS} bits",
        "codebook",
        settings=(f"{_CODEBOOK}.max_entropy_bits={HIGHER_RATE_BITS}",),
        widths=(5,),
    ),
    "mracos_only": WidthsMethod(
        "S8BQAT, compressed at the end only",
        "s8bqat",
        settings=("callbacks.hard.start_step=1.0",),
        widths=(2,),
    ),
    "hard_only": WidthsMethod(
        "S8BQAT without MRACos",
        "s8bqat",
        settings=("callbacks.mracos.strength=0.0",),
        widths=(2,),
    ),
    "codebook_trained": WidthsMethod(
        "fixed codebook, trained centroids",
        "codebook",
        settings=(
            f"{_CODEBOOK}.train_centroids=true",
            f"+{_CODEBOOK}.centroid_lr={{start: 1.0e-4, end: 0.0}}",
        ),
        widths=(4, 2),
    ),
    "codebook_annealed": WidthsMethod(
        "fixed codebook, soft and annealed up to 40 %, soft gradient",
        "codebook",
        settings=(
            f"{_CODEBOOK}.hard_from=0.4",
            f"{_CODEBOOK}.sharpness={{start: 1.0, end: 16.0, until: 0.4, shape: geometric}}",
            f"{_CODEBOOK}.gradient_sharpness=2.0",
        ),
        widths=(4, 2),
    ),
    "codebook_soft_gradient": WidthsMethod(
        "fixed codebook, soft gradient",
        "codebook",
        settings=(f"{_CODEBOOK}.gradient_sharpness=1.0",),
        widths=(2,),
    ),
    "codebook_no_zero": WidthsMethod(
        "fixed codebook, no centroid pinned at zero",
        "codebook",
        settings=(f"{_CODEBOOK}.pin_zero=false",),
        widths=(3, 2),
    ),
    "codebook_mu15": WidthsMethod(
        "fixed codebook, µ = 15, no centroid pinned at zero",
        "codebook",
        settings=(f"{_CODEBOOK}.mu=15.0", f"{_CODEBOOK}.pin_zero=false"),
        widths=(*BITS, MIXED),
    ),
    "codebook_mu255": WidthsMethod(
        "fixed codebook, µ = 255", "codebook", settings=(f"{_CODEBOOK}.mu=255.0",), widths=(2,)
    ),
}


#: Methods that the figure and the acceptance checks compare.
_COMPARED = ("rtn", "lloyd", "ste", "lsq", "parq", "s8bqat", "codebook", "gq")


@dataclass(frozen=True)
class CompressionRun(RecipeRun):
    """One method at one width.

    Attributes:
        method: A key of :data:`METHODS`.
        bits: Bits of every weight, or the name of a mixed allocation.
        seed: Seed of the training.
    """

    method: str
    bits: int | str
    seed: int

    @property
    def folder(self) -> Path:
        """Run folder."""
        return RUNS / f"{self.method}_{self.bits}" / f"seed{self.seed}"

    @property
    def allocation(self) -> Path:
        """File of a mixed allocation, bits by tensor."""
        return RUNS / "allocation" / str(self.bits) / "bits.json"

    @property
    def command(self) -> list[str]:
        """Module and overrides of the run."""
        method = METHODS[self.method]
        settings = [*compressed(method.compression), *method.settings]
        if self.bits in ALLOCATIONS:
            settings += ["bits=8", f"bit_overrides={self.allocation}"]
        elif self.bits == SMALL_ONE_BIT:
            pairs = ", ".join(f"{name}: {bits}" for name, bits in _SMALLEST_COST.items())
            settings += ["bits=4", f"+bit_overrides={{{pairs}}}"]
        elif method.compression not in ("none", "nna8"):
            settings.append(f"bits={self.bits}")
        if not method.trains:
            return evaluation(self.folder, *settings)
        return training(self.seed, self.folder, *settings)

    def prepare(self) -> None:
        """Measure the bits by tensor of a mixed allocation, which all seeds share."""
        if self.bits in ALLOCATIONS and not self.allocation.exists():
            run_recipe(
                "recipes.allocate",
                f"ckpt={START}",
                *ALLOCATIONS[str(self.bits)],
                f"hydra.run.dir={self.allocation.parent}",
                f"threads={self.threads}",
                log=self.allocation.parent / "run.log",
            )

    def row(self, summary: Mapping[str, Any]) -> Row:
        """Make the row of a finished run from its summary."""
        weights = load_weights(START).network
        shapes = {name.removeprefix("model."): x.shape for name, x in weights.items()}
        overrides, default = {}, self.bits
        if self.bits in ALLOCATIONS:
            overrides = json.loads(self.allocation.read_text())["overrides"]
        elif self.bits == SMALL_ONE_BIT:
            overrides, default = _SMALLEST_COST, 4
        bits = {
            name: next(
                (b for p, b in overrides.items() if matches_path(p, f"model.{name}")), default
            )
            for name, shape in shapes.items()
            if len(shape) >= 2
        }
        counts = {name: shape.numel() for name, shape in shapes.items()}
        total = sum(counts[name] for name in bits)
        return {
            "seed": self.seed,
            "corpus": "an4",
            "model": "rnnt",
            "method": self.method,
            "bits": self.bits,
            "mean_bits": sum(int(b) * counts[name] for name, b in bits.items()) / total,
            "one_bit_tensors": sorted(name for name, b in bits.items() if b == 1),
            "sparsity": 0.0,
            **metrics_of(summary),
            "packed_bytes": packed_bytes(counts, bits),
        }


def runs(
    *,
    methods: Sequence[str] = tuple(METHODS),
    bits: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    threads: int = 1,
) -> list[CompressionRun]:
    """List the grid, or a part of it, seed by seed; without training there is one seed.

    Args:
        methods: Keys of :data:`METHODS`.
        bits: Widths, as words; empty for all.
        seeds: Seeds of the training.
        threads: Number of CPU threads of each run.
    """
    return [
        CompressionRun(method, width, seed, threads=threads)
        for seed, method in itertools.product(seeds, methods)
        if METHODS[method].trains or seed == SEEDS[0]
        for width in METHODS[method].widths
        if not bits or str(width) in bits
    ]


def packed_bytes(counts: Mapping[str, int], bits: Mapping[str, int | str]) -> int:
    """Compute the size of a network: indices, one byte a centroid, one scale a tensor.

    Args:
        counts: Number of elements by tensor.
        bits: Bits of a weight by tensor; 8 and more store no centroids. Tensors that are not
            named (vectors) take 32.

    Example:
        >>> packed_bytes({"weight": 100, "bias": 3}, {"weight": 2})
        45
    """
    size = 0
    for name, count in counts.items():
        width = int(bits.get(name, 32))
        size += -(-count * width // 8)
        if width < 8:
            size += 2**width
        if width <= 8:
            size += 4
    return size


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report."""
    order = {method: number for number, method in enumerate(METHODS)}
    each = sorted(rows, key=lambda row: (order[row["method"]], _descending(row), row["seed"]))
    return {
        "steps": STEPS,
        "means": [
            mean_line(rows, method, bits) for method in METHODS for bits in _widths(rows, method)
        ],
        "checks": checks(rows),
        "runs": [run_line(row) for row in each],
    }


def checks(rows: Sequence[Row]) -> list[str]:
    """Run every acceptance check on the seeds that have rows."""
    references = {
        "float, trained further": select(rows, method="float_tuned"),
        "float before training": select(rows, method="float"),
        "8 bits, accelerator-aware": select(rows, method="nna8"),
    }
    lines = []
    for method, name in (("s8bqat", "S8BQAT"), ("codebook", "fixed codebook"), ("gq", "GQ")):
        for title, reference in references.items():
            if pairs := paired(select(rows, method=method, bits=5), reference):
                change, error = difference(pairs)
                mean = fmean(loss for _, loss in pairs)
                lines.append(
                    f"- {name} at 5 bits no worse in loss than {title}: {change / mean:+.1%} ± "
                    f"{error / mean:.1%} over {len(pairs)} seed(s), {outcome(change, error)}."
                )
    # What the accelerator saves at 5 bits is to cost no words.
    for method in ("gq", "codebook", "codebook_higher_rate", "codebook_rate"):
        reference = references["8 bits, accelerator-aware"]
        if pairs := paired(select(rows, method=method, bits=5), reference, "wer"):
            change, error = difference(pairs)
            lines.append(
                f"- {METHODS[method].title} at 5 bits without loss of WER against 8 bits, "
                f"accelerator-aware: {wer_change(change, error)} over {len(pairs)} seed(s), "
                f"{outcome(change, error)}."
            )
    for bits, metric in itertools.product((4, 3, 2), _METRICS):
        for method in ("gq", "codebook"):
            lines += _check_rivals(rows, method, bits, metric)
    start = references["float before training"]
    gq, lsq = (paired(select(rows, method=m, bits=2), start) for m in ("gq", "lsq"))
    if gq and lsq:
        # Where LSQ loses nothing, GQ must lose nothing either, and be no worse.
        bound = relative(lsq) * (0.5 if relative(lsq) > 0 else 1.0)
        lines.append(
            f"- At 2 bits at most half of LSQ's increase of the loss: GQ {relative(gq):+.1%}, "
            f"LSQ {relative(lsq):+.1%}, {outcome(relative(gq) - bound)}."
        )
    mixed = [row for row in select(rows, method="codebook") if row["one_bit_tensors"]]
    for allocation in dict.fromkeys(row["bits"] for row in mixed):
        for title, reference in references.items():
            lines += _check_mixed(select(mixed, bits=allocation), title, reference)
    return lines


def _check_rivals(rows: Sequence[Row], method: str, bits: int, metric: str) -> list[str]:
    own = select(rows, method=method, bits=bits)
    others = {
        other: pairs
        for other in _COMPARED
        if other != method and (pairs := paired(own, select(rows, method=other, bits=bits), metric))
    }
    if not others:
        return []
    rival = hardest_rival(others)
    change, error = difference(others[rival])
    return [
        f"- {METHODS[method].title} best or tied at {bits} bits: "
        f"{_METRICS[metric](change, error)} against the best "
        f"other ({METHODS[rival].title}) over {len(others[rival])} seed(s), "
        f"{outcome(change, error)}."
    ]


def _check_mixed(rows: Sequence[Row], title: str, reference: Sequence[Row]) -> list[str]:
    if not (pairs := paired(rows, reference, "wer")):
        return []
    change, error = difference(pairs)
    bits = max(row["mean_bits"] for row in rows)
    tensors = sorted({name for row in rows for name in row["one_bit_tensors"]})
    return [
        f"- A mixed allocation with 1-bit tensors ({', '.join(tensors)}), mean at most 4 bits, "
        f"without loss of WER against {title}: {bits:.2f} bits, {wer_change(change, error)} over "
        f"{len(pairs)} seed(s), {outcome(change, error) if bits <= 4 else 'missed'}."
    ]


#: Metrics that methods are compared in, and their words.
_METRICS = {"loss_per_token": loss_change, "wer": wer_change}


def mean_line(rows: Sequence[Row], method: str, bits: int | str) -> str:
    """Format a line of means over the seeds."""
    selected = select(rows, method=method, bits=bits)
    return line(
        METHODS[method].title,
        _bits(selected[0]),
        len(selected),
        *word_errors(selected),
        f"{mean_loss(selected):.4f}",
        *(against(selected, select(rows, method=each)) for each in ("float", "float_tuned")),
        f"{spread(row['packed_bytes'] for row in selected)[0] / 1e6:.3f} MB",
    )


def run_line(row: Row) -> str:
    """Format the line of one run."""
    return line(
        METHODS[row["method"]].title,
        _bits(row),
        row["seed"],
        percent(row["wer"]),
        interval(row),
        f"{row['loss_per_token']:.4f}",
        f"{row['cpu_seconds'] / 60:.1f} min" if row["cpu_seconds"] else "-",
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot the loss over the width."""
    numbers = [row for row in rows if isinstance(row["bits"], int)]
    plot_losses(
        path,
        curves={
            METHODS[method].title: [(row["bits"], row) for row in selected]
            for method in _COMPARED
            if (selected := select(numbers, method=method))
        },
        baselines={
            METHODS[method].title: selected
            for method in ("float", "float_tuned", "nna8")
            if (selected := select(rows, method=method))
        },
        label="bits of a weight",
        ticks=(2, 3, 4, 5),
    )


def _widths(rows: Sequence[Row], method: str) -> list[int | str]:
    """List the widths from large to small, then the allocations as they were run."""
    widths = dict.fromkeys(row["bits"] for row in select(rows, method=method))
    return sorted(widths, key=lambda bits: -bits if isinstance(bits, int) else 0)


def _bits(row: Row) -> str:
    if isinstance(row["bits"], int):
        return str(row["bits"])
    return f"mixed, {row['mean_bits']:.2f}" + (", 1 bit too" if row["one_bit_tensors"] else "")


def _descending(row: Row) -> float:
    return -row["bits"] if isinstance(row["bits"], int) else 0.0


STUDY = Study(
    name="compression",
    runs=runs,
    report=report,
    plot=plot,
    options={
        "methods": axis(METHODS),
        "bits": {"nargs": "*", "default": [], "help": "2 to 8, or mixed, one_bit; all if left out"},
        "seeds": axis(SEEDS, is_open=True),
        "threads": threads_option(),
    },
    workers=1,
)

if __name__ == "__main__":
    STUDY.main()
