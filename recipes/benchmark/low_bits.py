"""Low-bit weights on 10,000 test words: every method, width and budget, and the parts of GQ.

    python -m recipes.benchmark.low_bits --workers 2          # run what is missing, then report
    python -m recipes.benchmark.low_bits --models rnnt --bits 2 --seeds 1
    python -m recipes.benchmark.low_bits --page-only

Each run is one of ``recipes.train`` on the synthetic commands, from the weights in
``recipes/pretrained``, or of ``recipes.evaluate`` (rounding without training). PARQ needs the extra
``bench``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_nna.files import write_whole
from lightning_nna.weights.allocation import BitAllocation
from recipes.benchmark.grid import Study, axis, threads_option
from recipes.benchmark.plots import saved_figure
from recipes.benchmark.recipe_runs import (
    SEEDS,
    STARTS,
    STEPS,
    Method,
    RecipeRun,
    compressed,
    evaluation,
    metrics_of,
    packed_errors,
    run_recipe,
    training,
    training_from_scratch,
    wer_difference,
)
from recipes.benchmark.report import Fields, interval, line, mean_loss, percent, points, word_errors
from recipes.benchmark.rows import Row, select, spread

RUNS = Path("runs/low_bits")
#: Budgets of training, in optimizer steps.
BUDGETS = (STEPS, 1500, 5000)


def _gq(title: str, **settings: object) -> Method:
    """Return the General Quantizer with other settings than its recipe's."""
    overrides = tuple(f"callbacks.gq.{name}={value}" for name, value in settings.items())
    return Method(title, "gq", overrides)


def _variant(title: str, **settings: object) -> Method:
    """Return a variant of the General Quantizer whose centroids are trained to the end.

    So was the recipe until all but a few of these rows had been measured, with three quarters of a
    run of any length soft.
    """
    return _gq(title, **{"train_centroids": "true", "hard_from": 0.75, **settings})


def _codebook(title: str, **settings: object) -> Method:
    """Return the fixed codebook with a part of the General Quantizer."""
    overrides = tuple(f"++callbacks.codebook.{name}={value}" for name, value in settings.items())
    return Method(title, "codebook", overrides)


#: Without low-bit weights.
BASELINES = {
    "float": Method("float", "none", trains=False),
    "float_tuned": Method("float, trained further", "none"),
    "chip": Method("8 bits, untrained", "nna8", trains=False),
    "nna8": Method("8 bits, accelerator-aware", "nna8"),
}
COMPARED = {
    "lloyd": Method("rounded, Lloyd-Max", "s8bqat", trains=False),
    "ste": Method("straight-through, uniform", "ste"),
    "lsq": Method("LSQ", "lsq"),
    "parq": Method("PARQ (torchao)", "parq"),
    "dkm": Method("DKM", "dkm"),
    "s8bqat": Method("S8BQAT", "s8bqat"),
    "codebook": Method("fixed codebook, straight-through", "codebook"),
    "gq_to_end": _variant("GQ, centroids trained to the end"),
    "gq": Method("GQ", "gq"),
}
_ANNEALING = "{start: %s, end: %s, until: %s, shape: geometric}"


def _annealed(
    title: str, *, start: float = 4.0, end: float = 300.0, until: float = 0.75, **more: object
) -> Method:
    sharpness = _ANNEALING % (start, end, until)
    return _variant(title, sharpness=sharpness, hard_from=until, **more)


