"""Comparisons of activations, and what is selected by them, are LiteRT's in every bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.deploy.graph import CaptureError
from lightning_nna.testing.operator_oracle import CHECKS, SPECS, Check, Example, check_operator
from lightning_nna.testing.replay import replays
from tests.emulation.modules import Function

pytestmark = pytest.mark.exactness

ROWS, SQUARE = (120, 100), ((120, 100), (120, 100))
EXAMPLES = [
    Example(lambda: Function(lambda a, b: torch.where(2 * a > b.tanh(), a, b)), SQUARE),
    Example(lambda: Function(lambda x: (2 * x).masked_fill(2 * x < 0.3, 0.0)), (ROWS,)),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", EXAMPLES)
def test_oracle(example: Example, check: Check) -> None:
    check_operator("comparison", [example], checks=[check], runtime="litert")


def between(x: Tensor) -> Tensor:
    y = 2 * x
    return torch.where((y > -0.5) & ~(y >= 1.0) | (y == 2.0), y, 0.0)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_oracle_of_conditions(check: Check) -> None:
    check_operator(
        "logical", [Example(lambda: Function(between), (ROWS,))], checks=[check], runtime="litert"
    )


COMPARISONS: list[Callable[..., Tensor]] = [
    torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge, torch.greater, torch.less_equal,
    lambda a, b: a > b, lambda a, b: a != b,
]  # fmt: skip


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("scale", [1.0, 500.0, 0.01])
@pytest.mark.parametrize("index", range(len(COMPARISONS)))
def test_every_comparison_of_every_pair(index: int, scale: float, bits: int) -> None:
    function = COMPARISONS[index]
    net = Function(lambda a, b: torch.where(function(a * 1.0, b * 0.7), 1.0, 0.0))
    a = scale * torch.linspace(-1, 1, 256)[:, None].expand(256, 64).contiguous()
    b = scale * torch.linspace(-0.4, 1, 64).expand(256, 64).contiguous()
    compared = replays(net, a, b, inputs=[a, b], spec=SPECS[bits])
    names = ("EQUAL", "NOT_EQUAL", "LESS", "LESS_EQUAL", "GREATER", "GREATER_EQUAL")
    assert sum(compared[name] for name in names) == 256 * 64
    with torch.no_grad(), emulate(net, SPECS[bits]) as chip:
        with chip.observing():
            net(a, b)
        emulated = net(a, b)
    if function not in (torch.eq, torch.ne):
        assert float((emulated != net(a, b)).float().mean()) < 0.03


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("number", [0.0, 0.3, -5, 300.0, -1e-3])
def test_numbers_of_any_size(number: float, bits: int) -> None:
    net = Function(lambda x: torch.where(2 * x > number, 2 * x, 0.0))
    x = torch.randn(40, 50)
    replays(net, x, inputs=[1.5 * x], spec=SPECS[bits])
    with torch.no_grad(), emulate(net, SPECS[bits]) as chip:
        with chip.observing():
            net(x)
        assert float((net(x) - torch.where(2 * x > number, 2 * x, 0.0)).abs().max()) < 0.4


CONDITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "a product": lambda y: y * (y > 0.2),
    "numbers": lambda y: (y > 0.2).float() * y + (y < 0).to(y.dtype),
    "a type": lambda y: (y > 0.2).type_as(y) - y,
    "a fill": lambda y: y.masked_fill(y < 0, 0),
    "a fill with a number": lambda y: y.masked_fill(~(y > 0), 0.7),
    "an assignment": lambda y: assigned(y),
    "a layout": lambda y: torch.where((y > 0).t().reshape(4, 6), y, -y),
    "exclusive": lambda y: torch.where((y > 0.5) ^ (y < -0.1), y, 2 * y),
    "a row": lambda y: torch.where(y[:, :1] >= 0, y, 0.5),
    "a mask of scores": lambda y: torch.softmax(y.masked_fill(y < 0, -torch.inf), -1),
    "scores elsewhere": lambda y: torch.softmax(torch.where(y > 0, y, -torch.inf), -1),
    "no scores there": lambda y: torch.softmax(torch.where(y < 0, -1e9, y), -1),
    "its opposite": lambda y: torch.where(~(y > 0), y, y.flip(1)),
    "two": lambda y: torch.where((y > 0) & (torch.arange(6) < 4), y, 0.0),
}


def assigned(y: Tensor) -> Tensor:
    y[y < 0.1] = 0.0
    return y


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", CONDITIONS)
def test_a_program_selects_by_the_data(name: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Function(lambda x: CONDITIONS[name](x * 1.5)), torch.randn(4, 6)
    assert not coverage(net, x, spec=SPECS[bits]).fallbacks
    calibrate(net, [x], spec=SPECS[bits])
    with emulate(net, SPECS[bits]), torch.no_grad():
        assert float((net(x) - net.function(x)).abs().max()) < 0.1
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0


def test_python_cannot_branch_in_a_program(tmp_path: Path) -> None:
    net = Function(lambda x: 2 * x if (torch.tanh(x) > 0).any() else x * 3)
    x = torch.randn(4, 6)
    calibrate(net, [x])
    with pytest.raises(CaptureError, match="a program cannot decide"):
        export_tflite(net, [x], tmp_path / "net.tflite")


def test_random_numbers_and_raw_data_are_compared_in_float() -> None:
    def function(x: Tensor) -> Tensor:
        assert not (torch.rand(4) < -1e-6).any()
        assert (x > 1e-6).tolist() == [False, True]
        return torch.tanh(x)

    net, x = Function(function), torch.tensor([0.0, 1e-5])
    calibrate(net, [x])
    with emulate(net) as chip:
        net(x)
        assert set(chip.ranges.ranges) == {"./tanh#0/input"}
