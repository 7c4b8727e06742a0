"""The contract that every callback of the project passes.

Each check takes a factory that makes a fresh callback, and an empty folder; it raises
``AssertionError`` if a promise is broken. ``CHECKS`` has them all.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_contract(check, tmp_path):
        check(lambda: NNAEmulation(calibration_steps=2), tmp_path)
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.utils._pytree import tree_flatten

from lightning_nna.testing.modules import (
    LateModule,
    SeveralOptimizersModule,
    SmallRecurrentModule,
)
from lightning_nna.weights.method import WeightMethod

Factory = Callable[[], Callback]

# 64 examples in batches of 8: an epoch has 8 steps, so 5 is in the middle of the first.
_STOP, _END = 5, 13


def trainer(*callbacks: Callback, steps: int = _END, **settings: Any) -> pl.Trainer:
    """A quiet CPU Trainer for a few optimizer steps."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "max_epochs": None,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**(defaults | settings))


def module(seed: int = 0, **settings: Any) -> SmallRecurrentModule:
    """The same module every time, for a seed."""
    torch.manual_seed(seed)
    return SmallRecurrentModule(**settings)


def assert_same(first: Any, second: Any) -> None:
    """Nested values are equal, tensors in every bit.

    Raises:
        AssertionError: If they differ.
    """
    left, left_tree = tree_flatten(first)
    right, right_tree = tree_flatten(second)
    assert left_tree == right_tree, "the states have different keys"
    for a, b in zip(left, right, strict=True):
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert same, f"{a} differs from {b}"


def resume_equals_uninterrupted(factory: Factory, folder: Path) -> None:
    """A run that stopped in mid-epoch and resumed equals the one that did not, bit for bit."""
    uninterrupted, callback = module(), factory()
    one = trainer(callback)
    one.fit(uninterrupted)
    first = trainer(factory(), steps=_STOP)
    first.fit(module())
    first.save_checkpoint(folder / "stopped.ckpt")
    resumed, again = module(seed=1), factory()
    two = trainer(again)
    two.fit(resumed, ckpt_path=folder / "stopped.ckpt")
    assert_same(uninterrupted.state_dict(), resumed.state_dict())
    assert_same(one.optimizers[0].state_dict(), two.optimizers[0].state_dict())
    assert_same(callback.state_dict(), again.state_dict())


def resume_within_calibration(factory: Factory, folder: Path) -> None:
    """The same for a run that stopped after its first step."""
    uninterrupted, callback = module(), factory()
    trainer(callback, steps=4).fit(uninterrupted)
    first = trainer(factory(), steps=1)
    with warnings.catch_warnings():  # That no step ran emulated, as is meant here.
        warnings.simplefilter("ignore")
        first.fit(module())
    first.save_checkpoint(folder / "stopped.ckpt")
    resumed, again = module(seed=1), factory()
    trainer(again, steps=4).fit(resumed, ckpt_path=folder / "stopped.ckpt")
    assert_same(uninterrupted.state_dict(), resumed.state_dict())
    assert_same(callback.state_dict(), again.state_dict())


def model_keys_are_its_own(factory: Factory, folder: Path) -> None:
    """Keys and shapes of the module's ``state_dict`` are those without the callback."""
    plain, with_callback = module(), module()
    trainer(factory(), steps=_STOP).fit(with_callback)
    assert list(plain.state_dict()) == list(with_callback.state_dict())
    saved = torch.load(_checkpoint(factory, folder), weights_only=True)["state_dict"]
    assert list(saved) == list(plain.state_dict())


def float_checkpoint_loads_with_callback(factory: Factory, folder: Path) -> None:
    """A checkpoint of a run without the callback resumes with it."""
    first = trainer(steps=_STOP)
    first.fit(module())
    first.save_checkpoint(folder / "float.ckpt")
    resumed = trainer(factory())
    resumed.fit(module(seed=1), ckpt_path=folder / "float.ckpt")
    assert resumed.global_step == _END


def callback_checkpoint_loads_without(factory: Factory, folder: Path) -> None:
    """A checkpoint of a run with the callback loads into a float module and tests there."""
    path = _checkpoint(factory, folder)
    loaded = SmallRecurrentModule.load_from_checkpoint(path, map_location="cpu")
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert_same(dict(loaded.state_dict()), dict(saved))
    trainer().test(loaded, verbose=False)


