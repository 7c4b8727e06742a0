"""Deployment of compressed networks: AN4's RNN-T as programs, on LiteRT and through Vela.

    python -m recipes.benchmark.deployment                  # run what is missing, then report
    python -m recipes.benchmark.deployment --runs /other/runs --seeds 1
    python -m recipes.benchmark.deployment --sizes          # train those of other sizes first, too
    python -m recipes.benchmark.deployment --page-only

Each run is one of ``recipes.deploy`` on a checkpoint of ``recipes.benchmark.compression`` or
``recipes.benchmark.pruning``; a run whose checkpoint is missing is named with the command that
trains it, and left out. Networks of other sizes are trained here, in float like the weights in
``recipes/pretrained`` and then with the budget of the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes.benchmark import compression
from recipes.benchmark.compression import HIGHER_RATE_BITS, RATE_BITS
from recipes.benchmark.grid import Study, axis, threads_option
from recipes.benchmark.recipe_runs import (
    AN4_RNNT,
    RecipeRun,
    compressed,
    summary_of,
    training,
)
from recipes.benchmark.report import Fields, line, met, percent
from recipes.benchmark.rows import Row, read_rows, select

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
TITLES = {
    "nna8": "8 bits, accelerator-aware",
    "codebook": "fixed codebook",
    "codebook_rate": f"fixed codebook, entropy of at most {RATE_BITS} bits",
    "codebook_higher_rate": f"fixed codebook, entropy of at most {HIGHER_RATE_BITS} bits",
    "csp": "CSP",
    "csp_codebook": "CSP and fixed codebook",
}
#: Units of the encoder by model.
SIZES = {"rnnt_small": 256, "rnnt": 320, "rnnt_large": 400}
#: A larger low-bit network, and the smaller one of 8 bits that it is to beat.
PAIRS = (("rnnt_large", "rnnt"), ("rnnt", "rnnt_small"))
#: Fractions of memory and of latency that GQ's paper saved against 8 bits.
MEMORY_SAVED, TIME_SAVED = 0.31, 0.3175
_TARGET_SYSTEM = "Ethos_U55_High_End_Embedded"
_TRAINED_BY = {
    "codebook_rate": (
        *compressed("codebook"),
        "bits=5",
        f"callbacks.codebook.max_entropy_bits={RATE_BITS}",
    ),
    "nna8": compressed("nna8"),
}


@dataclass(frozen=True)
class DeploymentRun(RecipeRun):
    """One trained network on every system.

    Attributes:
        method: A key of :data:`TITLES`.
        bits: Bits of a weight, or ``"mixed"``.
        sparsity: Target fraction of zeros.
        trained: Folder of its training among all runs, without the seed.
        trained_by: Module and options of the study that trains it.
        seed: Seed of the training.
        model: A key of :data:`SIZES`.
        trained_runs: Folder of trained runs.
        trains_sizes: Whether networks of other sizes are trained first.
    """

    method: str
    bits: int | str
    sparsity: float
    trained: str
    trained_by: str
    seed: int = 1
    model: str = "rnnt"
    trained_runs: Path = Path("runs")
    trains_sizes: bool = False

    @property
    def keys(self) -> list[dict[str, Any]]:
        """Values that identify the rows of this run: all systems are measured at once."""
        names = ("model", "method", "bits", "sparsity", "seed")
        return [{name: getattr(self, name) for name in names}]

    @property
    def folder(self) -> Path:
        """Run folder of ``recipes.deploy``."""
        return RUNS / Path(self.trained).name / f"seed{self.seed}"

    @property
    def trained_folder(self) -> Path:
        """Run folder of the training."""
        return self.trained_runs / self.trained / f"seed{self.seed}"

    @property
    def trained_checkpoint(self) -> Path:
        """Weights that are deployed."""
        return self.trained_folder / "checkpoints" / "last.ckpt"

    @property
    def float_folder(self) -> Path:
        """Run folder of the float training of a network of another size."""
        return self.trained_runs / f"an4_{self.model}" / f"seed{self.seed}"

    @property
    def command(self) -> list[str]:
        """Module and overrides of the run."""
        systems = json.dumps([list(system) for system in SYSTEMS]).replace('"', "")
        return [
            "recipes.deploy",
            f"ckpt={self.trained_checkpoint}",
            f"systems={systems}",
            f"hydra.run.dir={self.folder}",
        ]

    @property
    def float_command(self) -> list[str]:
        """Module and overrides that train a network of another size in float."""
        return [
            "recipes.train",
            "experiment=an4_rnnt",
            f"seed={self.seed}",
            f"model.network.encoder_size={SIZES[self.model]}",
            f"name=an4_{self.model}",
            f"hydra.run.dir={self.float_folder}",
        ]

    @property
    def fine_tuning_command(self) -> list[str]:
        """Module and overrides that fine-tune it, emulated, with the budget of the others."""
        return training(
            self.seed,
            self.trained_folder,
            f"model.network.encoder_size={SIZES[self.model]}",
            *_TRAINED_BY[self.method],
            start=replace(AN4_RNNT, weights=self.float_folder / "checkpoints" / "last.ckpt"),
        )

    def rows(self) -> Iterator[Row]:
        """Deploy the network and yield a row for every system; say so if it is not trained."""
        is_resized = self.model != "rnnt"
        if self.trains_sizes and is_resized:
            summary_of(self.float_folder, self.float_command, threads=self.threads)
            summary_of(self.trained_folder, self.fine_tuning_command, threads=self.threads)
        if not self.trained_checkpoint.is_file():
            print(
                f"missing: {self.trained_checkpoint}; train it with python -m {self.trained_by} "
                f"--seeds {self.seed}, or give its folder with --runs"
            )
            return
        summary = summary_of(self.folder, self.command, threads=self.threads)
        float_summary = self.float_folder / "summary.json"
        if is_resized and float_summary.is_file():
            summary["wer_start"] = json.loads(float_summary.read_text())["wer_greedy"]
        yield from self.system_rows(summary)

    def system_rows(self, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Make a row for every system from the summary of the run."""
        metrics = (
            *("wer", "wer_low", "wer_high", "loss_per_token", "tflite_bytes", "real_time_factor"),
            *("equal_outputs", "outputs", "equal_transcripts", "utterances", "threads"),
        )
        estimates = (
            *("accelerator", "system", "memory_mode", "encoded_bytes", "memory_bytes"),
            *("sram_bytes", "inference_ms", "part_ms", "bound", "cpu_operators"),
        )
        return [
            {
                **self.keys[0],
                "corpus": "an4",
                "command": summary["command"],
                "commit": summary["commit"],
                **{name: summary[name] for name in metrics},
                "wer_start": summary.get("wer_start"),
                "wer_float": summary["float"] and summary["float"]["wer"],
                "wer_emulated": summary["emulated"]["wer"],
                **{name: system[name] for name in estimates},
            }
            for system in summary["systems"]
        ]


