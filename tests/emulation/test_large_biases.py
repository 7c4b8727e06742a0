"""A channel of tiny weights keeps its bias: its scale grows until the bias fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import bake, calibrate, emulate
from lightning_nna.deploy import export_tflite, load_packed, run_tflite, save_packed
from lightning_nna.emulation.arithmetic.quantized_weight import (
    QuantizedWeight,
    with_scales_of_at_least,
)
from lightning_nna.emulation.operators.linear import integer_bias
from lightning_nna.emulation.telemetry import Telemetry
from lightning_nna.testing.replay import check_instructions

SPECS = {8: "litert-int8", 16: "litert-int16x8"}


def tiny(layer: nn.Module, times: float) -> nn.Module:
    """The layer with a tiny channel and an empty one, and biases of 1 and -1 there."""
    with torch.no_grad():
        layer.weight[0] *= times
        layer.weight[1] = 0
        layer.bias[0], layer.bias[1] = 1.0, -1.0
    return nn.Sequential(layer)


def normed(layer: nn.Module, norm: nn.Module, gamma: float) -> nn.Module:
    """A layer before a norm that multiplies one channel with next to nothing."""
    with torch.no_grad():
        norm.weight[0], norm.weight[1] = gamma, -1.0
        norm.bias.copy_(torch.linspace(-1.0, 1.0, len(norm.bias)))
    return nn.Sequential(layer, norm).eval()


class Last(nn.Module):
    """A recurrent layer's outputs, with tiny weights at its input."""

    def __init__(self, layer: nn.Module, times: float) -> None:
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            layer.weight_ih_l0.mul_(times)
            layer.bias_ih_l0.mul_(3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


Case = tuple[Callable[[], nn.Module], tuple[int, ...], int]
# A module, the shape of its input, and how many of its channels need a larger scale in 8 bits.
CASES: dict[str, Case] = {
    "linear": (lambda: tiny(nn.Linear(16, 6), 1e-6), (30, 16), 2),
    "convolution": (lambda: tiny(nn.Conv2d(4, 6, 3, padding=1), 1e-7), (2, 4, 6, 6), 2),
    "depthwise": (lambda: tiny(nn.Conv1d(4, 4, 3, groups=4), 1e-7), (3, 4, 9), 2),
    "folded": (lambda: normed(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), 1e-8), (2, 4, 6, 6), 1),
    "folded_negative": (lambda: normed(nn.Linear(4, 6), nn.BatchNorm1d(6), -1e-8), (30, 4), 1),
    "folded_nothing": (lambda: normed(nn.Linear(4, 6), nn.BatchNorm1d(6), 0.0), (30, 4), 1),
    "norm_alone": (lambda: normed(nn.Identity(), nn.BatchNorm1d(6), 1e-8), (30, 6), 1),
    "lstm": (lambda: Last(nn.LSTM(8, 6), 1e-9), (5, 3, 8), 24),
    "gru": (lambda: Last(nn.GRU(8, 6), 1e-12), (5, 3, 8), 18),
}


@pytest.mark.exactness
@pytest.mark.parametrize("learned", ["none", "all"])
@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", CASES)
def test_a_bias_beside_tiny_weights_is_the_float_one_and_litert_has_it(
    name: str, bits: int, learned: str
) -> None:
    make, shape, raised = CASES[name]
    torch.manual_seed(0)
    module, x = make(), torch.randn(shape)
    with torch.no_grad():
        expected = module(x)
    recorded: list = []
    with emulate(module, SPECS[bits]) as chip:
        with chip.observing(), torch.no_grad():
            module(x)
        chip.learn(learned)
        telemetry = Telemetry()
        with chip.running(recorder=recorded.append, telemetry=telemetry):
            result = module(x)
        result.square().mean().backward()
        with chip.running(fidelity="fast", telemetry=telemetry):
            fast = module(x).detach()
    result = result.detach()
    check_instructions(recorded)
    # The rounding of 8-bit weights, and that of the output.
    assert float((result - expected).abs().max()) < 0.03 * float(expected.abs().max())
    assert float((fast - result).abs().max()) < 0.01 * float(expected.abs().max())
    assert all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)
    coarser = max(row.coarser for row in telemetry.sites.values())
    assert coarser >= {8: raised, 16: 1}[bits]


