"""Arm's compiler on our programs: nothing stays on the CPU, few values are few bytes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_nna import calibrate
from lightning_nna.deploy import VelaError, export_tflite, vela_report
from lightning_nna.deploy.dense_twin import dense_twin
from lightning_nna.pruning.masks import MatrixLayout
from lightning_nna.pruning.sparsity_pattern import SparsityPattern
from tests.deploy.networks import POORER_SPECS

#: An accelerator that may compute a layer with compressed weights in another way.
U85: Any = {"accelerator": "ethos-u85-256", "system": "Ethos_U85_SYS_DRAM_High"}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ethosu") is None, reason="ethos-u-vela is not installed"
)


def program(folder: Path, net: nn.Module, x: torch.Tensor) -> Path:
    calibrate(net, [x])
    return export_tflite(net, [x], folder / "net.tflite").path


@pytest.fixture
def lstm(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return program(tmp_path, nn.LSTM(64, 64, batch_first=True), torch.randn(1, 1, 64))


@pytest.mark.parametrize("accelerator", ["ethos-u55-128", "ethos-u65-256", "ethos-u85-256"])
def test_an_lstm_runs_on_the_npu(lstm: Path, accelerator: str) -> None:
    report = vela_report(lstm, accelerator=accelerator)
    assert report.cpu_operators == ()
    assert report.weight_bytes == 4 * 64 * 128
    assert 0.8 < report.encoded_bytes / report.weight_bytes < 1.1
    assert report.flash_bytes > report.encoded_bytes
    assert report.inference_ms > 0
    assert report.is_bandwidth_bound
    assert sum(operator.macs for operator in report.operators) >= report.weight_bytes


def test_few_values_are_few_bytes_and_little_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reports = []
    for levels in (255, 32):
        net = nn.Linear(256, 256, bias=False)
        nn.init.normal_(net.weight, std=0.3).data.clamp_(-1, 1)
        net.weight.data = torch.round(net.weight * (levels // 2)) / (levels // 2)
        net.weight.data[:, 0] = 1.0  # One scale for all rows.
        reports.append(vela_report(program(tmp_path, net, torch.randn(1, 256))))
    many, few = reports
    assert few.encoded_bytes < 0.7 * many.encoded_bytes
    assert few.inference_ms < 0.75 * many.inference_ms


def test_two_of_four_along_the_input_channel_are_time_saved_on_a_u85(tmp_path: Path) -> None:
    """As many zeros along the flattened kernel, which no unit expects, save none."""
    cycles = []
    for flat in (True, False):
        torch.manual_seed(0)
        net = nn.Conv2d(64, 64, 3, padding=1)
        layout = MatrixLayout(net.weight.shape) if flat else MatrixLayout.of(net, net.weight)
        matrix, pattern = layout.to_matrix(net.weight), SparsityPattern.of("2:4")
        mask = pattern.mask(pattern.importance_scores(matrix), 0.5, layout.matrix_shape)
        net.weight.data *= layout.from_matrix(mask)
        path = program(tmp_path, net, torch.randn(1, 64, 16, 16))
        report = vela_report(path, **U85, compare_dense=False)
        cycles.append(report.compute_cycles)
    along_the_kernel, along_the_channels = cycles
    assert along_the_channels < 0.6 * along_the_kernel


@pytest.mark.parametrize("cause", ["zeros", "few values"])
def test_weights_that_cost_time_on_a_u85_are_warned_of(cause: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(64, 64, 3, padding=1)
    weight = net.weight.data
    if cause == "zeros":
        weight *= torch.rand(weight.shape) < 0.5
    else:
        weight.copy_(weight.sign() * weight.abs().max())
    path = program(tmp_path, net, torch.randn(1, 64, 16, 16))
    with pytest.warns(UserWarning, match=r"cost time on ethos-u85-256: .* cycles\)\. There"):
        report = vela_report(path, **U85)
    (slowed,) = report.slowed
    assert slowed.cycles > 1.5 * slowed.dense_cycles
    assert f"slower than with dense weights: {slowed}" in str(report)
    # The same layer with weights of its own is as fast as the twin says.
    torch.manual_seed(0)
    nn.init.normal_(net.weight)
    dense = vela_report(program(tmp_path, net, torch.randn(1, 64, 16, 16)), **U85)
    cycles = sum(each.cycles for each in dense.operators if each.name == slowed.name)
    assert cycles == pytest.approx(slowed.dense_cycles, rel=0.02)
    assert dense.slowed == ()
    # Other families compute a layer in one way.
    assert vela_report(path).slowed == ()


def test_two_of_four_and_dense_weights_are_not_warned_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 1))
    x = torch.randn(1, 64, 32, 32)
    assert dense_twin(program(tmp_path, net, x).read_bytes()) is None
    for conv in net:
        layout, pattern = MatrixLayout.of(conv, conv.weight), SparsityPattern.of("2:4")
        scores = pattern.importance_scores(layout.to_matrix(conv.weight))
        mask = pattern.mask(scores, 0.5, layout.matrix_shape)
        conv.weight.data *= layout.from_matrix(mask)
    assert vela_report(program(tmp_path, net, x), **U85).slowed == ()


def test_a_twin_has_the_same_instructions_and_other_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Linear(64, 64)
    net.weight.data *= torch.rand(64, 64) < 0.5
    contents = program(tmp_path, net, torch.randn(1, 64)).read_bytes()
    twin = dense_twin(contents)
    assert twin is not None
    assert twin == dense_twin(contents)
    changed = np.frombuffer(contents, np.int8) != np.frombuffer(twin, np.int8)
    assert 0.9 * 4096 < changed.sum() <= 4096
    assert dense_twin(twin) is None


def test_an_embedding_stays_on_the_cpu(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 16))
    report = vela_report(program(tmp_path, net, torch.zeros(1, 1, dtype=torch.long)))
    assert [name.lower() for name in report.cpu_operators] == ["gatherv2"]
    assert "on the CPU: GatherV2" in str(report)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"accelerator": "ethos-n78"}, ValueError, "accelerator must be one of ethos-u55-32"),
        ({"accelerator": "ethos-u55-99"}, ValueError, "ethos-u85-2048; got 'ethos-u55-99'"),
        ({"system": "Ethos_U55_Nowhere"}, VelaError, r"Vela rejects.*Ethos_U55_Nowhere not found"),
    ],
)
def test_what_vela_has_not(lstm: Path, settings: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        vela_report(lstm, **settings)


def test_what_is_no_program(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no program"):
        vela_report(tmp_path / "nowhere.tflite")
    (tmp_path / "bad.tflite").write_text("no flatbuffer")
    with pytest.raises(VelaError, match=r"Vela rejects .*bad\.tflite"):
        vela_report(tmp_path / "bad.tflite")


def test_without_vela(lstm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_nna.deploy.vela.find_spec", lambda name: None)
    with pytest.raises(VelaError, match="ethos-u-vela is not installed: pip install"):
        vela_report(lstm)


def test_float_operators_are_the_cpus(tmp_path: Path) -> None:
    class Roots(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](torch.sqrt(torch.sigmoid(self[0](x))))

    net, x = Roots(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(4, 16)
    calibrate(net, [x], spec=POORER_SPECS[8])
    report = vela_report(export_tflite(net, [x], tmp_path / "net.tflite", allow_cpu=True).path)
    assert report.cpu_operators == ("Dequantize", "Sqrt", "Quantize")
    assert report.npu_operators >= 2