_COMPRESSION, _PRUNING = "recipes.benchmark.compression", "recipes.benchmark.pruning"
_SIZES = "recipes.benchmark.deployment --sizes"
_ONE_BIT, _HIGHER = compression.SMALL_ONE_BIT, "codebook_higher_rate"
#: Networks of one seed.
NETWORKS = (
    DeploymentRun("nna8", 8, 0.0, "compression/nna8_8", f"{_COMPRESSION} --methods nna8"),
    DeploymentRun(
        "codebook", 5, 0.0, "compression/codebook_5", f"{_COMPRESSION} --methods codebook --bits 5"
    ),
    DeploymentRun(
        "codebook_rate",
        5,
        0.0,
        "compression/codebook_rate_5",
        f"{_COMPRESSION} --methods codebook_rate",
    ),
    DeploymentRun(
        _HIGHER, 5, 0.0, f"compression/{_HIGHER}_5", f"{_COMPRESSION} --methods {_HIGHER}"
    ),
    DeploymentRun(
        "codebook",
        "mixed",
        0.0,
        f"compression/codebook_{_ONE_BIT}",
        f"{_COMPRESSION} --bits {_ONE_BIT}",
    ),
    DeploymentRun("csp", 8, 0.8, "pruning/csp_80", f"{_PRUNING} --methods csp --sparsities 0.8"),
    DeploymentRun(
        "csp_codebook", 5, 0.8, "pruning/csp_5bits_80", f"{_PRUNING} --methods csp_5bits"
    ),
    DeploymentRun(
        "codebook_rate", 5, 0.0, "sizes/rnnt_large_codebook_rate_5", _SIZES, model="rnnt_large"
    ),
    DeploymentRun("nna8", 8, 0.0, "sizes/rnnt_small_nna8_8", _SIZES, model="rnnt_small"),
)