@pytest.mark.parametrize("power_of_two", [False, True])
def test_scales_that_are_raised_hold_the_bias_and_are_scales_of_the_chip(
    power_of_two: bool,
) -> None:
    torch.manual_seed(0)
    stored = torch.randint(-127, 128, (6, 40), dtype=torch.int8)
    scales = torch.ldexp(torch.ones(6), torch.tensor([-3, -30, -40, -50, -60, -20]))
    weight, bias = QuantizedWeight(stored, scales), torch.linspace(-3.0, 3.0, 6)
    smallest = bias.abs().double() / (0.037 * 2**30)
    raised = with_scales_of_at_least(weight, smallest, power_of_two=power_of_two)
    assert torch.equal(raised.stored[0], stored[0])
    assert raised.scales[0] == scales[0]
    mantissa = torch.frexp(raised.scales).mantissa * (2 if power_of_two else 2**16)
    assert torch.equal(mantissa, mantissa.round())
    biases = integer_bias(bias, 0.037 * raised.scales.double())
    assert float(biases.abs().max()) <= 2**30
    assert float((raised.values - weight.values).abs().max()) <= float(raised.scales.max()) / 2


def test_rows_that_share_a_scale_go_on_sharing_it() -> None:
    stored = torch.arange(-64, 64, dtype=torch.int8).reshape(4, 32)
    stored[:, 0] = 100
    weight = QuantizedWeight(stored, torch.ones(4))
    smallest = torch.tensor([0.1, 0.2, 4.0, 0.1], dtype=torch.float64)
    raised = with_scales_of_at_least(weight, smallest, rows_per_scale=2)
    assert raised.scales.tolist() == [1.0, 1.0, 4.0, 4.0]
    assert raised.stored[:, 0].tolist() == [100, 100, 25, 25]


def test_a_tensor_of_few_integers_keeps_them() -> None:
    centroids = torch.tensor([-90, -20, 20, 90], dtype=torch.int8)
    torch.manual_seed(0)
    stored = centroids[torch.randint(0, 4, (5, 50))]
    weight = QuantizedWeight(stored, torch.ones(5))
    smallest = torch.tensor([0.0, 1.5, 3.0, 80.0, 1e9], dtype=torch.float64)
    raised = with_scales_of_at_least(weight, smallest)
    assert set(raised.stored.unique().tolist()) <= {0, *centroids.tolist()}
    assert not raised.stored[4].any()


@pytest.mark.exactness
def test_baked_packed_and_exported_it_is_the_same_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 6))
    with torch.no_grad():
        net[0].weight[:3] *= 1e-6
        net[0].bias[:3] = torch.tensor([1.0, 0.5, -1.0])
    x = torch.randn(40, 16)
    with torch.no_grad():
        expected = net(x)
    chip = calibrate(net, [x])
    with emulate(net, chip.spec), torch.no_grad():
        emulated = net(x)
    assert float((emulated - expected).abs().max()) < 0.03 * float(expected.abs().max())
    path = tmp_path / "net.tflite"
    export_tflite(net, [x], path)
    save_packed(net, tmp_path / "net.safetensors")
    (deployed,) = run_tflite(path, [x])
    torch.testing.assert_close(torch.as_tensor(deployed), emulated, rtol=0, atol=0)
    ranges = chip.state_dict()
    bake(net)
    baked = {name: value.clone() for name, value in net.state_dict().items()}
    for state in (baked, load_packed(tmp_path / "net.safetensors")):
        net.load_state_dict(state)
        with emulate(net) as again, torch.no_grad():
            again.load_state_dict(ranges)
            torch.testing.assert_close(net(x), emulated, rtol=0, atol=0)
