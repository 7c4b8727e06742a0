"""Marks of a tensor end with a write to its memory, through whatever shares it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
from lightning_nna.emulation.emulator import Emulator
from lightning_nna.emulation.learned_scales import Learned
from lightning_nna.emulation.marks import Marks, Writes
from tests.emulation.modules import Function


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
    """Tell whether a tensor is quantized with the parameters that it is marked with, if any."""
    grid = emulator.state.qparams_of(x)
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
        grids = [emulator.state.qparams_of(each) for each in (view, y, rest)]
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
        grid = emulator.state.qparams_of(target)
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


def layers() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    )
    return net.eval(), torch.randn(8, 4, 4)


def shrunk(weight: Tensor) -> Tensor:
    return (weight.detach() * torch.linspace(0.1, 0.9, weight.numel()).view_as(weight)).clone()


def assign(weight: Tensor) -> None:
    weight.data = shrunk(weight)


def subtract_and_assign(weight: Tensor) -> None:
    weight.data -= 0.7 * weight.data


def subtract_from_an_alias(weight: Tensor) -> None:
    alias = weight.data
    alias -= 0.7 * shrunk(weight)


def compute_into(weight: Tensor) -> None:
    torch.mul(weight.data, shrunk(weight), out=weight.data)


def store_into(weight: Tensor) -> None:
    weight.data[1:] = shrunk(weight)[1:]


def clip(weight: Tensor) -> None:
    F.hardtanh(weight.data, -0.02, 0.01, inplace=True)


def reinterpret(weight: Tensor) -> None:
    weight.data.view(torch.int32).zero_()


def assign_vector(weight: Tensor) -> None:
    nn.utils.vector_to_parameters(shrunk(weight).flatten(), [weight])


def write_in_backward(weight: Tensor) -> None:
    """Do what optimizers do whose steps are hooks of the backward."""

    def step(grad: Tensor) -> None:
        weight.data.sub_(grad, alpha=0.05)

    handle = weight.register_hook(step)
    weight.square().sum().backward()
    handle.remove()


def take_other_memory(weight: Tensor) -> None:
    with torch.no_grad():
        weight.set_(shrunk(weight))


WEIGHT_WRITES: dict[str, Callable[[Tensor], object]] = {
    "zero_": lambda weight: weight.data.zero_(),
    "mul_": lambda weight: weight.data.mul_(0.3),
    "copy_": lambda weight: weight.data.copy_(shrunk(weight)),
    "through a view": lambda weight: weight.data.transpose(0, 1)[1].mul_(0.1),
    "add_ in a list": lambda weight: torch._foreach_add_([weight.data], [shrunk(weight)]),
    "copy_ in a list": lambda weight: torch._foreach_copy_([weight.data], [shrunk(weight)]),
    "overload": lambda weight: torch.ops.aten.mul_.Scalar(weight.data, 0.3),
    "overload of a list": lambda weight: torch.ops.aten._foreach_mul_.Scalar([weight.data], 0.3),
    "normal_": lambda weight: weight.data.normal_(),
    "init": lambda weight: nn.init.normal_(weight.data),
    "init by keyword": lambda weight: nn.init.constant_(tensor=weight.data, val=0.25),
    "orthogonal": lambda weight: nn.init.orthogonal_(weight.data),
    "-=": subtract_and_assign,
    "-= of an alias": subtract_from_an_alias,
    "=": assign,
    "set_": take_other_memory,
    "out": compute_into,
    "[]": store_into,
    "inplace": clip,
    "other type": reinterpret,
    "vector": assign_vector,
    "backward": write_in_backward,
}


@pytest.mark.parametrize("learned", ["none", "weights"])
@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
@pytest.mark.parametrize("write", WEIGHT_WRITES)
def test_a_weight_that_is_written_to_inside_a_block_is_read_again(
    write: str, spec: str, learned: Learned
) -> None:
    net, x = layers()
    calibrate(net, [x], spec=spec)
    with emulate(net, spec, learned_scales=learned):
        before = net(x)
        for weight in (net[0].weight, net[4].weight):
            WEIGHT_WRITES[write](weight)
        after = net(x)
    with emulate(net, spec, learned_scales=learned):
        expected = net(x)
    assert not torch.equal(before, expected)
    assert torch.equal(after, expected)


@pytest.mark.parametrize("name", ["bias", "batch norm", "running mean"])
def test_biases_and_norms_that_are_written_to_inside_a_block_are_read_again(name: str) -> None:
    net, x = layers()
    calibrate(net, [x])
    tensor = {"bias": net[0].bias, "batch norm": net[1].weight, "running mean": net[1].running_mean}
    with emulate(net):
        before = net(x)
        tensor[name].data.add_(0.3)
        after = net(x)
    with emulate(net):
        expected = net(x)
    assert not torch.equal(before, expected)
    assert torch.equal(after, expected)


def test_a_recurrent_layer_sees_what_is_written_to_its_weights() -> None:
    torch.manual_seed(0)
    net, x = nn.LSTM(4, 6), torch.randn(5, 2, 4)
    calibrate(net, [x])
    with emulate(net):
        before, _ = net(x)
        net.weight_hh_l0.data.mul_(0.2)
        after, _ = net(x)
    with emulate(net):
        expected, _ = net(x)
    assert not torch.equal(before, expected)
    assert torch.equal(after, expected)


def test_a_learned_scale_that_is_written_to_is_read_again() -> None:
    net, x = layers()
    calibrate(net, [x])
    with emulate(net, learned_scales="all") as emulator:
        before = net(x)
        for scale in emulator.scales.tensors().values():
            scale.data.add_(1.0)
        after = net(x)
    with emulate(net):
        expected = net(x)
    assert not torch.equal(before, expected)
    assert torch.equal(after, expected)


def test_weights_that_are_exchanged_for_an_evaluation_are_used_and_brought_back() -> None:
    net, x = layers()
    calibrate(net, [x])
    averages = [shrunk(weight) for weight in net.parameters()]
    with emulate(net), torch.no_grad():
        before = net(x)
        own = [weight.data for weight in net.parameters()]
        for weight, average in zip(net.parameters(), averages, strict=True):
            weight.data = average
        averaged = net(x)
        for weight, value in zip(net.parameters(), own, strict=True):
            weight.data = value
        after = net(x)
    other, _ = layers()
    calibrate(other, [x])
    with emulate(other), torch.no_grad():
        for weight, average in zip(other.parameters(), averages, strict=True):
            weight.copy_(average)
        expected = other(x)
    assert not torch.equal(averaged, before)
    assert torch.equal(averaged, expected)
    assert torch.equal(after, before)


@pytest.mark.parametrize("learned", ["none", "weights"])
@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_descent_through_data_is_that_without_gradients(spec: str, learned: Learned) -> None:
    def trained(step: Callable[[Tensor, Tensor], object]) -> tuple[list[Tensor], list[float]]:
        net, x = layers()
        calibrate(net, [x], spec=spec)
        losses = []
        with emulate(net, spec, learned_scales=learned):
            for _ in range(5):
                net.zero_grad()
                loss = net(x).square().mean()
                loss.backward()
                losses.append(float(loss.detach()))
                for weight in net.parameters():
                    step(weight, weight.grad)
        return [weight.detach() for weight in net.parameters()], losses

    def without_gradients(weight: Tensor, grad: Tensor) -> None:
        with torch.no_grad():
            weight.add_(grad, alpha=-0.3)

    expected, expected_losses = trained(without_gradients)
    weights, losses = trained(lambda weight, grad: weight.data.add_(grad, alpha=-0.3))
    assert losses == expected_losses
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_a_mark_ends_with_its_tensor() -> None:
    marks = Marks(Writes())
    for number in range(10_000):
        x = torch.zeros(1)
        # Memory, and ids, are those of the tensors before.
        assert marks.get(x) is None
        marks[x] = number
        assert marks.get(x) == number
        assert len(marks) <= 2
    del x
    assert len(marks) == 0


def test_a_tensor_that_autograd_alone_holds_keeps_its_mark() -> None:
    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            marks_in_backward.append(marks.get(x))
            return grad

    marks, marks_in_backward = Marks(Writes()), []
    leaf = torch.ones(2, requires_grad=True)
    x = leaf * 1
    marks[x] = "kept"
    y = Identity.apply(x)
    del x
    y.sum().backward()
    assert marks_in_backward == ["kept"]


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_a_lazy_module_is_emulated_from_its_first_forward_on(
    spec: str, caplog: pytest.LogCaptureFixture
) -> None:
    lazy = nn.Sequential(nn.LazyConv1d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(2, 3, 9)
    with emulate(lazy, spec) as emulator:
        with emulator.observing():
            lazy(x)
        result = lazy(x)
        result.sum().backward()
    # What initializes the parameters is no site.
    assert not caplog.messages
    eager = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(28, 2))
    eager.load_state_dict(lazy.state_dict())
    calibrate(eager, [x], spec=spec)
    with emulate(eager):
        expected = eager(x)
        expected.sum().backward()
    assert torch.equal(result, expected)
    for parameter, other in zip(lazy.parameters(), eager.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_random_numbers_by_a_parameter_are_a_fallback(caplog: pytest.LogCaptureFixture) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate, self.layer = nn.Parameter(torch.full((4,), 0.5)), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * torch.bernoulli(self.rate)

    calibrate(Gated(), [torch.randn(2, 4)])
    assert "bernoulli" in caplog.text
