"""In which mode a module runs: blocks that nest, threads, copies, and parts of a module."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode

from lightning_nna import bake, calibrate, coverage, emulate, strip
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.emulation.attachment import attach, attached
from lightning_nna.testing import SmallNet
from lightning_nna.testing.contract import assert_same, is_unhooked
from tests.emulation.modules import Function


def calibrated(net: nn.Module, x: Tensor) -> nn.Module:
    calibrate(net, [x])
    return net


def emulated(net: nn.Module, x: Tensor, fidelity: str = "exact") -> Tensor:
    with emulate(net, fidelity=fidelity), torch.no_grad():  # type: ignore[arg-type]
        return net(x)


# --- blocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [SmallNet(), nn.RReLU(), Function(torch.tanh)])
def test_a_module_without_ranges_is_not_silently_in_float(net: nn.Module) -> None:
    x = torch.randn(3, 4)
    with emulate(net), pytest.raises(RuntimeError, match=r"has no ranges: call calibrate\(module"):
        net(x)
    assert torch.isfinite(net(x)).all()
    assert _get_current_function_mode() is None


def test_methods_beside_forward_need_ranges_too() -> None:
    class Decoder(nn.Module):
        def transcribe(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    decoder = Decoder()
    with emulate(decoder), pytest.raises(RuntimeError, match="Decoder is to be emulated and has"):
        decoder.transcribe(torch.randn(3))


def test_an_inner_block_leaves_the_outer_one_as_it_was() -> None:
    net, x = SmallNet(), torch.randn(200, 4)
    calibrated(net, x)
    plain, exact = net(x), emulated(net, x)
    with emulate(net) as chip, torch.no_grad():
        with emulate(net, fidelity="fast"):
            assert (chip.mode.phase, chip.mode.fidelity) == ("emulate", "fast")
        assert torch.equal(net(x), exact)
        calibrate(net, [x])
        assert torch.equal(net(x), exact)
        with pytest.raises(ZeroDivisionError), emulate(net, fidelity="fast"):
            1 / 0  # noqa: B018
        assert (chip.mode.phase, chip.mode.fidelity) == ("emulate", "exact")
    assert chip.mode.phase == "float"
    assert torch.equal(net(x), plain)


def test_an_inner_block_leaves_learned_scales_of_the_outer_one_on() -> None:
    net, x = SmallNet(), torch.randn(16, 4)
    calibrated(net, x)
    with emulate(net, learned_scales="weights") as chip:
        with emulate(net):
            net(x)
        net(x).sum().backward()
        assert all(step.grad is not None for step in chip.scales.tensors().values())
        assert len(chip.scales.tensors()) == 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_is_raised_leaves_no_mode_behind(error: type[BaseException]) -> None:
    def interrupted(x: Tensor) -> Tensor:
        y = torch.tanh(x)
        if len(x) == 7:
            raise error
        return y

    net, x = nn.Sequential(Function(interrupted)), torch.randn(3)
    calibrated(net, x)
    plain = net(x)
    with pytest.raises(error), emulate(net):
        net(torch.randn(7))
    assert _get_current_function_mode() is None
    assert torch.equal(net(x), plain)
    with emulate(net):
        assert not torch.equal(net(x), plain)


def test_a_hook_that_raises_before_ours_does_not_end_the_outer_forward() -> None:
    class Caught(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Tanh()
            self.child.register_forward_pre_hook(self.refuse)

        def refuse(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise LookupError

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.child(x)
            except LookupError:
                return torch.tanh(x)
            return x

    net, x = Caught(), torch.randn(50)
    calibrated(net, x)
    assert not torch.equal(emulated(net, x), torch.tanh(x))


@pytest.mark.parametrize("fails", [False, True])
def test_calibrating_keeps_every_training_flag(fails: bool) -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(0.1)))
    net.train()
    net[1].eval()
    before = {name: module.training for name, module in net.named_modules()}
    x = torch.randn(4, 2, 5)

    def forward(module: nn.Module, batch: Tensor) -> None:
        assert not module.training
        module(batch)
        if fails:
            raise OSError("a damaged batch")

    with contextlib.suppress(OSError):
        calibrate(net, [x], forward)
    assert {name: module.training for name, module in net.named_modules()} == before
    assert (attached(net).calibrated, attached(net).mode.phase) == (not fails, "float")


# --- threads ------------------------------------------------------------------------------------


def in_threads(*actions: Callable[[], None]) -> None:
    """Run actions at once; the first error is raised here."""
    errors: list[BaseException] = []

    def guarded(action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_run_one_module_in_modes_of_their_own() -> None:
    torch.manual_seed(0)
    net, x = SmallNet(16, 32, 8), torch.randn(200, 16)
    calibrated(net, x)
    modes = [None, "exact", "fast"]
    with torch.no_grad():
        expected = [net(x), emulated(net, x), emulated(net, x, "fast")]
    wrong: list[str | None] = []

    def forwards(mode: str | None, right: Tensor) -> None:
        for _ in range(100):
            with torch.no_grad():
                y = net(x) if mode is None else emulated(net, x, mode)
            if not torch.equal(y, right):
                wrong.append(mode)

    in_threads(*(lambda m=m, e=e: forwards(m, e) for m, e in zip(modes, expected, strict=True)))
    assert wrong == []
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_threads_that_meet_a_module_at_once_attach_to_it_once() -> None:
    net, x = SmallNet(), torch.randn(8, 4)
    barrier = threading.Barrier(4)

    def meet() -> None:
        barrier.wait()
        with emulate(net):
            pass

    in_threads(*([meet] * 4))
    assert len(net._forward_pre_hooks) == 1
    calibrate(net, [x])


def test_calibrating_while_another_thread_emulates_is_an_error() -> None:
    net, x = SmallNet(), torch.randn(8, 4)
    calibrated(net, x)
    with emulate(net), pytest.raises(RuntimeError, match="another thread runs this module"):
        in_threads(lambda: calibrate(net, [x]) and None)


def test_a_thread_of_the_engine_takes_the_mode_of_the_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on an accelerator, where the engine has threads of its own."""
    net, x = SmallNet(), torch.randn(16, 4)
    calibrated(net, x)
    expected, results = emulated(net, x), []

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            in_threads(lambda: results.append(net(x).detach()))
            return grad

    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)
    with emulate(net):
        Recomputed.apply(torch.zeros(1, requires_grad=True)).sum().backward()
    assert torch.equal(results[0], expected)


