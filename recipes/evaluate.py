"""Score a checkpoint on the test set, in float or on the chip.

    python -m recipes.evaluate ckpt=runs/an4_rnnt/seed1/checkpoints/last.ckpt
    python -m recipes.evaluate ckpt=recipes/pretrained/an4_rnnt.safetensors compression=nna8

With ``compression=nna8`` the network runs in the chip's arithmetic. A chip-aware checkpoint brings
its ranges along; a float one is calibrated on training batches first.
"""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from lightning_nna import calibrate
from lightning_nna.callbacks import NNAEmulation
from lightning_nna.weights.method import WeightMethod
from recipes.asr.batches import Batch
from recipes.asr.data import SpeechDataModule
from recipes.asr.recognizer import TransducerRecognizer
from recipes.run_folder import provenance, size_of, weight_figures, write_summary
from recipes.settings import check_settings
from recipes.train import build_callbacks, build_recognizer, score_test
from recipes.weights import TrainedWeights, load_weights

_log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    """Run :func:`evaluate` and print its summary."""
    summary = evaluate(config)
    _log.info("%s", {key: value for key, value in summary.items() if key != "versions"})


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Score ``config.ckpt`` as ``config`` says.

    Args:
        config: The composed configuration ``evaluate`` of ``conf/``.

    Returns:
        What ``summary.json`` in the run folder holds.

    Raises:
        FileNotFoundError: If ``ckpt`` does not exist.
        ValueError: If ``ckpt`` was not written by ``recipes.train``, or if ``data`` asks for other
            features than it was trained on; see :func:`.check_settings` too.
    """
    check_settings(config, "evaluate")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    weights = load_weights(config.ckpt)
    recipe = recipe_of(weights, config)
    datamodule = instantiate(recipe.data)
    recognizer = build_recognizer(recipe, datamodule, weights)
    callbacks = build_callbacks(config)
    for callback in callbacks.values():
        if isinstance(callback, WeightMethod) and callback.state_key in weights.callbacks:
            callback.load_state_dict(weights.callbacks[callback.state_key])
    emulation = callbacks.get("nna")
    if isinstance(emulation, NNAEmulation):
        batches = config.calibration_batches
        put_on_chip(recognizer, datamodule, emulation, weights, batches=batches)
    trainer = Trainer(
        accelerator="auto", devices=1, logger=False, callbacks=list(callbacks.values())
    )
    summary = {
        "ckpt": str(config.ckpt),
        "experiment": recipe.name,
        "method": _method(config, weights),
        **provenance(recipe.seed),
        **size_of(recognizer.model),
        **score_test(trainer, recognizer, datamodule),
        **weight_figures(recognizer),
    }
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_summary(run_dir, summary)
    return summary


def recipe_of(weights: TrainedWeights, config: DictConfig) -> DictConfig:
    """The settings that trained ``weights``, with the changes that ``config`` asks for."""
    recipe = OmegaConf.create(weights.recipe)
    assert isinstance(recipe, DictConfig)
    recipe.data = OmegaConf.merge(recipe.data, config.data)
    if config.get("beam_width") is not None:
        recipe.beam_width = config.beam_width
    return recipe


def put_on_chip(
    recognizer: TransducerRecognizer,
    datamodule: SpeechDataModule,
    emulation: NNAEmulation,
    weights: TrainedWeights,
    *,
    batches: int,
) -> None:
    """Give ``emulation`` its ranges: those of the checkpoint, or those of training batches.

    Args:
        recognizer: The recognizer that will be scored.
        datamodule: Where the training batches come from.
        emulation: The callback of the coming test run.
        weights: The checkpoint.
        batches: Training batches to observe, if the checkpoint has no ranges.
    """
    if emulation.state_key in weights.callbacks:
        emulation.load_state_dict(weights.callbacks[emulation.state_key])
        return
    first = itertools.islice(datamodule.train_dataloader(), batches)
    calibrate(
        recognizer,
        tqdm(first, total=batches, desc="observing ranges", delay=2),
        forward=_every_path,
        spec=emulation.spec,
        targets=emulation.targets,
    )


def _every_path(module: nn.Module, batch: Batch) -> None:
    """Score and decode: decoding runs predictor and joint label by label, a path of its own."""
    assert isinstance(module, TransducerRecognizer)
    module.losses(batch)
    module.decode(batch)


def _method(config: DictConfig, weights: TrainedWeights) -> str:
    """``chip`` is a float model on the chip; what trained on it keeps its method's name."""
    on_chip = config.callbacks.get("nna") is not None
    is_compressed = any("latents" in state for state in weights.callbacks.values())
    if not on_chip and not is_compressed:
        return "float"
    trained = str(weights.recipe.get("method", "float"))
    return "chip" if trained == "float" else trained


if __name__ == "__main__":
    main()
