"""The preset that is taken where none is named: that of TFLite-Micro."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.callbacks import NNAEmulation
from lightning_nna.deploy import export_tflite, run_tflite, verify
from lightning_nna.emulation.attachment import attach
from lightning_nna.emulation.emulator import Emulator
from lightning_nna.emulation.spec import DEFAULT_PRESET, PRESETS, NNASpec, resolve_spec
from lightning_nna.testing import SmallNet, SmallRecurrentModule
from lightning_nna.testing.contract import trainer

DEFAULT = PRESETS["tflm-int8"]


def _emulated() -> NNASpec:
    with emulate(SmallNet()) as emulator:
        return emulator.spec


@pytest.mark.parametrize(
    "spec",
    [
        lambda: PRESETS[DEFAULT_PRESET],
        NNASpec,
        lambda: resolve_spec({}),
        lambda: NNAEmulation().spec,
        lambda: Emulator(SmallNet()).spec,
        lambda: attach(SmallNet()).spec,
        lambda: calibrate(SmallNet(), [torch.randn(3, 4)]).spec,
        _emulated,
    ],
)
def test_what_names_no_preset_has_the_default(spec: Callable[[], NNASpec]) -> None:
    assert spec() == DEFAULT
    assert DEFAULT.runtime == "tflm"


def test_keys_without_a_preset_change_the_default(tmp_path: Path) -> None:
    path = tmp_path / "four.yaml"
    path.write_text("name: four\nweight_bits: 4\n")
    expected = dataclasses.replace(DEFAULT, name="four", weight_bits=4)
    assert resolve_spec(str(path)) == NNASpec("four", weight_bits=4) == expected


@pytest.mark.parametrize(
    ("preset", "runtime"),
    [
        *((name, name.split("-")[0]) for name in PRESETS if "-int" in name),
        ("ethos-u", "tflm"),
        ("shift", "litert"),
    ],
)
def test_every_preset_has_its_runtime(preset: str, runtime: str) -> None:
    assert (PRESETS[preset].name, PRESETS[preset].runtime) == (preset, runtime)


class Transformer(SmallRecurrentModule):
    """A layer of a transformer with GELU, before the recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            4, 2, 8, dropout=0.0, activation="gelu", batch_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.layer(x))


@pytest.mark.exactness
@pytest.mark.parametrize("preset", [[], ["tflm-int16x8"]], ids=["default", "16 bits"])
def test_a_transformer_with_gelu_is_trained_and_deployed(preset: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    fitted, x = Transformer(), torch.randn(64, 6, 4)
    trainer(NNAEmulation(*preset, calibration_steps=2), steps=6).fit(fitted)
    table = coverage(fitted, x)
    assert not table.fallbacks
    assert {row.where for row in table.rows if row.operator == "gelu"} == {"emulated"}
    model = export_tflite(fitted, [x], tmp_path / "net.tflite")
    agreement = verify(fitted, model.path, [x], runtime="tflm")
    assert agreement == 1.0
    assert agreement.outputs >= 600


@pytest.mark.exactness
def test_a_program_runs_on_tflite_micro_unless_told_otherwise(tmp_path: Path) -> None:
    net, x = SmallNet(8, 32, 4), torch.randn(64, 8)
    calibrate(net, [x])
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    (outputs,) = run_tflite(path, [x])
    with emulate(net), torch.no_grad():
        assert torch.equal(torch.from_numpy(outputs), net(x))
    assert verify(net, path, [x]) == verify(net, path, [x], runtime="tflm") == 1.0


class Largest(SmallRecurrentModule):
    """The two largest features, in order, before the network: TFLite-Micro has no kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(
            torch.cat([torch.tanh(x), torch.tanh(x).topk(2).values], -1)[..., :4]
        )


LACKING = (
    "TFLite-Micro has no kernel TOPK_V2 of int8: choose the largest before or after the emulated "
    "modules, which targets= selects, or take a preset of LiteRT (litert-int8, "
    "litert-int16x8), which have it"
)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    name = "lightning_nna.emulation.emulator"
    return [one.getMessage() for one in caplog.records if one.name == name and one.levelno >= 30]


def test_what_the_default_lacks_is_told_by_the_run_coverage_and_export(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    fitted, x = Largest(), torch.randn(4, 6, 4)
    trainer(NNAEmulation(calibration_steps=2), steps=4).fit(fitted)
    (warning,) = warnings_of(caplog)
    assert "'tflm-int8' has no operator for these sites" in warning
    assert f"./topk#0 ({LACKING})" in warning
    (row,) = coverage(fitted, x).fallbacks
    assert (row.site, row.remedy) == ("./topk#0", LACKING)
    with pytest.raises(ValueError, match=re.escape(LACKING)):
        export_tflite(fitted, [x], tmp_path / "net.tflite")


def test_litert_has_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer(NNAEmulation("litert-int8", calibration_steps=2), steps=4).fit(Largest())
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("learned", ["none", "all"])
@pytest.mark.parametrize("fidelity", ["exact", "fast"])
def test_a_run_on_the_default_has_gradients(fidelity: Any, learned: Any) -> None:
    fitted = Transformer()
    before = {name: p.detach().clone() for name, p in fitted.named_parameters()}
    emulation = NNAEmulation(calibration_steps=1, fidelity=fidelity, learned_scales=learned)
    trainer(emulation, steps=4).fit(fitted)
    assert all(bool(p.isfinite().all()) for p in fitted.parameters())
    assert not any(torch.equal(p, before[name]) for name, p in fitted.named_parameters())
