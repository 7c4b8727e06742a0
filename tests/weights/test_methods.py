from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nna import emulate
from lightning_nna.callbacks import (
    CompressedSensingPruning,
    CompressionReport,
    GeneralQuantizer,
    HardCompression,
    L1Pruning,
    LotteryTicketPruning,
    MagnitudePruning,
    MRACosRegularization,
    NNAEmulation,
    RandomPruning,
)
from lightning_nna.checkpoints import load_deployed
from lightning_nna.quantization.mracos import mracos
from lightning_nna.schedule import Schedule
from lightning_nna.testing import SmallRecurrentModule
from lightning_nna.testing.contract import (
    CHECKS,
    assert_same,
    module,
    own_process_group,
    trainer,
    two_processes,
)
from lightning_nna.weights.codebook import Codebook
from lightning_nna.weights.method import WeightMethod
from lightning_nna.weights.pipeline import pipeline_of
from lightning_nna.weights.selection import groups_of

# Runs are stopped long before their schedules end; test_runs.py has the warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*missed its target")


def gq(**settings: object) -> GeneralQuantizer:
    # In steps: a run that stops early has another length.
    rising = Schedule(1.0, 16.0, until=8, shape="geometric")
    return GeneralQuantizer(**({"bits": 3, "sharpness": rising, "hard_from": 8} | settings))


def hard(**settings: object) -> HardCompression:
    return HardCompression(**({"bits": 3, "every_n_steps": 3} | settings))


def pull(**settings: object) -> MRACosRegularization:
    return MRACosRegularization(**({"bits": 3, "strength": 1e-3} | settings))


def trained(**settings: object) -> GeneralQuantizer:
    """With a sharpness of each tensor that is trained, from uniform centroids."""
    return gq(**({"train_sharpness": True, "start": "uniform", "power": 1} | settings))


METHODS = {"gq": gq, "gq_trained": trained, "hard": hard, "mracos": pull}
PER_CHANNEL = {
    "gq per channel": partial(gq, bits=2, codebook="per_channel"),
    "hard per channel": partial(hard, bits=2, codebook="per_channel", granularity="per_channel"),
}
PRUNING = {
    "csp": partial(CompressedSensingPruning, 0.5, every_n_steps=2),
    "magnitude": partial(MagnitudePruning, 0.5),
    "l1": partial(L1Pruning, 0.5),
    "lottery": partial(LotteryTicketPruning, 0.5),
    "random": partial(RandomPruning, 0.5),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("method", METHODS | PER_CHANNEL)
def test_contract(method: str, check: Callable[..., None], tmp_path: Path) -> None:
    check((METHODS | PER_CHANNEL)[method], tmp_path)


ALL = METHODS | PER_CHANNEL | PRUNING


@pytest.mark.parametrize("method", ALL)
def test_a_copy_of_a_used_callback_begins_anew_with_another_module(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    used = ALL[method]()
    trainer(used, steps=5).fit(module())
    results = []
    with caplog.at_level("INFO"):
        for callback in (copy.deepcopy(used), ALL[method]()):
            other = module(seed=1)
            trainer(callback, steps=8).fit(other)
            results.append((dict(other.state_dict()), callback.state_dict()))
    assert_same(*results)
    (said,) = (one for one in caplog.messages if "is a copy and begins again" in one)
    assert said.startswith(type(used).__name__)


@pytest.mark.parametrize("method", ALL)
def test_a_pickle_is_of_the_weights_that_it_was_made_beside(method: str) -> None:
    """Any module that has them will do; a pickle of an unused pickle is the same."""
    used, fitted = ALL[method](), module()
    trainer(used, steps=5).fit(fitted)
    twin, its = module(seed=1), pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(used))))
    twin.load_state_dict(fitted.state_dict())
    for callback, one in ((used, fitted), (its, twin)):
        trainer(callback, steps=8).fit(one)
    assert used.steps == 13
    assert_same(dict(fitted.state_dict()), dict(twin.state_dict()))
    assert_same(used.state_dict(), its.state_dict())