def test_replicas_of_data_parallel_are_an_error() -> None:
    net, x = SmallNet(), torch.randn(8, 4)
    calibrated(net, x)
    replica = net._replicate_for_data_parallel()
    with emulate(net), pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        in_threads(lambda: replica(x) and None)


# --- ranks --------------------------------------------------------------------------------------


class Ranks:
    """``all_gather_object`` among threads that stand for the processes of a run."""

    def __init__(self, size: int) -> None:
        self.size, self.rank = size, threading.local()
        self.gathered: list[object] = [None] * size
        self.barrier = threading.Barrier(size)

    def all_gather_object(self, results: list[object], own: object) -> None:
        self.gathered[self.rank.number] = copy.deepcopy(own)
        self.barrier.wait()
        results[:] = copy.deepcopy(self.gathered)
        self.barrier.wait()


class Branches(nn.Module):
    """Run one of two products first, depending on the data; so do the consumers of a result."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if float(x.detach().sum()) > 0:
            return torch.relu(y) * 0.5
        return torch.relu(y) * 7.0 + y * 3.0


def test_ranks_that_take_other_branches_agree_on_sites_and_ranges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    nets = [Branches(), Branches()]
    nets[1].load_state_dict(nets[0].state_dict())
    x, ranks = torch.randn(16, 4).abs(), Ranks(2)
    batches = [[x, -x], [-2 * x, 3 * x]]
    alone = Branches()
    alone.load_state_dict(nets[0].state_dict())
    expected = calibrate(alone, [x, -2 * x, -x, 3 * x]).state_dict()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: ranks.rank.number)
    monkeypatch.setattr(torch.distributed, "all_gather_object", ranks.all_gather_object)

    def observe(number: int) -> None:
        ranks.rank.number = number
        chip = attach(nets[number])
        for batch in batches[number]:
            with chip.running("observe"):
                nets[number](batch)
            chip.reduce_ranges()
        chip.freeze()

    in_threads(lambda: observe(0), lambda: observe(1))
    assert attached(nets[0]).state_dict() == attached(nets[1]).state_dict() == expected


# --- copies -------------------------------------------------------------------------------------


def copied(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net)


def pickled(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


class Convolutional(nn.Module):
    """A batch norm and a ReLU that fold, two sites of one kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return torch.sigmoid(y) + torch.sigmoid(2 * y)


