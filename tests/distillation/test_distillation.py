"""Distillation: the contract, the gradient of the loss, and what the copies are."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader

from lightning_nna.callbacks import (
    CompressedSensingPruning,
    Distillation,
    GeneralQuantizer,
    NNAEmulation,
)
from lightning_nna.testing.contract import (
    CHECKS,
    assert_same,
    is_unhooked,
    module,
    own_process_group,
    trainer,
    two_processes,
)

# Runs are stopped long before their schedules end.
pytestmark = pytest.mark.filterwarnings("ignore:.*missed its target")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[..., None], tmp_path: Path) -> None:
    check(lambda: Distillation(["lstm"], weight=0.5), tmp_path)


# --- the gradient of the loss -----------------------------------------------------------------


class Explicit(pl.LightningModule):
    """A body that is called twice, a head, and by choice the distances in its own loss.

    Args:
        explicit: Function of student's and teacher's outputs, which this module adds itself.
        batches: Over which gradients are accumulated by hand; 0 for automatic optimization.
    """

    def __init__(
        self, explicit: Callable[[Tensor, Tensor], Tensor] | None = None, batches: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 3)
        self.explicit, self.batches = explicit, batches
        self.automatic_optimization = not batches
        self.copies: list[nn.Module] = []

    def on_fit_start(self) -> None:
        self.copies = [copy.deepcopy(self.body), copy.deepcopy(self.head)]

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        first = self.body(x)
        with torch.no_grad():
            self.body(-x)  # Without a gradient, so it does not count.
        second = self.body(first)
        logits = self.head(second)
        loss = F.cross_entropy(logits, y)
        if self.explicit is not None:
            body, head = self.copies
            students = torch.cat([first, second]), logits
            teachers = torch.cat([body(x), body(first)]), head(second)
            for student, teacher in zip(students, teachers, strict=True):
                loss = loss + self.explicit(student, teacher.detach())
        self.log("train/loss", loss)
        if self.batches:
            optimizer: Any = self.optimizers()
            self.manual_backward(loss / self.batches)
            if (index + 1) % self.batches == 0:
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(32, 4, generator=generator)
        return DataLoader([(one, int(one[0] > 0)) for one in x], batch_size=4)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """PyTorch's divergence of rows, at temperature 2."""
    return 4 * F.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean"
    )