def runs(
    *,
    seeds: Sequence[int] = SEEDS,
    trained: Path = Path("runs"),
    sizes: bool = False,
    threads: int = 1,
) -> list[DeploymentRun]:
    """List the grid, seed by seed.

    Args:
        seeds: Seeds of the trainings.
        trained: Folder of trained runs.
        sizes: Whether networks of other sizes are trained first.
        threads: Number of CPU threads of each run.
    """
    return [
        replace(run, seed=seed, trained_runs=trained, trains_sizes=sizes, threads=threads)
        for seed in seeds
        for run in NETWORKS
    ]


def report(rows: Sequence[Row], *, float_wer: float | None = None) -> Fields:
    """Make the fields of the report.

    Args:
        rows: Rows of networks of all sizes.
        float_wer: Word error rate of the float weights of the model ``rnnt``, greedily.
    """
    rnnt = select(rows, model="rnnt")
    return {
        "accuracy": accuracy_lines(rnnt),
        "checks": checks(rows),
        **{
            bound: [system_line(rnnt, row) for row in rnnt if row["bound"]["encoder"] == bound]
            for bound in ("bandwidth", "computation")
        },
        "pairs": [
            pair_line(row, float_wer if row["model"] == "rnnt" else row.get("wer_start"))
            for pair in _pairs(rows)
            for row in reversed(pair)
        ],
    }


def checks(rows: Sequence[Row]) -> list[str]:
    """Run every acceptance check."""
    lines = []
    if rows:
        outputs, transcripts = (
            min(row[name] for row in rows) for name in ("equal_outputs", "equal_transcripts")
        )
        lines.append(
            f"- Every output of the programs equal to the emulation's in every bit: the smallest "
            f"fraction is {outputs:.6%}, of transcripts {transcripts:.2%}."
        )
    for base in select(rows, model="rnnt", method="nna8", system=_TARGET_SYSTEM):
        lines += _check_saving(rows, base)
    lines += [
        _check_larger(row, base) for row, base in _pairs(rows) if row["system"] == _TARGET_SYSTEM
    ]
    return lines


def _check_saving(rows: Sequence[Row], base: Row) -> list[str]:
    """Check what the best dense network of 5 bits saves against that of 8."""
    key = {"model": "rnnt", "bits": 5, "sparsity": 0.0, "system": _TARGET_SYSTEM}
    candidates = select(rows, seed=base["seed"], **key)
    if not candidates:
        return []
    # Those without loss of WER first; of them, the one that saves most of the scarcer of the two.
    best = max(candidates, key=lambda row: (row["wer"] <= base["wer"], _margin(row, base)))
    memory, time = (_saved(best, base, name) for name in ("memory_bytes", "inference_ms"))
    is_met = best["wer"] <= base["wer"] and _margin(best, base) >= 0
    return [
        f"- At least {MEMORY_SAVED:.0%} of memory and {TIME_SAVED:.2%} of time saved at 5 bits on "
        f"{_TARGET_SYSTEM} without loss of WER, seed {base['seed']}, by the best row, "
        f"*{TITLES[best['method']]}*: {memory:.1%} and {time:.1%}, WER {percent(best['wer'])} "
        f"against {percent(base['wer'])}, {met(is_met)}."
    ]


def _margin(row: Row, base: Row) -> float:
    """Compute by how much the targets of memory and of time are passed: the smaller of both."""
    memory, time = (_saved(row, base, name) for name in ("memory_bytes", "inference_ms"))
    return min(memory - MEMORY_SAVED, time - TIME_SAVED)


