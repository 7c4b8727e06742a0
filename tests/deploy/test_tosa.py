"""TOSA's reference model: presets in every bit, and its own words where it cannot run a program."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_nna import calibrate
from lightning_nna.deploy import (
    MissingRuntimeError,
    Program,
    UnsupportedProgramError,
    export_tflite,
    export_tosa,
    run_tflite,
    runtime_of,
    vela_report,
    verify,
)
from lightning_nna.deploy.runtimes.environment import make_environment, python_of
from tests.deploy.test_runtimes import network
from tests.emulation.operators.examples import Calling

PRESETS = ("tosa-int8", "tosa-int16x8")


@pytest.mark.exactness
@pytest.mark.parametrize("spec", PRESETS)
def test_it_computes_every_bit_of_its_presets(spec: str, tmp_path: Path) -> None:
    net, x = network().eval(), torch.randn(300, 6, 12)
    calibrate(net, [x], spec=spec)
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    assert Program(path).runtime.name == "tosa"
    agreement = verify(net, path, [x])
    assert agreement == 1.0
    assert agreement.outputs >= 10_000


def test_sixteen_bits_are_other_tables_than_those_of_litert(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Tanh()), torch.randn(300, 40)
    calibrate(net, [x], spec="litert-int16x8")
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    assert verify(net, path, [x]) == 1.0
    assert 0.1 < verify(net, path, [x], runtime="tosa") < 0.9


def test_operators_without_a_form_in_tosa_are_named(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.LayerNorm(6)), torch.randn(4, 6)
    calibrate(net, [x], spec="litert-int8")
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    with pytest.raises(UnsupportedProgramError, match="no form in TOSA for RSQRT"):
        run_tflite(path, [x], runtime="tosa")


def test_its_own_words_say_why_it_cannot_run_a_program(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6)
    calibrate(net, [x], spec="tosa-int8")
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    loaded = runtime_of("tosa").load(path.read_bytes())
    (outputs,) = loaded.run([[np.zeros((4, 6), np.int8)]])
    assert outputs[0].shape == (4, 5)
    with pytest.raises(UnsupportedProgramError, match=r"input size \(20\) doesn't match"):
        loaded.run([[np.zeros((4, 5), np.int8)]])


def test_it_starts_again_after_a_program_that_ended_it(tmp_path: Path) -> None:
    runtime = runtime_of("tosa")
    with pytest.raises(UnsupportedProgramError, match="cannot be converted to TOSA"):
        runtime.load(b"no program")
    net, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6)
    calibrate(net, [x], spec="tosa-int8")
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    assert verify(net, path, [x]) == 1.0


@pytest.mark.exactness
def test_softmax_of_sixteen_bits_wraps_around_beyond_its_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Scores more than 10 below the largest come out large, and the emulation says so."""
    net, x = nn.Sequential(nn.Softmax(-1)), torch.randn(300, 40) * 4
    calibrate(net, [x], spec="tosa-int16x8")
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    assert verify(net, path, [x]) == 1.0
    assert "sums do not fit the integers of tosa-int16x8" in caplog.text
    assert "keep scores within 10 of the largest of their row" in caplog.text
    (found,) = run_tflite(path, [x])
    assert np.abs(found - F.softmax(x, -1).numpy()).max() > 0.1


@pytest.mark.exactness
def test_what_the_report_says_keeps_a_softmax_within_its_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = Calling(lambda x: F.softmax(torch.maximum(x, x.amax(-1, keepdim=True) - 9), -1))
    x = torch.randn(300, 40) * 4
    calibrate(net, [x], spec="tosa-int16x8")
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    assert verify(net, path, [x]) == 1.0
    assert not caplog.text
    (found,) = run_tflite(path, [x])
    # Of 40 scores each is raised to e^-9 at most, 0.005 in all.
    assert np.abs(found - F.softmax(x, -1).numpy()).max() < 0.01


@pytest.mark.exactness
def test_a_mask_of_sixteen_bits_is_reported_and_one_of_eight_bits_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 6, 8)
    for spec in ("tosa-int8", "tosa-int16x8"):
        assert not caplog.text
        net = Calling(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True))
        calibrate(net, [query], spec=spec)
        path = export_tflite(net, [query], tmp_path / "net.tflite").path
        assert verify(net, path, [query]) == 1.0
    assert "use a preset of 8-bit activations, as an attention with a mask has to" in caplog.text


def test_without_its_environment_it_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LIGHTNING_NNA_RUNTIMES", str(tmp_path))
    assert python_of("tosa") is None
    with pytest.raises(
        MissingRuntimeError, match=r"run python -m lightning_nna\.deploy\.runtimes\.environment"
    ):
        runtime_of("tosa").version()


def test_an_environment_of_other_versions_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LIGHTNING_NNA_RUNTIMES", str(tmp_path))
    (tmp_path / "tosa").mkdir()
    (tmp_path / "tosa" / "requirements.txt").write_text("numpy==1.0\n")
    assert python_of("tosa") is None


def test_an_environment_that_is_there_is_left_as_it_is() -> None:
    assert make_environment("tosa") == python_of("tosa")
    assert runtime_of("tosa").version().startswith("tosa-tools 2026")


@pytest.mark.parametrize("accelerator", ["ethos-u55-128", "ethos-u65-256", "ethos-u85-256"])
def test_vela_compiles_a_program_in_tosa(accelerator: str, tmp_path: Path) -> None:
    net, x = network().eval(), torch.randn(1, 6, 12)
    calibrate(net, [x], spec="tosa-int8")
    model = export_tosa(net, [x], tmp_path / "net.tosa")
    assert model.path.stat().st_size == model.size_bytes
    report = vela_report(model.path, accelerator=accelerator)
    assert not report.cpu_operators
    assert report.cycles > 1000