def test_a_state_that_is_loaded_goes_before_that_of_the_copy(tmp_path: Path) -> None:
    used, fitted = gq(), module()
    run = trainer(used, steps=5)
    run.fit(fitted)
    run.save_checkpoint(tmp_path / "stopped.ckpt")
    its, whole = copy.deepcopy(used), gq()
    trainer(its, steps=8).fit(module(seed=1), ckpt_path=tmp_path / "stopped.ckpt")
    trainer(whole, steps=8).fit(module())
    assert_same(whole.state_dict(), its.state_dict())


@pytest.mark.parametrize("method", ["gq", "hard"])
def test_every_weight_ends_with_few_values(method: str) -> None:
    fitted, callback = module(), METHODS[method](overrides={"head.first": 1})
    trainer(callback).fit(fitted)
    assert callback.selected == [n for n, p in fitted.named_parameters() if p.ndim == 2]
    for name in callback.selected:
        values = fitted.get_parameter(name).unique()
        assert len(values) <= (2 if name.startswith("head.first") else 8)
        steps = values / pipeline_of(fitted).grid_of(fitted.get_parameter(name)).scales
        assert torch.equal(steps, steps.round())


def test_each_tensor_trains_its_sharpness_until_weights_are_hard() -> None:
    fitted, callback = module(), trained(hard_from=8, centroid_lr=0.05)
    run = trainer(callback, steps=8)
    run.fit(fitted)
    soft = {name: one["sharpness_log2"] for name, one in callback.state_dict()["centroids"].items()}
    # Adam moves a logarithm by at most about its learning rate: 8 * 0.05.
    assert all(0 < abs(float(log)) < 0.5 for log in soft.values())
    assert len({float(log) for log in soft.values()}) == len(soft)
    mean = sum(2.0 ** float(log) for log in soft.values()) / len(soft)
    assert callback.metrics()["sharpness"] == pytest.approx(mean, rel=1e-6)
    trainer(callback, steps=12).fit(fitted)
    for name, state in callback.state_dict()["centroids"].items():
        assert torch.equal(state["sharpness_log2"], soft[name])
        assert len(fitted.get_parameter(name).unique()) <= 8