def _check_larger(row: Row, base: Row) -> str:
    """Check that a larger low-bit network is no slower than a smaller one of 8 bits, and better."""
    is_met = row["inference_ms"] <= base["inference_ms"] and row["wer"] < base["wer"]
    return (
        f"- A network of {SIZES[row['model']]} units at {row['bits']} bits at least as fast as one "
        f"of {SIZES[base['model']]} at 8 on {_TARGET_SYSTEM}, and better in WER, seed "
        f"{row['seed']}: {row['inference_ms']:.2f} against {base['inference_ms']:.2f} ms for a "
        f"second of speech, WER {percent(row['wer'])} against {percent(base['wer'])}, "
        f"{met(is_met)}."
    )


def accuracy_lines(rows: Sequence[Row]) -> list[str]:
    """Format one line a network: its accuracy does not depend on the system."""
    networks: dict[tuple[object, ...], Row] = {}
    for row in rows:
        networks.setdefault((row["method"], row["bits"], row["sparsity"], row["seed"]), row)
    return [
        line(
            *_network(row),
            row["seed"],
            "-" if row["wer_float"] is None else percent(row["wer_float"]),
            percent(row["wer_emulated"]),
            percent(row["wer"]),
            f"{row['loss_per_token']:.4f}",
            f"{row['equal_outputs']:.4%} of {row['outputs']}",
            f"{round(row['equal_transcripts'] * row['utterances'])} of {row['utterances']}",
            f"{row['tflite_bytes'] / 1e6:.3f} MB",
            f"{row['real_time_factor']:.3f}",
        )
        for row in networks.values()
    ]


def system_line(rows: Sequence[Row], row: Row) -> str:
    """Format Vela's estimates of a network on one system, compared with 8 bits."""
    base = _base(rows, row)
    memory = time = "-"
    if base is not None and row["method"] != "nna8":
        memory, time = (f"{_saved(row, base, n):.1%}" for n in ("memory_bytes", "inference_ms"))
    return line(
        *_network(row),
        row["accelerator"],
        row["system"],
        f"{row['encoded_bytes'] / 1024:.0f}",
        f"{row['memory_bytes'] / 1024:.0f}",
        memory,
        f"{row['part_ms']['encoder']:.3f}",
        f"{row['inference_ms']:.2f}",
        time,
        ", ".join(row["cpu_operators"]) or "none",
    )


def pair_line(row: Row, float_wer: float | None) -> str:
    """Format a network of the comparison of sizes."""
    return line(
        row["system"],
        SIZES[row["model"]],
        TITLES[row["method"]],
        row["bits"],
        row["seed"],
        "-" if float_wer is None else percent(float_wer),
        percent(row["wer"]),
        f"{row['loss_per_token']:.4f}",
        f"{row['tflite_bytes'] / 1e6:.3f} MB",
        f"{row['encoded_bytes'] / 1024:.0f}",
        f"{row['memory_bytes'] / 1024:.0f}",
        f"{row['inference_ms']:.2f}",
    )


def recorded_float_wer() -> float | None:
    """Read the word error rate of the float weights among the results of compression."""
    rows = select(read_rows(compression.STUDY.results), method="float")
    return float(rows[0]["wer"]) if rows else None


def _network(row: Row) -> tuple[str, int | str, str]:
    return TITLES[row["method"]], row["bits"], f"{row['sparsity']:.0%}"


def _pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pair larger networks of 5 bits with the smaller one of 8 on the same system."""
    return [
        (row, base)
        for larger, smaller in PAIRS
        for row in select(rows, model=larger, method="codebook_rate", sparsity=0.0)
        if (base := _base(rows, row, model=smaller)) is not None
    ]


def _base(rows: Sequence[Row], row: Row, *, model: str = "rnnt") -> Row | None:
    """Select a network of 8 bits on the same system."""
    same = {name: row[name] for name in ("seed", "accelerator", "system", "memory_mode")}
    return next(iter(select(rows, model=model, method="nna8", **same)), None)


def _saved(row: Row, base: Row, name: str) -> float:
    return 1.0 - float(row[name]) / float(base[name])


STUDY = Study(
    name="deployment",
    runs=runs,
    report=lambda rows: report(rows, float_wer=recorded_float_wer()),
    options={
        "sizes": {"action": "store_true", "help": "train networks of other sizes"},
        "runs": {"type": Path, "default": Path("runs"), "dest": "trained", "help": "trained runs"},
        "seeds": axis(SEEDS, is_open=True),
        "threads": threads_option(),
    },
)

if __name__ == "__main__":
    STUDY.main()
