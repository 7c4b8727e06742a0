from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint
from torchaudio.models.conformer import ConformerLayer
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_nna import calibrate, coverage, emulate, strip
from lightning_nna.testing import SmallNet
from tests.emulation.modules import Function


def sites(module: nn.Module, *inputs: Tensor) -> dict[str, bool]:
    return {row.site: row.on_chip for row in coverage(module, *inputs).rows}


def loop(x: Tensor) -> Tensor:
    for _ in range(3):
        x = torch.tanh(x)
    return x


def helper(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (loop, ["./tanh#0"]),
        (lambda x: torch.sigmoid(torch.sigmoid(x)), ["./sigmoid#0", "./sigmoid#1"]),
        (lambda x: helper(x) + helper(2 * x), ["sigmoid#0", "mul#0", "sigmoid#1", "add#0"]),
        (lambda x: x.relu().tanh_() - 1, ["relu#0", "tanh#0", "sub#0"]),
        (lambda x: 1 - torch.relu(x), ["relu#0", "sub#0"]),
        (lambda x: F.relu(x).view(-1)[1:].exp(), ["relu#0", "exp#0"]),
    ],
)
def test_a_site_is_a_code_location(
    function: Callable[[Tensor], Tensor], expected: list[str]
) -> None:
    keys = [site.removeprefix("./") for site in sites(Function(function), torch.randn(3, 4))]
    assert keys == [site.removeprefix("./") for site in expected]


def test_a_library_whose_name_begins_with_torch_has_sites_of_its_own() -> None:
    layer = ConformerLayer(8, 16, 2, 3)
    keys = sites(layer, torch.randn(5, 2, 8), None)  # type: ignore[arg-type]
    assert [site for site in keys if "./add" in site] == [f"./add#{index}" for index in range(4)]


def test_ordinals_survive_in_the_state() -> None:
    module = Function(lambda x: torch.sigmoid(x) + torch.sigmoid(2 * x))
    x = torch.randn(4)
    with emulate(module) as chip, chip.observing():
        module(x)
    again = Function(module.function)
    with emulate(again) as other:
        other.load_state_dict(chip.state_dict())
        assert torch.equal(again(x), _on_chip(module, x))
        assert other.ranges.state_dict() == chip.ranges.state_dict()


def _on_chip(module: nn.Module, *x: Tensor) -> Tensor:
    with emulate(module):
        return module(*x)


class Recognizer(nn.Module):
    """Methods beside forward, as decoders call them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def transcribe(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class Holder(pl.LightningModule):
    """Losses, metrics and steps around a recognizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Recognizer()
        self.my_loss = nn.MSELoss()
        self.accuracy = MulticlassAccuracy(4)

    def step(self, x: Tensor) -> Tensor:
        y = self.model.transcribe(x)
        self.accuracy(y, torch.zeros(len(y), dtype=torch.long))
        return self.my_loss(torch.tanh(y), x) + torch.sigmoid(y).sum()


def test_methods_of_children_count_and_steps_losses_and_metrics_do_not() -> None:
    holder, x = Holder(), torch.randn(8, 4)
    keys: list[str] = []
    with (
        emulate(holder) as chip,
        chip.running(listener=lambda call: keys.append(call.key)),
        chip.observing(),
    ):
        holder.step(x)
    assert keys == ["model.layer/fully_connected#0", "model/tanh#0"]


def test_an_exception_leaves_no_mode_behind() -> None:
    module = Function(lambda x: torch.tanh(x) @ torch.zeros(7))
    with emulate(module) as chip:
        with pytest.raises(RuntimeError), chip.observing():
            module(torch.randn(3, 4))
        assert chip.dispatch.call_sites.scope.stack == []
    assert _get_current_function_mode() is None


