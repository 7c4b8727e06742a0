"""Means, sums and extremes: every integer is LiteRT's, and the gradient is torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.testing.replay import replays
from tests.emulation import oracle

Reduction = Callable[[Tensor], Any]
SPECS = {8: "litert-int8", 16: "litert-int16x8"}

# The reduction, and the shape of its operand.
AVERAGES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "last": (lambda x, f: f(x, -1), (10_000, 3)),
    "last, kept": (lambda x, f: f(x, -1, keepdim=True), (10_000, 12)),
    "first": (lambda x, f: f(x, 0), (7, 10_000)),
    "middle": (lambda x, f: f(x, dim=1), (5, 100, 2_000)),
    "two": (lambda x, f: f(x, (-1, 1), keepdim=True), (50, 9, 200, 8)),
    "three": (lambda x, f: f(x, axis=[0, 2, 3]), (2, 10_000, 3, 3)),
    "one of one": (lambda x, f: f(x, 1), (10_000, 1)),
    "all": (lambda x, f: f(x), (30, 40)),
}
EXTREMES: dict[str, tuple[Reduction, str]] = {
    "all": (lambda x: x.max(), "REDUCE_MAX"),
    "with indices": (lambda x: x.max(1).values, "REDUCE_MAX"),
    "kept": (lambda x: x.min(dim=-1, keepdim=True)[0], "REDUCE_MIN"),
    "amax": (lambda x: x.amax((0, 2), keepdim=True), "REDUCE_MAX"),
    "amin": (lambda x: torch.amin(x, axis=-2), "REDUCE_MIN"),
}


@pytest.mark.exactness
@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("function", [torch.mean, torch.sum])
def test_every_average_is_the_references(function: Any, name: str, bits: int) -> None:
    reduce, shape = AVERAGES[name]
    torch.manual_seed(0)
    x = torch.randn(shape) + 0.7
    module = Calling(lambda x: reduce(x, function))
    compared = replays(module, x, inputs=[2 * x], spec=SPECS[bits])
    outputs = reduce(x, function).numel()
    assert compared["MEAN"] == outputs
    assert compared.get("MUL", 0) == (outputs if function is torch.sum else 0)


@pytest.mark.exactness
@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", EXTREMES)
def test_every_extreme_is_the_references(name: str, bits: int) -> None:
    reduce, kind = EXTREMES[name]
    torch.manual_seed(1)
    x = torch.randn(60, 50, 40)
    compared = replays(Calling(reduce), x, inputs=[2 * x], spec=SPECS[bits])
    assert compared[kind] == reduce(x).numel()


def test_indices_are_those_of_the_values() -> None:
    torch.manual_seed(2)
    x = torch.randint(-127, 129, (20, 30)) / 64
    x[0, :2] = torch.tensor([-127, 128]) / 64  # So that every value is on the grid.
    values, indices = emulated(Calling(lambda x: x.max(1)), x)
    assert torch.equal(values, x.max(1).values)
    assert torch.equal(values, x.gather(1, indices[:, None])[:, 0])


def test_the_larger_of_two_tensors_is_no_reduction() -> None:
    x = torch.tensor([[-1.0, 2.0]])
    assert torch.equal(emulated(Calling(lambda x: torch.max(x, x / 2)), x)[0] > 0, x[0] > 0)


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("function", [torch.mean, torch.sum])
def test_the_gradient_is_torchs(function: Any, name: str) -> None:
    reduce, shape = AVERAGES[name]
    torch.manual_seed(3)
    module = Calling(lambda x: reduce(x, function))
    x = torch.randn(shape)
    with emulate(module) as chip:
        with chip.observing():
            module(2 * x)  # Wide ranges: nothing is clipped.
        y = module(x.requires_grad_())
        slopes = torch.randn_like(y)
        y.backward(slopes)
    expected = x.detach().clone().requires_grad_()
    reduce(expected, function).backward(slopes)
    assert torch.allclose(x.grad, expected.grad, rtol=1e-6, atol=0)


def test_no_gradient_where_the_output_is_clipped() -> None:
    module = Calling(lambda x: x.mean(1))
    x = torch.tensor([[3.0, 3.0], [0.5, 0.0]], requires_grad=True)
    with emulate(module) as chip:
        with chip.observing():
            module(x.detach() / 6)
        chip.ranges["./mean#0/input"].update(x, -4.0, 4.0)
        module(x).sum().backward()
    assert x.grad.tolist() == [[0.0, 0.0], [0.5, 0.5]]


def test_an_extreme_keeps_the_grid_of_its_operand() -> None:
    torch.manual_seed(4)
    module, x = Calling(lambda x: torch.relu(x.amax(1))), torch.randn(20, 30)
    with emulate(module) as chip:
        with chip.observing():
            module(x)
        step = oracle.grid(chip, "./reduce_max#0/input").scale
        assert torch.equal(module(x), (x.amax(1) / step).round() * step)
        assert list(chip.ranges.ranges) == ["./reduce_max#0/input"]


def emulated(module: nn.Module, x: Tensor) -> Any:
    with torch.no_grad(), emulate(module) as chip:
        with chip.observing():
            module(x)
        return module(x)


class Calling(nn.Module):
    """A module of one function."""

    def __init__(self, function: Reduction) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)
