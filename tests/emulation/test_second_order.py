"""Emulated operators are differentiated once; twice is an error, or right without emulation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_nna import calibrate, emulate
from lightning_nna.emulation.learned_scales import Learned
from lightning_nna.emulation.operators.catalog import operators
from tests.emulation.modules import Function

ERROR = (
    r"an emulated operator \({}\) has no second derivative, .*outside of emulate, or with targets"
)
SPECS = ("litert-int8", "litert-int16x8")
FLAT, SEQUENCE, IMAGE = (4, 8), (3, 4, 8), (2, 4, 6, 6)


class Layer(nn.Module):
    """A function of a layer and an input."""

    def __init__(self, layer: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer, x)


def first(layer: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = layer(x)[0]
    return result


def attended(layer: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = layer(x, x, x)[0]
    return result


#: By name: the module, the shape of its input, and what the error calls the operator.
OPERATORS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear": (lambda: nn.Linear(8, 8), FLAT, "linear"),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3), SEQUENCE, "convolution"),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3), IMAGE, "convolution"),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), IMAGE, "convolution"),
    "conv and batch norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        IMAGE,
        "batch normalization of a layer",
    ),
    "linear and batch norm": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)),
        FLAT,
        "batch normalization of a layer",
    ),
    "gelu": (nn.GELU, FLAT, "gelu"),
    "leaky relu": (nn.LeakyReLU, FLAT, "leaky_relu"),
    "elu": (nn.ELU, FLAT, "elu"),
    "hard_swish": (nn.Hardswish, FLAT, "hard_swish"),
    "silu": (nn.SiLU, FLAT, ".*"),
    "tanh": (nn.Tanh, FLAT, "tanh"),
    "sigmoid": (nn.Sigmoid, FLAT, "sigmoid"),
    "hardsigmoid": (nn.Hardsigmoid, FLAT, "mul"),
    "rms norm": (lambda: nn.RMSNorm(8), FLAT, "rms_norm"),
    "layer norm": (lambda: nn.LayerNorm(8), FLAT, "layer_norm"),
    "lstm": (lambda: Layer(nn.LSTM(8, 8), first), SEQUENCE, "lstm"),
    "gru": (lambda: Layer(nn.GRU(8, 8), first), SEQUENCE, ".*"),
    "softmax": (lambda: nn.Softmax(-1), FLAT, "softmax"),
    "log_softmax": (lambda: nn.LogSoftmax(-1), FLAT, "log_softmax"),
    "add": (lambda: Function(lambda x: x + x.flip(0)), FLAT, "add"),
    "mul": (lambda: Function(lambda x: x * x.flip(0)), FLAT, "mul"),
    "mean": (lambda: Function(lambda x: x.mean(0)), FLAT, "mean"),
    "matmul": (lambda: Function(lambda x: x @ x.T), FLAT, "matmul"),
    "attention": (lambda: Layer(nn.MultiheadAttention(8, 2), attended), SEQUENCE, ".*"),
}
#: The last instruction, where 16 bits have several.
LAST_IN_16_BITS = {"gelu": "mul", "hard_swish": "mul"}
CASES = [
    pytest.param(name, spec, id=f"{name}-{spec}")
    for name in OPERATORS
    for spec in SPECS
    if spec == "litert-int8" or name not in operators() or 16 in operators()[name].widths
]


def made(name: str, spec: str) -> tuple[nn.Module, Tensor]:
    """A calibrated module and its input."""
    torch.manual_seed(0)
    net, shape = OPERATORS[name][0](), OPERATORS[name][1]
    x = torch.randn(shape)
    calibrate(net, [x], spec=spec)
    return net, x.requires_grad_()


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_a_second_derivative_is_an_error_that_names_the_operator(name: str, spec: str) -> None:
    net, x = made(name, spec)
    wide = spec == "litert-int16x8"
    error = ERROR.format(
        LAST_IN_16_BITS[name] if wide and name in LAST_IN_16_BITS else OPERATORS[name][2]
    )
    with emulate(net, spec):
        with pytest.raises(RuntimeError, match=error):
            torch.autograd.grad(net(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=error):
            net(x).sum().backward(create_graph=True)


@pytest.mark.parametrize("spec", SPECS)
def test_what_rounds_alone_has_the_second_derivative_of_its_function(spec: str) -> None:
    net, x = Function(lambda x: torch.atan(F.relu(x))), torch.randn(4, 8)
    calibrate(net, [x], spec=spec)
    x.requires_grad_()
    with emulate(net, spec):
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x)
    # The arctangent takes the quantized input.
    expected = torch.where(x > 0, -2 * x / (1 + x * x).square(), 0.0)
    assert bool(expected.any())
    torch.testing.assert_close(curvature, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("learned", ["weights", "all"])
def test_learned_scales_have_no_second_derivative(learned: Learned) -> None:
    net, x = made("linear", "litert-int8")
    with emulate(net, learned_scales=learned) as chip:
        loss = net(x).square().sum()
        scales = list(chip.scales.tensors().values())
        assert scales
        with pytest.raises(RuntimeError, match=ERROR.format("(linear|learned scale of .*)")):
            torch.autograd.grad(loss, scales, create_graph=True)


def test_a_hessian_is_an_error() -> None:
    net, x = made("mul", "litert-int8")
    with emulate(net), pytest.raises(RuntimeError, match=ERROR.format("mul")):
        torch.autograd.functional.hessian(lambda x: net(x).sum(), x)


class Critic(nn.Module):
    """A front end and a head, as the critic of a WGAN-GP."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2))
        self.head = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.front(x))
        return result


