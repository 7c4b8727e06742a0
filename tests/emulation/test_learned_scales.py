from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_nna import bake, calibrate, emulate
from lightning_nna.keyed_adam import KeyedAdam
from lightning_nna.testing import SmallNet
from lightning_nna.testing.contract import assert_same
from lightning_nna.testing.replay import replays

OUTPUT = "1/fully_connected#0/output"


def published(v: Tensor, s: Tensor, low: int, high: int, gradient_scale: float) -> Tensor:
    """LSQ as its appendix gives it: a scaled gradient, clip, round straight through."""
    scaled = (s - s * gradient_scale).detach() + s * gradient_scale
    clipped = (v / scaled).clamp(low, high)
    return ((clipped.round() - clipped).detach() + clipped) * scaled


def step_of(exponent: Tensor) -> Tensor:
    """The step that the chip holds, with the gradient of the power of two."""
    exact = torch.exp2(exponent.double())
    mantissa, power = torch.frexp(exact.detach())
    on_chip = torch.ldexp((mantissa * 2**16).round(), power - 16)
    # The quotient is 1 to the bit, with the gradient of the power of two.
    return exact / exact.detach() * on_chip


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_the_gradients_of_a_weight_are_those_of_the_paper(bits: int, granularity: str) -> None:
    torch.manual_seed(bits)
    net, x, upstream = nn.Linear(9, 4), torch.randn(8, 9), torch.randn(4, 9)
    spec = {"weight_bits": bits, "weight_granularity": granularity}
    rows, maximum = (1 if granularity == "per_channel" else 4), 2 ** (bits - 1) - 1
    calibrate(net, [x], spec=spec)
    with emulate(net, spec, learned_scales="weights") as chip:
        net(x)
        step = chip.scales.weights[f"weight:{rows}"]
        # Some weights of every group are to lie outside.
        with torch.no_grad():
            step -= 0.7
        values = chip.state.trainable(net.weight, rows)
        (values * upstream).sum().backward()
    exponent = step.detach().clone().requires_grad_()
    weight = net.weight.detach().double().requires_grad_()
    s = step_of(exponent).repeat_interleave(rows)[:, None]
    expected = published(weight, s, -maximum, maximum, 1 / math.sqrt(rows * 9 * maximum))
    (expected * upstream).sum().backward()
    assert torch.equal(values.detach(), expected.detach().float())
    assert net.weight.grad is not None
    assert 0 < int((net.weight.grad == 0).sum()) < 36
    torch.testing.assert_close(net.weight.grad, weight.grad.float())
    torch.testing.assert_close(step.grad, exponent.grad)


@pytest.mark.parametrize("width", [8, 16])
def test_the_gradient_of_an_output_is_that_of_the_paper(width: int) -> None:
    torch.manual_seed(0)
    net, x, upstream = nn.Sequential(nn.Tanh(), nn.Linear(9, 4)), torch.randn(32, 9), torch.ones(4)
    spec = {"activation_bits": width, "accumulator_bits": 64}
    calibrate(net, [x], spec=spec)
    with emulate(net, spec, learned_scales="all") as chip:
        step = chip.scales.activations[OUTPUT]
        with torch.no_grad():
            step -= 1.0
        hidden = net[0](x)
        result = net[1](hidden)
        (result * upstream).sum().backward()
        grid, weight = chip.state.qparams_of(result), chip.state.weight(net[1].weight, 1).values
    assert grid is not None
    v = F.linear(hidden, weight, net[1].bias).detach().double()
    low, high = grid.bounds
    exponent = step.detach().clone().requires_grad_()
    # Of the exponent itself: a 16-bit grid has too short a significand to hold it.
    s = torch.exp2(exponent.double())
    s = s * (grid.scale / s.detach())
    expected = published(v, s, low, high, 1 / math.sqrt(v.numel() * grid.largest))
    (expected * upstream).sum().backward()
    assert bool((v > high * grid.scale).any())
    torch.testing.assert_close(result.detach().double(), expected.detach(), rtol=0, atol=grid.scale)
    torch.testing.assert_close(step.grad, exponent.grad, rtol=1e-4, atol=1e-7)


