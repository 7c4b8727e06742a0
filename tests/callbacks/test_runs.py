"""Runs that are joined, resumed with other arguments, stopped early, or follow one another."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nna.callbacks import (
    CompressedSensingPruning,
    Distillation,
    GeneralQuantizer,
    HardCompression,
    LotteryTicketPruning,
    MagnitudePruning,
    MRACosRegularization,
    NNAEmulation,
)
from lightning_nna.checkpoints import load_deployed
from lightning_nna.testing import SmallRecurrentModule
from lightning_nna.testing.contract import assert_same, module, own_process_group, trainer
from lightning_nna.testing.modules import RandomSequences, SeveralOptimizersModule
from lightning_nna.weights.method import WeightMethod
from lightning_nna.weights.pipeline import pipeline_of

#: A schedule in steps, so that a run that stops early has the same.
STEPS: dict[str, Any] = {"schedule": {"start": 0.0, "end": 1.0, "until": 4}, "every_n_steps": 2}


def zeros(fitted: nn.Module) -> float:
    weights = [p.detach().flatten() for p in fitted.parameters() if p.ndim == 2]
    return round(float((torch.cat(weights) == 0).float().mean()), 2)


def stopped(path: Path, *callbacks: Callback, steps: int = 5) -> Path:
    """The checkpoint of a run that ends early."""
    run = trainer(*callbacks, steps=steps)
    run.fit(module())
    run.save_checkpoint(path / "stopped.ckpt")
    return path / "stopped.ckpt"


# --- one clock ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CompressedSensingPruning, MagnitudePruning])
def test_pruning_that_joins_a_run_has_a_schedule_of_what_is_left(kind: Any, tmp_path: Path) -> None:
    path, joined, prune = stopped(tmp_path, steps=6), module(), kind(0.5)
    trainer(prune, steps=12).fit(joined, ckpt_path=path)
    assert (prune.steps, zeros(joined)) == (6, 0.5)
    assert not any(transform.revives for transform in prune.masks.values())


def test_compression_that_joins_a_run_has_a_schedule_of_what_is_left(tmp_path: Path) -> None:
    path = stopped(tmp_path, steps=6)
    hard = HardCompression(3, start_step=0.5, every_n_steps=2)
    trainer(hard, steps=12).fit(module(), ckpt_path=path)
    assert hard.compressions == 2  # After steps 3 and 5 of 6.


class EveryFourthBatch(SmallRecurrentModule):
    """Accumulates by hand."""

    def __init__(self) -> None:
        super().__init__(manual=True)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self.manual_backward(self.loss(self(batch[0]), batch[1]))
        if batch_index % 4 == 3:
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        (SeveralOptimizersModule, {"steps": 24}),
        (SeveralOptimizersModule, {"max_epochs": 2, "max_steps": -1}),
        (EveryFourthBatch, {"max_epochs": 4, "max_steps": -1}),
        (EveryFourthBatch, {"steps": 8}),
    ],
    ids=["several, steps", "several, epochs", "accumulated, epochs", "accumulated, steps"],
)
def test_the_length_of_a_run_in_manual_optimization(kind: Any, limits: dict[str, Any]) -> None:
    torch.manual_seed(0)
    fitted, prune = kind(), MagnitudePruning(0.7)
    trainer(prune, **limits).fit(fitted, DataLoader(RandomSequences(), batch_size=8))
    assert zeros(fitted) == 0.7
    assert prune.steps == pytest.approx(prune._total_steps, abs=1)


class Wrapping(torch.optim.Optimizer):
    """An optimizer around another that has all its attributes, as torchao's PARQ is."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    def __getattribute__(self, name: str) -> Any:
        try:
            return super(torch.optim.Optimizer, self).__getattribute__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class WrappedOptimizer(SmallRecurrentModule):
    """Trained by an optimizer around another."""

    def configure_optimizers(self) -> Any:
        return Wrapping(super().configure_optimizers())


@pytest.mark.parametrize("kind", [MagnitudePruning, CompressedSensingPruning])
def test_steps_of_an_optimizer_around_another_count(kind: Any) -> None:
    torch.manual_seed(0)
    fitted, prune, nna = WrappedOptimizer(), kind(0.5), NNAEmulation(calibration_steps=2)
    trainer(prune, nna, steps=6).fit(fitted)
    assert (prune.steps, nna.steps, zeros(fitted)) == (6, 6, 0.5)