#: Parts of GQ in place of the recipe's: one at a time, then with an annealing that ends earlier.
PARTS = {
    "gq_p1": _variant("distance of power 1", power=1),
    "gq_mu0": _variant("no µ-law", mu=0.0),
    "gq_mu15": _variant("µ = 15", mu=15.0),
    "gq_mu63": _variant("µ = 63", mu=63.0),
    "gq_mu255": _variant("µ = 255", mu=255.0),
    "gq_uniform": _variant("uniform start", start="uniform"),
    "gq_every4": _variant("quantized in every fourth step", every_n_steps=4),
    "gq_fixed": _variant("centroids stay", train_centroids="false"),
    "gq_zero": _variant("a centroid stays at zero", pin_zero="true"),
    "gq_own": _variant("sharpness trained", train_sharpness="true"),
    "gq_decay": _variant("centroids' rate falls to 0", centroid_lr="{start: 1.0e-3, end: 0.0}"),
    "gq_decay_soft": _variant(
        "centroids' rate falls to 0 while soft",
        centroid_lr="{start: 1.0e-3, end: 0.0, until: 0.75}",
    ),
    "gq_decay_hard": _variant(
        "centroids' rate falls to 0 while hard",
        centroid_lr="{start: 1.0e-3, end: 0.0, begin: 0.75}",
    ),
    "gq_fast": _variant("centroids trained at 1e-2", centroid_lr=1.0e-2),
    "gq_slow": _variant("centroids trained at 1e-4", centroid_lr=1.0e-4),
    "gq_slow_decay": _variant(
        "centroids' rate falls from 1e-4 to 0", centroid_lr="{start: 1.0e-4, end: 0.0}"
    ),
    "gq_soft_gradient": _variant("soft gradient of hard weights", gradient_sharpness=2.0),
    "gq_from1": _annealed("annealed from 1", start=1.0),
    "gq_from16": _annealed("annealed from 16", start=16.0),
    "gq_to32": _annealed("annealed to 32 only", end=32.0),
    "gq_until25": _annealed("annealed up to 25 %", until=0.25),
    "gq_until50": _annealed("annealed up to 50 %", until=0.5),
    "gq_until90": _annealed("annealed up to 90 %", until=0.9),
    "gq_until90_p1": _annealed("annealed up to 90 %, distance of power 1", until=0.9, power=1),
    "gq_until50_p1": _annealed("annealed up to 50 %, distance of power 1", until=0.5, power=1),
    "gq_until50_mu0": _annealed("annealed up to 50 %, no µ-law", until=0.5, mu=0.0),
    "gq_until50_mu15": _annealed("annealed up to 50 %, µ = 15", until=0.5, mu=15.0),
    "gq_until50_from16": _annealed("annealed up to 50 %, from 16", start=16.0, until=0.5),
}


