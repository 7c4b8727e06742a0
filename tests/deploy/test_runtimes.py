"""Runtimes: the same interface, their own words where they cannot run a program."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_nna import calibrate
from lightning_nna.deploy import (
    MissingRuntimeError,
    Program,
    UnsupportedProgramError,
    export_tflite,
    run_tflite,
    runtime_of,
    verify,
)
from lightning_nna.deploy.runtimes.tflite_micro import LoadedTFLiteMicro

PRESETS = ("tflm-int8", "tflm-int16x8")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), nn.ReLU())
    return nn.Sequential(convolutions, nn.Flatten(), nn.Linear(80, 64), nn.Tanh(), nn.Linear(64, 9))


@pytest.mark.parametrize("spec", PRESETS)
def test_tflite_micro_computes_every_bit_of_its_presets(spec: str, tmp_path: Path) -> None:
    net, x = network().eval(), torch.randn(300, 6, 12)
    calibrate(net, [x], spec=spec)
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    program = Program(path)
    assert program.runtime.name == "tflm"
    agreement = verify(net, path, [x])
    assert agreement == 1.0
    assert agreement.outputs >= 10_000


def test_its_linear_layers_round_otherwise_than_those_of_litert(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 32)), torch.randn(300, 16)
    calibrate(net, [x], spec="litert-int8")
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    assert verify(net, path, [x]) == 1.0
    assert 0.9 < verify(net, path, [x], runtime="tflm") < 1.0


class Joining(nn.Module):
    """Join 23 results of an operator, and columns of another in blocks whose order is turned."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [torch.tanh(part) for part in x.split(2, 1)]
        blocks = torch.arange(x.shape[1]).split([2, 3, 4] * 5 + [1])
        return torch.cat([*parts, torch.sigmoid(x)[:, torch.cat(blocks[::-1])] * 0.5], 1)


@pytest.mark.parametrize("spec", PRESETS)
def test_more_than_ten_tensors_are_joined_in_several_operators(spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Joining(), torch.randn(150, 46)
    calibrate(net, [x], spec=spec)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    # 24 in three and one that joins them, 16 in two and one.
    assert model.operators["CONCATENATION"] == 4 + 3
    agreement = verify(net, model.path, [x])
    assert agreement == 1.0
    assert agreement.outputs >= 10_000


def test_an_operator_that_it_lacks_is_named_in_its_own_words(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.GELU()), torch.randn(4, 6)
    calibrate(net, [x], spec="litert-int8")
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    with pytest.raises(UnsupportedProgramError, match=r"TFLite-Micro cannot load .*'GELU'"):
        run_tflite(path, [x], runtime="tflm")


def test_it_says_how_much_memory_a_program_takes(tmp_path: Path) -> None:
    net, x = network().eval(), torch.randn(1, 6, 12)
    calibrate(net, [x], spec="tflm-int8")
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    loaded = runtime_of("tflm").load(path.read_bytes())
    assert isinstance(loaded, LoadedTFLiteMicro)
    loaded.run([[np.zeros((1, 6, 12), np.int8)]])
    assert 100 < loaded.arena_bytes() < 100_000


def test_without_its_package_it_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tflite_micro.python.tflite_micro", None)
    with pytest.raises(MissingRuntimeError, match=r"pip install 'lightning-nna\[deploy\]'"):
        runtime_of("tflm").load(b"")


def test_an_unknown_runtime_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"runtime must be one of litert, .*; got 'cmsis'"):
        runtime_of("cmsis")
