"""What is known of a tensor ends with a write to its memory, through whatever shares it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
from lightning_nna.emulator.engine import Emulator
from tests.emulator.modules import Function


class Written(nn.Module):
    """An activation, written to; the last instruction reads it again."""

    def __init__(self, write: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 1.5
        self.write(y)
        return y, torch.sigmoid(y * 0.1)


def through_a_view(y: Tensor) -> None:
    y[:, :3].mul_(50.0)


def through_chunks(y: Tensor) -> None:
    for part in y.chunk(2, 1):
        part.add_(40.0)


def by_copying(y: Tensor) -> None:
    y.view(-1)[:4].copy_(torch.full((4,), 77.7))


def by_assignment(y: Tensor) -> None:
    y[0] = y[1] * 30.0


def by_adding_to_a_slice(y: Tensor) -> None:
    y[:, 1:] += 33.3


def through_data(y: Tensor) -> None:
    y.data.transpose(0, 1)[2].mul_(50.0)


def by_out(y: Tensor) -> None:
    torch.mul(y, 50.0, out=y[:, :])


def by_a_function_in_float(y: Tensor) -> None:
    y[:, :2].exp_().mul_(9.0)


def by_an_activation(y: Tensor) -> None:
    torch.nn.functional.hardswish(y[:, :3], inplace=True)


def by_new_memory(y: Tensor) -> None:
    y.data = torch.full_like(y, 123.4)


WRITES = [
    through_a_view,
    through_chunks,
    by_copying,
    by_assignment,
    by_adding_to_a_slice,
    through_data,
    by_out,
    by_a_function_in_float,
    by_an_activation,
    by_new_memory,
]


def on_its_grid(emulator: Emulator, x: Tensor) -> bool:
    """Whether what a tensor holds are integers of the grid that it is marked with, if it is."""
    grid = emulator.tag_of(x)
    if grid is None:
        return True
    integers = x / grid.scale
    low, high = grid.bounds
    in_range = bool((integers >= low).all() and (integers <= high).all())
    return in_range and torch.equal(integers, integers.round())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES)
def test_no_tensor_keeps_a_grid_that_its_values_have_left(
    write: Callable[[Tensor], None], mode: Callable[[], AbstractContextManager[None]]
) -> None:
    torch.manual_seed(0)
    net, x = Written(write), torch.randn(4, 6)
    calibrate(net, [x])
    with mode(), emulate(net) as emulator:
        y, result = net(x)
        assert on_its_grid(emulator, y)
    with mode():
        in_float, expected = net(x)
    span = float(in_float.max() - in_float.min())
    torch.testing.assert_close(y, in_float, rtol=0, atol=0.03 * span)
    torch.testing.assert_close(result, expected, rtol=0, atol=0.05)


def test_a_view_that_an_operator_has_written_has_its_grid_and_the_base_has_none() -> None:
    def write(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x * 1.5
        view = y[:, :3]
        torch.nn.functional.hardswish(view, inplace=True)
        return view, y, y[:, 3:]

    net, x = Function(write), torch.randn(4, 6)
    calibrate(net, [x])
    with torch.inference_mode(), emulate(net) as emulator:
        view, y, rest = net(x)
        grids = [emulator.tag_of(each) for each in (view, y, rest)]
        assert on_its_grid(emulator, view)
    assert [grid is not None for grid in grids] == [True, False, False]


def test_copies_carry_the_grid_of_what_was_copied() -> None:
    def copied(x: Tensor) -> tuple[Tensor, Tensor]:
        y, target = torch.sigmoid(x), x * 4.0
        target.copy_(y)
        return target, target * 2.0

    net, x = Function(copied), torch.randn(4, 6)
    calibrate(net, [x])
    with torch.no_grad(), emulate(net) as emulator:
        target, result = net(x)
        grid = emulator.tag_of(target)
    assert grid is not None
    assert grid.scale == 1 / 256
    torch.testing.assert_close(target, torch.sigmoid(x), rtol=0, atol=0.02)
    torch.testing.assert_close(result, 2 * torch.sigmoid(x), rtol=0, atol=0.04)


@pytest.mark.parametrize("write", [lambda y: y.mul_(0.5), lambda y: y[:, :2].mul_(0.5)])
@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_a_layer_that_is_written_to_before_its_norm_is_not_folded(
    write: Callable[[Tensor], Tensor], mode: Callable[[], AbstractContextManager[None]]
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            write(y)
            result: Tensor = self.norm(y)
            return result

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(16, 4)
    with mode():
        calibrate(net, [x])
        with emulate(net):
            result = net(x)
        expected = net(x)
    torch.testing.assert_close(result, expected, rtol=0, atol=0.03)