def checkpoint_carries_the_callback_to_test(factory: Factory, folder: Path) -> None:
    """``test`` with a checkpoint of the run needs nothing else, and repeats to the bit."""
    path = _checkpoint(factory, folder)
    results = [
        trainer(factory()).test(module(seed=seed), ckpt_path=path, verbose=False) for seed in (1, 2)
    ]
    assert results[0] == results[1]


def untrained_tensors_are_untouched(factory: Factory, folder: Path) -> None:
    """With a learning rate of 0 and in evaluation every tensor stays byte-identical.

    Except those that a weight method has selected: when a fit ends, they are as deployed.
    """
    still, callback = module(learning_rate=0.0), factory()
    before = copy.deepcopy(still.state_dict())
    run = trainer(callback)
    run.fit(still)
    selected = callback.selected if isinstance(callback, WeightMethod) else []
    fitted = copy.deepcopy(still.state_dict())
    run.validate(still, verbose=False)
    assert_same(dict(fitted), dict(still.state_dict()))
    for name in set(fitted) - set(selected):
        assert torch.equal(before[name], fitted[name]), f"{name} has changed"


def pickles_before_and_after(factory: Factory, folder: Path) -> None:
    """Callback and module can be pickled and copied, before and after a run."""
    callback, fitted = factory(), module()
    pickle.loads(pickle.dumps(callback))
    trainer(callback, steps=_STOP).fit(fitted)
    assert_same(pickle.loads(pickle.dumps(callback)).state_dict(), callback.state_dict())
    fitted.trainer = None  # A Trainer holds loaders, loggers and processes; Lightning drops it too.
    twin = copy.deepcopy(fitted)
    assert_same(dict(twin.state_dict()), dict(fitted.state_dict()))
    assert_same(dict(pickle.loads(pickle.dumps(twin)).state_dict()), dict(fitted.state_dict()))


def accumulation_counts_optimizer_steps(factory: Factory, folder: Path) -> None:
    """With accumulated gradients the run has half the optimizer steps, and resumes as well."""
    uninterrupted, callback = module(), factory()
    trainer(callback, steps=6, accumulate_grad_batches=2).fit(uninterrupted)
    first = trainer(factory(), steps=3, accumulate_grad_batches=2)
    first.fit(module())
    first.save_checkpoint(folder / "stopped.ckpt")
    resumed, again = module(seed=1), factory()
    two = trainer(again, steps=6, accumulate_grad_batches=2)
    two.fit(resumed, ckpt_path=folder / "stopped.ckpt")
    assert_same(uninterrupted.state_dict(), resumed.state_dict())
    assert_same(callback.state_dict(), again.state_dict())


def resume_with_dropout(factory: Factory, folder: Path) -> None:
    """A run with dropout that stopped in mid-epoch equals the one that did not."""
    _resumes(factory, folder, partial(module, dropout=0.3, dropout_seed=7))


def layers_of_configure_model_count(factory: Factory, folder: Path) -> None:
    """A module whose layers do not exist before ``configure_model`` trains, resumes and tests."""
    _resumes(factory, folder, LateModule)
    (result,) = trainer(factory()).test(
        LateModule(), ckpt_path=folder / "stopped.ckpt", verbose=False
    )
    assert math.isfinite(result["test/loss"])


def averaged_weights_are_evaluated(factory: Factory, folder: Path) -> None:
    """With an average of the weights, validation sees the average; and the run resumes.

    Lightning has had such a callback since 2.6.
    """
    average_of = lightning_callbacks.EMAWeightAveraging
    _resumes(factory, folder, module, lambda: average_of(decay=0.5))
    average = average_of(decay=0.5)
    fitted = module()
    run = trainer(factory(), average, steps=8)
    run.fit(fitted)
    # The fit ends with the average's weights, and its last validation was of them.
    logged = float(run.logged_metrics["val/loss"])
    (result,) = run.validate(fitted, verbose=False)
    assert result["val/loss"] == logged, f"{logged} was logged, the average's is {result}"


def checkpointed_activations_change_nothing(factory: Factory, folder: Path) -> None:
    """A forward that the backward computes again gives the same values."""
    plain = module()
    trainer(factory(), steps=_STOP).fit(plain)
    for reentrant in (True, False):
        other = module(checkpointing=reentrant)
        trainer(factory(), steps=_STOP).fit(other)
        assert_same(dict(plain.state_dict()), dict(other.state_dict()))


