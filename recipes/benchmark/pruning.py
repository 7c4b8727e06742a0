"""Zero weights on AN4: every method from the same float weights, with the same budget.

    python -m recipes.benchmark.pruning --workers 2                 # what is missing, then the page
    python -m recipes.benchmark.pruning --seeds 1 --sparsities 0.8  # a part of the grid
    python -m recipes.benchmark.pruning --page-only

The start and the budget are those of ``recipes.benchmark.compression``. A cell that is in
``docs/results/pruning.jsonl`` is not run again, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_nna.checkpoints import load_checkpoint
from recipes.benchmark.fine_tuning import (
    SEEDS,
    evaluation,
    figures_of,
    run_cells,
    summary_of,
    training,
)
from recipes.benchmark.fine_tuning_page import write_page
from recipes.benchmark.pruning_page import draw, page
from recipes.benchmark.rows import append_row, has_row, read_rows

ROWS = Path("docs/results/pruning.jsonl")
RUNS = Path("runs/pruning")
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Method:
    """One way to prune.

    Args:
        title: In tables.
        compression: The configuration group.
        settings: Overrides of the configuration.
        sparsities: That it is run at.
    """

    title: str
    compression: str
    settings: tuple[str, ...] = ()
    sparsities: tuple[float, ...] = SPARSITIES


_PRUNE = "+callbacks.prune"
_BY_LAYER = "callbacks.prune.scope=layer"
METHODS: dict[str, Method] = {
    "float": Method("float", "none", sparsities=(0.0,)),
    "nna8": Method("dense, trained for the chip", "nna8", sparsities=(0.0,)),
    "csp": Method("CSP, activations", "csp"),
    "csp_identity": Method("CSP, identity", "csp", (f"{_PRUNE}.measurement=identity",)),
    "csp_random": Method("CSP, random projections", "csp", (f"{_PRUNE}.measurement=random",)),
    "csp_100": Method("CSP, activations, every 100 steps", "csp", (f"{_PRUNE}.every_n_steps=100",)),
    "csp_unfitted": Method("CSP, survivors as they are", "csp", (f"{_PRUNE}.refit=false",), (0.5,)),
    "csp_layer": Method("CSP, each layer alike", "csp", (_BY_LAYER,), (0.5,)),
    "gmp": Method("gradual magnitude", "gmp"),
    "gmp_global": Method("gradual magnitude, one budget", "gmp", (f"{_PRUNE}.scope=global",)),
    "gmp_global_100": Method(
        "gradual magnitude, one budget, every 100 steps",
        "gmp",
        (f"{_PRUNE}.scope=global", f"{_PRUNE}.every_n_steps=100"),
        (0.5, 0.7, 0.8),
    ),
    "l1": Method("L1, proximal", "l1"),
    "lth": Method(
        "lottery ticket", "lottery", (f"{_PRUNE}.every_n_steps=120", f"{_PRUNE}.freeze_step=0.5")
    ),
    "random": Method("random", "random_pruning", sparsities=(0.5, 0.8)),
    "model_pruning": Method("Lightning's ModelPruning", "model_pruning"),
    "csp_2:4": Method("CSP, 2:4", "csp", ("pattern='2:4'", _BY_LAYER), (0.5,)),
    "gmp_2:4": Method("gradual magnitude, 2:4", "gmp", ("pattern='2:4'",), (0.5,)),
    "csp_1x16": Method("CSP, blocks of 16", "csp", ("pattern=1x16",), (0.5, 0.8)),
    "gmp_1x16": Method("gradual magnitude, blocks of 16", "gmp", ("pattern=1x16",), (0.5, 0.8)),
    "csp_5bits": Method("CSP and 5 bits (GQ)", "csp_gq", ("bits=5",), (0.7, 0.8)),
}


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        method: A key of :data:`METHODS`.
        sparsity: Share of zeros.
        seed: Of the training.
    """

    method: str
    sparsity: float
    seed: int

    @property
    def folder(self) -> Path:
        """Where the run goes."""
        name = self.method.replace(":", "of")
        return RUNS / f"{name}_{round(100 * self.sparsity)}" / f"seed{self.seed}"

    @property
    def command(self) -> list[str]:
        """Module and overrides that run it."""
        method = METHODS[self.method]
        chosen = [f"compression={method.compression}", *method.settings]
        if self.method == "float":
            return evaluation(self.folder, *chosen)
        if method.compression != "nna8":
            chosen.append(f"sparsity={self.sparsity}")
        return training(self.seed, self.folder, *chosen)