EXPLICIT: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], dict[str, Any]]] = {
    "mse": (lambda s, t: 0.7 * F.mse_loss(s, t), {"weight": 0.7}),
    "kl": (lambda s, t: 0.7 * kl(s, t), {"weight": 0.7, "distance": "kl", "temperature": 2.0}),
}


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("distance", EXPLICIT)
def test_it_trains_as_a_loss_that_names_the_distances(
    distance: str, manual: bool, batches: int
) -> None:
    term, settings = EXPLICIT[distance]
    by_hand = batches if manual else 0
    accumulated: dict[str, Any] = {"accumulate_grad_batches": 1 if manual else batches}
    if manual:  # The callback's term is that of the loss which manual_backward is called with.
        settings = settings | {"weight": 0.7 / batches}
    explicit, plain, without = (
        Explicit(term, by_hand),
        Explicit(None, by_hand),
        Explicit(None, by_hand),
    )
    trainer(steps=6, **accumulated).fit(explicit)
    callback = Distillation(["body", "head"], **settings)
    trainer(callback, steps=6, **accumulated).fit(plain)
    trainer(steps=6, **accumulated).fit(without)
    for name, weight in explicit.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], weight, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(without.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def test_a_weight_of_zero_changes_nothing() -> None:
    plain, distilled = module(), module()
    trainer(NNAEmulation(calibration_steps=2)).fit(plain)
    emulation = NNAEmulation(calibration_steps=2)
    trainer(Distillation(["lstm", "head"], weight=0.0), emulation).fit(distilled)
    assert_same(dict(plain.state_dict()), dict(distilled.state_dict()))


class Saved(Explicit):
    """A loss whose value the backward needs."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = (self.head(self.body(batch[0])).square().mean()).exp()
        before = loss.detach().clone()
        self.manual_backward(loss)
        assert torch.equal(before, loss)
        optimizer.step()
        return loss.detach()


def test_a_loss_keeps_its_value_which_its_own_backward_may_need() -> None:
    plain, distilled = Saved(batches=1), Saved(batches=1)
    trainer(steps=1).fit(plain)
    trainer(Distillation(["body"], weight=5.0), steps=1).fit(distilled)
    # In the first step a copy is what it is a copy of.
    assert_same(dict(plain.state_dict()), dict(distilled.state_dict()))


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_gradient_scaler_scales_the_distance_too(scale: float) -> None:
    explicit, distilled = Explicit(EXPLICIT["mse"][0]), Explicit()
    for one, callbacks in (
        (explicit, []),
        (distilled, [Distillation(["body", "head"], weight=0.7)]),
    ):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        trainer(*callbacks, steps=6, plugins=[plugin]).fit(one)
    for name, weight in explicit.state_dict().items():
        torch.testing.assert_close(distilled.state_dict()[name], weight, rtol=1e-2, atol=2e-3)


class HalfBatches(Explicit):
    """Each process takes its half of every batch."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        size = len(batch[0]) // self.trainer.world_size
        rows = slice(self.global_rank * size, (self.global_rank + 1) * size)
        return super().training_step([one[rows] for one in batch], index)


class SaveCheckpoint(Callback):
    """Save where a run is to be resumed: a run that stops there has another length."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


class SaveWeights(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save(pl_module.state_dict(), self.folder / f"{trainer.global_rank}.pt")


def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    alone = HalfBatches()
    trainer(Distillation(["body", "head"], weight=0.7), steps=5).fit(alone)
    parts = [Distillation(["body", "head"], weight=0.7), SaveWeights(tmp_path)]
    two = {"devices": 2, "strategy": two_processes(), "use_distributed_sampler": False}
    with own_process_group(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*sync_dist=True.*")
        trainer(*parts, steps=5, **two).fit(HalfBatches())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(first, second)
    for name, weight in alone.state_dict().items():
        torch.testing.assert_close(first[name], weight, rtol=1e-5, atol=1e-6)


# --- the copies -------------------------------------------------------------------------------


class Odd(pl.LightningModule):
    """One target of any kind.

    Args:
        target: Module.
        call: Function of the target and a batch of shape ``(4, 3, 4)``, with a loss.
    """

    def __init__(self, target: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.target, self.call = target, call

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.call(self.target, batch)

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.call(self.target, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        x = torch.randn(16, 3, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(x, batch_size=4)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


class Named(nn.Module):
    """A dict of a tensor, a list of tensors and lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, *, x: Tensor) -> dict[str, Any]:
        y = self.linear(x)
        return {"y": y, "all": [y, (2 * y, None)], "lengths": torch.tensor([3])}


def packed(lstm: nn.LSTM, x: Tensor) -> Tensor:
    y, _ = lstm(pack_padded_sequence(x, torch.tensor([3, 2, 2, 1]), batch_first=True))
    return y.data.square().mean()


def attended(layer: nn.Module, x: Tensor) -> Tensor:
    padding = torch.tensor([[False, False, True]]).expand(4, 3)
    return layer(x, src_key_padding_mask=padding).square().mean()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 1)


