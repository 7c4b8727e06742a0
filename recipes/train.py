"""Train a module and test it.

    python -m recipes.train experiment=an4_rnnt compression=nna8 seed=2

The run folder (``runs/<experiment>/<time>`` or ``hydra.run.dir=...``) gets ``config.yaml``,
``metrics/``, ``checkpoints/`` and ``summary.json``. The same command with the folder of a stopped
run resumes it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lightning_nna.checkpoints import load_checkpoint
from recipes.adapter import adapter_class
from recipes.debug import shortened
from recipes.objective import OF_DEPLOYMENT, check_objective, objective_of
from recipes.other_processes import OtherProcesses
from recipes.preparation import build, prepare_process
from recipes.program import as_program, composed
from recipes.run_folder import (
    finished_summary,
    log_summary,
    provenance,
    record_config,
    settings_of,
    size_of,
    sole_run,
    task_overrides,
    weight_metrics,
    write_summary,
)
from recipes.settings import instantiate_all
from recipes.sigterm import EndTogether
from recipes.weights import RecipeInCheckpoint, load_weights, put_into
from recipes.whole_checkpoints import WholeCheckpointIO

_log = logging.getLogger(__name__)


@as_program("train")
def main(config: DictConfig) -> float | tuple[float, ...] | None:
    """Run :func:`train`, print its summary, and return what a sweep makes small."""
    summary = train(config)
    rank_zero_only(log_summary)(summary)
    if set(config.objective) & set(OF_DEPLOYMENT):
        summary = {**summary, **deployed_metrics(Path(config.run_dir))}
    return objective_of(summary, config.objective)


def deployed_metrics(run_dir: Path) -> dict[str, Any]:
    """Deploy a finished run in the folder ``deploy`` of its own, unless it is, and return the cost.

    Args:
        run_dir: Run folder.

    Returns:
        Vela's estimates for the first of the ``systems`` of ``recipes.deploy``.
    """
    # It imports this module.
    from recipes.deploy import deploy

    folder = run_dir / "deploy"
    ckpt = run_dir / "checkpoints" / "last.ckpt"
    summary_file = folder / "summary.json"
    # A run that was trained anew is newer than what was deployed of it.
    if summary_file.is_file() and summary_file.stat().st_mtime_ns > ckpt.stat().st_mtime_ns:
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
    else:
        paths = [f"ckpt='{ckpt}'", f"run_dir='{folder}'"]
        summary = deploy(composed("deploy", [*paths, "score_float=false"]))
    return dict(summary["systems"][0])


def train(config: DictConfig) -> dict[str, Any]:
    """Train a module, and test it on the test set.

    Args:
        config: Composed configuration ``train`` of ``recipes/conf``.

    Returns:
        Content of ``summary.json`` in the run folder.

    Raises:
        ValueError: If the run folder holds a run with other settings, or another process runs
            there; see :func:`.check_settings` too.
    """
    prepare_process(config, "train")
    model = adapter_class(get_object(config.model._target_))
    check_objective(config.objective, model.known_results)
    config = shortened(config)
    if config.resume and (finished := finished_summary(Path(config.run_dir), config)) is not None:
        _log.info(
            "%s has the results of these settings, trained at commit %s: nothing runs again "
            "(resume=false trains anew)",
            config.run_dir,
            finished.get("commit"),
        )
        return finished
    # The other processes of the run are in the folder of the first.
    is_first = getattr(rank_zero_only, "rank", 0) == 0
    with sole_run(Path(config.run_dir)) if is_first else nullcontext():
        return _train(config)


def _train(config: DictConfig) -> dict[str, Any]:
    rank_zero_only(record_config)(Path(config.run_dir), config)
    # Read now: by the end of training the checkout may be at another commit.
    origin = provenance(config.seed)
    weights = None if config.init_from is None else load_weights(config.init_from)
    adapter = build(config, weights)
    module, targets = adapter.module, config.targets
    if config.test:
        adapter.require_test()
    check_clipping(module, config)
    callbacks = build_callbacks(config)
    settings = settings_of(config)
    of_every_run = [RecipeInCheckpoint(settings), OtherProcesses(settings), EndTogether()]
    trainer = build_trainer(config, [*callbacks.values(), *of_every_run])
    check_processes(trainer)
    start = _last_checkpoint(config) if config.resume else None
    if start is not None:
        load_checkpoint(start)  # Raises its own message if the file is damaged.
    began = time.monotonic()
    trainer.fit(module, adapter.datamodule, ckpt_path=start, weights_only=True)
    # The timer's clock alone includes the time before a run was resumed.
    timer = callbacks.get("timer")
    seconds = timer.time_elapsed() if isinstance(timer, Timer) else time.monotonic() - began
    # Score the weights of the checkpoint: of a run that was finished before, only its checkpoint
    # has the average of the weights.
    if (last := _last_checkpoint(config)) is not None:
        put_into(module, load_weights(last), targets, with_rest=True)
    summary: dict[str, Any] = {
        "experiment": config.name,
        "method": config.method,
        **origin,
        "overrides": task_overrides(),
        **size_of(module, targets),
        "epochs": trainer.current_epoch,
        "train_seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
    }
    if config.get("debug"):
        summary["debug"] = True
    if config.test:
        results = adapter.tested(trainer)
        summary |= results | {"titles": _objective_first(adapter.titles_of(results), config)}
    summary |= weight_metrics(module, targets)
    if trainer.is_global_zero:
        if config.test:
            adapter.write_results(Path(config.run_dir))
        write_summary(Path(config.run_dir), summary)
    return summary


def build_callbacks(config: DictConfig) -> dict[str, Callback]:
    """Build the callbacks of ``config.callbacks`` that are not null, by their keys."""
    return instantiate_all(config.callbacks, "callbacks")


def build_trainer(config: DictConfig, callbacks: Sequence[Callback]) -> Trainer:
    """Build the trainer of ``config.trainer`` with the loggers that are not null."""
    loggers = list(instantiate_all(config.logger, "logger").values())
    trainer: Trainer = instantiate(config.trainer, callbacks=list(callbacks), logger=loggers)
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # Not a plugin of the user's.
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
    return trainer


def check_clipping(module: LightningModule, config: DictConfig) -> None:
    """Raise if the trainer is to clip the gradients of a module that optimizes by itself.

    Args:
        module: Module to train.
        config: Composed configuration ``train``.

    Raises:
        ValueError: If it is, as by default.
    """
    clipping = config.trainer.get("gradient_clip_val")
    if clipping and not module.automatic_optimization:
        raise ValueError(
            f"trainer.gradient_clip_val={clipping} is not used: {type(module).__name__} optimizes "
            "by itself (automatic_optimization=False); set it to null, and call "
            "self.clip_gradients in training_step"
        )


def check_processes(trainer: Trainer) -> None:
    """Raise if the processes of a run would not do the same run.

    Raises:
        ValueError: If a sweep is to be run by several processes: each of those that Lightning
            starts would run the whole sweep again. If torchrun, SLURM or another program has
            started the processes and each would choose a run folder by its own clock.
    """
    sweeps = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if sweeps and trainer.world_size > 1:
        raise ValueError(
            f"a sweep cannot be run by {trainer.world_size} processes: start its runs one by one, "
            "or set trainer.devices=1"
        )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if (
        trainer.world_size > 1
        and getattr(environment, "creates_processes_externally", False)
        and HydraConfig.initialized()
        and not any(each.startswith("hydra.run.dir=") for each in HydraConfig.get().overrides.hydra)
    ):
        raise ValueError(
            f"{trainer.world_size} processes were started from outside, and each would have a run "
            "folder of its own: add hydra.run.dir=<folder> to the command"
        )


def _objective_first(titles: Mapping[str, str], config: DictConfig) -> dict[str, str]:
    """Put what a sweep makes small before other results: tables are ordered by the first."""
    first = [name for name in config.objective if name in titles]
    return {name: titles[name] for name in dict.fromkeys([*first, *titles])}


def _last_checkpoint(config: DictConfig) -> str | None:
    """Return the path of the newest checkpoint in the run folder, if there is one."""
    path = Path(config.run_dir) / "checkpoints" / "last.ckpt"
    return str(path) if path.is_file() else None


if __name__ == "__main__":
    main()
