"""Train with every method on the simulated device and on the processor; print what differs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nna.callbacks import (
    CompressedSensingPruning,
    Distillation,
    GeneralQuantizer,
    HardCompression,
    L1Pruning,
    MagnitudePruning,
    MRACosRegularization,
    NNAEmulation,
)
from lightning_nna.testing.simulated_device import simulated_device


class SimulatedAccelerator(Accelerator):
    """Answer what Lightning asks of a device."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [simulated_device()]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "simulated"


class Classifier(pl.LightningModule):
    """Layers of several kinds; none whose float form has another order of sums on a device."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(128, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 4)),
        )
        self.rows = nn.Embedding(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.rows((x[:, 0, 0] > 0).long())

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, labels = batch
        return nn.functional.cross_entropy(self(x), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Weights(pl.Callback):
    """Weights after the last optimizer step, before they are moved to the processor."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        self.values = {
            name: parameter.detach().cpu().clone()
            for name, parameter in pl_module.named_parameters()
        }


def _emulation(spec: str = "litert-int8", **settings: Any) -> NNAEmulation:
    return NNAEmulation(spec, calibration_steps=2, **settings)


#: Callbacks by the name of the case.
CASES: dict[str, Callable[[], list[pl.Callback]]] = {
    "emulation": lambda: [_emulation()],
    "sixteen bits": lambda: [_emulation("tflm-int16x8")],
    "shift": lambda: [_emulation("shift")],
    "learned scales": lambda: [_emulation(learned_scales="all")],
    "general quantizer": lambda: [GeneralQuantizer(bits=3), _emulation()],
    "s8bqat": lambda: [
        MRACosRegularization(4),
        HardCompression(4, every_n_steps=3),
        _emulation(),
    ],
    "compressed sensing": lambda: [CompressedSensingPruning(sparsity=0.5), _emulation()],
    "magnitude": lambda: [MagnitudePruning(sparsity=0.5), _emulation()],
    "l1": lambda: [L1Pruning(sparsity=0.5), _emulation()],
    "distillation": lambda: [Distillation(targets=["net"]), _emulation()],
}


def trained(case: str, *, on_device: bool) -> dict[str, Tensor]:
    """Return the weights after a short training."""
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(32, 4, 8), torch.randint(0, 4, (32,)))
    weights = Weights()
    where: dict[str, Any] = {"accelerator": "cpu"}
    if on_device:
        device = simulated_device()
        where = {"strategy": SingleDeviceStrategy(device, accelerator=SimulatedAccelerator())}
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[*CASES[case](), weights],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **where,
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=8))
    return weights.values


def main() -> None:
    """Print, for every case, the parameters that are not the processor's."""
    torch.set_num_threads(1)
    different = {}
    for case in sys.argv[1:]:
        device, host = (trained(case, on_device=on_device) for on_device in (True, False))
        different[case] = [name for name in host if not torch.equal(host[name], device[name])]
    print(json.dumps(different))


if __name__ == "__main__":
    main()