#: GQ's recipe with other numbers of soft steps.
EARLY = {
    "gq_until75": _gq("GQ, annealed up to 75 %", hard_from=0.75),
    "gq_early3": _gq("GQ, annealed up to 3 %", hard_from=0.03),
    "gq_early10": _gq("GQ, annealed up to 10 %", hard_from=0.1),
    "gq_soft360": _gq("GQ, annealed for 360 steps", hard_from=360),
    "gq_early25": _gq("GQ, annealed up to 25 %", hard_from=0.25),
    "gq_early10_zero": _gq("GQ, annealed up to 10 %, a zero", hard_from=0.1, pin_zero="true"),
}
#: Parts of GQ, one at a time, added to the fixed codebook.
ADDED = {
    "codebook_mu": _codebook("and the µ-law", mu=7.0),
    "codebook_trained": _codebook("and trained centroids", train_centroids="true"),
    "codebook_soft": _codebook(
        "and annealing",
        sharpness=_ANNEALING % (4.0, 300.0, 0.75),
        hard_from=0.75,
    ),
    "codebook_free": _codebook("without the zero", pin_zero="false"),
}
_TO_END = ("callbacks.gq.train_centroids=true", "callbacks.gq.hard_from=0.75")
#: Together with others of the project's methods, and not the same width everywhere.
COMBINED = {
    "gq_distilled": Method("GQ and distillation", "gq", ("callbacks=distillation", *_TO_END)),
    "gq_ones": Method("GQ, 1 bit in the tensors that allow it", "gq", _TO_END),
    "gq_mixed": Method("GQ, bits of each tensor allocated, mean", "gq", _TO_END),
    "csp50": Method("CSP, 50 % zeros", "csp", ("sparsity=0.5",)),
    "csp70": Method("CSP, 70 % zeros", "csp", ("sparsity=0.7",)),
    "csp80": Method("CSP, 80 % zeros", "csp", ("sparsity=0.8",)),
    "csp50_gq": Method("CSP, 50 % zeros, and GQ", "csp_gq", ("sparsity=0.5", *_TO_END)),
    "csp80_gq": Method("CSP, 80 % zeros, and GQ", "csp_gq", ("sparsity=0.8", *_TO_END)),
    "csp80_recipe": Method("CSP, 80 % zeros, and GQ's recipe", "csp_gq", ("sparsity=0.8",)),
    "csp80_until75": Method(
        "CSP, 80 % zeros, and GQ, annealed up to 75 %",
        "csp_gq",
        ("sparsity=0.8", *EARLY["gq_until75"].settings),
    ),
    "csp80_codebook": Method(
        "CSP, 80 % zeros, and fixed codebook", "csp_codebook", ("sparsity=0.8",)
    ),
}
# Ranges of activations of random weights, frozen early, clip what training makes of them.
_RANGES_LATE = "callbacks.nna.calibration_steps=4000"
#: From random weights, with the method in every step of the training.
FROM_SCRATCH = {
    "float_scratch": Method("float", "none", from_scratch=True),
    "codebook_scratch": Method(
        "fixed codebook, straight-through", "codebook", (_RANGES_LATE,), from_scratch=True
    ),
    "gq_scratch": Method("GQ", "gq", (_RANGES_LATE,), from_scratch=True),
    "gq_scratch75": Method(
        "GQ, annealed up to 75 %",
        "gq",
        (_RANGES_LATE, *EARLY["gq_until75"].settings),
        from_scratch=True,
    ),
}
METHODS = {**BASELINES, **COMPARED, **PARTS, **EARLY, **ADDED, **COMBINED, **FROM_SCRATCH}
#: Widths of the methods that do not have those of the grid.
WIDTHS: dict[str, Sequence[int]] = {
    "float": (32,),
    "float_tuned": (32,),
    "float_scratch": (32,),
    "chip": (8,),
    "nna8": (8,),
    "gq_distilled": (3, 2),
    "gq_ones": (4, 3),
    "gq_mixed": (3, 2),
    "csp50": (8,),
    "csp70": (8,),
    "csp80": (8,),
    "csp50_gq": (4,),
    "csp80_gq": (4,),
    "csp80_recipe": (4,),
    "csp80_until75": (4,),
    "csp80_codebook": (4,),
}
#: Compressions whose weights have the 8 bits of the accelerator, or none.
_WITHOUT_BITS = ("none", "nna8", "csp")
#: Mean bits of the allocation whose tensors of 1 bit ``gq_ones`` takes.
_ONES_OF = 2


@dataclass(frozen=True)
class LowBitsRun(RecipeRun):
    """One method at one width, with one budget.

    Attributes:
        model: A key of :data:`STARTS`.
        method: A key of :data:`METHODS`.
        bits: Bits of every weight; 8 and 32 for the baselines.
        steps: Optimizer steps; 0 without training.
        seed: Seed of the training.
        part: Part of the corpus that is scored.
    """

    model: str
    method: str
    bits: int
    steps: int
    seed: int
    part: str

    @property
    def folder(self) -> Path:
        """Run folder."""
        name = f"{self.method}_{self.bits}_{self.steps}"
        return RUNS / self.part / self.model / name / f"seed{self.seed}"

    @property
    def command(self) -> list[str]:
        """Module and overrides of the run."""
        method, start = METHODS[self.method], STARTS[self.model]
        settings = [*compressed(method.compression), *method.settings]
        if method.compression not in _WITHOUT_BITS:
            settings.append(f"bits={self.bits}")
        if self.allocation is not None:
            settings.append(f"bit_overrides={self.allocation}")
        if method.compression == "parq":
            settings.append(f"parq_steps={self.steps}")
        settings.append(f"data.test_part={self.part}")
        if not method.trains:
            return evaluation(self.folder, *settings, start=start)
        command = training_from_scratch if method.from_scratch else training
        return command(self.seed, self.folder, *settings, start=start, steps=self.steps)

    @property
    def allocation(self) -> Path | None:
        """File of the bits of each tensor, which :meth:`prepare` makes; None for one width."""
        if self.method == "gq_mixed":
            return allocation_folder(self.model, self.bits) / "bits.json"
        if self.method == "gq_ones":
            return allocation_folder(self.model, _ONES_OF) / "ones.json"
        return None

    def prepare(self) -> None:
        """Allocate bits to tensors, where the method needs it."""
        if self.allocation is not None and not self.allocation.exists():
            bits = self.bits if self.method == "gq_mixed" else _ONES_OF
            allocate(self.model, bits, threads=self.threads)

    def row(self, summary: Mapping[str, Any]) -> Row:
        """Make the row of a finished run from its summary."""
        return {
            "model": self.model,
            "method": self.method,
            "bits": self.bits,
            "steps": self.steps,
            "seed": self.seed,
            "part": self.part,
            **metrics_of(summary),
            "packed_bytes": summary["packed_bytes"],
            "utterance_errors": packed_errors(self.folder),
        }


