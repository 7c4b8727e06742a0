"""ReLU fusion: the range of an operator begins at 0 if a ReLU is its only consumer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.emulation.learned_scales import Learned
from lightning_nna.emulation.ranges import QParams, affine_qparams
from lightning_nna.emulation.telemetry import Telemetry
from lightning_nna.testing.replay import replays


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
        observed = chip.ranges["first/fully_connected#0/output"]
        return affine_qparams(observed.minimum, observed.maximum, bits=chip.spec.activation_bits)


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
    largest = float(net.first(3 * x).detach().abs().max())
    grid = grid_of_first(net, x, "litert-int16x8")
    assert grid.scale == pytest.approx(largest / 32767, rel=1e-2)


@pytest.mark.exactness
@pytest.mark.parametrize("name", FOLDED)
def test_every_output_is_the_references(name: str) -> None:
    torch.manual_seed(0)
    compared = replays(Layers(FOLDED[name][0]), torch.randn(500, 20), spec="litert-int8")
    assert compared["FULLY_CONNECTED"] == 25_000


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
def test_the_gradient_is_zero_where_the_relu_is(fidelity: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(20, 40), nn.ReLU()), torch.randn(500, 20)
    with emulate(net, fidelity=fidelity) as chip:  # type: ignore[arg-type]
        with chip.observing():
            net(x)
        net(x).sum().backward()
    gradient = net[0].bias.grad
    net.zero_grad()
    net(x).sum().backward()
    expected = net[0].bias.grad
    assert gradient is not None
    assert expected is not None
    assert float((gradient - expected).abs().max()) <= 0.02 * 500


def test_telemetry_does_not_count_what_the_relu_takes_away() -> None:

    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(20, 40), nn.ReLU()), torch.randn(500, 20)
    with emulate(net) as chip, torch.no_grad():
        with chip.observing():
            net(x)
        telemetry = Telemetry()
        with chip.running(telemetry=telemetry):
            net(x)
            row = telemetry["0/fully_connected#0"]
    assert row.clip_rate < 0.001
    assert row.sqnr_db > 40


class Auxiliary(nn.Module):
    """A second reader of the first layer's result, on a path of its own."""

    def __init__(self, after: nn.Module, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.after, self.read = nn.Linear(20, 40), after, read
        self.takes_both = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        result: Tensor = self.after(y)
        return result + self.read(y) if self.takes_both else result


READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "an operator": torch.tanh,
    "a layout operator": lambda y: y.flip(-1),
    "the CPU": torch.atan,
    "after a layout operator": lambda y: torch.sigmoid(y.view(y.shape)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("learned", ["none", "all"])
def test_a_new_reader_of_what_ends_at_zero_is_told_once(
    reader: str, learned: Learned, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    net, x = Auxiliary(nn.ReLU(), READERS[reader]), torch.randn(50, 20)
    calibrate(net, [x])
    with emulate(net, learned_scales=learned):
        net(x)
        assert not caplog.messages
        net.takes_both = True
        net(x).sum().backward()
        net(x)
    warnings = [text for text in caplog.messages if "ends at 0" in text]
    assert len(warnings) == 1
    assert "first/fully_connected#0" in warnings[0]
    assert "calibrate with batches that take this path" in warnings[0]


def test_who_calibrates_with_the_path_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net, x = Auxiliary(nn.ReLU(), torch.tanh), torch.randn(50, 20)
    net.takes_both = True
    calibrate(net, [x])
    with emulate(net):
        result = net(x)
        net.takes_both = False
        net(x)
    assert not caplog.messages
    net.takes_both = True
    torch.testing.assert_close(result, net(x), rtol=0, atol=0.05)


def test_results_that_leave_the_network_are_read_too(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net, x = Auxiliary(nn.ReLU(), torch.tanh), torch.randn(50, 20)
    calibrate(net, [x])
    masks: list[Tensor] = []
    net.first.register_forward_hook(lambda module, args, result: masks.append(result > 0))
    with emulate(net):
        net(x)
    assert masks[0].any()
    assert [text for text in caplog.messages if "first/fully_connected#0 ends at 0" in text]


def watched(net: nn.Module) -> None:
    """Give every module hooks that change no gradient."""
    for module in net.modules():
        module.register_full_backward_hook(lambda *_: None)
        module.register_full_backward_pre_hook(lambda *_: None)


@pytest.mark.parametrize("when", ["before calibration", "after calibration"])
@pytest.mark.parametrize("between", [[nn.ReLU()], [nn.BatchNorm1d(40), nn.ReLU6()]])
def test_hooks_of_the_backward_are_no_readers(
    when: str, between: list[nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    def run(hooked: bool) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 40), *copy.deepcopy(between), nn.Linear(40, 4)).eval()
        x = torch.randn(50, 20, requires_grad=True)
        if hooked and when == "before calibration":
            watched(net)
        with emulate(net) as chip:
            with chip.observing():  # With gradients, so that hooks take part.
                net(x)
            if hooked and when == "after calibration":
                watched(net)
            result = net(x)
            result.square().sum().backward()
        return result, [x.grad, *(weight.grad for weight in net.parameters())]

    expected, expected_gradients = run(hooked=False)
    result, gradients = run(hooked=True)
    assert not caplog.messages
    assert torch.equal(result, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))


def test_a_reader_behind_a_hook_of_the_backward_is_told(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net, x = Auxiliary(nn.ReLU(), torch.tanh), torch.randn(50, 20, requires_grad=True)
    calibrate(net, [x])
    watched(net)
    net.takes_both = True
    with emulate(net):
        net(x).sum().backward()
    assert [text for text in caplog.messages if "first/fully_connected#0 ends at 0" in text]


@pytest.mark.parametrize("training", [False, True])
def test_dropout_between_a_layer_and_its_relu_changes_nothing(
    training: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 40), nn.Dropout(0.5), nn.ReLU(), nn.Linear(40, 4))
    net.train(training)
    x = torch.randn(50, 20)
    with emulate(net) as chip:
        with chip.observing():
            net(x)
        net.train()(x).sum().backward()
        result = net.eval()(x)
    assert not caplog.messages
    torch.testing.assert_close(result, net(x), rtol=0, atol=0.05)


def test_dropout_of_what_another_reads_does_not_hide_the_reader() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(20, 40)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return torch.relu(y) + torch.tanh(F.dropout(y, 0.5, self.training))

    torch.manual_seed(0)
    net, x = Net(), torch.randn(50, 20)
    with emulate(net) as chip:
        with chip.observing():
            net(x)
        result = net.eval()(x)
    below = net(x) < 0
    assert below.any()
    torch.testing.assert_close(result[below], net(x)[below], rtol=0, atol=0.05)


@pytest.mark.parametrize("reader", ["an operator", "the CPU", "after a layout operator"])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_folded_into_a_batch_norm_has_no_other_reader(reader: str, training: bool) -> None:
    torch.manual_seed(0)
    net, x = Auxiliary(nn.BatchNorm1d(40), READERS[reader]).train(training), torch.randn(50, 20)
    calibrate(net, [x])
    with emulate(net):
        net(x)
        net.takes_both = True
        with pytest.raises(RuntimeError, match="result of first/fully_connected#0, which is fold"):
            net(x)


def test_a_convolution_that_is_folded_has_no_other_reader() -> None:
    net = Auxiliary(nn.BatchNorm2d(4), torch.sigmoid)
    net.first = nn.Conv2d(3, 4, 3)  # type: ignore[assignment]
    x = torch.randn(2, 3, 6, 6)
    calibrate(net, [x])
    net.takes_both = True
    with emulate(net), pytest.raises(RuntimeError, match="calibrate with batches that take this"):
        net(x)


@pytest.mark.parametrize(
    ("layer", "drop", "shape"),
    [
        (nn.Conv1d(3, 4, 3), nn.Dropout1d(0.5), (4, 3, 9)),
        (nn.Conv2d(3, 4, 3), nn.Dropout2d(0.5), (4, 3, 6, 6)),
        (nn.Conv2d(3, 4, 3), nn.Dropout2d(0.5, inplace=True), (4, 3, 6, 6)),
    ],
)
def test_dropout_of_channels_stays_on_the_accelerator(
    layer: nn.Module, drop: nn.Module, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(layer, drop, nn.ReLU()).eval(), torch.randn(shape)
    assert not coverage(net, x).fallbacks
    calibrate(net, [x])
    with emulate(net):
        result = net(x)
        net.train()(x).sum().backward()
    torch.testing.assert_close(result, net.eval()(x), rtol=0, atol=0.03)
