"""Weights of few bits on AN4: every method from the same float weights, with the same budget.

    python -m recipes.benchmark.compression --workers 2          # what is missing, then the page
    python -m recipes.benchmark.compression --seeds 1 --bits 2   # a part of the grid
    python -m recipes.benchmark.compression --page-only

Every cell is one run of ``recipes.train`` (from ``recipes/pretrained/an4_rnnt.safetensors``, on the
chip, with the settings of ``experiment=an4_rnnt_finetune``) or of ``recipes.evaluate`` (rounding
without training). A cell that is in ``docs/results/compression.jsonl`` is not run again, and a run
that was stopped goes on. PARQ needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning_nna.weights.selection import matches_path
from recipes.benchmark.compression_page import draw, page
from recipes.benchmark.fine_tuning import (
    SEEDS,
    START,
    evaluation,
    figures_of,
    run,
    run_cells,
    summary_of,
    training,
)
from recipes.benchmark.fine_tuning_page import write_page
from recipes.benchmark.rows import append_row, has_row, read_rows
from recipes.weights import load_weights

ROWS = Path("docs/results/compression.jsonl")
RUNS = Path("runs/compression")
BITS = (5, 4, 3, 2)
#: Mixed allocations by their place in the grid: what is asked of ``recipes.allocate``. With all
#: widths to choose from, 4 bits in the mean need no tensor of 1 bit.
MIXED, ONE_BIT = "mixed", "one_bit"
ALLOCATIONS = {
    MIXED: ("target_mean_bits=4",),
    ONE_BIT: ("target_mean_bits=3.6", "candidates=[1,4,5,8]"),
}
#: One that is given: 4 bits but for the tensor that 1 bit costs least.
SMALL_ONE_BIT = "small_one_bit"
_SMALLEST_COST = {"model.predictor.lstm.weight_ih_l0": 1}


@dataclass(frozen=True)
class Method:
    """One way to get few bits.

    Args:
        title: In tables.
        compression: The configuration group.
        trains: Whether the weights are trained; else they are rounded.
        settings: Overrides of the configuration.
        widths: Bits that it is run at.
    """

    title: str
    compression: str
    trains: bool = True
    settings: tuple[str, ...] = ()
    widths: tuple[int | str, ...] = BITS


_GQ = "callbacks.gq"
#: Entropies of a 5-bit weight: one that saves a third of memory and time on the chip with a margin,
#: and one that saves hardly more than a third.
RATE_BITS, HIGHER_RATE_BITS = 4.25, 4.4
METHODS: dict[str, Method] = {
    "float": Method("float", "none", trains=False, widths=(32,)),
    "float_tuned": Method("float, trained on", "none", widths=(32,)),
    "chip": Method("8 bits, untrained", "nna8", trains=False, widths=(8,)),
    "nna8": Method("8 bits, chip-aware", "nna8", widths=(8,)),
    "rtn": Method("rounded, uniform levels", "ste", trains=False),
    "lloyd": Method("rounded, Lloyd-Max", "s8bqat", trains=False, widths=(*BITS, MIXED)),
    "ste": Method("straight-through, uniform", "ste"),
    "lsq": Method("LSQ", "lsq", widths=(*BITS, MIXED)),
    "parq": Method("PARQ (torchao)", "parq"),
    "s8bqat": Method("S8BQAT", "s8bqat"),
    "gq": Method("General Quantizer", "gq", widths=(*BITS, MIXED, ONE_BIT, SMALL_ONE_BIT)),
    "gq_rate": Method(
        f"GQ, entropy of at most {RATE_BITS} bits",
        "gq",
        settings=(f"{_GQ}.max_entropy_bits={RATE_BITS}",),
        widths=(5,),
    ),
    "gq_higher_rate": Method(
        f"GQ, entropy of at most {HIGHER_RATE_BITS} bits",
        "gq",
        settings=(f"{_GQ}.max_entropy_bits={HIGHER_RATE_BITS}",),
        widths=(5,),
    ),
    "mracos_only": Method(
        "S8BQAT, compressed at the end only",
        "s8bqat",
        settings=("callbacks.hard.start_step=1.0",),
        widths=(2,),
    ),
    "hard_only": Method(
        "S8BQAT without MRACos",
        "s8bqat",
        settings=("callbacks.mracos.strength=0.0",),
        widths=(2,),
    ),
    "gq_trained": Method(
        "GQ, trained centroids",
        "gq",
        settings=(
            f"{_GQ}.train_centroids=true",
            f"+{_GQ}.centroid_lr={{start: 1.0e-4, end: 0.0}}",
        ),
        widths=(4, 2),
    ),
    "gq_annealed": Method(
        "GQ, soft and annealed up to 40 %, soft gradient",
        "gq",
        settings=(
            f"{_GQ}.hard_from=0.4",
            f"{_GQ}.sharpness={{start: 1.0, end: 16.0, until: 0.4, shape: geometric}}",
            f"{_GQ}.gradient_sharpness=2.0",
        ),
        widths=(4, 2),
    ),
    "gq_soft_gradient": Method(
        "GQ, soft gradient", "gq", settings=(f"{_GQ}.gradient_sharpness=1.0",), widths=(2,)
    ),
    "gq_no_zero": Method(
        "GQ, no value pinned at zero", "gq", settings=(f"{_GQ}.pin_zero=false",), widths=(3, 2)
    ),
    "gq_mu15": Method(
        "GQ, µ = 15, no value pinned at zero",
        "gq",
        settings=(f"{_GQ}.mu=15.0", f"{_GQ}.pin_zero=false"),
        widths=(*BITS, MIXED),
    ),
    "gq_mu255": Method("GQ, µ = 255", "gq", settings=(f"{_GQ}.mu=255.0",), widths=(2,)),
}


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        method: A key of :data:`METHODS`.
        bits: Of every weight, or a name of a mixed allocation.
        seed: Of the training.
    """

    method: str
    bits: int | str
    seed: int

    @property
    def folder(self) -> Path:
        """Where the run goes."""
        return RUNS / f"{self.method}_{self.bits}" / f"seed{self.seed}"

    @property
    def allocation(self) -> Path:
        """Bits by tensor of a mixed allocation."""
        return RUNS / "allocation" / str(self.bits) / "bits.json"

    @property
    def command(self) -> list[str]:
        """Module and overrides that run it."""
        method = METHODS[self.method]
        chosen = [f"compression={method.compression}", *method.settings]
        if self.bits in ALLOCATIONS:
            chosen += ["bits=8", f"bit_overrides={self.allocation}"]
        elif self.bits == SMALL_ONE_BIT:
            pairs = ", ".join(f"{name}: {bits}" for name, bits in _SMALLEST_COST.items())
            chosen += ["bits=4", f"+bit_overrides={{{pairs}}}"]
        elif method.compression not in ("none", "nna8"):
            chosen.append(f"bits={self.bits}")
        if not method.trains:
            return evaluation(self.folder, *chosen)
        return training(self.seed, self.folder, *chosen)


