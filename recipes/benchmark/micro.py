"""Bytes of flash and RAM on a microcontroller, of networks with few bits or many zeros.

    python -m recipes.benchmark.micro               # run what is missing, then report
    python -m recipes.benchmark.micro --page-only

Each network of MLPerf Tiny is trained emulated for some steps on noise with a weight method, and
exported with constants that TFLite-Micro decodes. A row is one network with one method.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nna.callbacks import CompressedSensingPruning, GeneralQuantizer, NNAEmulation
from lightning_nna.deploy import MicroExport, export_micro, export_tflite, vela_report
from lightning_nna.testing.tiny_networks import TINY_NETWORKS
from recipes.benchmark.grid import Run, Study, axis, threads_option
from recipes.benchmark.report import Fields, line
from recipes.benchmark.rows import Row, select

NETWORKS = {
    "keyword_spotting": "DS-CNN, keyword spotting",
    "image_classification": "ResNet8, 32 x 32",
    "anomaly_detection": "autoencoder, anomaly detection",
}
ACCELERATOR = "ethos-u55-128"
SPEC = "tflm-int8"
STEPS, BATCH, VECTORS = 24, 8, 8


@dataclass(frozen=True)
class Method:
    """A weight method.

    Attributes:
        title: Name in tables.
        make: Function of the network that returns its callbacks.
    """

    title: str
    make: Callable[[nn.Module], list[Callback]]


def _gq(bits: int) -> Method:
    title = f"GQ, {bits} bits" if bits > 1 else "GQ, 1 bit"
    return Method(title, lambda network: [GeneralQuantizer(bits)])


def _gq_by_channel(bits: int) -> Method:
    """Return the method with centroids of each channel, where it has as many weights."""

    def make(network: nn.Module) -> list[Callback]:
        weights = {n: p for n, p in network.named_parameters() if p.ndim > 1}
        small = [name for name, weight in weights.items() if weight[0].numel() < 2**bits]
        both: list[Callback] = [
            GeneralQuantizer(
                bits,
                codebook="per_channel",
                granularity="per_channel",
                targets=[name for name in weights if name not in small],
            )
        ]
        if small:
            both.append(GeneralQuantizer(bits, targets=small))
        return both

    return Method(f"GQ, {bits} bits, by channel", make)


METHODS: dict[str, Method] = {
    "dense": Method("8 bits", lambda network: []),
    **{f"gq{bits}": _gq(bits) for bits in (5, 4, 3, 2, 1)},
    **{f"gq{bits}_by_channel": _gq_by_channel(bits) for bits in (4, 3, 2)},
    "csp80": Method("CSP, 80 % zeros", lambda network: [CompressedSensingPruning(0.8)]),
}


class _Regression(pl.LightningModule):
    """Fit noise with a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Sequence[Tensor], _: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@dataclass(frozen=True)
class MicroRun(Run):
    """One network with one weight method.

    Attributes:
        network: A key of :data:`NETWORKS`.
        method: A key of :data:`METHODS`.
    """

    network: str
    method: str

    def rows(self) -> Iterator[Row]:
        """Train, export with and without compression, and compile with Vela."""
        pl.seed_everything(0)
        network, example = TINY_NETWORKS[self.network]()
        with torch.no_grad():
            targets = torch.randn(STEPS * BATCH, *network.eval()(example).shape[1:])
        inputs = torch.randn(STEPS * BATCH, *example.shape[1:])
        module = _Regression(network.train())
        emulation = NNAEmulation(SPEC, calibration_steps=4)
        methods = METHODS[self.method].make(module)
        trainer = Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            callbacks=[emulation, *methods],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(inputs, targets), batch_size=BATCH))
        with TemporaryDirectory() as folder:
            plain = export_tflite(module, [example], Path(folder) / "plain.tflite")
            report = vela_report(plain.path, accelerator=ACCELERATOR)
            micro = export_micro(
                module,
                [example],
                Path(folder) / "micro",
                compress=True,
                test_vectors=VECTORS,
            )
        yield {
            "network": self.network,
            "method": self.method,
            "spec": SPEC,
            "sqnr_db": _sqnr_db(module, methods),
            **_figures(micro),
            "vela_weight_bytes": report.weight_bytes,
            "vela_encoded_bytes": report.encoded_bytes,
        }