def allocation_folder(model: str, mean_bits: int) -> Path:
    """Return the folder of an allocation of bits.

    Args:
        model: A key of :data:`STARTS`.
        mean_bits: Largest mean bits of a weight.
    """
    return RUNS / "allocations" / model / str(mean_bits)


def allocate(model: str, mean_bits: int, *, threads: int | None) -> None:
    """Run ``recipes.allocate``: write ``bits.json``, and ``ones.json`` with the tensors of 1 bit.

    Args:
        model: A key of :data:`STARTS`.
        mean_bits: Largest mean bits of a weight.
        threads: Number of CPU threads; None leaves the recipe's own.
    """
    folder = allocation_folder(model, mean_bits)
    run_recipe(
        "recipes.allocate",
        f"ckpt={STARTS[model].weights}",
        f"target_mean_bits={mean_bits}",
        f"run_dir={folder}",
        f"hydra.run.dir={folder}",
        *([] if threads is None else [f"threads={threads}"]),
        log=folder / "run.log",
    )
    bits = BitAllocation.load(folder / "bits.json").bits
    ones = {name: each for name, each in bits.items() if each == 1}
    if not ones:
        raise ValueError(f"at a mean of {mean_bits} bits no tensor of {model} has 1 bit")
    write_whole(folder / "ones.json", json.dumps({"overrides": ones}, indent=1))


