"""Sizes that an Ethos-U cannot resize are products: on the NPU, and at least as exact."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import NNASpec, calibrate, emulate
from lightning_nna.deploy import export_tflite, vela_report, verify
from lightning_nna.emulation.operators.resizing_products import (
    interpolating,
    is_resized_by_npu,
    moving,
)
from lightning_nna.emulation.spec import PRESETS
from recipes.benchmark.foreign_vision import UNet
from tests.emulation.modules import Function

pytestmark = pytest.mark.exactness

HAS_VELA = importlib.util.find_spec("ethosu") is not None
SPECS = ["litert-int8", "litert-int16x8"]
ACCELERATORS = ["ethos-u55-128", "ethos-u65-256", "ethos-u85-256"]


def with_resizings(spec: str) -> NNASpec:
    """An accelerator without exact weights, whose programs have RESIZE_BILINEAR."""
    return dataclasses.replace(PRESETS[spec], weight_granularity="per_tensor")


def errors(net: nn.Module, x: Tensor, reference: Any, spec: NNASpec) -> Tensor:
    """Distances of the emulation from a function in float64, in units of the scale."""
    calibrate(net, [x], spec=spec)
    with emulate(net, spec) as emulator, torch.no_grad():
        y = net(x)
        qparams = emulator.state.qparams_of(y)
    assert qparams is not None
    integers = (x / qparams.scale).round() + qparams.zero_point
    taken = integers.clamp(qparams.low, qparams.high) - qparams.zero_point
    return y.double() / qparams.scale - reference(taken.double())


INTERPOLATIONS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((1, 8, 8, 8), {"scale_factor": 2, "mode": "bilinear", "align_corners": True}),
    ((2, 4, 16, 16), {"scale_factor": 2, "mode": "bilinear", "align_corners": True}),
    ((1, 2, 80, 70), {"scale_factor": 2, "mode": "bilinear", "align_corners": True}),
    ((1, 8, 16, 16), {"scale_factor": 3, "mode": "bilinear"}),
    ((1, 8, 16, 16), {"scale_factor": 4, "mode": "bilinear"}),
    ((1, 8, 16, 16), {"scale_factor": (1, 4), "mode": "bilinear"}),
    ((1, 8, 16, 16), {"scale_factor": (3, 1), "mode": "bilinear"}),
    ((1, 8, 16, 16), {"size": (23, 31), "mode": "bilinear"}),
    ((1, 8, 16, 16), {"size": (7, 9), "mode": "bilinear"}),
    ((1, 8, 16, 16), {"size": (1, 9), "mode": "bilinear", "align_corners": True}),
    ((2, 6, 40), {"size": 100, "mode": "linear"}),
    ((2, 6, 40), {"scale_factor": 2, "mode": "linear", "align_corners": True}),
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("shape", "form"), INTERPOLATIONS)
def test_products_are_at_least_as_exact_as_the_kernel(
    shape: tuple[int, ...], form: dict[str, Any], spec: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)

    def function(x: Tensor) -> Tensor:
        return F.interpolate(x, **form)

    own = errors(Function(function), x, function, PRESETS[spec])
    other = errors(Function(function), x, function, with_resizings(spec))
    # Rounding to 16 bits before is another hundredth of a unit of 8 bits.
    assert float(own.square().mean().sqrt()) <= 1.001 * float(other.square().mean().sqrt())
    assert float(own.abs().max()) <= float(other.abs().max()) + 0.02


NEAREST: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((1, 8, 16, 16), {"scale_factor": 3}),
    ((2, 8, 12, 10), {"scale_factor": (2, 5)}),
    ((1, 8, 40, 40), {"scale_factor": 3, "mode": "nearest-exact"}),
    ((1, 8, 16, 16), {"size": (23, 31)}),
    ((1, 8, 16, 16), {"size": (7, 31), "mode": "nearest-exact"}),
    ((1, 4, 100, 20), {"scale_factor": 1.5}),
    ((2, 8, 30), {"scale_factor": 3}),
    ((2, 8, 30), {"size": 47}),
]


class _Between(nn.Module):
    """A resizing between two convolutions."""

    def __init__(self, channels: int, axes: int, form: dict[str, Any]) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d}[axes]
        self.first, self.last = kind(2, channels, 1), kind(channels, 2, 1)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.interpolate(self.first(x), **self.form))


@pytest.mark.skipif(not HAS_VELA, reason="needs ethos-u-vela")
@pytest.mark.parametrize(("shape", "form"), INTERPOLATIONS[:1] + INTERPOLATIONS[2:8] + NEAREST)
def test_resizings_stay_on_the_accelerator(
    shape: tuple[int, ...], form: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x = _Between(shape[1], len(shape) - 2, form), torch.randn(1, 2, *shape[2:])
    calibrate(net, [x])
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0
    assert vela_report(model.path).cpu_operators == ()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("shape", "form"), NEAREST)
def test_elements_move_unchanged(
    shape: tuple[int, ...], form: dict[str, Any], spec: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x = Function(lambda x: F.interpolate(torch.tanh(x), **form)), torch.randn(shape)
    before = Function(torch.tanh)
    calibrate(before, [x], spec=spec)
    calibrate(net, [x], spec=spec)
    with emulate(net, spec), emulate(before, spec), torch.no_grad():
        assert torch.equal(net(x), F.interpolate(before(x), **form))
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0
    assert not {"RESIZE_NEAREST_NEIGHBOR", "GATHER", "BROADCAST_TO"} & set(model.operators)


@pytest.mark.skipif(not HAS_VELA, reason="needs ethos-u-vela")
@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_a_unet_is_on_the_accelerator(accelerator: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = UNet(is_bilinear=True).eval(), torch.randn(1, 3, 32, 32)
    calibrate(net, [x])
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0
    assert vela_report(model.path, accelerator=accelerator).cpu_operators == ()


@pytest.mark.skipif(not HAS_VELA, reason="needs ethos-u-vela")
@pytest.mark.parametrize(
    ("before", "after", "form"),
    [
        ((8, 8), (16, 16), {"mode": "bilinear"}),
        ((8, 8), (32, 32), {"mode": "bilinear"}),
        ((8, 8), (15, 15), {"mode": "bilinear", "align_corners": True}),
        ((8, 8), (16, 16), {"mode": "bilinear", "align_corners": True}),
        ((8, 8), (8, 15), {"mode": "bilinear", "align_corners": True}),
        ((1, 8), (1, 29), {"mode": "bilinear", "align_corners": True}),
        ((1, 8), (2, 15), {"mode": "bilinear", "align_corners": True}),
        ((1, 1), (5, 7), {"mode": "bilinear"}),
        ((1, 8), (2, 16), {"mode": "bilinear"}),
    ],
)
def test_conditions_are_those_of_vela(
    before: tuple[int, int], after: tuple[int, int], form: dict[str, Any], tmp_path: Path
) -> None:
    corners = form.get("align_corners", False)
    net = Function(lambda x: F.interpolate(x, after, **form))
    x = torch.randn(1, 3, *before)
    spec = with_resizings("litert-int8")
    calibrate(net, [x], spec=spec)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert "RESIZE_BILINEAR" in model.operators
    settings = {"corners": corners, "centers": not corners, "bilinear": True}
    on_cpu = "ResizeBilinear" in vela_report(model.path).cpu_operators
    assert is_resized_by_npu(before, after, **settings) == (not on_cpu)


@pytest.mark.parametrize(
    ("spec", "shape", "form"),
    [
        # Exact positions, and 16 bits that would be rounded twice.
        ("litert-int16x8", (1, 2, 8, 8), {"scale_factor": 4, "mode": "bilinear"}),
        # More weights than are worth their memory.
        (
            "litert-int8",
            (1, 1, 300, 2),
            {"size": (500, 3), "mode": "bilinear", "align_corners": True},
        ),
        # Scales are powers of two, and 1/15 is none.
        ("shift", (1, 2, 8, 8), {"scale_factor": 2, "mode": "bilinear", "align_corners": True}),
    ],
)
def test_other_resizings_stay_the_kernel(
    spec: str, shape: tuple[int, ...], form: dict[str, Any]
) -> None:
    recorded: list[str] = []
    net, x = Function(lambda x: F.interpolate(x, **form)), torch.randn(shape)
    emulator = calibrate(net, [x], spec=spec)
    record = emulator.running(recorder=lambda each: recorded.append(each.operator))
    with emulate(net, spec), record, torch.no_grad():
        net(x)
    assert recorded[-1] == "RESIZE_BILINEAR"


def test_weights_are_too_many() -> None:
    assert interpolating(300, 500, True) is None
    assert moving(torch.zeros(500, dtype=torch.int64), 300) is None


@pytest.mark.parametrize("corners", [False, True])
def test_weights_are_the_nearest_fractions_of_127(corners: bool) -> None:
    for before, after in ((3, 7), (64, 128), (200, 301), (7, 3), (1, 5), (9, 1)):
        weights = interpolating(before, after, corners)
        assert weights is not None
        exact = F.interpolate(
            torch.eye(before).double()[:, None],
            after,
            mode="linear",
            align_corners=corners,
        )[:, 0].T
        values = weights.integers.double() * weights.scales.double()[:, None]
        assert float((values - exact).abs().max()) <= 1 / 254 + 1e-6
        assert weights.error <= 1 / 254
        torch.testing.assert_close(values.sum(1), torch.ones(after).double(), atol=1e-6, rtol=0)
