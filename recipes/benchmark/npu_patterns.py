"""Compile layers with zeros for Arm's NPUs: which patterns save cycles, and which cost some?

    python -m recipes.benchmark.npu_patterns              # compile what is missing
    python -m recipes.benchmark.npu_patterns --page-only

The least weights of a random layer, or of the pretrained recognizer of AN4, are zero. Nothing is
trained.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

from lightning_nna import calibrate
from lightning_nna.deploy import VelaReport, export_tflite, vela_report
from lightning_nna.pruning.masks import MatrixLayout
from lightning_nna.pruning.sparsity_pattern import SparsityPattern
from lightning_nna.weights.codebook import Codebook
from lightning_nna.weights.pipeline import WeightGrid
from lightning_nna.weights.selection import Sparsities
from recipes.adapter import Adapter
from recipes.allocate import calibration_of, vela_price
from recipes.benchmark.grid import Run, Study, axis
from recipes.benchmark.recipe_runs import START
from recipes.benchmark.report import Fields, line
from recipes.benchmark.rows import Row, select
from recipes.settings import CONF


@dataclass(frozen=True)
class Layer:
    """A layer and its input.

    Attributes:
        title: Name in tables.
        module: Function that makes it.
        shape: Shape of the input.
    """

    title: str
    module: Callable[[], nn.Module]
    shape: tuple[int, ...]


LAYERS = {
    "linear": Layer("linear, 512 to 512, one row", lambda: nn.Linear(512, 512), (1, 512)),
    "conv1x1": Layer(
        "convolution 1x1, 256 to 256, on 16 x 16",
        lambda: nn.Conv2d(256, 256, 1),
        (1, 256, 16, 16),
    ),
    "conv3x3_16": Layer(
        "convolution 3x3, 64 to 64, on 16 x 16",
        lambda: nn.Conv2d(64, 64, 3, padding=1),
        (1, 64, 16, 16),
    ),
    "conv3x3_32": Layer(
        "convolution 3x3, 64 to 64, on 32 x 32",
        lambda: nn.Conv2d(64, 64, 3, padding=1),
        (1, 64, 32, 32),
    ),
    "lstm": Layer(
        "LSTM, 320 units, one step", lambda: nn.LSTM(320, 320, batch_first=True), (1, 1, 320)
    ),
}
#: Name and title of a whole network: cycles of its layers for an utterance, see :func:`vela_price`.
NETWORK = ("an4_rnnt", "RNN-T of AN4, mean utterance")
#: Accelerators with a system: name in tables, accelerator, system.
TARGETS = {
    "u55": ("U55-128, slow flash", "ethos-u55-128", "Ethos_U55_Deep_Embedded"),
    "u85": ("U85-256, DRAM", "ethos-u85-256", "Ethos_U85_SYS_DRAM_High"),
}
#: Name of a pattern, and the fraction of zeros; the first row is dense.
PATTERNS = {
    "dense": ("unstructured", 0.0),
    "unstructured 50 %": ("unstructured", 0.5),
    "unstructured 80 %": ("unstructured", 0.8),
    "2:4": ("2:4", 0.5),
    "1:4": ("1:4", 0.75),
    "1x16 50 %": ("1x16", 0.5),
    "1x16 80 %": ("1x16", 0.8),
    "16x1 50 %": ("16x1", 0.5),
    "column 50 %": ("column", 0.5),
}
#: Low-bit weights, which are compressed as zeros are: bits by name.
LOW_BITS = {"5 bits": 5, "4 bits": 4, "2 bits": 2}


@dataclass(frozen=True)
class PatternRun(Run):
    """One layer with one pattern of zeros, or with few values, on one accelerator.

    Attributes:
        layer: A key of :data:`LAYERS`.
        target: A key of :data:`TARGETS`.
        pattern: A key of :data:`PATTERNS` or :data:`LOW_BITS`.
    """

    layer: str
    target: str
    pattern: str

    def rows(self) -> Iterator[Row]:
        """Compile, and yield the row."""
        key = {"layer": self.layer, "target": self.target, "pattern": self.pattern}
        if self.layer == NETWORK[0]:
            yield {**key, "cycles": self._cycles_of_network(), "slowed": False}
            return
        report = self._report()
        yield {
            **key,
            "cycles": report.cycles,
            "compute_cycles": report.compute_cycles,
            "encoded_bytes": report.encoded_bytes,
            "weight_bytes": report.weight_bytes,
            "slowed": bool(report.slowed),
        }

    def _report(self) -> VelaReport:
        torch.manual_seed(0)
        layer = LAYERS[self.layer]
        module, x = layer.module(), torch.randn(layer.shape)
        for name, weight in list(module.named_parameters()):
            if weight.ndim > 1:
                self._compress(module, name, weight)
        _, accelerator, system = TARGETS[self.target]
        calibrate(module, [x], spec="ethos-u")
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # What it warns of is a column of the table.
            path = export_tflite(module, [x], Path(folder) / "layer.tflite").path
            return vela_report(path, accelerator=accelerator, system=system)

    @torch.no_grad()
    def _cycles_of_network(self) -> float:
        _, accelerator, system = TARGETS[self.target]
        config, adapter, batches = _recognizer()
        config.accelerator, config.system = accelerator, system
        price = vela_price(adapter, batches, config)
        recognizer = adapter.module
        changed: dict[str, tuple[Tensor, WeightGrid | None]] = {}
        for full_name in Sparsities(0.5, config.targets).of(recognizer):
            weight = recognizer.get_parameter(full_name)
            if self.pattern in LOW_BITS:
                book = Codebook.fit(weight, LOW_BITS[self.pattern])
                changed[full_name] = book.project(weight), book.grid
            else:
                changed[full_name] = self._pruned(recognizer, full_name, weight), None
        return price.together(changed)

    @torch.no_grad()
    def _compress(self, module: nn.Module, name: str, weight: Tensor) -> None:
        if self.pattern in LOW_BITS:
            book = Codebook.fit(weight, LOW_BITS[self.pattern])
            weight.copy_(book.project(weight))
            # One scale for all rows: the largest centroid is in each of them.
            rows = weight.flatten(1)
            rows[:, 0] = float(book.scaled_centroids.abs().max())
            return
        weight.copy_(self._pruned(module, name, weight))

    def _pruned(self, module: nn.Module, name: str, weight: Tensor) -> Tensor:
        """Zero the least weights, where the pattern divides the weight."""
        pattern_name, sparsity = PATTERNS[self.pattern]
        pattern = SparsityPattern.of(pattern_name)
        layout = MatrixLayout.of(module.get_submodule(name.rpartition(".")[0]), weight)
        if not pattern.fits(layout.matrix_shape, layout.channels):
            return weight.detach()
        scores = pattern.importance_scores(layout.to_matrix(weight))
        mask = pattern.mask(scores, sparsity, layout.matrix_shape)
        return weight.detach() * layout.from_matrix(mask)


@functools.cache
def _recognizer() -> tuple[DictConfig, Adapter, list[Any]]:
    """Load the pretrained recognizer, and batches for the length of an utterance."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("allocate", [f"ckpt={START}", "budget=cycles", "batches=2", "run_dir=."])
    return config, *calibration_of(config)


