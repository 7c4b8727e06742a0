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
from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from recipes.asr.data import SpeechDataModule
from recipes.asr.recogniser import TransducerRecogniser
from recipes.run_folder import provenance, size_of, write_summary
from recipes.train import build_callbacks, build_recogniser, score_test
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
            features than it was trained on.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    weights = load_weights(config.ckpt)
    recipe = recipe_of(weights, config)
    datamodule = instantiate(recipe.data)
    recogniser = build_recogniser(recipe, datamodule, weights)
    callbacks = build_callbacks(config)
    put_on_chip(recogniser, datamodule, callbacks, weights, config)
    trainer = Trainer(
        accelerator="auto", devices=1, logger=False, callbacks=list(callbacks.values())
    )
    summary = {
        "ckpt": str(config.ckpt),
        "experiment": recipe.name,
        "method": _method(config, weights),
        **provenance(recipe.seed),
        **size_of(recogniser.model),
        **score_test(trainer, recogniser, datamodule),
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
    if config.beam_width is not None:
        recipe.model.beam_width = config.beam_width
    return recipe


def put_on_chip(
    recogniser: TransducerRecogniser,
    datamodule: SpeechDataModule,
    callbacks: dict[str, Callback],
    weights: TrainedWeights,
    config: DictConfig,
) -> None:
    """Give the emulation among ``callbacks`` its ranges, if it is there."""
    if "nna" not in callbacks:
        return
    emulation = callbacks["nna"]
    if emulation.state_key in weights.callbacks:
        emulation.load_state_dict(weights.callbacks[emulation.state_key])
        return
    calibrate_on(recogniser, datamodule, spec=config.nna.spec, batches=config.calibration_batches)


def calibrate_on(
    recogniser: TransducerRecogniser, datamodule: SpeechDataModule, *, spec: Any, batches: int
) -> None:
    """Measure the ranges of ``recogniser`` on the first training batches."""
    # The core works without the recipes' packages and the recipes without the chip.
    from lightning_nna import calibrate

    first = itertools.islice(datamodule.train_dataloader(), batches)
    recogniser.eval()
    calibrate(
        recogniser,
        tqdm(first, total=batches, desc="calibrating"),
        forward=lambda module, batch: module.losses(batch),
        spec=spec,
    )


def _method(config: DictConfig, weights: TrainedWeights) -> str:
    """``chip`` is a float model on the chip; what trained on it keeps its method's name."""
    on_chip = config.callbacks.get("nna") is not None
    if not on_chip:
        return "float"
    trained = str(weights.recipe.get("method", "float"))
    return "chip" if trained == "float" else trained


if __name__ == "__main__":
    main()
