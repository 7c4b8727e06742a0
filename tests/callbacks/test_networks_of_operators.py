"""Runs of a network of pooling, normalizations and transposed convolutions: resumed, and in two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nna.callbacks import NNAEmulation
from lightning_nna.testing import SmallRecurrentModule
from lightning_nna.testing.contract import (
    _resumes,
    _SaveState,
    assert_same,
    own_process_group,
    trainer,
    two_processes,
)
from lightning_nna.testing.modules import RandomSequences


class Operators(SmallRecurrentModule):
    """A classifier of sequences without a recurrent layer."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.lstm = nn.Identity()
        self.body = nn.Sequential(
            *(nn.Conv1d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), activation()),
            *(nn.AvgPool1d(2), nn.ConvTranspose1d(8, 8, 4, 2, 1), nn.PReLU(8), nn.MaxPool1d(2)),
            nn.Flatten(),
        )
        self.norm, self.head = nn.RMSNorm(24), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x.transpose(1, 2))))


class Repeated(Operators):
    """The same batches on every rank."""

    def train_dataloader(self) -> Any:
        return DataLoader(RandomSequences(), batch_size=8)


def built(kind: type[Operators], spec: str) -> Operators:
    torch.manual_seed(0)
    return kind(nn.GELU if spec == "litert-int8" else nn.SiLU)


@pytest.mark.parametrize("learned", ["none", "all"])
@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    spec: str, learned: Any, tmp_path: Path
) -> None:
    factory = partial(NNAEmulation, spec, calibration_steps=2, learned_scales=learned)
    _resumes(factory, tmp_path, partial(built, Operators, spec))


@pytest.mark.filterwarnings("ignore:.*sync_dist=True")
@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_two_processes_equal_one(spec: str, tmp_path: Path) -> None:
    """On equal batches a mean of gradients is each of them, so every bit is that of one process."""
    one, alone = built(Repeated, spec), NNAEmulation(spec, calibration_steps=2)
    trainer(alone, steps=5).fit(one)
    both = [NNAEmulation(spec, calibration_steps=2), _SaveState(str(tmp_path))]
    settings = {"devices": 2, "strategy": two_processes(), "use_distributed_sampler": False}
    with own_process_group():
        trainer(*both, steps=5, **settings).fit(built(Repeated, spec))
    for rank in range(2):
        state = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert_same(dict(one.state_dict()), dict(state["weights"]))
        assert state["callbacks"][0]["emulator"] == alone.state_dict()["emulator"]