def runs(
    *,
    models: Sequence[str] = tuple(STARTS),
    methods: Sequence[str] = (*BASELINES, *COMPARED),
    bits: Sequence[int] = (4, 3, 2, 1),
    steps: Sequence[int] = (STEPS,),
    seeds: Sequence[int] = SEEDS,
    part: str = "test",
    threads: int = 1,
) -> list[LowBitsRun]:
    """List the grid, or a part of it, seed by seed; without training there is one seed.

    Args:
        models: Keys of :data:`STARTS`.
        methods: Keys of :data:`METHODS`.
        bits: Bits of a weight, of the methods that have few.
        steps: Optimizer steps.
        seeds: Seeds of the training.
        part: Part of the corpus that is scored: ``"test"``, or ``"validation"`` to choose settings.
        threads: Number of CPU threads of each run.
    """
    grid = itertools.product(seeds, steps, models, methods)
    return list(
        dict.fromkeys(
            LowBitsRun(model, method, width, budget, seed, part, threads=threads)
            if METHODS[method].trains
            else LowBitsRun(model, method, width, 0, SEEDS[0], part, threads=threads)
            for seed, budget, model, method in grid
            for width in WIDTHS.get(method, bits)
        )
    )


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report."""
    tested = select(rows, part="test")
    return {
        "starts": [
            line(STARTS[row["model"]].title, percent(row["wer"]), interval(row))
            for row in select(tested, method="float")
        ],
        **{
            f"methods_{model}": [
                mean_line(tested, model, method, bits, STEPS)
                for method in (*BASELINES, *COMPARED)
                for bits in _widths(tested, model, method)
            ]
            for model in STARTS
        },
        "budgets": [
            mean_line(tested, model, method, bits, steps)
            for model, bits, method in itertools.product(
                STARTS, (8, 4, 3, 2, 1), (*COMPARED, *PARTS, *EARLY, *COMBINED)
            )
            for steps in BUDGETS[1:]
            if select(tested, model=model, method=method, bits=bits, steps=steps)
        ],
        "from_scratch": from_scratch(tested),
        "combined": combined(tested),
        "parts": parts(rows),
        "checks": checks(tested),
        "runs": [run_line(row) for row in sorted(rows, key=_position)],
    }


def mean_line(
    rows: Sequence[Row], model: str, method: str, bits: int, steps: int, *, own: str = "gq"
) -> str:
    """Format the line of a method: means over seeds, and the difference of our own to it."""
    selected = _selected(rows, model, method, bits, steps)
    compared = _selected(rows, model, own, bits, steps)
    has_change = compared and method not in (own, *BASELINES)
    change = wer_difference(compared, selected) if has_change else None
    budget = [steps] if steps != STEPS else []
    start = [STARTS[model].title] if steps != STEPS else []
    return line(
        *start,
        METHODS[method].title,
        bits,
        *budget,
        len(selected),
        *word_errors(selected),
        f"{mean_loss(selected):.4f}",
        points(change),
        f"{selected[0]['packed_bytes'] / 1e6:.3f} MB",
    )


def from_scratch(rows: Sequence[Row]) -> list[str]:
    """Make the lines of training from random weights."""
    cells = {
        (model, method, row["bits"], row["steps"])
        for model, method in itertools.product(STARTS, FROM_SCRATCH)
        for row in select(rows, model=model, method=method)
    }
    lines = [mean_line(rows, *cell, own="gq_scratch") for cell in sorted(cells)]
    return lines or [line("no run is finished", *[""] * 9)]


def combined(rows: Sequence[Row]) -> list[str]:
    """Make the lines of small networks: differences to float and to GQ, and sizes."""
    rows = [row for row in rows if row["steps"] in (0, STEPS)]
    lines = []
    for model, method in itertools.product(
        STARTS, ("float_tuned", "nna8", "gq", "gq_to_end", *COMBINED)
    ):
        baseline = select(rows, model=model, method="float")
        of_method = select(rows, model=model, method=method)
        for bits in sorted({row["bits"] for row in of_method}, reverse=True):
            selected = select(of_method, bits=bits)
            plain = select(rows, model=model, method="gq_to_end", bits=bits)
            gq = None if method not in COMBINED else wer_difference(selected, plain)
            packed = selected[0]["packed_bytes"]
            lines.append(
                line(
                    STARTS[model].title,
                    METHODS[method].title,
                    bits,
                    len(selected),
                    *word_errors(selected),
                    points(wer_difference(selected, baseline)),
                    points(gq),
                    f"{packed / 1e6:.3f} MB",
                    f"{baseline[0]['packed_bytes'] / packed:.1f}",
                )
            )
    return lines


def parts(rows: Sequence[Row]) -> list[str]:
    """Make the lines of GQ's parts on the validation part, each against the first variant."""
    validated = select(rows, part="validation")
    lines = []
    for model, bits, steps in itertools.product(STARTS, (4, 3, 2, 1), BUDGETS):
        cell = select(validated, model=model, bits=bits, steps=steps)
        own = select(cell, method="gq_to_end")
        for method in ("gq_to_end", "gq", *PARTS, *EARLY, "codebook", *ADDED):
            if not (selected := select(cell, method=method)) or not own:
                continue
            change = None if method == "gq_to_end" else wer_difference(selected, own, "validation")
            lines.append(
                line(
                    STARTS[model].title,
                    METHODS[method].title,
                    bits,
                    steps,
                    len(selected),
                    word_errors(selected)[0],
                    f"{mean_loss(selected):.4f}",
                    points(change),
                )
            )
    return lines