def test_a_freeze_step_that_is_jumped_over_is_made_up_for(tmp_path: Path) -> None:
    long = {"start": 0.0, "end": 1.0, "until": 30}
    with pytest.warns(UserWarning, match=r"missed its target: sparsity is 0.0%, not 50.0%"):
        path = stopped(tmp_path, MagnitudePruning(0.5, freeze_step=30, schedule=long))
    shorter, prune = module(), MagnitudePruning(0.5, freeze_step=0.5)
    trainer(prune, steps=8).fit(shorter, ckpt_path=path)
    assert zeros(shorter) == 0.5


class StopAfterThree(Callback):
    """As EarlyStopping does."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        trainer.should_stop = trainer.global_step == 3


@pytest.mark.parametrize(
    ("callback", "missed"),
    [
        (MagnitudePruning(0.5), r"MagnitudePruning ended at .* 3 .*: sparsity is 0.0%, not 50.0%"),
        (GeneralQuantizer(3), r"from step 12 on \(hard_from\), and the sharpness is .*, not 300"),
        (
            GeneralQuantizer(3, hard_from=99, sharpness={"start": 1.0, "end": 32.0, "until": 2}),
            r"training from step 99 on \(hard_from\)$",
        ),
        (HardCompression(3), r"first compression is at step 100 .* compressed 0 times"),
        (
            MRACosRegularization(3, strength=2.0, schedule={"start": 0.0, "end": 1.0}),
            "the strength is 0.375, not 2",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_target_that_is_missed_is_warned_of(callback: WeightMethod, missed: str) -> None:
    with pytest.warns(UserWarning, match=missed) as warned:
        trainer(callback, StopAfterThree(), steps=16).fit(module())
    assert sum("missed its target" in str(one.message) for one in warned) == 1


# --- other arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        (
            GeneralQuantizer(4, hard_from=2),
            GeneralQuantizer(2, hard_from=2),
            r"bits\['lstm.weight_ih_l0'\] is 4 there and 2 here",
        ),
        (
            GeneralQuantizer(3, hard_from=2),
            GeneralQuantizer(3, hard_from=2, mu=15.0, granularity="per_channel"),
            "mu is 7.0 there and 15.0 here, granularity is 'per_tensor' there and 'per_channel' "
            "here",
        ),
        (
            GeneralQuantizer(3, hard_from=2, targets=["lstm"]),
            GeneralQuantizer(3, hard_from=2),
            r"the state of GeneralQuantizer\{'targets': \['lstm'\]\}, and the Trainer has General",
        ),
        (
            HardCompression(3, every_n_steps=2),
            HardCompression(3, every_n_steps=2, grid_bits=6),
            "grid_bits is 8 there and 6 here",
        ),
        (
            MRACosRegularization(3, overrides={"head": 2}),
            MRACosRegularization(3),
            r"bits\['head.first.weight'\] is 2 there and 3 here",
        ),
        (
            MagnitudePruning(0.5, freeze_step=4, **STEPS),
            MagnitudePruning(0.75, freeze_step=4, **STEPS),
            r"sparsity\['lstm.weight_ih_l0'\] is 0.5 there and 0.75 here",
        ),
        (
            CompressedSensingPruning(0.5, freeze_step=4, **STEPS),
            CompressedSensingPruning(0.5, freeze_step=4, pattern="1x2", **STEPS),
            "pattern is 'unstructured' there and '1x2' here",
        ),
        (
            LotteryTicketPruning(0.5, freeze_step=9, **STEPS),
            LotteryTicketPruning(0.5, freeze_step=9, rewind_step=3, **STEPS),
            "rewind_step is 0 there and 3 here",
        ),
        (
            NNAEmulation("litert-int8", calibration_steps=2),
            NNAEmulation(calibration_steps=2),
            r"spec\['name'\] is 'litert-int8' there and 'tflm-int8' here, spec",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # Of other targets.
def test_what_cannot_be_honored_names_both_values(
    before: Callback, after: Callback, named: str, tmp_path: Path
) -> None:
    path = stopped(tmp_path, before)
    with pytest.raises(ValueError, match=named):
        trainer(after).fit(module(), ckpt_path=path)
    with pytest.raises(ValueError, match=named):
        trainer(after).test(module(), ckpt_path=path, verbose=False)


@pytest.mark.parametrize("changed", [{"sparsity": 0.75}, {"pattern": "1x2"}, {"every_n_steps": 3}])
@pytest.mark.filterwarnings("ignore:.*missed its target")  # It is stopped on purpose.
def test_before_masks_freeze_new_arguments_are_honored(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"sparsity": 0.5, "freeze_step": 9, **STEPS}
    path = stopped(tmp_path, MagnitudePruning(**settings), steps=3)
    resumed, prune = module(), MagnitudePruning(**(settings | changed))
    trainer(prune).fit(resumed, ckpt_path=path)
    assert zeros(resumed) == (settings | changed)["sparsity"]
    pairs = resumed.lstm.weight_hh_l0.detach().view(-1, 2) == 0
    assert bool((pairs[:, 0] == pairs[:, 1]).all()) == ("pattern" in changed)


def test_a_longer_run_prunes_on(tmp_path: Path) -> None:
    path = stopped(tmp_path, MagnitudePruning(0.5), steps=4)
    resumed, prune = module(), MagnitudePruning(0.75)
    trainer(prune, steps=12).fit(resumed, ckpt_path=path)
    assert zeros(resumed) == 0.75


def test_scales_that_are_not_learned_any_more_stay_as_they_are(tmp_path: Path) -> None:
    before = GeneralQuantizer(3, hard_from=2, learn_scale=True)
    path = stopped(tmp_path, before)
    after = GeneralQuantizer(3, hard_from=2)
    trainer(after).fit(module(), ckpt_path=path)
    for name, transform in after._transforms.items():
        assert torch.equal(transform.scales, before._transforms[name].scales), name


# --- one run after another ------------------------------------------------------------------------


def test_a_method_follows_another_on_the_same_module() -> None:
    fitted = module()
    for callback in (
        HardCompression(4, every_n_steps=2),
        HardCompression(3, every_n_steps=2),
        GeneralQuantizer(2),
        MagnitudePruning(0.5),
    ):
        trainer(callback, steps=4).fit(fitted)
        assert [type(s) for s in pipeline_of(fitted).transforms_of(fitted.lstm.weight_hh_l0)] == [
            type(next(iter(callback.transforms().values())))
        ]
    assert zeros(fitted) == 0.5


def test_evaluations_with_several_widths_on_the_same_module() -> None:
    fitted, results = module(), []
    before = fitted.head.first.weight.detach().clone()
    for bits in (8, 2, 8):
        results += trainer(HardCompression(bits)).test(fitted, verbose=False)
    assert results[0] == results[2] != results[1]
    assert torch.equal(fitted.head.first.weight, before)


def test_weights_that_are_trained_on_without_the_method_are_off_its_grid() -> None:
    fitted = module()
    trainer(GeneralQuantizer(2), steps=4).fit(fitted)
    assert pipeline_of(fitted).grid_of(fitted.head.first.weight) is not None
    trainer(steps=2).fit(fitted)
    assert pipeline_of(fitted).grid_of(fitted.head.first.weight) is None
    deployed = pipeline_of(fitted).deployed(fitted.head.first.weight)
    assert torch.equal(deployed, fitted.head.first.weight)


def test_folds_of_a_cross_validation_are_each_pruned() -> None:
    prune = MagnitudePruning(0.5)
    for seed in range(2):
        fold = module(seed)
        trainer(prune, steps=4).fit(fold)
        assert (prune.steps, zeros(fold)) == (4, 0.5)
    with pytest.warns(UserWarning, match="no masks for this module, which is evaluated dense"):
        trainer(prune).test(module(2), verbose=False)


def test_two_callbacks_of_one_class_on_other_tensors(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        settings: dict[str, Any] = {"freeze_step": 4, **STEPS}
        return [
            MagnitudePruning(0.5, exclude=["head"], **settings),
            MagnitudePruning(0.75, targets=["head"], **settings),
        ]

    path = stopped(tmp_path, *callbacks())
    resumed = module()
    run = trainer(*callbacks(), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(resumed, ckpt_path=path)
    assert (zeros(resumed.lstm), zeros(resumed.head)) == (0.5, 0.75)
    logged = {k: float(v) for k, v in run.logged_metrics.items() if "sparsity" in k}
    assert logged == {
        "nna/magnitude_pruning/*+!head/sparsity": pytest.approx(0.5, abs=0.01),
        "nna/magnitude_pruning/head/sparsity": 0.75,
    }


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [GeneralQuantizer(4, learn_scale=True)],
        lambda: [HardCompression(3, every_n_steps=2)],
        lambda: [MRACosRegularization(3)],
        lambda: [CompressedSensingPruning(0.5, freeze_step=4, **STEPS)],
        lambda: [LotteryTicketPruning(0.5, freeze_step=4, **STEPS)],
        lambda: [GeneralQuantizer(3), NNAEmulation(calibration_steps=2)],
        lambda: [NNAEmulation(calibration_steps=2, observer="mse", learned_scales="all")],
    ],
)
@pytest.mark.parametrize("is_new", [False, True], ids=["same objects", "resumed"])
def test_a_checkpoint_that_is_tested_on_the_way_changes_nothing(
    callbacks: Any, is_new: bool, tmp_path: Path
) -> None:
    def states(*evaluations: str) -> list[Any]:
        fitted, mine = module(), callbacks()
        run = trainer(*mine, steps=5)
        run.fit(fitted)
        path = tmp_path / "run.ckpt"
        run.save_checkpoint(path)
        if is_new:
            fitted, mine = module(1), callbacks()
        for name in evaluations:
            getattr(trainer(*mine), name)(fitted, ckpt_path=path, verbose=False)
        trainer(*mine, steps=8).fit(fitted, ckpt_path=path if is_new else None)
        return [fitted.state_dict(), *(one.state_dict() for one in mine)]

    # Lightning evaluates in inference mode, whose tensors cannot be trained.
    assert_same(states("test", "validate"), states())


@pytest.mark.parametrize("best", ["best", "last"])
def test_the_best_checkpoint_is_tested(best: str, tmp_path: Path) -> None:
    writer = ModelCheckpoint(tmp_path, save_last=True)
    fitted, run = module(), trainer(GeneralQuantizer(4), writer, enable_checkpointing=True)
    run.fit(fitted)
    weights = copy.deepcopy(fitted.state_dict())
    first, second = (run.test(fitted, ckpt_path=best, verbose=False) for _ in range(2))
    assert first == second
    assert_same(fitted.state_dict(), weights)


def test_what_is_loaded_in_inference_mode_is_evaluated_and_trained(tmp_path: Path) -> None:
    path = stopped(tmp_path, GeneralQuantizer(3, hard_from=2), NNAEmulation(calibration_steps=2))
    loaded = [module(1), module(2)]
    load_deployed(loaded[0], path)
    with torch.inference_mode():
        load_deployed(loaded[1], path)
    for one in loaded:
        trainer(GeneralQuantizer(2), steps=4).fit(one)
    assert_same(loaded[0].state_dict(), loaded[1].state_dict())


class Values(SmallRecurrentModule):
    """Counts the values of a weight in validation."""

    values = 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self.values = len(self.head.second.weight.unique())
        super().validation_step(batch, batch_index)


@pytest.mark.parametrize("kind", [GeneralQuantizer, HardCompression])
def test_parameters_that_were_replaced_are_compressed(kind: Any) -> None:
    torch.manual_seed(0)
    fitted, callback = Values(), kind(2, every_n_steps=1)
    trainer(callback, steps=4).fit(fitted)
    other = {name: torch.randn_like(value) for name, value in fitted.state_dict().items()}
    fitted.load_state_dict(other, assign=True)
    trainer(callback).validate(fitted, verbose=False)
    assert fitted.values == 4
    assert torch.equal(fitted.head.second.weight, other["head.second.weight"])


class Tied(SmallRecurrentModule):
    """Writes a checkpoint in the middle of a step."""

    path = ""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.head.second.weight

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        loss = super().training_step(batch, batch_index)
        if batch_index == 2:
            self.trainer.save_checkpoint(self.path)
        return loss


def test_a_tied_weight_is_saved_once_whatever_its_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fitted, callback = Tied(), GeneralQuantizer(2)
    fitted.path = str(tmp_path / "within.ckpt")
    trainer(callback, steps=4).fit(fitted)
    saved = torch.load(fitted.path, weights_only=True)
    names = ("head.second.weight", "tied.weight")
    assert torch.equal(*(saved["state_dict"][name] for name in names))
    assert len(saved["state_dict"]["tied.weight"].unique()) <= 4
    assert len(saved["callbacks"]["GeneralQuantizer"]["latents"]["head.second.weight"].unique()) > 4


def test_a_file_of_weights_alone_is_warned_of(tmp_path: Path) -> None:
    writer = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.warns(
        UserWarning, match="save_weights_only=True.* writes the latent weights alone"
    ):
        trainer(MagnitudePruning(0.5), writer, steps=4, enable_checkpointing=True).fit(module())


@pytest.mark.parametrize(
    "callback",
    [
        NNAEmulation(),
        GeneralQuantizer(4),
        CompressedSensingPruning(0.5),
        MRACosRegularization(4),
        Distillation(["lstm"]),
    ],
    ids=lambda callback: type(callback).__name__,
)
@pytest.mark.parametrize("run", ["fit", "test"])
def test_a_strategy_that_splits_parameters_is_refused(callback: Callback, run: str) -> None:
    split = trainer(callback, strategy=ModelParallelStrategy())
    name = type(callback).__name__
    message = f"{name} works on whole parameters, and ModelParallel"
    with own_process_group(), pytest.raises(ValueError, match=message):
        getattr(split, run)(module())