def test_learning_starts_where_the_emulation_is_without() -> None:
    torch.manual_seed(0)
    net, x = SmallNet(), torch.randn(32, 4)
    calibrate(net, [x])
    with emulate(net):
        without = net(x)
    with emulate(net, learned_scales="all") as chip:
        assert torch.equal(net(x), without)
    assert sorted(chip.scales.weights) == ["first.weight:1", "second.weight:1", "third.weight:1"]
    # Tanh and sigmoid have the grids that the reference fixes.
    labels = {key.rsplit("/", 2)[1].split("#")[0] for key in chip.scales.activations}
    assert labels == {"fully_connected", "add", "mul"}


def test_nothing_is_learned_unless_asked_for() -> None:
    net, x = SmallNet(), torch.randn(32, 4)
    calibrate(net, [x])
    with emulate(net) as chip:
        net(x).sum().backward()
        assert chip.state.trainable(net.first.weight, 1) is net.first.weight
    assert chip.scales.tensors() == {}


class Body(nn.Module):
    """One weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.layer(torch.tanh(self.layer(x))))


class Again(nn.Module):
    """A body that perhaps runs again in the backward, and its layer once more outside."""

    def __init__(self) -> None:
        super().__init__()
        self.kind, self.body = "plain", Body()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "plain":
            return self.body.layer(self.body(x))
        return self.body.layer(checkpoint(self.body, x, use_reentrant=self.kind == "reentrant"))


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("learned", ["none", "all"])
def test_checkpointed_activations_give_the_same_gradients(kind: str, learned: str) -> None:
    torch.manual_seed(0)
    nets, x = [Again(), Again()], torch.randn(16, 6, requires_grad=True)
    nets[1].load_state_dict(nets[0].state_dict())
    grads = []
    for net, own_kind in zip(nets, ("plain", kind), strict=True):
        calibrate(net, [x])
        net.kind = own_kind
        with emulate(net, learned_scales=learned) as chip:  # type: ignore[arg-type]
            net(x).square().sum().backward()
        log2_scales = sorted(chip.scales.tensors().items())
        grads.append([net.body.layer.weight.grad, *(step.grad for _, step in log2_scales)])
    assert len(grads[0]) == (1 if learned == "none" else 4)
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_what_follows_in_place_is_allowed() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), torch.randn(8, 4)
    calibrate(net, [x])
    with emulate(net, learned_scales="all") as chip:
        net(x).sum().backward()
    assert chip.scales.activations["0/fully_connected#0/output"].grad is not None


def train(net: nn.Module, x: Tensor, optimizer: KeyedAdam, updates: int) -> None:
    """Some updates of the weights and scales of an emulated module."""
    with emulate(net, learned_scales="all") as chip:
        ordinary = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(updates):
            ordinary.zero_grad()
            net(x).square().mean().backward()
            ordinary.step()
            optimizer.update(chip.scales.tensors())


def trained_for(learned: str, seed: int) -> float:
    """Squared error of a network with 3-bit weights after training on what it gave in float."""
    # PyTorch's random numbers differ with the instructions of a processor, NumPy's do not.
    draw = np.random.default_rng(seed)
    net, spec = SmallNet(8, 32, 4), {"preset": "litert-int8", "weight_bits": 3}
    with torch.no_grad():
        for parameter in net.parameters():
            values = draw.uniform(-1, 1, parameter.shape) / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.from_numpy(values))
    x = torch.from_numpy(draw.standard_normal((256, 8))).float()
    y = net(x).detach()
    calibrate(net, [x], spec=spec)
    ordinary, optimizer = torch.optim.Adam(net.parameters(), 1e-3), KeyedAdam(0.01)
    with emulate(net, spec, fidelity="fast", learned_scales=learned) as chip:  # type: ignore[arg-type]
        for _ in range(100):
            ordinary.zero_grad()
            F.mse_loss(net(x), y).backward()
            ordinary.step()
            optimizer.update(chip.scales.tensors())
    with torch.no_grad(), emulate(net, spec):
        return float(F.mse_loss(net(x), y))


@pytest.mark.parametrize("seed", [0, 1])
def test_learned_steps_lower_the_error_of_weights_of_few_bits(seed: int) -> None:
    assert trained_for("weights", seed) < 0.6 * trained_for("none", seed)


@pytest.mark.exactness
@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_what_was_trained_is_what_litert_computes(spec: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)

    def learn(net: nn.Module, chip: object) -> None:
        assert chip is not None
        optimizer, ordinary = KeyedAdam(0.05), torch.optim.SGD(net.parameters(), lr=0.1)
        chip.learn("all")  # type: ignore[attr-defined]
        for _ in range(4):
            net(x).square().mean().backward()
            ordinary.step()
            optimizer.update(chip.scales.tensors())  # type: ignore[attr-defined]
        chip.learn("none")  # type: ignore[attr-defined]
        moved = optimizer.state_dict()
        assert {"first.weight:1", "first/fully_connected#0/output"} <= moved.keys()

    compared = replays(SmallNet(), x, spec=spec, train=learn)
    assert compared["FULLY_CONNECTED"] == 64 * (8 + 8 + 3)


def test_what_is_baked_lies_on_the_learned_grid() -> None:
    torch.manual_seed(0)
    net, x = SmallNet(), torch.randn(32, 4)
    chip = calibrate(net, [x])
    train(net, x, KeyedAdam(0.05), 3)
    with torch.no_grad(), emulate(net):
        on_chip = net(x)
    state, exponent = chip.state_dict(), chip.scales.weights["first.weight:1"].detach()
    bake(net)
    integers = net.first.weight.detach() / step_of(exponent)[:, None]
    assert torch.equal(integers, integers.round())
    assert float(integers.abs().max()) <= 127
    with torch.no_grad(), emulate(net) as again:
        again.load_state_dict(state)
        assert torch.equal(net(x), on_chip)


def test_rows_of_zeros_and_frozen_weights() -> None:
    torch.manual_seed(0)
    net, x = SmallNet(), torch.randn(32, 4)
    nn.init.zeros_(net.first.weight[0])
    nn.init.zeros_(net.third.weight)
    net.second.weight.requires_grad_(False)
    calibrate(net, [x])
    with emulate(net, learned_scales="weights") as chip:
        net(x).sum().backward()
        assert list(chip.scales.weights) == ["first.weight:1"]
        step = chip.scales.weights["first.weight:1"]
        assert torch.equal(step[0], step.max())
        torch.nn.init.ones_(net.third.weight)
        net(x)
        assert list(chip.scales.weights) == ["first.weight:1", "third.weight:1"]


def test_a_scaled_gradient_is_divided_and_one_that_overflowed_dropped() -> None:
    torch.manual_seed(0)
    nets, x = [SmallNet(), SmallNet()], torch.randn(32, 4)
    nets[1].load_state_dict(nets[0].state_dict())
    states = []
    for net, scale in zip(nets, (1.0, 1024.0), strict=True):
        chip, optimizer = calibrate(net, [x]), KeyedAdam(0.05)
        for factor in (scale, scale * 1e38 * 1e3, scale):
            with emulate(net, learned_scales="all"):
                (net(x).square().sum() * factor).backward()
                optimizer.update(chip.scales.tensors(), divisor=scale)
        states.append((chip.scales.state_dict(), optimizer.state_dict()))
    assert_same(*states)
    assert float(states[0][1]["first.weight:1"]["step"]) == 2


def test_the_optimizer_goes_on_where_its_state_was_taken() -> None:
    torch.manual_seed(0)
    net, x = SmallNet(), torch.randn(32, 4)
    chip = calibrate(net, [x])
    first = KeyedAdam(0.05)
    train(net, x, first, 3)
    weights, before, state = net.state_dict(), chip.state_dict(), first.state_dict()
    weights = {name: value.clone() for name, value in weights.items()}
    train(net, x, first, 3)
    expected = chip.scales.state_dict()
    net.load_state_dict(weights)
    chip.load_state_dict(before)
    second = KeyedAdam(0.05)
    second.load_state_dict(state)
    train(net, x, second, 3)
    assert_same(chip.scales.state_dict(), expected)


def test_wrong_settings_are_named() -> None:
    net, x = SmallNet(), torch.randn(4, 4)
    calibrate(net, [x])
    wrong = emulate(net, learned_scales="biases")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"learned_scales must be one of .*got 'biases'"):
        wrong.__enter__()
    with pytest.raises(ValueError, match=r"a learning rate must be positive, got 0\.0"):
        KeyedAdam(0.0)


class Computed(nn.Module):
    """A weight that is computed from a parameter has no step."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.gain.exp())


def test_a_weight_that_an_evaluation_computes_has_no_count_of_changes() -> None:
    torch.manual_seed(0)
    net, x = Computed(), torch.randn(8, 4)
    calibrate(net, [x])
    with emulate(net, learned_scales="all") as chip:
        expected = net(x).detach()
    assert chip.scales.weights == {}
    with torch.inference_mode(), emulate(net):
        assert torch.equal(net(x), expected)