@pytest.mark.parametrize("twin_of", [copied, pickled])
@pytest.mark.parametrize(
    ("settings", "learned"),
    [
        ({}, "none"),
        ({"spec": "litert-int16x8"}, "none"),
        ({"spec": {"name": "four", "weight_bits": 4}, "targets": ["layers", "."]}, "none"),
        ({"observer": "percentile"}, "none"),
        ({}, "all"),
    ],
)
def test_a_copy_carries_its_emulation(
    twin_of: Callable[[nn.Module], nn.Module], settings: dict, learned: str
) -> None:
    torch.manual_seed(0)
    net, x = Convolutional().eval(), torch.randn(8, 2, 30)
    calibrate(net, [x], **settings)
    arguments = {key: value for key, value in settings.items() if key != "observer"}
    with emulate(net, **arguments, learned_scales=learned) as chip:  # type: ignore[arg-type]
        net(x)
        with torch.no_grad():
            for log2_scale in chip.scales.tensors().values():
                log2_scale -= 0.3
        expected = net(x).detach()
    twin = twin_of(net)
    with emulate(twin, **arguments) as other:
        assert torch.equal(twin(x), expected)
    assert other is not chip
    assert_same(other.state_dict(), chip.state_dict())
    assert other.state.used_weights.keys() <= {name for name, _ in twin.named_parameters()}
    # A copy of the copy; and the copy is free of the original.
    strip(net)
    with emulate(twin_of(twin), **arguments), emulate(twin, **arguments):
        assert torch.equal(twin(x), expected)
    assert is_unhooked(strip(twin))
    assert torch.equal(twin(x), net(x))


def test_a_copy_can_be_baked_and_stripped_as_the_original() -> None:
    net, x = SmallNet(), torch.randn(16, 4)
    calibrated(net, x)
    emulated(net, x)
    twin, other = copied(net), pickled(net)
    assert_same(dict(bake(twin).state_dict()), dict(bake(net).state_dict()))
    assert is_unhooked(twin)
    assert is_unhooked(strip(other))
    with pytest.raises(RuntimeError, match="nothing to bake: the module has no emulator"):
        bake(other)


def test_a_copy_of_a_part_says_that_it_has_no_ranges() -> None:
    net, x = nn.Sequential(SmallNet(), nn.Tanh()), torch.randn(16, 4)
    calibrated(net, x)
    part = copied(net[0])
    with emulate(part), pytest.raises(RuntimeError, match="SmallNet is to be emulated and has no"):
        part(x)
    calibrated(part, x)
    assert torch.equal(emulated(part, x), emulated(net[0], x))


# --- parts of a module --------------------------------------------------------------------------


class Holder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_part_is_emulated_and_exported_with_the_ranges_of_the_whole(tmp_path: object) -> None:
    torch.manual_seed(0)
    holder, x = Holder(), torch.randn(16, 4)
    calibrated(holder, x)
    expected = emulated(holder, x)
    assert torch.equal(emulated(holder.net, x), expected)
    path = f"{tmp_path}/net.tflite"
    export_tflite(holder.net, [x], path)
    assert verify(holder.net, path, [x]) == 1.0


def test_what_a_part_cannot_do_alone_names_the_whole() -> None:
    holder, x = Holder(), torch.randn(16, 4)
    calibrate(holder, [x], targets=["net.first", "net.second", "net.third"])
    for action in (strip, bake, lambda net: calibrate(net, [x])):
        with pytest.raises(ValueError, match=r"is 'net' of a Holder that has an emulator"):
            action(holder.net)
    with pytest.raises(ValueError, match=r"targets \['net.first'.*leave it out; call strip on"):
        emulated(holder.net, x)
    strip(holder)
    calibrate(holder, [x])
    with pytest.raises(ValueError, match=r"the Holder around 'net' is emulated on 'tflm-int8'"):
        emulate(holder.net, "shift").__enter__()


# --- messages -----------------------------------------------------------------------------------


def test_a_forward_without_any_operator_of_the_chip_is_named() -> None:
    net = nn.Conv3d(4, 3, 1)
    with pytest.raises(RuntimeError, match=r"forwards were observed, but .* \./conv3d#0 run in"):
        calibrate(net, [torch.randn(5, 4, 2, 2, 2)])


def test_a_forward_without_floats_is_no_missing_forward() -> None:
    net = Function(lambda x: x + 1)
    with pytest.raises(RuntimeError, match="no function with a float tensor ran in the modules"):
        calibrate(net, [torch.arange(3)])


def test_baking_after_calibrating_alone_says_what_is_missing() -> None:
    net = calibrated(SmallNet(), torch.randn(3, 4))
    with pytest.raises(RuntimeError, match=r"calibrate only observes it in float. Run it once"):
        bake(net)


@pytest.mark.parametrize("entry", ["fusion", "locations", "observer", "ranges"])
def test_an_older_state_is_named(entry: str) -> None:
    chip = calibrate(SmallNet(), [torch.randn(3, 4)])
    state = {key: value for key, value in chip.state_dict().items() if key != entry}
    with pytest.raises(
        ValueError, match=f"lacks {entry}: it was saved by another version of .* calibrate"
    ):
        chip.load_state_dict(state)


