"""AN4's recognizers as programs on every runtime: the RNN-T and the Conformer, compressed.

    python -m recipes.benchmark.recognizers                  # run what is missing, then report
    python -m recipes.benchmark.recognizers --models rnnt --specs tflm-int8
    python -m recipes.benchmark.recognizers --page-only

A network is trained for TFLite-Micro, and deployed there as it was trained. For the other runtimes
the same weights get new ranges. The Conformer's float weights are trained first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.benchmark.grid import Study, axis, threads_option
from recipes.benchmark.recipe_runs import BUDGET, START, RecipeRun, summary_of
from recipes.benchmark.report import Fields, line, percent
from recipes.benchmark.rows import Row, select

RUNS = Path("runs/recognizers")
TRAINED_FOR = "tflm-int8"
SYSTEM = ("ethos-u55-128", "Ethos_U55_High_End_Embedded", "Shared_Sram")
ELEMENTARY = "tflm-int8 elementary"
#: Overrides by name of a row's spec.
SPECS = {
    TRAINED_FOR: f"nna={TRAINED_FOR}",
    ELEMENTARY: "nna.spec={preset:tflm-int8,lstm:elementary}",
    "tosa-int8": "nna=tosa-int8",
    "litert-int8": "nna=litert-int8",
}
MODELS = {"rnnt": "RNN-T", "conformer": "Conformer"}
#: Overrides, bits, zeros and title by method.
METHODS: dict[str, tuple[tuple[str, ...], int, float, str]] = {
    "nna8": (("compression=nna8",), 8, 0.0, "8 bits"),
    "codebook": (("compression=codebook", "bits=4"), 4, 0.0, "fixed codebook"),
    "csp_codebook": (
        ("compression=csp_codebook", "bits=4", "sparsity=0.8"),
        4,
        0.8,
        "CSP and fixed codebook",
    ),
}
#: Float weights that the fine-tuning starts from.
STARTS = {"rnnt": START, "conformer": Path("runs/an4_conformer/seed1/checkpoints/last.ckpt")}


@dataclass(frozen=True)
class RecognizerRun(RecipeRun):
    """One trained network on one runtime.

    Attributes:
        model: A key of :data:`MODELS`.
        method: A key of :data:`METHODS`.
        spec: A key of :data:`SPECS`.
    """

    model: str
    method: str
    spec: str

    @property
    def folder(self) -> Path:
        """Run folder of ``recipes.deploy``."""
        return RUNS / f"{self.model}_{self.method}" / self.spec.replace(" ", "_")

    @property
    def trained_folder(self) -> Path:
        """Run folder of the training, which the runs of all runtimes share."""
        return RUNS / f"{self.model}_{self.method}" / "trained"

    @property
    def training_command(self) -> list[str]:
        """Module and overrides of the fine-tuning."""
        return [
            "recipes.train",
            f"experiment=an4_{self.model}_finetune",
            "seed=1",
            f"init_from={STARTS[self.model]}",
            *BUDGET,
            "trainer.limit_val_batches=0",
            "beam_width=1",
            f"nna={TRAINED_FOR}",
            *METHODS[self.method][0],
            f"hydra.run.dir={self.trained_folder}",
        ]

    @property
    def command(self) -> list[str]:
        """Module and overrides of the deployment."""
        if self.spec == TRAINED_FOR:
            settings = ["target=tflm", f"systems=[[{','.join(SYSTEM)}]]"]
        else:
            settings = ["recalibrate=true", SPECS[self.spec], "systems=[]"]
        return [
            "recipes.deploy",
            f"ckpt={self.trained_folder / 'checkpoints' / 'last.ckpt'}",
            *settings,
            f"hydra.run.dir={self.folder}",
        ]

    def prepare(self) -> None:
        """Train the float weights of the Conformer, and the network."""
        start = STARTS[self.model]
        if not start.exists():
            folder = start.parents[1]
            float_training = ["recipes.train", f"experiment=an4_{self.model}", "seed=1"]
            command = [*float_training, f"hydra.run.dir={folder}"]
            summary_of(folder, command, threads=self.threads)
        summary_of(self.trained_folder, self.training_command, threads=self.threads)

    def rows(self) -> Iterator[Row]:
        """Deploy the network and yield its row."""
        summary = summary_of(self.folder, self.command, threads=self.threads)
        metrics = (
            *("wer", "wer_low", "wer_high", "loss_per_token", "tflite_bytes", "runtime", "words"),
            *("equal_outputs", "outputs", "equal_transcripts", "utterances", "commit", "command"),
        )
        yield {
            **self.keys[0],
            **(_sizes_on_a_microcontroller(summary) if summary["firmware"] else {}),
            "bits": METHODS[self.method][1],
            "sparsity": METHODS[self.method][2],
            "wer_float": summary["float"]["wer"],
            "wer_emulated": summary["emulated"]["wer"],
            **{name: summary.get(name) for name in metrics},
        }


def _sizes_on_a_microcontroller(summary: Mapping[str, Any]) -> dict[str, int]:
    """Add up the three programs' bytes; Vela's are those of the one system."""
    sizes = ("plain_flash_bytes", "flash_bytes", "plain_arena_bytes", "arena_bytes")
    (system,) = summary["systems"]
    return {
        **{size: sum(part[size] for part in summary["firmware"].values()) for size in sizes},
        "encoded_bytes": system["encoded_bytes"],
    }


def runs(
    *,
    models: Sequence[str] = tuple(MODELS),
    methods: Sequence[str] = tuple(METHODS),
    specs: Sequence[str] = tuple(SPECS),
    threads: int = 1,
) -> list[RecognizerRun]:
    """List the grid; the LSTM of elementary operators is the RNN-T's alone.

    Args:
        models: Keys of :data:`MODELS`.
        methods: Keys of :data:`METHODS`.
        specs: Keys of :data:`SPECS`.
        threads: Number of CPU threads of each run.
    """
    return [
        RecognizerRun(model, method, spec, threads=threads)
        for spec in specs
        for method in methods
        for model in models
        if (model, spec) != ("conformer", ELEMENTARY)
    ]


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report."""
    ordered = [
        row
        for model in MODELS
        for method in METHODS
        for spec in SPECS
        for row in select(rows, model=model, method=method, spec=spec)
    ]
    outputs = sum(int(row["outputs"]) for row in rows)
    equal = sum(round(row["outputs"] * row["equal_outputs"]) for row in rows)
    return {
        "networks": [network_line(row) for row in ordered],
        "total": f"{equal:,} of {outputs:,}",
        "firmware": [firmware_line(row) for row in ordered if "flash_bytes" in row],
    }


