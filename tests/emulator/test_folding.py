"""What is folded into the ReLU after it: the grid has nothing below 0."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_nna import emulate
from lightning_nna.emulator.ranges import QParams, affine_qparams
from lightning_nna.emulator.telemetry import Telemetry
from tests.emulator.replay import replays


class Layers(nn.Module):
    """Two layers with something between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(20, 40), nn.Linear(40, 10), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(3 * x)))


FOLDED: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (torch.relu, math.inf),
    "in place": (lambda x: F.relu(x, inplace=True) + x, math.inf),
    "relu6": (F.relu6, 6.0),
}
NOT_FOLDED: dict[str, Callable[[Tensor], Tensor]] = {
    "residual": lambda x: torch.relu(x) + x,
    "after a view": lambda x: torch.relu(x.view(x.shape)),
    "leaky": F.leaky_relu,
    "two": lambda x: torch.relu(x) + F.relu6(x),
}


def grid_of_first(net: Layers, x: Tensor, spec: str = "litert-int8") -> QParams:
    with emulate(net, spec) as chip, torch.no_grad():
        with chip.observing():
            net(x)
        seen = chip.ranges["first/fully_connected#0/output"]
        return affine_qparams(seen.minimum, seen.maximum, bits=chip.spec.activation_bits)


@pytest.mark.parametrize("name", FOLDED)
def test_the_grid_begins_at_zero(name: str) -> None:
    torch.manual_seed(0)
    between, upper = FOLDED[name]
    net, x = Layers(between), torch.randn(500, 20)
    grid = grid_of_first(net, x)
    largest = min(float(net.first(3 * x).detach().max()), upper)
    assert grid.zero_point == -128
    assert grid.scale == pytest.approx(largest / 255, rel=1e-4)


class Packed(nn.Module):
    """A recurrent layer whose packed output meets a ReLU: it is the layer's state, too."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, [7, 5, 3])
        return torch.relu(self.lstm(packed)[0].data)


def test_a_recurrent_state_keeps_its_range() -> None:
    torch.manual_seed(0)
    net, x = Packed(), torch.randn(7, 3, 20)
    with emulate(net) as chip, torch.no_grad():
        with chip.observing():
            net(x)
        assert chip.ranges["lstm/lstm#0/layer0/output"].minimum < -0.05


class Returning(Layers):
    """Gives out what a ReLU reads."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(3 * x)
        return hidden, self.second(torch.relu(hidden))


READ_OUTSIDE: dict[str, tuple[nn.Module, Callable[..., object]]] = {
    "returned": (Returning(torch.relu), lambda net, x: net(x)),
    "decided by": (
        Layers(lambda x: torch.relu(x) + x.argmax(-1, keepdim=True)),
        lambda net, x: net(x),
    ),
    "in a loss": (
        Layers(torch.relu),
        lambda net, x: (net.second(torch.relu(h := net.first(3 * x))), F.mse_loss(h, h)),
    ),
}


@pytest.mark.parametrize("name", READ_OUTSIDE)
def test_what_is_read_outside_of_the_chip_keeps_its_range(name: str) -> None:
    net, run = READ_OUTSIDE[name]
    x = torch.randn(500, 20)
    with emulate(net) as chip, torch.no_grad():
        with chip.observing():
            run(net, x)
        assert chip.ranges["first/fully_connected#0/output"].minimum < -1


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_what_something_else_reads_keeps_its_range(name: str) -> None:
    torch.manual_seed(0)
    net, x = Layers(NOT_FOLDED[name]), torch.randn(500, 20)
    assert grid_of_first(net, x).zero_point > -100


def test_sixteen_bits_are_symmetric_and_keep_their_range() -> None:
    torch.manual_seed(0)
    net, x = Layers(torch.relu), torch.randn(500, 20)
    whole = float(net.first(3 * x).detach().abs().max())
    grid = grid_of_first(net, x, "litert-int16x8")
    assert grid.scale == pytest.approx(whole / 32767, rel=1e-2)


@pytest.mark.exactness
@pytest.mark.parametrize("name", FOLDED)
def test_every_output_is_the_references(name: str) -> None:
    torch.manual_seed(0)
    compared = replays(Layers(FOLDED[name][0]), torch.randn(500, 20))
    assert compared["FULLY_CONNECTED"] == 25_000


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
def test_the_gradient_is_zero_where_the_relu_is(fidelity: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(20, 40), nn.ReLU()), torch.randn(500, 20)
    with emulate(net, fidelity=fidelity) as chip:  # type: ignore[arg-type]
        with chip.observing():
            net(x)
        net(x).sum().backward()
    found = net[0].bias.grad
    net.zero_grad()
    net(x).sum().backward()
    expected = net[0].bias.grad
    assert found is not None
    assert expected is not None
    assert float((found - expected).abs().max()) <= 0.02 * 500


def test_telemetry_does_not_count_what_the_relu_takes_away() -> None:

    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(20, 40), nn.ReLU()), torch.randn(500, 20)
    with emulate(net) as chip, torch.no_grad():
        with chip.observing():
            net(x)
        chip.telemetry = Telemetry()
        net(x)
        row = chip.telemetry["0/fully_connected#0"]
    assert row.clip_rate < 0.001
    assert row.sqnr_db > 40