def checks(rows: Sequence[Row]) -> list[str]:
    """Run the acceptance checks: GQ no worse than every other method at each width."""
    lines = []
    for model, bits, steps in itertools.product(STARTS, (4, 3, 2, 1), BUDGETS):
        own = _selected(rows, model, "gq", bits, steps)
        for method in COMPARED:
            if method in ("gq", "lloyd"):
                continue
            others = _selected(rows, model, method, bits, steps)
            change = wer_difference(own, others)
            if change is None:
                continue
            seeds = len({row["seed"] for row in own} & {row["seed"] for row in others})
            verdict = "tied" if change.is_tied else "met" if change.mean < 0 else "missed"
            lines.append(
                f"- {STARTS[model].title}, {bits} bit(s), {steps} steps, {seeds} seed(s): GQ no "
                f"worse than {METHODS[method].title}: {points(change)} points, {verdict}."
            )
    return lines


def run_line(row: Row) -> str:
    """Format the line of one run."""
    return line(
        STARTS[row["model"]].title,
        METHODS[row["method"]].title,
        row["bits"],
        row["steps"],
        row["seed"],
        row["part"],
        percent(row["wer"]),
        interval(row),
        f"{row['loss_per_token']:.4f}",
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot the word error rate over the width, a panel for each start."""
    tested = [row for row in select(rows, part="test") if row["steps"] in (0, STEPS)]
    models = [model for model in STARTS if select(tested, model=model)]
    with saved_figure(path, (4.5 * len(models), 3.8)) as figure:
        panels = figure.subplots(1, len(models), squeeze=False)[0]
        for axes, model in zip(panels, models, strict=True):
            for number, method in enumerate(COMPARED):
                if not (widths := _widths(tested, model, method)):
                    continue
                rates = [_mean_wer(_selected(tested, model, method, b, STEPS)) for b in widths]
                width, color = (2.5, "black") if method == "gq" else (1.2, f"C{number}")
                label = METHODS[method].title
                axes.plot(widths, rates, marker="o", ms=3, label=label, lw=width, color=color)
            for dashes, method in (("-", "float_tuned"), (":", "nna8")):
                if selected := select(tested, model=model, method=method):
                    label = METHODS[method].title
                    axes.axhline(_mean_wer(selected), ls=dashes, color="gray", label=label)
            axes.set(title=STARTS[model].title, xlabel="bits of a weight", xticks=[1, 2, 3, 4, 5])
            if axes.lines:
                axes.set_yscale("log")
                for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                    axis_format("{x:.3g}")
        panels[0].set_ylabel("word error rate, %")
        # One legend: a line may be in one panel alone.
        shown = {line.get_label(): line for axes in panels for line in axes.lines}
        if shown:
            panels[0].legend(list(shown.values()), list(shown), fontsize=7)


def _mean_wer(rows: Sequence[Row]) -> float:
    """Average the word error rate over seeds, in percent."""
    return 100 * spread(row["wer"] for row in rows)[0]


def _selected(rows: Sequence[Row], model: str, method: str, bits: int, steps: int) -> list[Row]:
    """Select the rows of a cell; what is not trained has no steps."""
    trained = METHODS[method].trains
    return select(rows, model=model, method=method, bits=bits, steps=steps if trained else 0)


def _widths(rows: Sequence[Row], model: str, method: str) -> list[int]:
    """List the widths that a method has rows of, with the shortest budget, from large to small."""
    trained = METHODS[method].trains
    selected = select(rows, model=model, method=method, steps=STEPS if trained else 0)
    return sorted({row["bits"] for row in selected}, reverse=True)


def _position(row: Row) -> tuple[str, str, int, int, int, int]:
    order = list(METHODS).index(row["method"])
    return row["part"], row["model"], row["steps"], order, -row["bits"], row["seed"]


STUDY = Study(
    name="low_bits",
    runs=runs,
    report=report,
    plot=plot,
    options={
        "models": axis(STARTS),
        "methods": {**axis(METHODS), "default": [*BASELINES, *COMPARED]},
        "bits": {**axis((8, 5, 4, 3, 2, 1)), "default": [4, 3, 2, 1]},
        "steps": {**axis(BUDGETS), "default": [STEPS]},
        "seeds": axis(SEEDS, is_open=True),
        "part": {"choices": ["test", "validation"], "default": "test"},
        "threads": threads_option(),
    },
    workers=1,
)

if __name__ == "__main__":
    STUDY.main()