def test_a_checkpoint_with_a_trained_sharpness_is_loaded_as_deployed(tmp_path: Path) -> None:
    fitted = module()
    run = trainer(trained(), steps=5)
    run.fit(fitted)
    run.save_checkpoint(tmp_path / "stopped.ckpt")
    deployed = load_deployed(module(seed=1), tmp_path / "stopped.ckpt", emulation=False)
    assert_same(dict(deployed.state_dict()), dict(fitted.state_dict()))
    with pytest.raises(ValueError, match="train_sharpness is True there and False here"):
        trainer(gq()).fit(module(), ckpt_path=tmp_path / "stopped.ckpt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "random"}, "start must be 'lloyd_max' or 'uniform', got 'random'"),
        (
            {"start": "uniform", "max_entropy_bits": 2.0},
            r"without regard to the entropy, got max_entropy_bits=2\.0: leave it out",
        ),
    ],
)
def test_a_start_is_validated(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gq(**settings)


@pytest.mark.parametrize("method", ["gq", "hard"])
def test_the_chip_holds_the_codebook(method: str) -> None:
    """One set of values a tensor in int8, whatever the chip's scales; in either order."""
    results = []
    for chip_first in (True, False):
        fitted, callback = module(), METHODS[method]()
        callbacks = [NNAEmulation(calibration_steps=2), callback]
        trainer(*(callbacks if chip_first else callbacks[::-1])).fit(fitted)
        with emulate(fitted) as chip:
            fitted(torch.randn(2, 6, 4))
            for name in callback.selected:
                weight = fitted.get_parameter(name)
                held = chip.state.weight(weight, chip.state.used_weights[name])
                assert len(held.stored.unique()) <= 8
                assert torch.equal(held.values, weight)
        results.append(copy.deepcopy(dict(fitted.state_dict())))
    assert_same(*results)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_layers_are_left_alone(method: str) -> None:
    fitted = module()
    fitted.lstm.requires_grad_(False)
    before = copy.deepcopy(dict(fitted.lstm.state_dict()))
    callback = METHODS[method]()
    trainer(callback).fit(fitted)
    assert_same(dict(fitted.lstm.state_dict()), before)
    assert callback.selected == [n for n, p in fitted.head.named_parameters("head") if p.ndim == 2]


@pytest.mark.parametrize("method", ["gq", "hard"])
def test_a_frozen_layer_is_taken_where_it_is_named(method: str) -> None:
    fitted = module()
    fitted.lstm.requires_grad_(False)
    trainer(METHODS[method](targets=["lstm"])).fit(fitted)
    assert len(fitted.lstm.weight_hh_l0.unique()) <= 8
    assert len(fitted.head.first.weight.unique()) > 8


class Spoiled(SmallRecurrentModule):
    """A batch that is not a number makes the fifth step."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        loss = super().training_step(batch, batch_index)
        return loss * torch.nan if self.global_step == 4 else loss


@pytest.mark.parametrize(
    ("make", "emulated"),
    [*((make, False) for make in (*METHODS.values(), *PRUNING.values())), (gq, True)],
    ids=[*METHODS, *PRUNING, "gq, emulated"],
)
def test_a_batch_that_is_no_number_is_an_error_that_names_the_weights(
    make: Callable[[], WeightMethod], emulated: bool
) -> None:
    chip = [NNAEmulation(calibration_steps=2)] if emulated else []
    with pytest.raises(FloatingPointError, match=r"lstm\.weight_ih_l0.*not finite"):
        trainer(*chip, make()).fit(Spoiled())


@pytest.mark.parametrize("where", ["logged", "reported", "deployed"])
def test_what_looks_at_weights_after_the_step_names_them_too(where: str, tmp_path: Path) -> None:
    settings = {"log_every_n_steps": 5} if where == "logged" else {"log_every_n_steps": 100}
    watch = [CompressionReport(tmp_path, snapshots=13, figures=False)] * (where == "reported")
    steps = 5 if where == "deployed" else 12
    with pytest.raises(FloatingPointError, match=r"lstm\.weight_ih_l0.*not finite"):
        trainer(gq(), *watch, steps=steps, **settings).fit(Spoiled())


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("make", [*METHODS.values(), *PRUNING.values()], ids=[*METHODS, *PRUNING])
def test_weights_that_are_no_numbers_are_named_before_anything_is_done(
    make: Callable[[], WeightMethod], value: float
) -> None:
    fitted = module()
    fitted.head.second.weight.data[1, 1] = value
    for run in (trainer(make()).fit, trainer(make()).test):
        with pytest.raises(FloatingPointError, match=r"^head\.second\.weight has weights that"):
            run(fitted)


@pytest.mark.parametrize("method", ["gq", "hard"])
def test_weights_that_become_no_numbers_are_named_in_evaluation(method: str) -> None:
    fitted, callback = module(), METHODS[method]()
    trainer(callback, steps=2).fit(fitted)
    fitted.head.second.weight.data[1, 1] = torch.nan
    with pytest.raises(FloatingPointError, match=r"head\.second\.weight has weights that"):
        trainer(callback).test(fitted)


class ExplicitTerm(SmallRecurrentModule):
    """The regularizer as a term of the loss, differentiated by autograd."""

    books: ClassVar[dict[str, Tensor]] = {}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        loss = self.loss(self(batch[0]), batch[1])
        for name, centroids in self.books.items():
            loss = loss + 1e-2 * mracos(self.get_parameter(name), centroids).sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class WithoutTerm(ExplicitTerm):
    """The same without."""


@pytest.mark.filterwarnings("ignore:.*sync_dist=True.*")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"devices": 2, "strategy": two_processes()},
    ],
    ids=["plain", "accumulated", "clipped", "bf16-mixed", "two processes"],
)
def test_mracos_equals_autograd_on_an_explicit_term(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    # Layers that every processor has in bfloat16.
    ours, explicit = WithoutTerm(cell="gru"), ExplicitTerm(cell="gru")
    explicit.load_state_dict(ours.state_dict())
    explicit.books = {
        name: Codebook.fit(parameter.detach(), bits=3).scaled_centroids[0]
        for name, parameter in explicit.named_parameters()
        if parameter.ndim == 2
    }
    for run, fitted in ((partial(trainer, pull(strength=1e-2)), ours), (trainer, explicit)):
        with own_process_group():
            run(steps=3, **settings).fit(fitted)
    for name, parameter in explicit.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def test_both_callbacks_of_s8bqat_share_one_set_of_centroids() -> None:
    first, second = pull(), hard()
    trainer(first, second, steps=2).fit(module())
    assert first.centroids["lstm.weight_hh_l0"] is second.centroids["lstm.weight_hh_l0"]
    with pytest.raises(ValueError, match=r"lstm.weight_ih_l0 differ in bits \(3 and 4\)"):
        trainer(pull(), hard(bits=4), steps=2).fit(module())
    with pytest.raises(ValueError, match=r"differ in max_entropy_bits \(None and 2.0\)"):
        trainer(pull(), hard(max_entropy_bits=2.0), steps=2).fit(module())


@pytest.mark.parametrize("method", ["gq", "hard"])
def test_values_of_a_given_entropy_but_where_a_tensor_has_its_own_bits(method: str) -> None:
    def deployed(**settings: object) -> dict[str, Tensor]:
        callback = METHODS[method](overrides={"lstm.*_l1": 4}, **settings)
        if method == "gq":
            callback.mu = 0.0
        tested = module()
        trainer(callback).test(tested, tested.train_dataloader(), verbose=False)
        held = dict(tested.named_parameters())
        return {n: pipeline_of(tested).hard(held[n]) for n in callback.selected}

    free, cheap = deployed(), deployed(max_entropy_bits=2.0)
    own = [name for name in free if name.endswith("_l1")]
    assert len(own) == 2
    for name, weight in cheap.items():
        shares = weight.unique(return_counts=True)[1] / weight.numel()
        if name in own:
            assert torch.equal(weight, free[name])
        else:
            # Putting levels on the grid moves borders a little.
            assert float(-(shares * shares.log2()).sum()) <= 2.1


def test_centroids_stay_unless_they_are_to_be_refreshed() -> None:
    books = {}
    for every in (0, 4):
        callback = hard(refresh_every_n_steps=every, start_step=1.0)
        trainer(callback, steps=1).fit(fitted := module())
        before = callback.centroids["head.first.weight"].codebook.scaled_centroids.clone()
        trainer(callback, steps=6).fit(fitted)
        books[every] = torch.equal(
            callback.centroids["head.first.weight"].codebook.scaled_centroids, before
        )
    assert books == {0: True, 4: False}


@pytest.mark.parametrize("momentum", ["keep", "reset"])
def test_compression_at_its_steps_and_what_becomes_of_momentum(momentum: str) -> None:
    fitted, callback = module(), hard(every_n_steps=2, start_step=4, momentum=momentum)
    run = trainer(callback, steps=8)
    run.fit(fitted)
    assert callback.compressions == 3
    means = run.optimizers[0].state[fitted.head.first.weight]["exp_avg"]
    assert bool(means.any()) is (momentum == "keep")


class Moved(pl.Callback):
    """Multiply weights by a factor after three steps."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object
    ) -> None:
        if trainer.global_step == 3:
            pl_module.get_parameter("head.first.weight").data.mul_(self.factor)