def manual_optimization_equals_automatic(factory: Factory, folder: Path) -> None:
    """A step that the module calls itself makes no difference."""
    automatic, manual = module(), module(manual=True)
    first, second = factory(), factory()
    trainer(first).fit(automatic)
    trainer(second).fit(manual)
    assert_same(dict(automatic.state_dict()), dict(manual.state_dict()))
    assert_same(first.state_dict(), second.state_dict())


def runs_under_bf16_mixed(factory: Factory, folder: Path) -> None:
    """Mixed precision trains; parameters stay float32 and finite."""
    mixed = module(cell="gru")
    before = copy.deepcopy(mixed.state_dict())
    trainer(factory(), precision="bf16-mixed").fit(mixed)
    for name, value in mixed.state_dict().items():
        assert value.dtype == torch.float32, f"{name} became {value.dtype}"
        assert bool(torch.isfinite(value).all()), f"{name} is not finite"
        assert not torch.equal(value, before[name]), f"{name} was not trained"


def logs_under_its_own_names(factory: Factory, folder: Path) -> None:
    """Every log key of the callback begins with ``nna/`` or ``drift/``."""
    plain, run = trainer(steps=16), trainer(factory(), steps=16)
    plain.fit(module())
    run.fit(module())
    own = set(run.logged_metrics) - set(plain.logged_metrics)
    assert own, "the callback logs nothing"
    assert all(key.startswith(("nna/", "drift/")) for key in own), f"names of others: {sorted(own)}"


def strategy_changes_nothing(factory: Factory, folder: Path) -> None:
    """``ddp`` with one process trains, logs and remembers what ``auto`` does, in every bit."""
    results: list[Any] = []
    for strategy in ("auto", "ddp"):
        fitted, callback = module(), factory()
        run = trainer(callback, steps=8, strategy=strategy)
        with own_process_group(), warnings.catch_warnings():
            # With one process there is nothing to accumulate.
            warnings.filterwarnings("ignore", message=r".*sync_dist=True")
            run.fit(fitted)
        results.append([dict(fitted.state_dict()), callback.state_dict(), run.logged_metrics])
    assert_same(*results)


def copies_carry_on(factory: Factory, folder: Path) -> None:
    """Deep copies of module and callback evaluate and train on as those do."""
    callback, fitted = factory(), module()
    trainer(callback, steps=_STOP).fit(fitted)
    (expected,) = trainer(callback).test(fitted, verbose=False)
    fitted.trainer = None  # A Trainer holds loaders, loggers and processes; Lightning drops it too.
    twin, its = copy.deepcopy(fitted), copy.deepcopy(callback)
    trainer(callback, steps=_STOP).fit(fitted)
    (result,) = trainer(its).test(twin, verbose=False)
    assert result == expected, f"{result} differs from {expected}"
    trainer(its, steps=_STOP).fit(twin)
    assert_same(dict(fitted.state_dict()), dict(twin.state_dict()))
    assert_same(callback.state_dict(), its.state_dict())


def two_processes_agree(factory: Factory, folder: Path) -> None:
    """Two ranks on different data end with equal weights and equal callback state."""
    run = trainer(factory(), _SaveState(str(folder)), steps=3, devices=2, strategy=two_processes())
    with own_process_group(), warnings.catch_warnings():
        # Lightning advises to synchronize what is logged, also where it is the same on all ranks.
        warnings.filterwarnings("ignore", ".*sync_dist=True.*")
        run.fit(module())
    states = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(states[0], states[1])


def two_processes() -> str:
    """The Trainer's strategy for two processes on the CPU.

    A forked process has imported everything already: it starts in a tenth of the time. CUDA does
    not survive a fork once it is in use.
    """
    return "ddp_spawn" if torch.cuda.is_available() else "ddp_fork"


@contextmanager
def own_process_group() -> Iterator[None]:
    """Leave no process group, and no variable that tells its address, behind the block.

    Lightning leaves both to the end of the process. The next run would take the port of this one,
    which may be another program's by then, and the group of one process for its own.

    Example:
        >>> with own_process_group():
        ...     os.environ["MASTER_PORT"] = "29500"
        >>> "MASTER_PORT" in os.environ
        False
    """
    environment, rank = dict(os.environ), rank_zero_only.rank  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        rank_zero_only.rank = rank  # type: ignore[attr-defined]
        os.environ.clear()
        os.environ.update(environment)