def test_a_state_of_another_spec_names_both() -> None:
    x = torch.randn(3, 4)
    state = calibrate(SmallNet(), [x]).state_dict()
    other = calibrate(SmallNet(), [x], spec="litert-int16x8")
    with pytest.raises(ValueError, match="spec 'tflm-int8', the emulator has 'litert-int16x8'"):
        other.load_state_dict(state)


def test_the_arithmetic_of_a_state_counts_and_not_its_name() -> None:
    x = torch.randn(3, 4)
    state = calibrate(SmallNet(), [x]).state_dict()
    calibrate(SmallNet(), [x], spec={"name": "mine"}).load_state_dict(state)
    other = calibrate(SmallNet(), [x], spec={"name": "tflm-int8", "weight_bits": 4})
    with pytest.raises(ValueError, match="weight_bits is 8 there and 4 here"):
        other.load_state_dict(state)


class Scaled(nn.Module):
    """A layer with a gain that is a parameter, and an offset that is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
        self.register_buffer("offset", torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.gain + self.offset


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
@pytest.mark.parametrize("learned", ["none", "all"])
def test_tensors_that_others_took_the_place_of_keep_their_part(learned: str, spec: str) -> None:
    net, x = Scaled(), torch.randn(8, 4)
    chip = calibrate(net, [x], spec=spec)
    with emulate(net, spec, learned_scales=learned):  # type: ignore[arg-type]
        net(x)
        for step in chip.scales.tensors().values():
            step.data += 0.3
    with torch.no_grad(), emulate(net, spec):
        expected = net(x)
    baked = bake(copy.deepcopy(net)).state_dict()
    known = set(chip.ranges.ranges)
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    with torch.no_grad(), emulate(net, spec):
        assert torch.equal(net(x), expected)
    assert set(chip.ranges.ranges) == known
    after = bake(net).state_dict()
    assert all(torch.equal(after[key], value) for key, value in baked.items())


@pytest.mark.parametrize("spec", ["litert-int16x8", "shift"])
def test_coverage_takes_the_spec_by_position(spec: str) -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.GELU()), torch.randn(2, 4)
    assert coverage(net, x, spec) == coverage(net, x, spec=spec)


# --- what a failed call leaves behind -------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def broken(batch: Tensor) -> Iterator[Tensor]:
    yield batch * 1e4
    raise OSError("the disk is gone")


@pytest.mark.parametrize("observer", ["min_max", "mse"])
@pytest.mark.parametrize("begun", [True, False])
def test_a_calibration_that_fails_leaves_nothing_behind(begun: bool, observer: str) -> None:
    x, net, other = torch.randn(20, 6), network(), network()
    settings: dict[str, Any] = {"observer": observer}
    for _ in range(1 + begun):
        calibrate(other, [x], **settings)
    if begun:
        calibrate(net, [x], **settings)
    with pytest.raises(OSError, match="disk"):
        calibrate(net, broken(x), **settings)
    calibrate(net, [x], **settings)
    assert_same(attached(net).state_dict(), attached(other).state_dict())  # type: ignore[union-attr]


@pytest.mark.parametrize("spec", ["litert-int16x8", "shift"])
def test_what_failed_before_it_observed_binds_a_module_to_nothing(spec: str) -> None:
    x, net = torch.randn(20, 6), network()
    with pytest.raises(TypeError, match="pass the accelerator as spec="):
        calibrate(net, [x], spec)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="has no ranges"), emulate(net):
        net(x)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        calibrate(net, [x[:, :3]])
    assert calibrate(net, [x], spec=spec).spec.name == spec


def test_emulate_without_a_spec_takes_the_one_of_the_module_and_of_its_copies() -> None:
    x, net = torch.randn(20, 6), network()
    calibrate(net, [x], spec="litert-int16x8", targets=["0", "1"])
    with torch.no_grad(), emulate(net, "litert-int16x8", targets=["0", "1"]):
        expected = net(x)
    for each in (net, copy.deepcopy(net)):
        with torch.no_grad(), emulate(each):
            assert torch.equal(each(x), expected)
    with pytest.raises(ValueError, match="leave out spec and targets"), emulate(net, "shift"):
        pass


def test_a_copy_inside_of_another_module_keeps_its_ranges() -> None:
    x, net = torch.randn(20, 6), network()
    calibrate(net, [x])
    with torch.no_grad(), emulate(net):
        expected = net(x)
    average = torch.optim.swa_utils.AveragedModel(net)
    coverage(average, x)
    with pytest.raises(RuntimeError, match="has no ranges"), emulate(average):
        average(x)
    with torch.no_grad(), emulate(average.module):
        assert torch.equal(average.module(x), expected)
    strip(average)
    with torch.no_grad(), emulate(average.module):
        assert torch.equal(average.module(x), expected)
