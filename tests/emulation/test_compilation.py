"""``torch.compile`` is disabled while emulated: however it was applied, results are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.callbacks import NNAEmulation
from lightning_nna.emulation.modes import Mode
from lightning_nna.testing import SmallRecurrentModule
from lightning_nna.testing.contract import assert_same, module, trainer

Module = Callable[[SmallRecurrentModule], nn.Module]


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    torch._dynamo.reset()


@pytest.fixture
def _without_gradients() -> Iterator[None]:
    """To trace what needs a gradient, dynamo looks at ``grad`` of a non-leaf, which warns."""
    with torch.no_grad():
        yield


def unchanged(net: SmallRecurrentModule) -> nn.Module:
    return net


def given_to_compile(net: SmallRecurrentModule) -> nn.Module:
    return torch.compile(net, backend="eager")


def compiled_in_place(net: SmallRecurrentModule) -> nn.Module:
    net.compile(backend="eager")
    return net


def with_compiled_child(net: SmallRecurrentModule) -> nn.Module:
    net.head = torch.compile(net.head, backend="eager")
    return net


def with_child_compiled_in_place(net: SmallRecurrentModule) -> nn.Module:
    net.head.compile(backend="eager")
    return net


def with_compiled_step(net: SmallRecurrentModule) -> nn.Module:
    net.training_step = torch.compile(net.training_step, backend="eager")
    return net


COMPILED = [
    given_to_compile,
    compiled_in_place,
    with_compiled_child,
    with_child_compiled_in_place,
    with_compiled_step,
]


def fitted(apply: Module) -> tuple[list[Tensor], NNAEmulation]:
    net, chip = module(), NNAEmulation(calibration_steps=2)
    trainer(chip, steps=4).fit(apply(net))
    return list(net.parameters()), chip


@pytest.mark.parametrize("apply", COMPILED)
def test_training_a_compiled_module_is_training_the_module(apply: Module) -> None:
    plain, chip = fitted(unchanged)
    compiled, other = fitted(apply)
    assert_same(plain, compiled)
    assert_same(chip.state_dict()["emulator"], other.state_dict()["emulator"])


@pytest.mark.parametrize("apply", [compiled_in_place, with_compiled_child])
def test_what_was_compiled_is_named(apply: Module, caplog: pytest.LogCaptureFixture) -> None:
    net = apply(module())
    with emulate(net):
        pass
    named = {compiled_in_place: "the module", with_compiled_child: "head"}[apply]
    assert caplog.messages == [f"torch.compile is disabled while emulated: {named}"]


class WithCompiledFunction(nn.Module):
    """Calls a function that was compiled where it was defined."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.gate = torch.compile(gate, backend="eager") if compiled else gate

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.layer(x))


def gate(x: Tensor) -> Tensor:
    return torch.tanh(x) * torch.sigmoid(x)


@pytest.mark.usefixtures("_without_gradients")
@pytest.mark.parametrize("warm", [True, False])
def test_a_compiled_function_is_seen_into(warm: bool) -> None:
    x, results, sites = torch.randn(16, 4), [], []
    for compiled in (True, False):
        torch.manual_seed(0)
        net = WithCompiledFunction(compiled)
        for _ in range(int(warm)):
            net(x)
        calibrate(net, [x])
        with emulate(net) as chip:
            results.append(net(x))
        sites.append(set(chip.sites.locations))
    assert torch.equal(*results)
    assert sites == [{"layer/fully_connected", "./tanh", "./sigmoid", "./mul"}] * 2


class Layers(nn.Sequential):
    """Without the checks of shapes that tests add to the package's own modules."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def _child(holder: Holder) -> nn.Module:
    holder.net = torch.compile(holder.net, backend="eager")
    return holder


def _child_in_place(holder: Holder) -> nn.Module:
    holder.net.compile(backend="eager")
    return holder


@pytest.mark.usefixtures("_without_gradients")
@pytest.mark.parametrize(
    "apply",
    [lambda holder: torch.compile(holder, backend="eager"), _child, _child_in_place],
    ids=["module", "child", "child in place"],
)
def test_compiled_after_it_was_put_on_the_chip(apply: Callable[[Holder], nn.Module]) -> None:
    torch.manual_seed(0)
    holder, x = Holder(), torch.randn(16, 4)
    plain = holder(x)
    calibrate(holder, [x])
    with emulate(holder):
        expected = holder(x)
    compiled = apply(holder)
    assert torch.equal(compiled(x), plain)
    with emulate(holder):
        assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x), plain)


def test_coverage_sees_into_compiled_children() -> None:
    x = torch.randn(3, 4)
    compiled = coverage(_child(Holder()), x)
    assert [row.site for row in compiled.rows] == [row.site for row in coverage(Holder(), x).rows]


@pytest.mark.usefixtures("_without_gradients")
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_compiled_code_that_calls_the_chip_is_refused() -> None:
    net, x = Layers(), torch.randn(8, 4)
    compiled = torch.compile(net, backend="eager")
    emulator = calibrate(net, [x])
    # A mode without the scope of `running`, which would set compiled code aside.
    emulator.state.modes.enter(Mode("emulate"))
    with pytest.raises(RuntimeError, match=r"the emulation cannot see: call it inside `with emul"):
        compiled(x)
