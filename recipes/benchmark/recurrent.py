"""Both forms of the LSTM: cycles and memory on NPUs, and the distance from float.

    python -m recipes.benchmark.recurrent               # run what is missing, then report
    python -m recipes.benchmark.recurrent --page-only

A layer runs as the kernel of a whole sequence, with 8-bit hidden states, or as elementary operators
with 16-bit states. Costs are estimates of Arm's compiler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna.deploy import export_tflite, vela_report
from lightning_nna.emulation import calibrate, emulate
from recipes.benchmark.grid import Run, Study
from recipes.benchmark.report import Fields, line, ruled
from recipes.benchmark.rows import Row, select

FORMS = ("sequence", "elementary")
PRESETS = ("litert-int8", "tflm-int8", "litert-int16x8", "tflm-int16x8")
ACCELERATORS = ("ethos-u55-128", "ethos-u65-256", "ethos-u85-256")
UNITS = (64, 256)
STEPS = (1, 10)
_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class CostRun(Run):
    """One layer on one accelerator, one sequence, as many inputs as units.

    Attributes:
        units: Number of units.
        steps: Number of time steps in a call; the states come in and go out.
        form: A member of :data:`FORMS`.
        accelerator: A member of :data:`ACCELERATORS`.
    """

    units: int
    steps: int
    form: str
    accelerator: str

    def rows(self) -> Iterator[Row]:
        """Compile the layer."""
        torch.manual_seed(0)
        layer = nn.LSTM(self.units, self.units)
        x, state = torch.randn(self.steps, 1, self.units), torch.zeros(1, 1, self.units)
        batches: list[Any] = [(torch.randn(50, 4, self.units), None), (x, (state, state))]
        calibrate(
            layer,
            batches,
            forward=lambda module, batch: module(*batch),
            spec={"preset": "tflm-int8", "lstm": self.form},
        )
        with TemporaryDirectory() as folder:
            path = Path(folder) / "layer.tflite"
            export_tflite(layer, [x, (state, state)], path)
            report = vela_report(path, accelerator=self.accelerator)
        yield {
            **self.keys[0],
            "system": report.system,
            "cycles": report.cycles,
            "compute_cycles": report.compute_cycles,
            "sram_bytes": report.sram_bytes,
            "flash_bytes": report.flash_bytes,
            "operators": len(report.operators),
            "cpu": sorted(report.cpu_operators),
        }


class Integrator(nn.Module):
    """A layer and a head that learn to sum inputs that are forgotten in time."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return estimates, shape ``(steps, batch, 4)``, from ``(steps, batch, 8)``."""
        estimates: Tensor = self.head(self.lstm(x)[0])
        return estimates


def goals(x: Tensor) -> Tensor:
    """Compute what the network learns: sums of pairs of inputs, forgotten by a tenth a step."""
    sums, total = [], torch.zeros(x.shape[1], 4)
    for step in x:
        total = 0.9 * total + step[:, :4] * step[:, 4:]
        sums.append(total)
    return torch.stack(sums)


@lru_cache(maxsize=8)
def trained(seed: int, updates: int) -> dict[str, Tensor]:
    """Train a network in float, once a process.

    Args:
        seed: Seed of weights and data.
        updates: Number of updates.
    """
    torch.manual_seed(seed)
    net = Integrator()
    optimizer = torch.optim.Adam(net.parameters(), 0.005)
    for _ in range(updates):
        x = torch.randn(30, 32, 8)
        optimizer.zero_grad()
        F.mse_loss(net(x), goals(x)).backward()
        optimizer.step()
    return net.state_dict()


@dataclass(frozen=True)
class AccuracyRun(Run):
    """A network that was trained in float, emulated in one form under one preset.

    Attributes:
        seed: Seed of weights and data.
        form: A member of :data:`FORMS`.
        preset: A member of :data:`PRESETS`.
        updates: Number of updates in float.
    """

    seed: int
    form: str
    preset: str
    updates: int = field(default=300, kw_only=True)

    def rows(self) -> Iterator[Row]:
        """Train in float, calibrate on the training data, and compare on other data."""
        net = Integrator()
        net.load_state_dict(trained(self.seed, self.updates))
        torch.manual_seed(1000 + self.seed)  # Other data than in training.
        x, test = torch.randn(30, 256, 8), torch.randn(60, 256, 8)
        with torch.no_grad():
            expected, float_loss = net.lstm(test)[0], float(F.mse_loss(net(test), goals(test)))
        spec = {"preset": self.preset, "lstm": self.form}
        calibrate(net, [x], spec=spec)
        with emulate(net, spec), torch.no_grad():
            outputs, loss = net.lstm(test)[0], float(F.mse_loss(net(test), goals(test)))
        noise = float((outputs - expected).square().sum() / expected.square().sum())
        yield {
            **self.keys[0],
            "snr_db": round(-10 * math.log10(noise), 2),
            "loss": round(loss, 5),
            "float_loss": round(float_loss, 5),
        }


def runs(*, units: Sequence[int] = UNITS, seeds: Sequence[int] = _SEEDS) -> list[Run]:
    """List the grid.

    Args:
        units: Numbers of units of the layers whose costs are estimated.
        seeds: Seeds of the networks that are compared with float.
    """
    costs = [
        CostRun(size, steps, form, accelerator)
        for size in units
        for steps in STEPS
        for accelerator in ACCELERATORS
        for form in FORMS
    ]
    return [
        *costs,
        *(
            AccuracyRun(seed, form, preset)
            for preset in PRESETS
            for form in FORMS
            for seed in seeds
        ),
    ]


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report."""
    return {"costs": _costs(rows), "accuracy": _accuracy(rows)}


def _costs(rows: Sequence[Row]) -> list[str]:
    titles = ("cycles", "of them computing", "SRAM, KiB", "flash, KiB", "operators", "on the CPU")
    table = ruled(["units", "steps", "accelerator", "form", *titles])
    for row in (row for row in rows if "cycles" in row):
        table.append(
            line(
                row["units"],
                row["steps"],
                row["accelerator"],
                row["form"],
                f"{row['cycles']:,}",
                f"{row['compute_cycles']:,}",
                f"{row['sram_bytes'] / 1024:.1f}",
                f"{row['flash_bytes'] / 1024:.1f}",
                row["operators"],
                len(row["cpu"]),
            )
        )
    return table


def _accuracy(rows: Sequence[Row]) -> list[str]:
    table = ruled(["preset", "form", "SNR of the outputs, dB", "loss over that of float"])
    measured = [row for row in rows if "snr_db" in row]
    for preset, form in dict.fromkeys((row["preset"], row["form"]) for row in measured):
        own = select(measured, preset=preset, form=form)
        snr = " / ".join(f"{row['snr_db']:.1f}" for row in own)
        losses = " / ".join(f"{row['loss'] / row['float_loss']:.3f}" for row in own)
        table.append(line(f"`{preset}`", form, snr, losses))
    return table


STUDY = Study(
    name="recurrent",
    runs=runs,
    report=report,
    options={
        "units": {"nargs": "*", "type": int, "default": list(UNITS)},
        "seeds": {"nargs": "*", "type": int, "default": list(_SEEDS)},
    },
)

if __name__ == "__main__":
    STUDY.main()
