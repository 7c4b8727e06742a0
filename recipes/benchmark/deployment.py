"""What compression is worth on the chip: AN4's RNN-T as programs, on LiteRT and through Vela.

    python -m recipes.benchmark.deployment                  # what is missing, then the page
    python -m recipes.benchmark.deployment --runs /other/runs --seeds 1
    python -m recipes.benchmark.deployment --sizes          # and train those of other sizes first
    python -m recipes.benchmark.deployment --page-only

Every cell is one run of ``recipes.deploy`` on a checkpoint of ``recipes.benchmark.compression`` or
``recipes.benchmark.pruning``, which train it; a cell whose checkpoint is missing is named with the
command that makes it, and left out. Networks of other sizes are trained here, in float like the
weights in ``recipes/pretrained`` and then with the budget of the others; a run that was stopped
goes on. A cell that is in ``docs/results/deployment.jsonl`` is not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_nna.files import write_whole
from recipes.benchmark.compression import RATE_BITS
from recipes.benchmark.compression import ROWS as COMPRESSION_ROWS
from recipes.benchmark.deployment_page import SIZES, page
from recipes.benchmark.fine_tuning import summary_of, training
from recipes.benchmark.rows import append_row, has_row, read_rows, select

ROWS = Path("docs/results/deployment.jsonl")
RUNS = Path("runs/deployment")
SEEDS = (1,)
#: Accelerator, system and memory mode: weights in flash, and in DRAM.
SYSTEMS = (
    ("ethos-u55-128", "Ethos_U55_High_End_Embedded", "Shared_Sram"),
    ("ethos-u55-128", "Ethos_U55_Deep_Embedded", "Shared_Sram"),
    ("ethos-u65-256", "Ethos_U65_Embedded", "Shared_Sram"),
    ("ethos-u65-256", "Ethos_U65_High_End", "Dedicated_Sram"),
    ("ethos-u85-256", "Ethos_U85_SYS_Flash_High", "Shared_Sram"),
    ("ethos-u85-256", "Ethos_U85_SYS_DRAM_High", "Dedicated_Sram"),
)


@dataclass(frozen=True)
class Cell:
    """One trained network.

    Attributes:
        method: That chose its weights.
        bits: Of a weight, or ``"mixed"``.
        sparsity: Share of zeros that was asked for.
        trained: Folder of its run among all runs.
        trained_by: What trains it.
        seed: Of the training.
        model: ``"rnnt"`` or, with an encoder of another size, another of ``SIZES``.
    """

    method: str
    bits: int | str
    sparsity: float
    trained: str
    trained_by: str
    seed: int = 1
    model: str = "rnnt"

    @property
    def key(self) -> dict[str, Any]:
        """What its rows have and no others."""
        names = ("model", "method", "bits", "sparsity", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def folder(self) -> Path:
        """Where the run of ``recipes.deploy`` goes."""
        return RUNS / Path(self.trained).name / f"seed{self.seed}"

    def checkpoint(self, runs: Path) -> Path:
        """The weights, in a folder of runs."""
        return runs / self.trained / f"seed{self.seed}" / "checkpoints" / "last.ckpt"

    def command(self, runs: Path) -> list[str]:
        """Module and overrides that deploy it."""
        systems = json.dumps([list(system) for system in SYSTEMS]).replace('"', "")
        return [
            "recipes.deploy",
            f"ckpt={self.checkpoint(runs)}",
            f"systems={systems}",
            f"hydra.run.dir={self.folder}",
        ]


_COMPRESSION, _PRUNING = "recipes.benchmark.compression", "recipes.benchmark.pruning"
_SIZES = "recipes.benchmark.deployment --sizes"
CELLS = (
    Cell("nna8", 8, 0.0, "compression/nna8_8", f"{_COMPRESSION} --methods nna8"),
    Cell("gq", 5, 0.0, "compression/gq_5", f"{_COMPRESSION} --methods gq --bits 5"),
    Cell("gq_rate", 5, 0.0, "compression/gq_rate_5", f"{_COMPRESSION} --methods gq_rate"),
    Cell(
        "gq_higher_rate",
        5,
        0.0,
        "compression/gq_higher_rate_5",
        f"{_COMPRESSION} --methods gq_higher_rate",
    ),
    Cell(
        "gq", "mixed", 0.0, "compression/gq_small_one_bit", f"{_COMPRESSION} --bits small_one_bit"
    ),
    Cell("csp", 8, 0.8, "pruning/csp_80", f"{_PRUNING} --methods csp --sparsities 0.8"),
    Cell("csp_gq", 5, 0.8, "pruning/csp_5bits_80", f"{_PRUNING} --methods csp_5bits"),
    Cell("gq_rate", 5, 0.0, "sizes/rnnt_large_gq_rate_5", _SIZES, model="rnnt_large"),
    Cell("nna8", 8, 0.0, "sizes/rnnt_small_nna8_8", _SIZES, model="rnnt_small"),
)
_TRAINED_BY = {
    "gq_rate": ("compression=gq", "bits=5", f"callbacks.gq.max_entropy_bits={RATE_BITS}"),
    "nna8": ("compression=nna8",),
}


def cells(*, seeds: Sequence[int] = SEEDS) -> Iterator[Cell]:
    """The grid, seed by seed."""
    for seed in seeds:
        for cell in CELLS:
            yield Cell(**{**vars(cell), "seed": seed})


def main(arguments: Sequence[str] | None = None) -> None:
    """Deploy what is there and not done yet, say what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    parser.add_argument("--sizes", action="store_true", help="train networks of other sizes")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of trained runs")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU for each run")
    options = parser.parse_args(arguments)
    if not options.page_only:
        for cell in cells(seeds=options.seeds):
            if options.sizes and cell.model != "rnnt":
                train_other_size(cell, options.runs, threads=options.threads)
            if not run_cell(cell, options.runs, threads=options.threads):
                print(
                    f"missing: {cell.checkpoint(options.runs)}; train it with python -m "
                    f"{cell.trained_by} --seeds {cell.seed}, or give its folder with --runs"
                )
    start = select(read_rows(COMPRESSION_ROWS), method="float")
    write_whole(
        ROWS.with_suffix(".md"),
        page(read_rows(ROWS), float_wer=float(start[0]["wer"]) if start else None),
    )


