"""Resume a run with another number of processes: after the loss of a GPU, or on another machine.

Weights, optimizers and callbacks are whole in a checkpoint, so any number of processes goes on from
it. Schedules count optimizer steps: the run must have as many as were planned, so the batches of
all processes of an optimizer step must stay as large together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import OmegaConf
from typing_extensions import override

from lightning_nna.files import write_whole

#: Settings that say which processes run.
_PROCESSES = {"trainer": ("accelerator", "devices", "num_nodes", "strategy")}
#: Settings that keep an optimizer step as large with another number of processes.
_BATCHES = {
    "trainer": ("accumulate_grad_batches", "limit_train_batches"),
    "data": ("batch_size", "batch_seconds"),
}
_STEPS, _RECIPE = "recipe_steps", "recipe"
#: A run may end so much earlier than its schedules: batches do not always divide.
_LEAST_FRACTION = 0.95


def with_processes_of(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the processes of a stopped run, if that run can go on with others.

    Args:
        before: All settings of the stopped run.
        now: All settings of the command that resumes it.

    Returns:
        ``now`` with the accelerator, devices, nodes and strategy of ``before``, and its sizes of
        batches; unchanged if the processes are the same, or their strategy splits the parameters.

    Example:
        >>> with_processes_of({"trainer": {"devices": 2}}, {"trainer": {"devices": 1}})
        {'trainer': {'devices': 2}}
    """
    if not _changed(before, now, _PROCESSES) or not (_is_whole(before) and _is_whole(now)):
        return dict(now)
    return _replaced(before, _replaced(before, now, _PROCESSES), _BATCHES)


class OtherProcesses(Callback):
    """Warn if a run goes on with other processes, and raise if it would have other steps.

    Args:
        settings: All settings of the run, plain values.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._before: Mapping[str, Any] = settings
        self._planned: float | None = None

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_STEPS] = float(trainer.estimated_stepping_batches)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._before = checkpoint.get(_RECIPE, self._settings)
        self._planned = checkpoint.get(_STEPS)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        changes = _changed(self._before, self._settings, _PROCESSES)
        if not changes:
            return
        text = ", ".join(f"{key}={old} is {new} now" for key, (old, new) in changes.items())
        planned, steps = self._planned, float(trainer.estimated_stepping_batches)
        if planned is not None and not _LEAST_FRACTION * planned <= steps <= planned:
            # The next command is compared with the settings of the checkpoint.
            if trainer.is_global_zero:
                path = Path(self._settings["run_dir"]) / "config.yaml"
                write_whole(path, OmegaConf.to_yaml(OmegaConf.create(dict(self._before))))
            raise ValueError(
                f"the run was planned with {planned:g} optimizer steps and would have {steps:g} "
                f"({text}), so its schedules would not end with it: let the processes of a step "
                f"have as much data together as before{_remedy(steps, planned, trainer)}"
            )
        rank_zero_warn(
            f"the run goes on with other processes ({text}): weights, optimizer and methods are "
            "those of its checkpoint, the order of the data is another"
        )


def _remedy(steps: float, planned: float, trainer: Trainer) -> str:
    """Name the settings that keep the number of optimizer steps."""
    batches = "data.batch_size or data.batch_seconds"
    times = steps / planned
    if times > 1:
        accumulated = round(times) * trainer.accumulate_grad_batches
        return (
            f", with trainer.accumulate_grad_batches={accumulated}, or {times:.3g} times {batches}"
        )
    return f", with {times:.3g} times {batches}, or fewer trainer.accumulate_grad_batches"


def _is_whole(settings: Mapping[str, Any]) -> bool:
    """Tell whether every process has all parameters, and so a checkpoint that any number reads."""
    strategy = settings.get("trainer", {}).get("strategy", "auto")
    return isinstance(strategy, str) and (strategy == "auto" or strategy.startswith("ddp"))


def _changed(
    before: Mapping[str, Any], now: Mapping[str, Any], keys: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[Any, Any]]:
    """Return old and new values of the settings among ``keys`` that differ, by dotted key."""
    pairs = {
        f"{group}.{name}": (before.get(group, {}).get(name), now.get(group, {}).get(name))
        for group, names in keys.items()
        for name in names
    }
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def _replaced(
    before: Mapping[str, Any], now: Mapping[str, Any], keys: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Return ``now`` with the values that ``before`` has of ``keys``."""
    replaced = dict(now)
    for group, names in keys.items():
        old, new = before.get(group, {}), now.get(group, {})
        others = {name: value for name, value in new.items() if name not in names}
        own = {name: old[name] for name in names if name in old}
        if group in now or own:
            replaced[group] = {**others, **own}
    return replaced