def test_copies_and_pickles_are_not_emulated() -> None:
    net, x = SmallNet(), torch.randn(16, 4)
    plain = net(x)
    with emulate(net) as chip:
        with chip.observing():
            net(x)
        copied, pickled = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
        assert not torch.equal(net(x), plain)
    assert torch.equal(copied(x), plain)
    assert torch.equal(pickled(x), plain)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.net, self.reentrant = SmallNet(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.net(x)
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_recomputes_on_the_chip(reentrant: bool) -> None:
    torch.manual_seed(0)
    plain = Checkpointed(None)
    other = Checkpointed(reentrant)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(16, 4, requires_grad=True)
    gradients = []
    for module in (plain, other):
        with emulate(module) as chip:
            with chip.observing():
                module(x)
            module(x).square().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def test_packing_and_padding_keep_quantization_parameters() -> None:
    def function(x: Tensor) -> Tensor:
        y = torch.tanh(x).transpose(0, 1).reshape(2, -1).unsqueeze(0)
        return torch.relu(F.pad(y, (1, 1)).squeeze(0).chunk(2, -1)[0].contiguous())

    report = coverage(Function(function), torch.randn(4, 6))
    assert [row.site for row in report.rows] == ["./tanh#0", "./relu#0"]
    module = Function(function)
    with emulate(module) as chip:
        with chip.observing():
            module(torch.randn(4, 6))
        assert set(chip.ranges.ranges) == {"./tanh#0/input"}


def test_a_choice_between_activations_on_one_grid_keeps_it() -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first = torch.tanh(x)
            return torch.where(torch.arange(4) < 2, first, first.roll(1, 0)).sigmoid()

    net, x = Chosen(), torch.randn(3, 4)
    with emulate(net) as chip, torch.no_grad():
        with chip.observing():
            net(x)
        net(x)
    # One operand is quantized: the input.
    assert [key for key in chip.ranges.ranges if key.endswith("input")] == ["./tanh#0/input"]


def test_an_activation_kept_from_calibration_is_quantized_anew() -> None:
    first, second = Function(torch.tanh), Function(lambda x: torch.relu(x))
    module = nn.ModuleList([first, second])
    with emulate(module) as chip:
        with chip.observing():
            activation = first(torch.linspace(-2, 2, 9))
            second(activation.clone().exp())
        result = second(activation)
    assert float((result - torch.relu(activation)).abs().max()) < 0.02


def test_another_dtype_leaves_the_grid() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x).to(torch.bfloat16).float())

    module = Function(function)
    with emulate(module) as chip:
        with chip.observing():
            module(torch.randn(50))
        assert set(chip.ranges.ranges) == {"./tanh#0/input", "./tanh#1/input"}


@pytest.mark.parametrize("inplace", [True, False])
def test_in_place_forms_equal_the_others(inplace: bool) -> None:
    def function(x: Tensor) -> Tensor:
        y = torch.tanh(x)
        z = y * 0.5
        if inplace:
            z += y
            return F.relu(z, inplace=True).add(z)
        z = z + y
        z = F.relu(z)
        return z + z

    torch.manual_seed(0)
    x = torch.randn(50, requires_grad=True)
    module, plain = Function(function), Function(_two_lines)
    with emulate(module) as chip:
        with chip.observing():
            module(x)
        result = module(x)
        result.sum().backward()
    expected_input = x.detach().clone().requires_grad_()
    with emulate(plain) as chip:
        with chip.observing():
            plain(expected_input)
        expected = plain(expected_input)
        expected.sum().backward()
    assert torch.equal(result, expected)
    assert torch.equal(x.grad, expected_input.grad)


def _two_lines(x: Tensor) -> Tensor:
    y = torch.tanh(x)
    z = torch.relu(y * 0.5 + y)
    return z + z


class DirectlyCalled(pl.LightningModule):
    """Calls forwards as users do: by the module, by ``forward``, through decorators and bases."""

    def __init__(self, direct: bool) -> None:
        super().__init__()
        self.net, self.direct = SmallNet(), direct

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def forward(self, x: Tensor) -> Tensor:
        net = self.net.forward if self.direct else self.net
        return self.gate(net(x)) + self.gate(2 * x[:, :3])

    def training_step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.forward(x) if self.direct else self(x)
        return y, torch.sigmoid(y).mean()


def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Tensor, **kwargs: Tensor) -> Tensor:
        return function(*args, **kwargs)

    return wrapper


class Decorated(DirectlyCalled):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Renamed(DirectlyCalled):
    def forward(this, x: Tensor) -> Tensor:  # noqa: N805
        return torch.tanh(DirectlyCalled.forward(this, x))