def cells(
    *,
    methods: Sequence[str] = tuple(METHODS),
    bits: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
) -> Iterator[Cell]:
    """The grid, or a part of it, seed by seed; what is not trained has one."""
    for seed, method in itertools.product(seeds, methods):
        if not METHODS[method].trains and seed != SEEDS[0]:
            continue
        for width in METHODS[method].widths:
            if not bits or str(width) in bits:
                yield Cell(method, width, seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--bits", nargs="*", default=[], help="2 to 8, or mixed, one_bit; all if left out"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU for each run")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    options = parser.parse_args(arguments)
    if not options.page_only:
        chosen = [
            cell
            for cell in cells(methods=options.methods, bits=options.bits, seeds=options.seeds)
            if not has_row(read_rows(ROWS), **asdict(cell))
        ]
        for cell in chosen:
            if cell.bits in ALLOCATIONS and not cell.allocation.exists():
                allocate(cell, threads=options.threads)
        run_cells(chosen, partial(run_cell, threads=options.threads), workers=options.workers)
    write_page(ROWS, {name: method.title for name, method in METHODS.items()}, page, draw)


def allocate(cell: Cell, *, threads: int) -> None:
    """Measure the bits by tensor of a mixed allocation."""
    run(
        "recipes.allocate",
        f"ckpt={START}",
        *ALLOCATIONS[str(cell.bits)],
        f"hydra.run.dir={cell.allocation.parent}",
        f"threads={threads}",
        log=cell.allocation.parent / "run.log",
    )


def run_cell(cell: Cell, *, threads: int) -> None:
    """Run ``cell`` and append its row."""
    append_row(ROWS, row_of(cell, summary_of(cell.folder, cell.command, threads=threads)))


def row_of(cell: Cell, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a finished run."""
    shapes = {name: x.shape for name, x in load_weights(START).network.items()}
    widths, others = {}, cell.bits
    if cell.bits in ALLOCATIONS:
        widths = json.loads(cell.allocation.read_text())["overrides"]
    elif cell.bits == SMALL_ONE_BIT:
        widths, others = _SMALLEST_COST, 4
    bits = {
        name: next((b for p, b in widths.items() if matches_path(p, f"model.{name}")), others)
        for name, shape in shapes.items()
        if len(shape) >= 2
    }
    counts = {name: shape.numel() for name, shape in shapes.items()}
    total = sum(counts[name] for name in bits)
    return {
        "seed": cell.seed,
        "corpus": "an4",
        "model": "rnnt",
        "method": cell.method,
        "bits": cell.bits,
        "mean_bits": sum(int(b) * counts[name] for name, b in bits.items()) / total,
        "one_bit_tensors": sorted(name for name, b in bits.items() if b == 1),
        "sparsity": 0.0,
        **figures_of(summary),
        "packed_bytes": packed_bytes(counts, bits),
    }


def packed_bytes(counts: Mapping[str, int], bits: Mapping[str, int | str]) -> int:
    """Size of a network: indices, a byte for each level, a scale a tensor, vectors in 32 bits.

    Args:
        counts: Numbers by tensor.
        bits: Of the tensors that are no vectors; 8 and more have no levels to be stored.

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


if __name__ == "__main__":
    main()