def float_command(cell: Cell, runs: Path) -> list[str]:
    """Module and overrides that train a network of another size in float."""
    return [
        "recipes.train",
        "experiment=an4_rnnt",
        f"seed={cell.seed}",
        f"model.network.encoder_size={SIZES[cell.model]}",
        f"name=an4_{cell.model}",
        f"hydra.run.dir={_float_folder(cell, runs)}",
    ]


def fine_tuning_command(cell: Cell, runs: Path) -> list[str]:
    """Module and overrides that train it on for the chip, as the others are."""
    return training(
        cell.seed,
        runs / cell.trained / f"seed{cell.seed}",
        f"model.network.encoder_size={SIZES[cell.model]}",
        *_TRAINED_BY[cell.method],
        start=_float_folder(cell, runs) / "checkpoints" / "last.ckpt",
    )


def train_other_size(cell: Cell, runs: Path, *, threads: int) -> None:
    """Train what is missing of a network of another size, unless it has been deployed.

    Args:
        cell: The network.
        runs: Folder of trained runs.
        threads: Of the CPU.

    Raises:
        RuntimeError: If a run fails; it goes on the next time.
    """
    if not has_row(read_rows(ROWS), **cell.key):
        summary_of(_float_folder(cell, runs), float_command(cell, runs), threads=threads)
        folder = runs / cell.trained / f"seed{cell.seed}"
        summary_of(folder, fine_tuning_command(cell, runs), threads=threads)


def _float_folder(cell: Cell, runs: Path) -> Path:
    return runs / f"an4_{cell.model}" / f"seed{cell.seed}"


def run_cell(cell: Cell, runs: Path, *, threads: int) -> bool:
    """Deploy a network unless it has been; False if it is not there.

    Args:
        cell: The network.
        runs: Folder of trained runs.
        threads: Of the CPU.

    Raises:
        RuntimeError: If the run fails; its output is in ``run.log`` of its folder.
    """
    if has_row(read_rows(ROWS), **cell.key):
        return True
    if not cell.checkpoint(runs).is_file():
        return False
    summary = summary_of(cell.folder, cell.command(runs), threads=threads)
    start = _float_folder(cell, runs) / "summary.json"
    if cell.model != "rnnt" and start.is_file():
        summary["wer_start"] = json.loads(start.read_text())["wer_greedy"]
    for row in rows_of(cell, summary):
        append_row(ROWS, row)
    return True


def rows_of(cell: Cell, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for every system."""
    kept = (
        *("wer", "wer_low", "wer_high", "loss_per_token", "tflite_bytes", "real_time_factor"),
        *("equal_outputs", "outputs", "equal_transcripts", "utterances", "threads"),
    )
    systems = (
        *("accelerator", "system", "memory_mode", "encoded_bytes", "memory_bytes"),
        *("sram_bytes", "inference_ms", "part_ms", "bound", "cpu_operators"),
    )
    return [
        {
            **cell.key,
            "corpus": "an4",
            "command": summary["command"],
            "commit": summary["commit"],
            **{name: summary[name] for name in kept},
            "wer_start": summary.get("wer_start"),
            "wer_float": summary["float"] and summary["float"]["wer"],
            "wer_emulated": summary["emulated"]["wer"],
            **{name: report[name] for name in systems},
        }
        for report in summary["systems"]
    ]


if __name__ == "__main__":
    main()