def firmware_line(row: Row) -> str:
    """Format what a network takes on a microcontroller."""
    saved = 1 - row["flash_bytes"] / row["plain_flash_bytes"]
    return line(
        MODELS[row["model"]],
        METHODS[row["method"]][3],
        row["bits"],
        f"{row['sparsity']:.0%}",
        f"{row['plain_flash_bytes']:,}",
        f"{row['flash_bytes']:,}",
        f"{saved:.1%}",
        f"{row['plain_arena_bytes']:,}",
        f"{row['arena_bytes']:,}",
        f"{row['encoded_bytes']:,}",
    )


def network_line(row: Row) -> str:
    """Format the row of a network on a runtime."""
    spec, _, form = str(row["spec"]).partition(" ")
    equal = round(row["outputs"] * row["equal_outputs"])
    transcripts = round(row["equal_transcripts"] * row["utterances"])
    cells: list[Any] = [
        MODELS[row["model"]],
        METHODS[row["method"]][3],
        row["bits"],
        f"{row['sparsity']:.0%}",
        f"`{spec}`" + (", LSTM of elementary operators" if form else ""),
        row["runtime"],
        percent(row["wer_float"]),
        percent(row["wer_emulated"]),
        f"{percent(row['wer'])} ({percent(row['wer_low'])} to {percent(row['wer_high'])})",
        f"{equal:,} of {row['outputs']:,}",
        f"{transcripts} of {row['utterances']}",
        f"{row['tflite_bytes'] / 1e6:.3f} MB",
    ]
    return line(*cells)


STUDY = Study(
    name="recognizers",
    runs=runs,
    report=report,
    options={
        "models": axis(MODELS),
        "methods": axis(METHODS),
        "specs": axis(SPECS),
        "threads": threads_option(),
    },
)

if __name__ == "__main__":
    STUDY.main()
