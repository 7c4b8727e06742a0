"""Compile networks with Vela from .tflite and from .tosa: which has fewer cycles?

    python -m recipes.benchmark.npu_formats           # compile what is missing

A row of ``docs/results/npu_formats.jsonl`` is one network in one format on one accelerator.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lightning_nna.deploy import TFLiteModel, VelaError, export_tflite, export_tosa, vela_report
from lightning_nna.emulation import calibrate
from recipes.benchmark.foreign_vision import VISION
from recipes.benchmark.rows import Row, append_row, has_row, read_rows

#: Networks of MLPerf Tiny.
NETWORKS = ("autoencoder", "ds_cnn", "mobilenet_v1", "resnet8")
ACCELERATORS = ("ethos-u55-128", "ethos-u65-256", "ethos-u85-256")
FORMATS: dict[str, Callable[..., TFLiteModel]] = {"tflite": export_tflite, "tosa": export_tosa}
RESULTS = Path("docs/results/npu_formats.jsonl")


def compile_network(name: str, path: Path = RESULTS) -> None:
    """Compile a network for one input and append the rows that are missing.

    Args:
        name: Name of a network of :data:`.VISION`.
        path: File of the rows.
    """
    network = VISION[name]
    torch.manual_seed(0)
    module = network.module().eval()
    batch = network.batch()
    calibrate(module, [batch], forward=lambda net, x: net(*x), spec="tosa-int8")
    example = [x[:1] for x in batch]
    with TemporaryDirectory() as folder:
        for form, export in FORMATS.items():
            program = Path(folder) / f"network.{form}"
            export(module, example, program)
            for accelerator in ACCELERATORS:
                key = {"network": name, "format": form, "accelerator": accelerator}
                if not has_row(read_rows(path), **key):
                    append_row(path, {**key, **_compiled(program, accelerator)})


def _compiled(program: Path, accelerator: str) -> Row:
    """Return cycles, and the operators on the CPU; or why there is no program."""
    try:
        report = vela_report(program, accelerator=accelerator)
    except VelaError as error:
        return {"error": str(error).replace(str(program), "the program")}
    return {
        "cycles": report.cycles,
        "npu_operators": report.npu_operators,
        "cpu": sorted(set(report.cpu_operators)),
        "encoded_bytes": report.encoded_bytes,
    }


def main() -> None:
    """Compile all networks whose rows are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", type=Path, default=RESULTS, help="file of the rows")
    settings = parser.parse_args()
    for name in NETWORKS:
        compile_network(name, settings.path)


if __name__ == "__main__":
    main()