def several_optimizers_resume(factory: Factory, folder: Path) -> None:
    """A run with two optimizers, of which one steps less often, resumes to the bit."""
    _resumes(factory, folder, SeveralOptimizersModule)


def joined_run_resumes(factory: Factory, folder: Path) -> None:
    """A callback that joins a float run counts from there, and resumes to the bit."""
    first = trainer(steps=_STOP)
    first.fit(module())
    first.save_checkpoint(folder / "float.ckpt")
    uninterrupted, callback = module(), factory()
    trainer(callback).fit(uninterrupted, ckpt_path=folder / "float.ckpt")
    joined = trainer(factory(), steps=_STOP + 4)
    joined.fit(module(seed=1), ckpt_path=folder / "float.ckpt")
    joined.save_checkpoint(folder / "joined.ckpt")
    resumed, again = module(seed=2), factory()
    trainer(again).fit(resumed, ckpt_path=folder / "joined.ckpt")
    assert_same(dict(uninterrupted.state_dict()), dict(resumed.state_dict()))
    assert_same(callback.state_dict(), again.state_dict())


def second_module_is_as_the_first(factory: Factory, folder: Path) -> None:
    """A callback that has trained a module trains another as a fresh one, or a copy, does."""
    used, fresh = factory(), factory()
    twin = copy.deepcopy(used)
    trainer(used, steps=_STOP).fit(module())
    results = []
    for callback in (used, fresh, twin):
        other = module(seed=1)
        trainer(callback).fit(other)
        results.append((dict(other.state_dict()), callback.state_dict()))
    for result in results[1:]:
        assert_same(results[0], result)


class _SaveCheckpoint(Callback):
    """Write a checkpoint where the run is to stop; without a state, so that nobody misses it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """After every other callback: it is the last."""
        if trainer.global_step == _STOP:
            trainer.save_checkpoint(self.path)


class _SaveState(Callback):
    """Write what a rank ends with."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Weights and the state of the other callbacks."""
        states = [c.state_dict() for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        weights = {k: v.clone() for k, v in pl_module.state_dict().items()}
        torch.save(
            {"weights": weights, "callbacks": states}, f"{self.folder}/rank{trainer.global_rank}.pt"
        )


def _resumes(
    factory: Factory,
    folder: Path,
    build: Callable[[], pl.LightningModule],
    companion: Callable[[], Callback] = Callback,
) -> None:
    """Compare an uninterrupted run with one that stopped in mid-epoch, whatever the module."""
    path = folder / "stopped.ckpt"
    torch.manual_seed(0)  # What `configure_model` builds is drawn as the run starts.
    uninterrupted, callback = build(), factory()
    trainer(callback, companion()).fit(uninterrupted)
    torch.manual_seed(0)
    # Saved within the run: at its end an average of the weights takes their place.
    trainer(factory(), companion(), _SaveCheckpoint(path), steps=_STOP).fit(build())
    resumed, again = build(), factory()
    trainer(again, companion()).fit(resumed, ckpt_path=path)
    assert_same(dict(uninterrupted.state_dict()), dict(resumed.state_dict()))
    assert_same(callback.state_dict(), again.state_dict())


def _checkpoint(factory: Factory, folder: Path) -> Path:
    """A checkpoint of a short run with the callback."""
    run = trainer(factory(), steps=_STOP)
    run.fit(module())
    path = folder / "with_callback.ckpt"
    run.save_checkpoint(path)
    return path


def is_unhooked(module: nn.Module) -> bool:
    """Tell whether no forward hook is left on a module or anything in it."""
    return not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


CHECKS: tuple[Callable[[Factory, Path], None], ...] = (
    resume_equals_uninterrupted,
    resume_within_calibration,
    model_keys_are_its_own,
    float_checkpoint_loads_with_callback,
    callback_checkpoint_loads_without,
    checkpoint_carries_the_callback_to_test,
    untrained_tensors_are_untouched,
    pickles_before_and_after,
    accumulation_counts_optimizer_steps,
    manual_optimization_equals_automatic,
    runs_under_bf16_mixed,
    logs_under_its_own_names,
    strategy_changes_nothing,
    copies_carry_on,
    two_processes_agree,
    resume_with_dropout,
    layers_of_configure_model_count,
    *([averaged_weights_are_evaluated] if hasattr(lightning_callbacks, "WeightAveraging") else []),
    checkpointed_activations_change_nothing,
    several_optimizers_resume,
    joined_run_resumes,
    second_module_is_as_the_first,
)
