"""Transposed convolutions pass the oracle in every form that PyTorch has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import bake, calibrate, coverage, emulate
from lightning_nna.deploy import (
    export_tflite,
    layer_figures,
    load_packed,
    save_packed,
    verify,
)
from lightning_nna.emulation.arithmetic.quantized_weight import SECOND_AXIS
from lightning_nna.testing.operator_oracle import CHECKS, Check, Example, check_operator
from lightning_nna.testing.replay import replays

pytestmark = pytest.mark.exactness

SPECS = ["litert-int8", "litert-int16x8"]
EXAMPLES = [
    Example(lambda: nn.ConvTranspose2d(6, 8, 4, 2, 1), ((4, 6, 9, 9),)),
    Example(lambda: nn.ConvTranspose2d(6, 8, 3, 2, 1, 1, bias=False), ((4, 6, 9, 9),)),
    Example(lambda: nn.ConvTranspose1d(8, 10, 4, 2), ((8, 8, 64),)),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", EXAMPLES)
def test_oracle(example: Example, check: Check) -> None:
    check_operator("transposed_convolution", [example], checks=[check], runtime="litert")


_FORMS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 3), "padding": (0, 1), "output_padding": (0, 2)},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "stride": 3, "output_padding": 1},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": 3, "dilation": (1, 3), "stride": 2, "output_padding": 1, "groups": 2},
    {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 4, "bias": False},
    {"kernel_size": 5, "padding": 4},
]


def _check(net: nn.Module, x: Tensor, spec: str, tmp_path: Path) -> None:
    """Compare with LiteRT and with float, export and verify."""
    assert not coverage(net, x, spec=spec).fallbacks
    replays(net, x, spec=spec)
    calibrate(net, [x], spec=spec)
    with torch.no_grad():
        expected = net(x)
        with emulate(net, spec):
            result = net(x)
    torch.testing.assert_close(result, expected, atol=0.05 * float(expected.abs().max()), rtol=0)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("form", _FORMS)
def test_every_form(spec: str, form: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    _check(nn.ConvTranspose2d(4, 8, **form), torch.randn(2, 4, 5, 6), spec, tmp_path)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "form",
    [
        {"kernel_size": 8, "stride": 4, "padding": 2},
        {"kernel_size": 3, "stride": 3},
        {"kernel_size": 2, "stride": 5, "output_padding": 3},
        {"kernel_size": 2, "stride": 5, "output_padding": 4},
        {"kernel_size": 5, "stride": 5, "padding": 1, "output_padding": 2},
        {"kernel_size": 7, "stride": 3, "padding": 2, "output_padding": 1, "groups": 2},
        {"kernel_size": 3, "stride": 3, "dilation": 4, "padding": 3, "bias": False},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
        {"kernel_size": 3, "dilation": 3, "padding": 1},
    ],
)
def test_every_form_over_time(spec: str, form: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    _check(nn.ConvTranspose1d(4, 6, **form), torch.randn(2, 4, 7), spec, tmp_path)
    _check(nn.ConvTranspose1d(4, 6, **form), torch.randn(4, 7), spec, tmp_path)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("padding", [0, 1])
def test_a_batch_norm_is_folded(spec: str, padding: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, 2, padding, groups=2)
    norm = nn.BatchNorm2d(6)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, 6))
        norm.running_var.copy_(torch.linspace(0.1, 2, 6))
    net = nn.Sequential(layer, norm, nn.ReLU()).eval()
    _check(net, torch.randn(2, 4, 5, 6), spec, tmp_path)
    model = export_tflite(net, [torch.randn(2, 4, 5, 6)], tmp_path / "net.tflite")
    assert set(model.operators) <= {"TRANSPOSE_CONV", "STRIDED_SLICE", "TRANSPOSE", "RELU"}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("learned_scales", ["none", "all"])
def test_it_trains(spec: str, learned_scales: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.ConvTranspose2d(2, 4, 2, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 1, 3)
    )
    x, target = torch.randn(8, 2, 4, 4), torch.randn(8, 1, 10, 10)
    calibrate(net, [x], spec=spec)
    losses = []
    with emulate(net, spec, learned_scales=learned_scales):
        optimizer = torch.optim.Adam(net.parameters(), 0.02)
        for _ in range(30):
            loss = F.mse_loss(net(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_functions_and_their_arguments(tmp_path: Path) -> None:
    weight, bias = nn.Parameter(torch.randn(4, 3, 3)), nn.Parameter(torch.randn(6))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = weight, bias

        def forward(self, x: Tensor) -> Tensor:
            y = torch.conv_transpose1d(x, self.weight, self.bias, 2, groups=2)
            return y + F.conv_transpose1d(x, weight=self.weight, bias=None, stride=2, groups=2)

    _check(Net(), torch.randn(2, 4, 7), "litert-int8", tmp_path)


def test_three_axes_run_in_float() -> None:
    net = nn.ConvTranspose3d(2, 2, 2)
    assert coverage(net, torch.randn(1, 2, 3, 3, 3)).fallbacks


def _with_channels_of_several_sizes() -> nn.Sequential:
    """A network whose output channels have weights of very different sizes."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, 2)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-2, 1, 6).view(1, 6, 1, 1))
    return nn.Sequential(layer, nn.Flatten())


@pytest.mark.parametrize("learned_scales", ["none", "weights"])
def test_every_output_channel_has_a_scale(learned_scales: Any, tmp_path: Path) -> None:
    net, x = _with_channels_of_several_sizes(), torch.randn(4, 4, 5, 5)
    layer = net[0]
    calibrate(net, [x])
    with emulate(net, learned_scales=learned_scales) as chip:
        net(x).square().sum().backward()
        weight = chip.state.weight(layer.weight, chip.state.used_weights["0.weight"])
    largest = layer.weight.detach().abs().amax((0, 2, 3))
    torch.testing.assert_close(weight.scales, largest / 127, rtol=1e-3, atol=0)
    torch.testing.assert_close(weight.values, layer.weight.detach(), rtol=0.005, atol=0.05)
    if learned_scales == "weights":
        (scales,) = chip.scales.weights.values()
        assert scales.grad is not None
        assert scales.grad.shape == (6,)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0


def test_scales_of_channels_are_packed_and_baked(tmp_path: Path) -> None:
    net, x = _with_channels_of_several_sizes(), torch.randn(4, 4, 5, 5)
    calibrate(net, [x])
    with emulate(net) as chip, torch.no_grad():
        net(x)
        values = chip.state.weight(net[0].weight, SECOND_AXIS).values
        save_packed(net, tmp_path / "packed.safetensors")
        (row, *_) = layer_figures(net)
    assert torch.equal(load_packed(tmp_path / "packed.safetensors")["0.weight"], values)
    assert row.packed_bytes >= net[0].weight.numel() + 4 * 6
    bake(net)
    assert torch.equal(net[0].weight, values)
