"""Score a checkpoint on the test set, in float or emulated.

    python -m recipes.evaluate ckpt=runs/an4_rnnt/seed1/checkpoints/last.ckpt
    python -m recipes.evaluate ckpt=recipes/pretrained/an4_rnnt.safetensors compression=nna8

With ``compression=nna8`` the network is emulated: it runs in the accelerator's arithmetic.
A checkpoint that was trained emulated brings its ranges; a float one is calibrated on training
batches first.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

from lightning_nna import calibrate
from lightning_nna.callbacks import NNAEmulation
from lightning_nna.weights.method import WeightMethod
from recipes.asr.batches import Batch
from recipes.asr.data import SpeechDataModule
from recipes.asr.recognizer import TransducerRecognizer
from recipes.preparation import prepare_process, rebuild
from recipes.program import as_program
from recipes.run_folder import (
    log_summary,
    provenance,
    size_of,
    weight_metrics,
    write_summary,
    write_transcripts,
)
from recipes.train import build_callbacks, score_test
from recipes.weights import TrainedWeights, load_weights


@as_program("evaluate")
def main(config: DictConfig) -> None:
    """Run :func:`evaluate` and print its summary."""
    log_summary(evaluate(config))


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Score ``config.ckpt`` on the test set.

    Args:
        config: Composed configuration ``evaluate`` of ``recipes/conf``.

    Returns:
        Content of ``summary.json`` in the run folder.

    Raises:
        FileNotFoundError: If ``ckpt`` does not exist.
        ValueError: If ``ckpt`` was not written by ``recipes.train``, or if ``data`` asks for other
            features than it was trained on; see :func:`.check_settings` too.
    """
    prepare_process(config, "evaluate")
    weights = load_weights(config.ckpt)
    recipe, datamodule, recognizer = rebuild(weights, config)
    callbacks = build_callbacks(config)
    for callback in callbacks.values():
        if isinstance(callback, WeightMethod) and callback.state_key in weights.callbacks:
            callback.load_state_dict(weights.callbacks[callback.state_key])
    emulation = callbacks.get("nna")
    if isinstance(emulation, NNAEmulation):
        batches = config.calibration_batches
        restore_or_calibrate(recognizer, datamodule, emulation, weights, batches=batches)
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
        **weight_metrics(recognizer),
    }
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_transcripts(run_dir, recognizer)
    write_summary(run_dir, summary)
    return summary


def restore_or_calibrate(
    recognizer: TransducerRecognizer,
    datamodule: SpeechDataModule,
    emulation: NNAEmulation,
    weights: TrainedWeights,
    *,
    batches: int,
) -> None:
    """Restore the ranges of ``emulation`` from a checkpoint, or calibrate on training batches.

    Args:
        recognizer: Recognizer of the coming test run.
        datamodule: Source of the training batches.
        emulation: Callback of the coming test run.
        weights: Checkpoint, with or without ranges.
        batches: Number of training batches to observe if the checkpoint has no ranges, positive.
    """
    if emulation.state_key in weights.callbacks:
        emulation.load_state_dict(weights.callbacks[emulation.state_key])
        return
    examples = itertools.islice(datamodule.train_dataloader(), batches)
    calibrate(
        recognizer,
        tqdm(examples, total=batches, desc="observing ranges", delay=2),
        forward=_score_and_decode,
        spec=emulation.spec,
        targets=emulation.targets,
    )


def _score_and_decode(module: nn.Module, batch: Batch) -> None:
    """Score and decode a batch: decoding calls predictor and joint label by label, other sites."""
    assert isinstance(module, TransducerRecognizer)
    module.losses(batch)
    module.decode(batch)


def _method(config: DictConfig, weights: TrainedWeights) -> str:
    """Name the method of a score: ``chip`` is an emulated model that was trained in float."""
    is_emulated = config.callbacks.get("nna") is not None
    is_compressed = any("latents" in state for state in weights.callbacks.values())
    if not is_emulated and not is_compressed:
        return "float"
    trained = str(weights.recipe.get("method", "float"))
    return "chip" if trained == "float" else trained


if __name__ == "__main__":
    main()