@pytest.mark.parametrize(("factor", "is_changed"), [(-1.0, True), (1.001, False)])
def test_weights_that_take_another_centroid_are_counted(factor: float, is_changed: bool) -> None:
    fitted, callback = module(), hard(every_n_steps=2, targets=["head.first.weight"])
    fitted.learning_rate = 0.0
    trainer(callback, steps=2).fit(fitted)
    before = fitted.head.first.weight.detach().clone()
    again, callback = module(), hard(every_n_steps=2, targets=["head.first.weight"])
    again.learning_rate = 0.0
    trainer(Moved(factor), callback, steps=4).fit(again)
    assert callback.compressions == 2
    changed = float((again.head.first.weight != before).float().mean())
    assert callback.metrics()["changed"] == pytest.approx(changed)
    assert (changed > 0) is is_changed


def test_the_pull_is_logged_relative_to_the_gradient_of_the_loss() -> None:
    class Watch(pl.Callback):
        norms: ClassVar[list[Tensor]] = []

        def on_before_optimizer_step(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object
        ) -> None:
            grad = pl_module.get_parameter("head.first.weight").grad
            assert grad is not None
            self.norms.append(grad.clone())

    before, after = Watch(), Watch()
    before.norms, after.norms = [], []  # type: ignore[misc]
    callback = pull(strength=0.3, targets=["head.first.weight"])
    trainer(before, callback, after, steps=2).fit(module())
    added = after.norms[-1] - before.norms[-1]
    expected = float(added.norm() / before.norms[-1].norm())
    assert callback.metrics()["pull"] == pytest.approx(expected, rel=1e-5)