def cells(
    *,
    methods: Sequence[str] = tuple(METHODS),
    sparsities: Sequence[float] = (),
    seeds: Sequence[int] = SEEDS,
) -> Iterator[Cell]:
    """The grid, or a part of it, seed by seed."""
    for seed, method in itertools.product(seeds, methods):
        for sparsity in METHODS[method].sparsities:
            if not sparsities or sparsity in sparsities:
                yield Cell(method, sparsity, seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--sparsities", nargs="*", type=float, default=[])
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU for each run")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    options = parser.parse_args(arguments)
    if not options.page_only:
        grid = cells(methods=options.methods, sparsities=options.sparsities, seeds=options.seeds)
        chosen = [cell for cell in grid if not has_row(read_rows(ROWS), **asdict(cell))]
        run_cells(chosen, partial(run_cell, threads=options.threads), workers=options.workers)
    write_page(ROWS, {name: method.title for name, method in METHODS.items()}, page, draw)


def run_cell(cell: Cell, *, threads: int) -> None:
    """Run ``cell`` and append its row."""
    summary = summary_of(cell.folder, cell.command, threads=threads)
    checkpoint = cell.folder / "checkpoints" / "last.ckpt"
    held = load_checkpoint(checkpoint) if checkpoint.exists() else {}
    kept = kept_by_tensor(held) if held else {}
    row = {
        "corpus": "an4",
        "model": "rnnt",
        **asdict(cell),
        "bits": 5 if cell.method == "csp_5bits" else 8,
        "zeros": share_of_zeros(kept, held.get("state_dict", {})),
        **figures_of(summary),
        "packed_bytes": packed_bytes(
            kept, bits=5 if cell.method == "csp_5bits" else 8, parameters=summary["parameters"]
        ),
    }
    append_row(ROWS, row)


def kept_by_tensor(checkpoint: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Weights that are kept, and all weights, by tensor; none where nothing is pruned.

    Args:
        checkpoint: Of a run: masks are in the state of a callback; Lightning's own pruning leaves
            zeros in the weights.
    """
    masks = {
        name: held["mask"]
        for state in checkpoint["callbacks"].values()
        if isinstance(state, Mapping) and "masks" in state
        for name, held in state["masks"].items()
    }
    if not masks:
        weights = {name: x != 0 for name, x in checkpoint["state_dict"].items() if x.ndim > 1}
        masks = {name: kept for name, kept in weights.items() if not kept.all()}
    return {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}


def share_of_zeros(kept: Mapping[str, tuple[int, int]], state: Mapping[str, torch.Tensor]) -> float:
    """Share of zeros in all matrices of a network, pruned or not.

    Args:
        kept: Kept and all weights of each pruned tensor.
        state: Of the network.

    Example:
        >>> share_of_zeros({"a": (1, 4)}, {"a": torch.ones(1, 4), "b": torch.ones(2, 1)})
        0.5
    """
    matrices = sum(x.numel() for x in state.values() if x.ndim > 1)
    return sum(whole - some for some, whole in kept.values()) / max(matrices, 1)


def packed_bytes(kept: Mapping[str, tuple[int, int]], *, bits: int, parameters: int) -> int:
    """Size of a network: a bit a weight and the kept ones in ``bits``, or all in ``bits``.

    Args:
        kept: Kept and all weights of each pruned tensor.
        bits: Of a kept weight; below 8 with a byte for each value.
        parameters: Of the network; what is not pruned takes 8 bits.

    Example:
        >>> packed_bytes({"weight": (20, 100)}, bits=8, parameters=110)
        47
    """
    size = parameters - sum(whole for _, whole in kept.values())
    for some, whole in kept.values():
        masked = -(-whole // 8) + -(-some * bits // 8)
        size += min(masked, -(-whole * bits // 8)) + (2**bits if bits < 8 else 0) + 4
    return size


if __name__ == "__main__":
    main()