ODD: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "tuple": (lambda: nn.LSTM(4, 4, batch_first=True), lambda m, x: m(x)[0].square().mean()),
    "dict and keywords": (Named, lambda m, x: m(x=x)["all"][1][0].square().mean()),
    "packed": (lambda: nn.LSTM(4, 4, batch_first=True), packed),
    "writes to its input": (
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)),
        lambda m, x: m(x - 0.5).square().mean(),
    ),
    "written to": (lambda: nn.Linear(4, 4), lambda m, x: m(x).add_(1.0).square().mean()),
    "attention with a mask": (encoder, attended),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        lambda m, x: m(x).square().mean(),
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_outputs_of_a_start_are_those_of_its_copy(kind: str) -> None:
    """So the first step changes what it changes without; and later ones do not."""
    build, call = ODD[kind]
    steps: list[list[dict[str, Tensor]]] = []
    for callbacks in ([], [Distillation(["target"], weight=3.0)]):
        torch.manual_seed(0)
        fitted = Odd(build(), call)
        steps.append([])
        for count in (1, 3):
            run = trainer(*callbacks, steps=count, max_epochs=1)
            run.fit(fitted)
            steps[-1].append(copy.deepcopy(fitted.state_dict()))
        distance = run.logged_metrics.get("nna/distillation/target", torch.tensor(math.nan))
    for first, second in zip(*(one[0].values() for one in steps), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    last = [torch.cat([w.flatten() for w in one[1].values()]) for one in steps]
    assert not torch.allclose(*last, rtol=0, atol=1e-5)
    assert float(distance) > 1e-6


def test_a_copy_is_float_unseen_by_the_emulation_and_frozen() -> None:
    """Its outputs are those of the float weights; the emulated ones differ from them."""
    fitted, emulation = module(), NNAEmulation(calibration_steps=2)
    start = copy.deepcopy(fitted)
    callback = Distillation(["lstm"], weight=1.0)
    run = trainer(emulation, callback, steps=8)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    fitted.lstm.register_forward_hook(
        lambda _, args, output: (inputs.append(args[0].clone()), outputs.append(output))[1] and None
    )
    run.fit(fitted)
    training = [i for i, output in enumerate(outputs) if output[0].requires_grad]
    assert len(training) == 8
    states, (h, c) = outputs[training[-1]]
    expected, (start_h, start_c) = start.lstm(inputs[training[-1]])
    both = zip((states, h, c), (expected, start_h, start_c), strict=True)
    squares = torch.cat([(a - b).flatten() for a, b in both]).square()
    logged = run.logged_metrics["nna/distillation/lstm"]
    torch.testing.assert_close(logged, squares.mean().detach(), rtol=1e-5, atol=0)
    copies = callback.state_dict()["copies"]["lstm"]
    assert_same(dict(copies), dict(start.lstm.named_parameters()))
    assert not any(tensor.requires_grad for tensor in copies.values())
    # The emulation has the sites that it has without the copy.
    alone = NNAEmulation(calibration_steps=2)
    trainer(alone, steps=8).fit(module())
    assert emulation.emulator.ranges.ranges.keys() == alone.emulator.ranges.ranges.keys()


def test_nothing_of_the_copies_is_in_the_module_or_its_optimizer() -> None:
    fitted, callback = module(), Distillation(["lstm", "head*"])
    names = list(fitted.state_dict())
    run = trainer(callback, steps=3)
    run.fit(fitted)
    assert list(fitted.state_dict()) == names
    trained = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in fitted.parameters()}
    assert is_unhooked(fitted)
    assert list(callback.state_dict()["copies"]) == [
        *("lstm", "head", "head.first", "head.second", "head.third")
    ]