@pytest.mark.parametrize("kind", [DirectlyCalled, Decorated, Renamed])
def test_a_forward_is_in_scope_however_it_is_called(kind: type[DirectlyCalled]) -> None:
    x, results = torch.randn(16, 4), []
    for direct in (False, True):
        torch.manual_seed(0)
        module = kind(direct)
        with emulate(module) as chip:
            with chip.observing():
                module.training_step(x)
            y, loss = module.training_step(x)
        assert torch.equal(loss, torch.sigmoid(y).mean())
        results.append(y)
        assert not torch.equal(y, module.training_step(x)[0])
    assert torch.equal(*results)


def test_a_decorator_around_a_forward_makes_nothing_else_one() -> None:
    @decorated
    def scored(module: nn.Module, y: Tensor) -> Tensor:
        return torch.sigmoid(y) + 0.1

    x, module = torch.randn(16, 4), Decorated(False)
    with emulate(module) as chip:
        with chip.observing():
            module(x)
        known = set(chip.ranges.ranges)
        y = module(x)
        assert torch.equal(scored(module, y), torch.sigmoid(y) + 0.1)
    assert set(chip.ranges.ranges) == known


def test_the_forward_of_a_root_has_the_same_sites_however_it_is_called() -> None:
    x, tables = torch.randn(16, 4), []
    for direct in (False, True):
        module = DirectlyCalled(False)
        with emulate(module) as chip, chip.observing():
            (module.forward if direct else module)(x)
        tables.append(chip.sites.locations)
    assert tables[0] == tables[1]


def test_a_step_that_a_strategy_runs_through_the_call_of_the_module_stays_in_float() -> None:
    """As DDP, FSDP and DeepSpeed do; see ``_ForwardRedirection`` of Lightning."""
    module, x = DirectlyCalled(False), torch.randn(16, 4)
    redirect = _ForwardRedirection()
    results, tables = [], []
    for redirected in (False, True):
        strip(module)
        with emulate(module) as chip:
            with chip.observing():
                module.training_step(x)
            if redirected:
                y, loss = redirect(module, module, "training_step", x)
            else:
                y, loss = module.training_step(x)
        assert torch.equal(loss, torch.sigmoid(y).mean())
        results.append(y)
        tables.append(chip.sites.locations)
    assert torch.equal(*results)
    assert tables[0] == tables[1]


def test_what_a_forward_logs_is_averaged_in_float() -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.means = [MeanMetric()]  # As Lightning keeps its own: in no list of modules.

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(x)
            self.means[0].update(y)
            return y

    module, x = Averaged(), torch.randn(40)
    with emulate(module) as chip:
        with chip.observing():
            module(x)
        module.means[0].reset()
        y = module(x)
        assert set(chip.sites.locations) == {"./tanh"}
    assert torch.equal(module.means[0].compute(), y.sum() / 40)


def test_a_method_of_another_module_is_a_site_of_that_module_inside_a_forward_too() -> None:
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Recognizer()

        def forward(self, x: Tensor) -> Tensor:
            return self.model.transcribe(x)

    module, x = Caller(), torch.randn(8, 4)
    with emulate(module, targets=["model"]) as chip:
        with chip.observing():
            module(x)
        result = module.model.transcribe(x)
        assert torch.equal(module(x), result)
    assert set(chip.sites.locations) == {"model.layer/fully_connected", "model/tanh"}


@pytest.mark.parametrize(("of_a_module", "warnings"), [(True, 0), (False, 1)])
def test_a_function_that_is_checkpointed_is_named_once(
    of_a_module: bool, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Its recomputation passes no module, so that nothing says that it is to be emulated."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def method(self, x: Tensor) -> Tensor:
            return torch.tanh(x) * 0.5

        def forward(self, x: Tensor) -> Tensor:
            inner = self.layer if of_a_module else self.method
            return checkpoint(inner, x, use_reentrant=False)

    net, x = Block(), torch.randn(8, 4)
    with emulate(net) as chip:
        with chip.observing():
            net(x)
        net(x)
    assert caplog.text.count("torch.utils.checkpoint is given a function in the module") == warnings


@pytest.mark.parametrize("select", [torch.where, lambda mask, a, b: torch.maximum(a, b)])
def test_what_a_decoder_selects_between_forwards_keeps_its_parameters(select: Any) -> None:
    net, x = nn.Tanh(), torch.randn(2, 3, 4)
    calibrate(net, [x])
    with emulate(net) as chip:
        before, after = net(x[0]), net(x[1])
        state = select(torch.tensor([[True], [False], [True]]), after, before)
        assert chip.state.qparams_of(state) == chip.state.qparams_of(before) is not None