def _sqnr_db(module: nn.Module, methods: Sequence[Callback]) -> float | None:
    """Return the signal to quantization noise of all weights with centroids; None without any."""
    signal = noise = 0.0
    for method in methods:
        if isinstance(method, GeneralQuantizer):
            for name, latent in method.state_dict()["latents"].items():
                deployed = module.get_parameter(name).detach().double()
                signal += float(latent.double().square().sum())
                noise += float((latent.double() - deployed).square().sum())
    return 10 * math.log10(signal / noise) if noise else None


def _figures(micro: MicroExport) -> Row:
    assert micro.agreement is not None, "the runtime is not installed"
    return {
        "flash_bytes": micro.flash_bytes,
        "plain_flash_bytes": micro.plain_flash_bytes,
        "arena_bytes": micro.arena_bytes,
        "plain_arena_bytes": micro.plain_arena_bytes,
        "forms": dict(Counter(each.method for each in micro.compressed)),
        "constant_bytes": sum(each.before_bytes for each in micro.compressed),
        "compressed_bytes": sum(each.after_bytes for each in micro.compressed),
        "equal_outputs": float(micro.agreement),
        "outputs": micro.agreement.outputs,
    }


def runs(network: Sequence[str], method: Sequence[str], threads: int) -> list[MicroRun]:
    """List the grid, network by network."""
    return [MicroRun(n, m, threads=threads) for n in network for m in method]


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report."""
    lines = []
    for network, title in NETWORKS.items():
        for method, settings in METHODS.items():
            for row in select(rows, network=network, method=method):
                forms = ", ".join(f"{count} {form}" for form, count in row["forms"].items())
                sqnr_db = row.get("sqnr_db")
                saved = 1 - row["flash_bytes"] / row["plain_flash_bytes"]
                lines.append(
                    line(
                        title,
                        settings.title,
                        "-" if sqnr_db is None else f"{sqnr_db:.1f}",
                        f"{row['plain_flash_bytes']:,}",
                        f"{row['flash_bytes']:,}",
                        f"{100 * saved:.1f} %",
                        f"{row['plain_arena_bytes']:,}",
                        f"{row['arena_bytes']:,}",
                        forms or "none",
                        f"{row['vela_weight_bytes']:,}",
                        f"{row['vela_encoded_bytes']:,}",
                        f"{row['equal_outputs']:.6f}",
                    )
                )
    return {
        "spec": SPEC,
        "accelerator": ACCELERATOR,
        "steps": STEPS,
        "vectors": VECTORS,
        "networks": lines,
        "codebooks": _codebooks(rows),
    }


def _codebooks(rows: Sequence[Row]) -> list[str]:
    """Compare centroids by channel with a set for the tensor that has one more bit."""
    lines = []
    for network, title in NETWORKS.items():
        for bits in (2, 3, 4):
            by_channel = select(rows, network=network, method=f"gq{bits}_by_channel")
            by_tensor = select(rows, network=network, method=f"gq{bits + 1}")
            for channel, tensor in zip(by_channel, by_tensor, strict=False):
                cells = [
                    f"{row['flash_bytes']:,} bytes, {row['arena_bytes']:,}, {row['sqnr_db']:.1f} dB"
                    for row in (channel, tensor)
                    if row.get("sqnr_db") is not None
                ]
                if len(cells) == 2:
                    lines.append(line(title, f"{bits}", cells[0], f"{bits + 1}", cells[1]))
    return lines


STUDY = Study(
    "micro",
    runs,
    report,
    options={
        "network": axis(NETWORKS),
        "method": axis(METHODS),
        "threads": threads_option(),
    },
)

if __name__ == "__main__":
    STUDY.main()