class Normalized(Explicit):
    """Dropout and batch statistics in the target."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.inner = Explicit()  # A LightningModule, which knows the Trainer.

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.head(self.inner.body(self.body(batch[0]))), batch[1])


def test_a_copy_has_the_statistics_of_the_start_and_no_dropout() -> None:
    fitted = Normalized()
    start = copy.deepcopy(fitted)
    callback = Distillation(["body", "inner"])
    with pytest.warns(UserWarning, match="inner was never called"):
        trainer(callback, steps=6).fit(fitted)
    copies = callback.state_dict()["copies"]
    assert_same(
        copies["body"], {**dict(start.body.named_parameters()), **dict(start.body.named_buffers())}
    )
    assert not torch.equal(fitted.body[1].running_mean, start.body[1].running_mean)


def together(order: slice) -> list[Callback]:
    """Emulation, centroids and zeros with a distillation, in one order or the other."""
    rising = {"start": 0.0, "end": 1.0, "until": 4}
    return [
        NNAEmulation(calibration_steps=2),
        GeneralQuantizer(3, hard_from=3, sharpness=4.0, pin_zero=True),
        CompressedSensingPruning(0.5, schedule=rising, every_n_steps=2),
        Distillation(["lstm", "head"], weight=0.5),
    ][order]


@pytest.mark.parametrize("batches", [1, 2])
def test_it_resumes_with_emulation_centroids_and_zeros(tmp_path: Path, batches: int) -> None:
    settings: dict[str, Any] = {"accumulate_grad_batches": batches}
    start, uninterrupted, resumed = module(), module(), module(seed=1)
    callbacks, again = together(slice(None)), together(slice(None, None, -1))
    save = SaveCheckpoint(tmp_path / "stopped.ckpt", 5)
    trainer(*callbacks, save, steps=9, **settings).fit(uninterrupted)
    trainer(*again, steps=9, **settings).fit(resumed, ckpt_path=tmp_path / "stopped.ckpt")
    assert_same(dict(uninterrupted.state_dict()), dict(resumed.state_dict()))
    for one, other in zip(callbacks, again[::-1], strict=True):
        assert_same(one.state_dict(), other.state_dict())
    copies = again[0].state_dict()["copies"]
    assert_same(dict(copies["lstm"]), dict(start.lstm.named_parameters()))
    assert_same(dict(copies["head"]), dict(start.head.named_parameters()))


def test_two_processes_agree_with_emulation_centroids_and_zeros(tmp_path: Path) -> None:
    parts = [*together(slice(None)), SaveWeights(tmp_path)]
    with own_process_group(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*sync_dist=True.*")
        trainer(*parts, steps=4, devices=2, strategy=two_processes()).fit(module())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(first, second)


def test_it_pulls_the_outputs_back_to_the_start() -> None:
    """The same training of centroids, with the distance to the float outputs and without."""
    x, distances = torch.randn(64, 6, 4, generator=torch.Generator().manual_seed(3)), []
    for weight in (0.0, 20.0):
        fitted = module()
        expected = fitted.lstm(x)[0]
        callbacks = [GeneralQuantizer(2, hard_from=0), Distillation(["lstm"], weight=weight)]
        trainer(*callbacks, steps=32).fit(fitted)
        distances.append(float((fitted.lstm(x)[0] - expected).detach().square().mean()))
    assert distances[1] < 0.5 * distances[0]


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight must not be negative, and finite, got -1.0"),
        ({"weight": math.inf}, "got inf"),
        ({"distance": "l1"}, r"distance must be one of \['mse', 'kl'\], got 'l1'"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
    ],
)
def test_arguments_are_validated(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(["lstm"], **settings)


def test_an_unknown_target_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'encoder' matches no module; there are: lstm, head"):
        trainer(Distillation(["encoder"])).fit(module())


class Widens(nn.Linear):
    """A row more in training."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([y, y[:1]]) if self.training else y


class Lengths(nn.Linear):
    """No output that a distance could be of."""

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return [torch.tensor(x.shape[1])]


def compiled(call: Callable[[Any, Tensor], Tensor]) -> Odd:
    odd = Odd(nn.Linear(4, 4), call)
    odd.target.compile(backend="eager")
    return odd