def penalty(score: Tensor, x: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def test_a_penalty_outside_of_the_emulation_is_the_one_of_float() -> None:
    torch.manual_seed(0)
    critic, x = Critic(), torch.randn(4, 8)
    alone = copy.deepcopy(critic)
    calibrate(critic, [x])
    x.requires_grad_()
    with emulate(critic):
        critic(x).mean().backward()
        with pytest.raises(RuntimeError, match=ERROR.format(".*")):
            penalty(critic(x), x).backward()
    critic.zero_grad()
    penalty(critic(x), x).backward()
    penalty(alone(x), x).backward()
    grads = [[p.grad for p in net.parameters()] for net in (critic, alone)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_targets_that_leave_the_head_out_let_its_penalty_train_all() -> None:
    torch.manual_seed(0)
    critic, x = Critic(), torch.randn(4, 8)
    calibrate(critic, [x], targets=["front*"])
    with emulate(critic, targets=["front*"]):
        features = critic.front(x)
        penalty(critic.head(features), features).backward()
    found = [p.grad for p in critic.parameters()]

    alone = copy.deepcopy(critic)
    alone.zero_grad()
    leaf = features.detach().requires_grad_()
    penalty(alone.head(leaf), leaf).backward()
    expected = [p.grad for p in alone.head.parameters()]
    torch.testing.assert_close(found[-len(expected) :], expected, rtol=0, atol=0)
    assert found[0] is not None
    assert bool(found[0].any())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_of_activations_give_the_same_gradients(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.RMSNorm(8), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    calibrate(net, [x])
    x.requires_grad_()
    leaves, found = [x, *net.parameters()], []
    with emulate(net):
        for y in (net(x), checkpoint(net, x, use_reentrant=use_reentrant)):
            for leaf in leaves:
                leaf.grad = None
            y.square().sum().backward()
            found.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_second_derivative_through_a_checkpoint_is_an_error() -> None:
    net, x = made("gelu", "litert-int8")
    with emulate(net):
        y = checkpoint(net, x, use_reentrant=False)
        with pytest.raises(RuntimeError, match=ERROR.format("gelu")):
            y.sum().backward(create_graph=True)