def runs(
    *,
    layers: Sequence[str] = (*LAYERS, NETWORK[0]),
    targets: Sequence[str] = tuple(TARGETS),
    patterns: Sequence[str] = (*PATTERNS, *LOW_BITS),
) -> list[PatternRun]:
    """List the grid, or a part of it.

    Args:
        layers: Keys of :data:`LAYERS`, and that of :data:`NETWORK`.
        targets: Keys of :data:`TARGETS`.
        patterns: Keys of :data:`PATTERNS` and :data:`LOW_BITS`.
    """
    return [
        PatternRun(layer, target, pattern)
        for layer in layers
        for target in targets
        for pattern in patterns
    ]


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report."""
    titles = {**{key: layer.title for key, layer in LAYERS.items()}, NETWORK[0]: NETWORK[1]}
    tables: dict[str, Any] = {}
    for target in TARGETS:
        tables[target] = [
            line(name, *(_cell(rows, layer, target, name) for layer in titles))
            for name in (*PATTERNS, *LOW_BITS)
        ]
    heads = " | ".join(titles.values())
    return {**tables, "heads": heads, "rules": "|".join(["---"] * (1 + len(titles)))}


def _cell(rows: Sequence[Row], layer: str, target: str, pattern: str) -> str:
    """Format cycles, and their ratio to those of the dense layer."""
    found = select(rows, layer=layer, target=target, pattern=pattern)
    dense = select(rows, layer=layer, target=target, pattern="dense")
    if not found or not dense:
        return "-"
    ratio = found[0]["cycles"] / dense[0]["cycles"]
    text = f"{found[0]['cycles']:,.0f} ({ratio:.2f})"
    return f"**{text}**" if found[0]["slowed"] else text


STUDY = Study(
    name="npu_patterns",
    runs=runs,
    report=report,
    options={
        "layers": axis((*LAYERS, NETWORK[0])),
        "targets": axis(TARGETS),
        "patterns": axis((*PATTERNS, *LOW_BITS)),
    },
)

if __name__ == "__main__":
    STUDY.main()