def mean(target: nn.Module, x: Tensor) -> Tensor:
    return target(x).square().mean()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Odd(Widens(4, 4), mean), r"\[\(5, 3, 4\)\] in training and \[\(4, 3, 4\)\]"),
        (
            lambda: Odd(Lengths(4, 4), lambda m, x: m(x)[0].sum() * m.weight.sum()),
            "output of target is a list without floating tensors",
        ),
        (
            lambda: Odd(torch.jit.script(nn.Linear(4, 4)), mean),
            "target is a ScriptModule, whose calls have no hooks",
        ),
        (lambda: compiled(mean), "no calls of target, since target is compiled"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_what_cannot_be_compared_is_an_error(build: Callable[[], Odd], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(Distillation(["target"]), steps=2).fit(build())


def test_an_output_of_the_backward_alone_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="head is computed in the backward alone"):
        trainer(Distillation(["head"]), steps=2).fit(module(checkpointing=True))


def test_activation_checkpointing_changes_nothing() -> None:
    plain, saving = module(), module(checkpointing=False)
    for one in (plain, saving):
        trainer(Distillation(["head", "head.second"]), steps=6).fit(one)
    assert_same(dict(plain.state_dict()), dict(saving.state_dict()))


class Several(Explicit):
    """A loss for every example."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = F.cross_entropy(self.head(self.body(batch[0])), batch[1], reduction="none")
        self.manual_backward(loss, gradient=torch.ones(4))
        return loss


def test_a_loss_of_several_elements_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"one element, and this one has the shape \(4,\)"):
        trainer(Distillation(["body"]), steps=1).fit(Several(batches=1))


def test_a_target_that_is_never_called_causes_one_warning() -> None:
    def call(target: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, target[0].weight).square().mean()  # type: ignore[index]

    with pytest.warns(UserWarning, match=r"target was never called with a gradient") as warned:
        trainer(Distillation(["target"]), max_epochs=3, steps=-1).fit(
            Odd(nn.Sequential(nn.Linear(4, 4)), call)
        )
    assert len([one for one in warned if "Distillation" in str(one.message)]) == 1


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_another_run_of_targets_is_an_error(tmp_path: Path) -> None:
    first = trainer(Distillation(["head"]), steps=2)
    first.fit(module())
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    with pytest.raises(
        ValueError, match=r"state of Distillation\{'targets': \['head'\]\}, and the"
    ):
        trainer(Distillation(["lstm"])).fit(module(), ckpt_path=tmp_path / "stopped.ckpt")


def test_another_module_of_the_targets_is_an_error(tmp_path: Path) -> None:
    first = trainer(Distillation(["head*"]), steps=2)
    first.fit(module())
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    other = module()
    other.head.add_module("fourth", nn.Identity())
    with pytest.raises(ValueError, match="cannot change what the checkpoint has fixed: modules is"):
        trainer(Distillation(["head*"])).fit(other, ckpt_path=tmp_path / "stopped.ckpt")


def test_a_state_that_a_test_has_loaded_is_not_that_of_the_next_module(tmp_path: Path) -> None:
    first = trainer(Distillation(["head"]), steps=2)
    first.fit(module())
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    callback, other = Distillation(["head"]), module(seed=3)
    trainer(callback).test(module(), ckpt_path=tmp_path / "stopped.ckpt", verbose=False)
    start = copy.deepcopy(other.head)
    trainer(callback, steps=2).fit(other)
    assert_same(dict(callback.state_dict()["copies"]["head"]), dict(start.named_parameters()))


def test_a_module_that_is_copied_within_a_run_has_idle_hooks() -> None:
    twins: list[pl.LightningModule] = []

    class Copies(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            twins.append(pickle.loads(pickle.dumps(pl_module.head)))
            twins.append(copy.deepcopy(pl_module.head))

    fitted, callback = module(), Distillation(["head"])
    trainer(callback, Copies(), steps=2).fit(fitted)
    for twin in twins:
        assert twin(torch.ones(1, 8)).shape == (1, 2)


def test_two_distillations_share_a_trainer(tmp_path: Path) -> None:
    parts: Callable[[], list[Callback]] = lambda: [  # noqa: E731
        Distillation(["lstm"], weight=0.5),
        Distillation(["head"], distance="kl", temperature=2.0),
    ]
    uninterrupted, resumed = module(), module(seed=1)
    run = trainer(*parts())
    run.fit(uninterrupted)
    assert {"nna/distillation/lstm", "nna/distillation/head"} <= run.logged_metrics.keys()
    first = trainer(*parts(), steps=5)
    first.fit(module())
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    trainer(*parts()).fit(resumed, ckpt_path=tmp_path / "stopped.ckpt")
    assert_same(dict(uninterrupted.state_dict()), dict(resumed.state_dict()))
