"""What works in place gives the values and the gradients of what does not, to the bit.

The other side of every comparison is the same network without in-place functions, on the same
chip: its functions are held against float and LiteRT elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
from lightning_nna.emulation.learned_scales import Learned
from lightning_nna.emulation.operators.catalog import operators
from lightning_nna.emulation.telemetry import Telemetry
from lightning_nna.testing.operator_oracle import in_place_forms
from tests.emulation.modules import Function


class Of(nn.Module):
    """A function of the input and two parameters."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.vector, self.matrix = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.vector, self.matrix)


class FirstResult(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        result: Tensor = self.layer(*inputs)[0]
        return result


class LastState(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        states = self.layer(x)[1]
        result: Tensor = states[0] if isinstance(states, tuple) else states
        return result


def thrice(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x, x, x


FLAT, SEQUENCE, IMAGE = (4, 8), (2, 4, 8), (2, 8, 5, 5)
#: What may stand before an in-place function: all that float training allows there.
PRODUCERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 8), FLAT),
    "linear over a sequence": (lambda: nn.Linear(8, 8, bias=False), SEQUENCE),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), SEQUENCE),
    "conv2d": (lambda: nn.Conv2d(8, 8, 3), IMAGE),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), IMAGE),
    "folded": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), IMAGE),
    "folded linear": (lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), FLAT),
    "batch norm": (lambda: nn.BatchNorm2d(8), IMAGE),
    "layer norm": (lambda: nn.LayerNorm(8), FLAT),
    "rms norm": (lambda: nn.RMSNorm(8), FLAT),
    "silu": (nn.SiLU, FLAT),
    "leaky relu": (nn.LeakyReLU, FLAT),
    "hard sigmoid": (nn.Hardsigmoid, FLAT),
    "dropout": (lambda: Of(lambda x, v, m: F.dropout(x * v)), FLAT),
    "add": (lambda: Of(lambda x, v, m: x + v), FLAT),
    "sub": (lambda: Of(lambda x, v, m: x - v), FLAT),
    "mul": (lambda: Of(lambda x, v, m: x * v), FLAT),
    "div": (lambda: Of(lambda x, v, m: x / 3), FLAT),
    "matmul": (lambda: Of(lambda x, v, m: x @ m), FLAT),
    "bmm": (lambda: Of(lambda x, v, m: x[None].bmm(x.T[None])), FLAT),
    "cat": (lambda: Of(lambda x, v, m: torch.cat([x * v, x])), FLAT),
    "stack": (lambda: Of(lambda x, v, m: torch.stack([x * v, x])), FLAT),
    "mean": (lambda: Of(lambda x, v, m: (x * v).mean(0)), FLAT),
    "sum": (lambda: Of(lambda x, v, m: (x * v).sum(0)), FLAT),
    "glu": (lambda: Of(lambda x, v, m: F.glu(x * v)), FLAT),
    "view": (lambda: Of(lambda x, v, m: (x * v).view(8, -1).T), FLAT),
    "lstm": (lambda: FirstResult(nn.LSTM(8, 8)), SEQUENCE),
    "state of a gru": (lambda: LastState(nn.GRU(8, 8)), SEQUENCE),
    "attention": (
        lambda: nn.Sequential(Function(thrice), _Spread(nn.MultiheadAttention(8, 2))),
        SEQUENCE,
    ),
}
#: One of each kind.
FEW = ("linear", "conv2d", "add", "mul", "cat", "view")


class _Spread(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = FirstResult(attention)

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        result: Tensor = self.attention(*inputs)
        return result


#: In-place forms of all operators, and what they stand for; then forms with other arguments, and
#: functions that are no operator.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    **{
        label: (in_place, plain)
        for operator in operators().values()
        for label, in_place, plain in in_place_forms(operator)
    },
    "relu by keyword": (lambda x: F.relu(input=x, inplace=True), F.relu),
    "relu6 by position": (lambda x: F.relu6(x, True), F.relu6),
    "hardtanh of relu6": (lambda x: F.hardtanh(x, 0.0, 6.0, inplace=True), F.relu6),
    "leaky_relu of 0.2": (
        lambda x: F.leaky_relu(x, 0.2, inplace=True),
        lambda x: F.leaky_relu(x, 0.2),
    ),
    "dropout": (lambda x: F.dropout(x, 0.5, True, True), lambda x: F.dropout(x, 0.5)),
    "mul_": (lambda x: x.mul_(x.clone()), lambda x: x.mul(x.clone())),
    "div_ by 3": (lambda x: x.div_(3.0), lambda x: x.div(3.0)),
    "mish": (lambda x: F.mish(x, inplace=True), F.mish),
    "clamp_": (lambda x: x.clamp_(min=0.1), lambda x: x.clamp(min=0.1)),
}


