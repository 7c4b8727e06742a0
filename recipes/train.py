"""Train a recognizer and score it.

    python -m recipes.train experiment=an4_rnnt compression=nna8 seed=2

The run folder (``runs/<experiment>/<time>`` or ``hydra.run.dir=...``) gets ``config.yaml``,
``metrics/``, ``checkpoints/`` and ``summary.json``. The same command with the folder of a run
that was stopped goes on where it stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lightning_nna.checkpoints import deploy_weights, load_checkpoint
from recipes.asr.data import SpeechDataModule
from recipes.asr.recognizer import TransducerRecognizer
from recipes.run_folder import (
    provenance,
    record_config,
    settings_of,
    size_of,
    weight_figures,
    write_summary,
)
from recipes.settings import check_settings, instantiate_all
from recipes.weights import TrainedWeights, load_weights, put_into

_log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(config: DictConfig) -> None:
    """Run :func:`train` and print its summary."""
    summary = train(config)
    _log.info("%s", {key: value for key, value in summary.items() if key != "versions"})


def train(config: DictConfig) -> dict[str, Any]:
    """Train as ``config`` says, and score the test set.

    Args:
        config: The composed configuration ``train`` of ``conf/``.

    Returns:
        What ``summary.json`` in the run folder holds.

    Raises:
        ValueError: If the run folder holds a run with other settings; see :func:`.check_settings`
            too.
    """
    check_settings(config, "train")
    rank_zero_only(record_config)(Path(config.run_dir), config)
    # Now: by the end of training the checkout may have moved on.
    origin = provenance(config.seed)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    seed_everything(config.seed, verbose=False)
    datamodule = instantiate(config.data)
    weights = None if config.init_from is None else load_weights(config.init_from)
    recognizer = build_recognizer(config, datamodule, weights)
    callbacks = build_callbacks(config)
    trainer = build_trainer(config, callbacks)
    check_processes(trainer)
    start = _last_checkpoint(config) if config.resume else None
    if start is not None:
        load_checkpoint(start)  # Says in its own words what is wrong with the file.
    began = time.monotonic()
    trainer.fit(recognizer, datamodule, ckpt_path=start, weights_only=True)
    # Of the clocks only the timer's counts what a resumed run took before.
    timer = callbacks.get("timer")
    seconds = timer.time_elapsed() if isinstance(timer, Timer) else time.monotonic() - began
    # Score what the checkpoint holds: a run that was finished before leaves the average of the
    # weights to its checkpoint alone.
    if (last := _last_checkpoint(config)) is not None:
        put_into(recognizer.model, load_weights(last))
    summary: dict[str, Any] = {
        "experiment": config.name,
        "method": config.method,
        **origin,
        **size_of(recognizer.model),
        "epochs": trainer.current_epoch,
        "train_seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
    }
    if config.test:
        summary |= score_test(trainer, recognizer, datamodule)
    summary |= weight_figures(recognizer)
    if trainer.is_global_zero:
        write_summary(Path(config.run_dir), summary)
    return summary


def build_recognizer(
    config: DictConfig, datamodule: SpeechDataModule, weights: TrainedWeights | None = None
) -> TransducerRecognizer:
    """Build the recognizer of ``config.model`` for what ``datamodule`` delivers.

    Args:
        config: The settings of the run; the recognizer keeps them for its checkpoints.
        datamodule: Read from disk here.
        weights: Weights to start from; their vocabulary and normalization become the data's.

    Raises:
        ValueError: If the weights are those of another network.
    """
    datamodule.prepare_data()
    datamodule.setup("fit")
    if weights is not None:
        datamodule.load_state_dict(weights.data)
    recognizer: TransducerRecognizer = instantiate(
        config.model,
        vocabulary=datamodule.vocabulary,
        num_mels=datamodule.num_mels,
        beam_width=config.beam_width,
    )
    recognizer.recipe = settings_of(config)
    if weights is not None:
        put_into(recognizer.model, weights)
        # What a run has compressed is used so: a checkpoint may hold what it goes on from.
        deploy_weights(recognizer, weights.callbacks)
    return recognizer


def build_callbacks(config: DictConfig) -> dict[str, Callback]:
    """The callbacks of ``config.callbacks`` that are not null, by their keys."""
    return instantiate_all(config.callbacks, "callbacks")


def build_trainer(config: DictConfig, callbacks: Mapping[str, Callback]) -> Trainer:
    """The trainer of ``config.trainer`` with the loggers that are not null."""
    loggers = list(instantiate_all(config.logger, "logger").values())
    trainer: Trainer = instantiate(
        config.trainer, callbacks=list(callbacks.values()), logger=loggers
    )
    return trainer


def check_processes(trainer: Trainer) -> None:
    """Raise where the processes of a run would not do the same run.

    Raises:
        ValueError: If a sweep is to be run by several processes: each of those that Lightning
            starts would run the whole sweep again.
    """
    sweeps = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if sweeps and trainer.world_size > 1:
        raise ValueError(
            f"a sweep cannot be run by {trainer.world_size} processes: start its runs one by one, "
            "or set trainer.devices=1"
        )


def _last_checkpoint(config: DictConfig) -> str | None:
    """The newest checkpoint in the run folder."""
    path = Path(config.run_dir) / "checkpoints" / "last.ckpt"
    return str(path) if path.is_file() else None


def score_test(
    trainer: Trainer, recognizer: TransducerRecognizer, datamodule: SpeechDataModule
) -> dict[str, Any]:
    """Score ``recognizer`` as it is on the test set.

    Returns:
        ``wer``, ``wer_low``, ``wer_high`` (fractions), ``errors``, ``words``, ``beam_width``,
        ``wer_greedy`` (of the greedy search) and ``loss_per_token``.
    """
    figures = trainer.test(recognizer, datamodule, verbose=False)[0]
    score = recognizer.score
    assert score is not None, "a test run leaves a score"
    counts = asdict(score)
    return {
        "wer": counts["rate"],
        "wer_low": counts["low"],
        "wer_high": counts["high"],
        "errors": counts["errors"],
        "words": counts["words"],
        "beam_width": recognizer.beam_width,
        "wer_greedy": figures["test/wer_greedy"],
        "loss_per_token": figures["test/loss_per_token"],
    }


if __name__ == "__main__":
    main()
