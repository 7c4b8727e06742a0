"""Convolutions: every integer is LiteRT's, and the gradient is the float convolution's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.testing.replay import replays
from tests.emulation import oracle

# Name, layer, shape of the input, and the instructions that it becomes.
CASES: dict[str, tuple[Any, tuple[int, ...], set[str]]] = {
    "time": (lambda: nn.Conv1d(12, 20, 5), (6, 12, 100), {"CONV_2D"}),
    "time, same": (lambda: nn.Conv1d(12, 20, 4, padding="same"), (6, 12, 100), {"CONV_2D"}),
    "time, strided": (
        lambda: nn.Conv1d(12, 20, 5, stride=2, padding=2, bias=False),
        (8, 12, 150),
        {"PAD", "CONV_2D"},
    ),
    "time, dilated": (
        lambda: nn.Conv1d(12, 20, 3, dilation=4, padding=4),
        (6, 12, 100),
        {"CONV_2D"},
    ),
    "time, causal": (
        lambda: nn.Sequential(nn.ConstantPad1d((4, 0), 0.0), nn.Conv1d(12, 20, 5)),
        (6, 12, 100),
        {"CONV_2D"},
    ),
    "time, depthwise": (
        lambda: nn.Conv1d(24, 24, 31, padding=15, groups=24),
        (4, 24, 120),
        {"DEPTHWISE_CONV_2D"},
    ),
    "time, twice depthwise": (
        lambda: nn.Conv1d(12, 24, 7, padding=1, groups=12, bias=False),
        (6, 12, 100),
        {"PAD", "DEPTHWISE_CONV_2D"},
    ),
    "picture": (
        lambda: nn.Conv2d(4, 16, (3, 5), stride=2, padding=(1, 2)),
        (8, 4, 21, 41),
        {"CONV_2D"},
    ),
    "picture, even": (
        lambda: nn.Conv2d(1, 24, 3, stride=2, padding=1),
        (4, 1, 20, 40),
        {"PAD", "CONV_2D"},
    ),
    "picture, depthwise": (
        lambda: nn.Conv2d(16, 16, 3, padding="same", dilation=2, groups=16),
        (4, 16, 15, 12),
        {"DEPTHWISE_CONV_2D"},
    ),
    "picture, groups": (
        lambda: nn.Conv2d(12, 18, 3, groups=3),
        (6, 12, 14, 15),
        {"CONV_2D"},
    ),
}


@pytest.mark.exactness
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", CASES)
def test_every_output_is_the_references(name: str, bits: int) -> None:
    layer, shape, instructions = CASES[name]
    torch.manual_seed(0)
    spec = {8: "litert-int8", 16: "litert-int16x8"}[bits]
    loud = [3 * torch.randn(shape)]
    compared = replays(layer(), torch.randn(shape), inputs=loud, spec=spec)
    assert set(compared) == instructions | {"QUANTIZE"}
    assert compared[max(compared, key=lambda key: key.endswith("CONV_2D"))] >= 10_000


@pytest.mark.exactness
@pytest.mark.parametrize("spec", [{"weight_granularity": "per_tensor"}, {"weight_bits": 4}])
def test_other_weights(spec: dict[str, Any]) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv1d(8, 24, 3), nn.ReLU(), nn.Conv1d(24, 24, 9, groups=24))
    compared = replays(net, torch.randn(8, 8, 80), spec=spec)
    assert compared["CONV_2D"] + compared["DEPTHWISE_CONV_2D"] >= 25_000


@pytest.mark.exactness
@pytest.mark.parametrize("bits", [8, 16])
def test_weights_whose_sums_leave_float32(bits: int) -> None:
    torch.manual_seed(2)
    layer = nn.Conv1d(1600, 16, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(0, 2, layer.weight.shape) * 2.0 - 1)
    x = torch.randn(4, 1600, 160).sign() * torch.rand(4, 1, 160)
    spec = {8: "litert-int8", 16: "litert-int16x8"}[bits]
    assert replays(layer, x, spec=spec)["CONV_2D"] >= 10_000


def test_an_example_without_a_batch() -> None:
    torch.manual_seed(3)
    layer, x = nn.Conv1d(3, 5, 3), torch.randn(3, 20)
    with emulate(layer) as chip:
        with chip.observing():
            layer(x)
        assert torch.equal(layer(x), layer(x[None])[0])


@pytest.mark.parametrize("name", CASES)
def test_fast_differs_in_less_than_a_thousandth_of_the_outputs(name: str) -> None:
    make, shape, _ = CASES[name]
    torch.manual_seed(4)
    layer, x = make(), torch.randn(shape)
    with torch.no_grad(), emulate(layer) as chip:
        with chip.observing():
            layer(x)
        exact = layer(x)
        with chip.running(fidelity="fast"):
            assert float((exact != layer(x)).float().mean()) < 1e-3


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
@pytest.mark.parametrize("groups", [1, 4, 12])
def test_the_gradient_is_the_float_convolutions(groups: int, fidelity: Any) -> None:
    torch.manual_seed(5)
    layer = nn.Conv1d(12, 24, 4, stride=2, padding="valid", groups=groups)
    x = torch.randn(3, 12, 40)
    with emulate(layer, fidelity=fidelity) as chip:
        with chip.observing():
            layer(2 * x)  # Wide ranges: nothing is clipped.
        step = oracle.grid(chip, "./convolution#0/input").scale
        x = (x / step).round().mul(step).requires_grad_()
        y = layer(x)
        slopes = torch.randn_like(y)
        y.backward(slopes)
        weight = chip.state.weight(layer.weight, 1).values
    operands = [t.detach().clone().requires_grad_() for t in (x, weight, layer.bias)]
    F.conv1d(*operands, stride=2, groups=groups).backward(slopes)
    for found, operand in zip((x, layer.weight, layer.bias), operands, strict=True):
        assert torch.allclose(found.grad, operand.grad, rtol=0, atol=1e-4)


def test_no_gradient_where_the_output_is_clipped() -> None:
    layer = nn.Conv1d(1, 1, 1, bias=False)
    nn.init.ones_(layer.weight)
    x = torch.tensor([[[-3.0, -0.5, 0.25, 3.0]]], requires_grad=True)
    with emulate(layer) as chip:
        with chip.observing():
            layer(x.clamp(-1, 1))
        # Let the operand pass: what is clipped here is the output alone.
        chip.ranges["./convolution#0/input"].update(x, -4.0, 4.0)
        layer(x).sum().backward()
    assert torch.equal(x.grad != 0, torch.tensor([[[False, True, True, False]]]))


def test_autocast_does_not_reach_the_chip() -> None:
    torch.manual_seed(6)
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 9, 9)
    with emulate(layer) as chip:
        with chip.observing():
            layer(x)
        plain: Tensor = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), plain)