class Failing(SmallRecurrentModule):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        loss = super().training_step(batch, batch_index)
        if batch_index == 3:
            raise KeyError("a bug of the user's")
        return loss


class Adversarial(pl.LightningModule):
    """A generator's graph waits for its backward while the discriminator steps."""

    def __init__(self, *, judges_again: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        # Its parts are called, and not the network.
        self.network = nn.ModuleDict({"generator": generator, "judge": nn.Linear(4, 8)})
        self.judges_again = judges_again
        self.compared = 0

    def training_step(self, batch: Tensor, batch_index: int) -> None:
        generator, judge = self.optimizers()
        network = self.network
        generated = network["generator"](batch)
        loss = generated.square().mean()
        expected = torch.autograd.grad(loss, network["generator"].parameters(), retain_graph=True)
        judge.zero_grad()
        self.manual_backward(network["judge"](generated.detach()).square().mean())
        judge.step()
        if self.judges_again:  # Else no forward runs between the step and the backward.
            loss = loss + 0 * network["judge"](generated).square().mean()
        generator.zero_grad()
        self.manual_backward(loss)
        gradients = [parameter.grad for parameter in network["generator"].parameters()]
        assert all(map(torch.equal, gradients, expected))
        self.compared += 1
        generator.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in self.network.values()]

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randn(96, 4), batch_size=8)


@pytest.mark.parametrize("judges_again", [True, False])
@pytest.mark.parametrize("method", ALL)
def test_a_graph_may_wait_while_another_optimizer_steps(method: str, judges_again: bool) -> None:
    torch.manual_seed(0)
    fitted = Adversarial(judges_again=judges_again)
    trainer(ALL[method](), steps=24).fit(fitted)
    assert fitted.compared == 12
    assert pipeline_of(fitted).phase == "latent"


def test_after_an_exception_the_latent_weights_are_back() -> None:
    torch.manual_seed(0)
    failing, callback = Failing(), gq(bits=2)
    with pytest.raises(KeyError):
        trainer(callback).fit(failing)
    assert pipeline_of(failing).phase == "latent"
    assert len(failing.head.first.weight.unique()) > 4
    assert not any(m._forward_pre_hooks for m in failing.modules())


def test_a_tensor_that_two_methods_claim() -> None:
    with pytest.raises(ValueError, match=r"claimed by general_quantizer and by hard_compression"):
        trainer(gq(), hard()).fit(module())
    trainer(gq(targets=["lstm"]), hard(targets=["head"])).fit(module())