class Branches(nn.Module):
    """Every producer, followed by one function."""

    def __init__(self, names: tuple[str, ...], function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.producers = nn.ModuleList(PRODUCERS[name][0]() for name in names)
        self.function = function

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        pairs = zip(self.producers, inputs, strict=True)
        return [self.function(producer(x)) * 2 for producer, x in pairs]


def trained(
    net: Branches, inputs: list[Tensor], spec: str, learned: Learned = "none"
) -> list[Tensor]:
    """Results and gradients of a step of emulated training."""
    torch.manual_seed(1)
    calibrate(net, [[x.detach() for x in inputs]], spec=spec)
    with (
        emulate(net, spec, learned_scales=learned) as chip,
        chip.running(telemetry=Telemetry()),
    ):
        results = net([x * 1 for x in inputs])
        sum((y * y).sum() for y in results).backward()
        steps = [step.grad for step in chip.scales.activations.values() if step.grad is not None]
    grads = [x.grad for x in (*inputs, *net.parameters())]
    return [*(y.detach() for y in results), *(g for g in grads if g is not None), *steps]


def compared(
    names: tuple[str, ...], function: str, spec: str, learned: Learned = "none"
) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    in_place = Branches(names, FUNCTIONS[function][0])
    plain = copy.deepcopy(in_place)
    plain.function = FUNCTIONS[function][1]
    inputs = [torch.randn(PRODUCERS[name][1]) for name in names]
    first, second = (
        trained(net, [x.clone().requires_grad_() for x in inputs], spec, learned)
        for net in (in_place, plain)
    )
    return first, second


@pytest.mark.parametrize("function", ["relu", "hardswish", "mul_"])
def test_values_and_gradients_are_those_of_the_other_form(function: str) -> None:
    first, second = compared(tuple(PRODUCERS), function, "litert-int8")
    assert len(first) > 2 * len(PRODUCERS)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_has_the_values_and_gradients_of_its_other_form(function: str) -> None:
    first, second = compared(FEW, function, "litert-int8")
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("function", ["relu", "relu6", "leaky_relu", "tanh_", "mul_", "add_"])
def test_so_they_are_in_16_bits(function: str) -> None:
    first, second = compared(FEW, function, "litert-int16x8")
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("function", ["relu", "hardswish", "silu", "mul_", "add_"])
def test_so_they_are_where_scales_are_learned(function: str) -> None:
    first, second = compared(FEW, function, "litert-int8", "all")
    torch.testing.assert_close(first, second, rtol=0, atol=0)


class Block(nn.Module):
    """An inverted residual with squeeze and excitation, as mobile networks have it."""

    def __init__(self, activation: Callable[..., nn.Module], inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.widen = nn.Sequential(
            nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), activation(inplace=inplace)
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            activation(inplace=inplace),
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(16, 4, 1),
            nn.ReLU(inplace=inplace),
            nn.Conv2d(4, 16, 1),
            nn.Hardsigmoid(inplace=inplace),
        )
        self.narrow = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.widen(x))
        gate = self.squeeze(y)
        y = y.mul_(gate.clone()) if self.inplace else y * gate.clone()
        y = self.narrow(y)
        if self.inplace:
            y += x
            return y
        return y + x


def mobile(activation: Callable[..., nn.Module], inplace: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        activation(inplace=inplace),
        Block(activation, inplace),
        Block(activation, inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 16),
        activation(inplace=inplace),
        nn.Dropout(0.2, inplace=inplace),
        nn.Linear(16, 4),
    )


def vgg(activation: Callable[..., nn.Module], inplace: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        activation(inplace=inplace),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        activation(inplace=inplace),
        nn.Flatten(),
        nn.Linear(8 * 5 * 5, 16),
        activation(inplace=inplace),
        nn.Dropout(inplace=inplace),
        nn.Linear(16, 4),
    )


def discriminator(activation: Callable[..., nn.Module], inplace: bool) -> nn.Module:
    """Of the GAN example of Lightning."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * 16 * 16, 16),
        nn.LeakyReLU(0.2, inplace=inplace),
        nn.Linear(16, 8),
        nn.LeakyReLU(0.2, inplace=inplace),
        nn.Linear(8, 1),
        nn.Sigmoid(),
    )


def steps(build: Callable[..., nn.Module], inplace: bool, **options: Any) -> dict[str, Tensor]:
    """The state after some steps of training, the first of them calibration."""
    torch.manual_seed(0)
    net = build(inplace=inplace)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    x = torch.randn(4, 3, 16, 16)
    with emulate(net, **options) as chip:

        def step() -> None:
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

        with chip.observing():
            step()
        step()
        result = net.eval()(x).detach()
    return {**net.state_dict(), "result": result}


@pytest.mark.parametrize(
    ("build", "fidelity"),
    [
        (lambda inplace: mobile(nn.ReLU6, inplace), "exact"),
        (lambda inplace: mobile(nn.Hardswish, inplace), "fast"),
        (lambda inplace: vgg(nn.ReLU, inplace), "exact"),
        (lambda inplace: discriminator(nn.ReLU, inplace), "fast"),
    ],
)
def test_networks_train_as_without(build: Callable[..., nn.Module], fidelity: str) -> None:
    in_place, plain = (steps(build, form, fidelity=fidelity) for form in (True, False))
    torch.testing.assert_close(in_place, plain, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [nn.LSTM(4, 5), nn.GRU(4, 5)])
def test_states_share_no_memory_with_the_output(layer: nn.Module) -> None:
    def overwrite(x: Tensor) -> Any:
        y, states = layer(x)
        last = states[0] if isinstance(states, tuple) else states
        before = last.clone()
        y.mul_(0.0)
        return before, last

    net, x = Function(overwrite), torch.randn(6, 2, 4)
    net.layer = layer
    calibrate(net, [x])
    with emulate(net):
        before, last = net(x)
    assert bool(before.any())
    torch.testing.assert_close(last, before, rtol=0, atol=0)


def into(x: Tensor) -> Tensor:
    out = torch.empty(0)
    torch.mul(x, x, out=out)
    torch.add(out, 1.0, out=out)
    return torch.sigmoid(out)


def test_results_are_written_where_out_says() -> None:
    net, plain = Function(into), Function(lambda x: torch.sigmoid(x * x + 1.0))
    x = torch.randn(3, 4)
    with torch.no_grad():
        for each in (net, plain):
            calibrate(each, [x])
        with emulate(net):
            first = net(x)
        with emulate(plain):
            second = plain(x)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_out_takes_no_gradients_as_in_torch() -> None:
    net, x = Function(into), torch.randn(3, 4)
    calibrate(net, [x])
    with emulate(net), pytest.raises(RuntimeError, match="arguments don't support"):
        net(x.requires_grad_())
