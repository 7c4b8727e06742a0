"""Quick runs of the keyword recipe on one process or two, which write what each process holds.

    python -m tests.recipes.keywords.spotter_runs FOLDER CACHE

runs :data:`GROUPS` and the resumed run of ``tests/recipes/keywords/test_two_processes.py`` on two
processes; Lightning starts the second one by this command.
"""

from __future__ import annotations

import copy
import importlib
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from recipes.program import CONF
from recipes.train import train

#: Learned scales; pruning with trained centroids; searched centroids; weights that are reset.
GROUPS = ("nna8_lsq", "csp_gq", "s8bqat", "lottery")
#: Emulation, a quantizer and a pruning method, for runs that are resumed.
RESUMED = "csp_gq"


class StoppedError(Exception):
    """A run that was stopped after its first epoch."""


class States(Callback):
    """Write the states of a process before every step and at the end of training into a file.

    Args:
        folder: Folder of the files, ``0.pt`` of the first process, ``1.pt`` of the second; those
            that training starts with are in ``start0.pt`` and ``start1.pt``.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.steps = Path(folder), list[dict[str, Any]]()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"start{trainer.global_rank}.pt"
        torch.save(_states(trainer, pl_module), path)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append(_states(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = [*self.steps, _states(trainer, pl_module)]
        torch.save(steps, self.folder / f"{trainer.global_rank}.pt")


class Stop(Callback):
    """Stop a run that was not resumed after its first epoch."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1 and trainer.ckpt_path is None:  # type: ignore[attr-defined]
            raise StoppedError


class PlainNetwork(nn.Module):
    """A network whose outputs of a word do not depend on the words beside it: no batch norm."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=4)
        self.head = nn.Linear(4, num_labels)

    def forward(self, spectrograms: Tensor) -> Tensor:
        return self.head(self.conv(spectrograms).relu().mean((2, 3)))


PLAIN = (
    "~model.network",
    "+model.network._target_=tests.recipes.keywords.spotter_runs.PlainNetwork",
    "+model.network._partial_=true",
)


def run(folder: Path, cache: Path, group: str, devices: int, *overrides: str) -> dict[str, Any]:
    """Train and test a spotter in a second; eight words in a step, for any number of processes."""
    needed = {"s8bqat": ["callbacks.hard.every_n_steps=2"]}
    config = composed(
        *("experiment=keywords", "data.vocabulary=digits", "data.train_size=16"),
        *("data.validation_size=3", "data.test_size=5", f"data.batch_size={8 // devices}"),
        *(f"data.cache_dir={cache}", "model.network.channels=8", "model.network.widths=[8]"),
        *("trainer=ddp_cpu" if devices == 2 else "trainer=cpu", "trainer.max_epochs=3"),
        *("trainer.check_val_every_n_epoch=1", "callbacks.progress=null", "threads=1"),
        *("callbacks.average=null", "trainer.log_every_n_steps=1"),
        *("trainer.enable_progress_bar=false", f"run_dir={folder}", f"compression={group}"),
        *("callbacks.nna.calibration_steps=2", *needed.get(group, [])),
        "+callbacks.states._target_=tests.recipes.keywords.spotter_runs.States",
        *("+callbacks.states.folder=${run_dir}/states", *overrides),
    )
    return train(config)


def composed(*overrides: str) -> DictConfig:
    """Compose the settings of a training run."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=list(overrides))
    OmegaConf.set_readonly(config, False)
    return config


def run_resumed(folder: Path, cache: Path, devices: int, *overrides: str) -> dict[str, Any] | None:
    """Run until it is stopped, or to the end if it was; return the results if it has any."""
    stop = "+callbacks.stop._target_=tests.recipes.keywords.spotter_runs.Stop"
    with suppress(StoppedError):
        return run(folder, cache, RESUMED, devices, stop, *overrides)
    return None


def _states(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Return what must be the same in all processes."""
    # Statistics of batch norm are those of the words of each process, until the next forward.
    buffers = {name: each for name, each in module.named_buffers() if "running" not in name}
    callbacks = {
        each.state_key: each.state_dict()
        for each in trainer.callbacks  # type: ignore[attr-defined]
        if type(each).__module__.startswith("lightning_nna.")
    }
    states = {
        "step": trainer.global_step,
        "parameters": dict(module.named_parameters()),
        "buffers": buffers,
        "optimizers": [each.state_dict() for each in trainer.optimizers],
        "schedules": [each.scheduler.state_dict() for each in trainer.lr_scheduler_configs],
        "callbacks": callbacks,
    }
    return copy.deepcopy(states)


def main(folder: Path, cache: Path) -> None:
    """Run everything that the test needs of two processes."""
    for group in GROUPS:
        run(folder / "two" / group, cache, group, 2)
    run(folder / "two" / "plain", cache, "nna8", 2, *PLAIN)
    run_resumed(folder / "one to two", cache, 2)
    run_resumed(folder / "two to one", cache, 2)


if __name__ == "__main__":
    # The module by its name: the callbacks raise its error, not that of the program.
    importlib.import_module("tests.recipes.keywords.spotter_runs").main(*map(Path, sys.argv[1:]))