def test_two_fits_go_on_from_what_was_trained() -> None:
    whole, parts = module(), module()
    trainer(hard(), max_epochs=2, max_steps=-1).fit(whole)
    callback, run = hard(), trainer(max_epochs=1, max_steps=-1)
    run.callbacks.append(callback)
    run.fit(parts)
    latent = callback._latents["head.first.weight"].clone()
    callback._resume()
    assert torch.equal(parts.head.first.weight, latent)
    assert len(whole.head.first.weight.unique()) <= 8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0}, "bits must be an int from 1 to 8, got 0"),
        ({"bits": 9}, "bits must be an int from 1 to 8, got 9"),
        ({"overrides": {"head": 0}}, r"overrides\['head'\] must be an int"),
        ({"max_entropy_bits": 0.0}, "max_entropy_bits must be above 0 and at most 3 bits, got 0.0"),
        ({"max_entropy_bits": 3.5}, "max_entropy_bits must be above 0 and at most 3 bits, got 3.5"),
        ({"granularity": "row"}, "granularity must be 'per_tensor' or 'per_channel', got 'row'"),
        ({"codebook": "row"}, "codebook must be 'per_tensor' or 'per_channel', got 'row'"),
        (
            {"codebook": "per_channel", "max_entropy_bits": 2.5},
            r"max_entropy_bits=2\.5 is an entropy .* set codebook='per_tensor', or max_ent",
        ),
    ],
)
def test_wrong_arguments_are_named(method: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS[method](**settings)


@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_that_matches_nothing(method: str) -> None:
    with pytest.raises(ValueError, match="pattern 'decoder' matches no weight"):
        trainer(METHODS[method](targets=["decoder"])).fit(module())


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_not_finite_or_all_the_same(method: str) -> None:
    broken = module()
    nn.init.constant_(broken.head.second.weight, float("nan"))
    with pytest.raises(FloatingPointError, match=r"head\.second\.weight"):
        trainer(METHODS[method]()).fit(broken)
    constant = module()
    nn.init.constant_(constant.head.second.weight, 0.25)
    trainer(METHODS[method](), steps=2).fit(constant)
    assert bool(constant.head.second.weight.isfinite().all())


class Several(SmallRecurrentModule):
    """Convolution, GRU, attention, embedding and a plain parameter; tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gru = nn.Conv1d(4, 4, 3, padding=1), nn.GRU(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.embedding, self.plain = nn.Embedding(6, 4), nn.Parameter(torch.randn(4, 4))
        self.tied = nn.Linear(4, 6)
        self.tied.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.transpose(1, 2)).transpose(1, 2) + self.embedding.weight
        x = self.gru(x @ self.plain)[0]
        x = self.attention(x, x, x)[0]
        return super().forward(x + self.tied(x).softmax(-1) @ self.embedding.weight)


@pytest.mark.parametrize("on_chip", [False, True], ids=["float", "chip"])
@pytest.mark.parametrize("method", ["gq", "hard"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_every_kind_of_weight(method: str, granularity: str, on_chip: bool) -> None:
    torch.manual_seed(0)
    fitted = Several()
    callback: WeightMethod = METHODS[method](bits=2, granularity=granularity)
    chip = [NNAEmulation(calibration_steps=2)] if on_chip else []
    trainer(*chip, callback, steps=9).fit(fitted)
    grids = pipeline_of(fitted)
    for name in callback.selected:
        weight = fitted.get_parameter(name)
        steps = grids.grid_of(weight).scales
        integers = weight.reshape(len(steps), -1) / steps[:, None]
        assert len(integers.unique()) <= 4
    (result,) = trainer(*chip, callback).test(fitted, verbose=False)
    assert result["test/loss"] < 2


@pytest.mark.parametrize("on_chip", [False, True], ids=["float", "chip"])
@pytest.mark.parametrize("method", ["gq", "hard"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_every_channel_ends_with_few_values(method: str, granularity: str, on_chip: bool) -> None:
    torch.manual_seed(0)
    fitted = Several()
    callback: WeightMethod = METHODS[method](
        bits=2, granularity=granularity, codebook="per_channel", pin_zero=True
    )
    chip = [NNAEmulation(calibration_steps=2)] if on_chip else []
    trainer(*chip, callback, steps=9).fit(fitted)
    pipeline, values = pipeline_of(fitted), {}
    for name in callback.selected:
        weight = fitted.get_parameter(name)
        channels = groups_of(fitted, name, weight, "per_channel")
        scales = pipeline.grid_of(weight).scales
        integers = weight.reshape(len(scales), -1) / scales[:, None]
        assert torch.equal(integers.round(), integers)
        assert len(scales) == (channels if granularity == "per_channel" else 1)
        assert max(len(row.unique()) for row in weight.reshape(channels, -1)) <= 4
        values[name] = channels, len(integers.unique())
    by_channel = {name for name, (channels, _) in values.items() if channels > 1}
    assert {"conv.weight", "lstm.weight_hh_l0", "tied.weight", "head.first.weight"} & by_channel
    assert all(values[name][1] > 4 for name in ("lstm.weight_hh_l0", "head.first.weight"))
    assert all(count <= 4 for channels, count in values.values() if channels == 1)
    (result,) = trainer(*chip, callback).test(fitted, verbose=False)
    assert result["test/loss"] < 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (4, r"head.first.weight .* 16 centroids \(4 bits\) for each of its 8 channels, since a ch"),
        (8, r"lstm.weight_ih_l0 .* 256 .* all the integers .* with codebook='per_tensor'"),
    ],
)
def test_a_channel_has_as_many_weights_as_centroids(method: str, bits: int, message: str) -> None:
    callback = METHODS[method](bits=bits, codebook="per_channel")
    with pytest.raises(ValueError, match=message):
        trainer(callback, steps=2).fit(module())


@pytest.mark.parametrize("method", ["gq", "hard"])
def test_a_run_keeps_its_codebook(method: str, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    one = trainer(METHODS[method](), steps=5)
    one.fit(module())
    one.save_checkpoint(path)
    other = METHODS[method](codebook="per_channel")
    with pytest.raises(ValueError, match="codebook is 'per_tensor' there and 'per_channel' here"):
        trainer(other, steps=8).fit(module(seed=1), ckpt_path=path)
    # Written before there was a choice.
    checkpoint = torch.load(path, weights_only=True)
    (state,) = (one for one in checkpoint["callbacks"].values() if "latents" in one)
    del state["settings"]["codebook"]
    torch.save(checkpoint, path)
    trainer(METHODS[method](), steps=8).fit(module(seed=1), ckpt_path=path)
    other = METHODS[method](codebook="per_channel")
    with pytest.raises(ValueError, match="one set in the checkpoint, and centroids of 4 channels"):
        trainer(other, steps=8).fit(module(seed=1), ckpt_path=path)


@pytest.mark.parametrize("method", ["gq", "hard"])
def test_training_beats_rounding_at_two_bits(method: str) -> None:
    """On what is trained: 64 sequences are learned by heart, also with four values a tensor."""
    fitted = module()
    trainer(steps=80).fit(fitted)
    rounded = _loss_on_training_data(copy.deepcopy(fitted), hard(bits=2))
    fitted.learning_rate = 0.005
    callback = METHODS[method](bits=2)
    trainer(callback, steps=80).fit(fitted)
    assert _loss_on_training_data(fitted, callback) < 0.5 * rounded


def _loss_on_training_data(fitted: SmallRecurrentModule, callback: WeightMethod) -> float:
    (result,) = trainer(callback).test(fitted, fitted.train_dataloader(), verbose=False)
    return result["test/loss"]


def test_centroids_need_powers_of_two_on_a_chip_of_shifts() -> None:
    chip = NNAEmulation("shift", calibration_steps=1)
    with pytest.raises(ValueError, match="set power_of_two_scales=True"):
        trainer(chip, gq(), steps=4).fit(module())
    chip = NNAEmulation("shift", calibration_steps=1)
    trainer(chip, gq(power_of_two_scales=True), steps=4).fit(module())


@pytest.mark.parametrize("method", ["gq", "hard"])
def test_one_bit_has_no_pinned_zero(method: str) -> None:
    fitted = module()
    trainer(METHODS[method](bits=2, pin_zero=True, overrides={"head.first": 1})).fit(fitted)
    one = next(p for n, p in fitted.named_parameters() if n == "head.first.weight")
    assert len(one.unique()) == 2
    assert float(one.detach().min()) < 0 < float(one.detach().max())
    assert bool((fitted.get_parameter("lstm.weight_hh_l0") == 0).any())


@pytest.mark.parametrize("method", ["gq", "hard"])
def test_zeros_of_pruning_beyond_the_codebook_are_warned_of(method: str) -> None:
    callback = METHODS[method](bits=2, targets=["head.first"])
    with pytest.warns(UserWarning, match=r"head.first.weight \(5 values of 2 bit"):
        trainer(callback, MagnitudePruning(0.5), steps=4).fit(module())


@pytest.mark.parametrize("settings", [{"pin_zero": True}, {"targets": ["lstm"]}])
@pytest.mark.parametrize("method", ["gq", "hard"])
@pytest.mark.filterwarnings("error:.*pruned weights:UserWarning")
def test_zeros_of_pruning_in_the_codebook_or_beside_it_are_not(
    method: str, settings: dict[str, Any]
) -> None:
    callback, fitted = METHODS[method](bits=2, **settings), module()
    trainer(callback, MagnitudePruning(0.5, targets=["head.first"]), steps=4).fit(fitted)
    weight = fitted.get_parameter("head.first.weight").detach()
    assert bool((weight == 0).any())


def _after(steps: int, **settings: object) -> tuple[dict[str, Tensor], pl.LightningModule]:
    """Centroids of a run that becomes hard in its fifth step, and its module."""
    fitted, callback = module(), gq(**{"hard_from": 5, "centroid_lr": 0.05, **settings})
    trainer(callback, steps=steps).fit(fitted)
    states = callback.state_dict()["centroids"]
    return {name: state["centroids"].clone() for name, state in states.items()}, fitted


def test_centroids_stay_once_weights_are_hard() -> None:
    soft, fitted = _after(9)
    assert_same(_after(5)[0], soft)
    moved, _ = _after(9, train_centroids=True)
    assert all(not torch.equal(moved[name], soft[name]) for name in soft)
    # As with a rate of zero from the first hard step on.
    rate = Schedule(0.05, 0.0, until=6, shape="step")
    stopped, other = _after(9, train_centroids=True, centroid_lr=rate)
    assert_same(stopped, soft)
    assert_same(dict(other.state_dict()), dict(fitted.state_dict()))


RISING = {"start": 4.0, "end": 300.0, "shape": "geometric"}


class Sharpness(pl.Callback):
    """Record the sharpness after each step, and end the run after ``last`` steps."""

    def __init__(self, method: GeneralQuantizer, last: int) -> None:
        self.method, self.last, self.values = method, last, []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.values.append(self.method.metrics()["sharpness"])
        trainer.should_stop = trainer.global_step >= self.last


@pytest.mark.parametrize(
    ("settings", "steps", "hard_step"),
    [
        ({}, 16, 12),
        ({}, 480, 360),
        ({}, 960, 720),
        ({}, 1000, 100),
        ({}, 5000, 500),
        ({"hard_from": 0.25}, 16, 4),
        ({"hard_from": 4}, -1, 4),
        ({"hard_from": 0}, 16, 0),
        ({"sharpness": {**RISING, "until": 8}}, 16, 8),
        ({"sharpness": {**RISING, "until": 0.25}}, 2000, 500),
    ],
)
def test_weights_are_soft_for_three_quarters_of_a_short_run_and_a_tenth_of_a_long_one(
    settings: dict[str, Any], steps: int, hard_step: int
) -> None:
    method = GeneralQuantizer(3, **settings)
    sharpness = Sharpness(method, 3)
    trainer(method, sharpness, steps=steps, max_epochs=-1).fit(module())
    assert method.hard_step == hard_step
    rise = [4 * 75 ** min(step / max(hard_step, 1), 1) for step in (1, 2, 3)]
    assert sharpness.values == pytest.approx(rise, rel=1e-6)


@pytest.mark.parametrize(
    ("method", "time"),
    [
        (GeneralQuantizer(3), "hard_from=0.1"),
        (GeneralQuantizer(3, sharpness=16.0), "hard_from=0.1"),
        (GeneralQuantizer(3, sharpness=16.0, hard_from=0.5), "hard_from=0.5"),
        (HardCompression(3, every_n_steps=1, start_step=0.5), "start_step=0.5"),
        (
            MagnitudePruning(0.5, schedule=Schedule(0, 1, until=8), freeze_step=0.5),
            "freeze_step=0.5",
        ),
    ],
)
def test_a_fraction_of_a_run_without_an_end_is_an_error(method: WeightMethod, time: str) -> None:
    with pytest.raises(ValueError, match=f"{time} is a fraction of a run that has no end"):
        trainer(method, steps=-1, max_epochs=-1).fit(module())


def test_centroids_are_trained_always_never_or_while_soft() -> None:
    with pytest.raises(ValueError, match="train_centroids must be True, False or 'soft'"):
        gq(train_centroids="hard")
