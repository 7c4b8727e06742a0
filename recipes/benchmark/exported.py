"""Programs of a trained recognizer, compared with its emulation on test batches."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import Trainer
from omegaconf import OmegaConf

from lightning_nna.callbacks import NNAEmulation
from lightning_nna.deploy import TFLiteModel
from recipes.asr.adapter import Comparison, TransducerAdapter, compare
from recipes.asr.batches import Batch
from recipes.asr.data import SpeechDataModule
from recipes.asr.deployed import DeployedTransducer, export_transducer
from recipes.asr.rnnt import Encoder
from recipes.deploy import trained_callbacks
from recipes.preparation import rebuild
from recipes.weights import load_weights


class ExportedRecognizer(NamedTuple):
    """A recognizer's programs and what they computed."""

    datamodule: SpeechDataModule
    models: Mapping[str, TFLiteModel]
    """Programs by name."""
    deployed: DeployedTransducer
    """The programs on their runtime; its calls are not those of the comparison."""
    batches: list[Batch]
    """Batches of the test part that were compared."""
    comparison: Comparison


def export_checkpoint(checkpoint: Path, folder: Path, *, batches: int) -> ExportedRecognizer:
    """Export a recognizer that was trained emulated, and compare its programs bit by bit.

    Args:
        checkpoint: Checkpoint of a run of ``recipes.train``.
        folder: Folder of the programs.
        batches: Number of test batches that are compared, positive.
    """
    weights = load_weights(checkpoint)
    config = OmegaConf.create(
        {"ckpt": str(checkpoint), "data": {}, "callbacks": {}, "beam_width": 1}
    )
    _, adapter = rebuild(weights, config)
    assert isinstance(adapter, TransducerAdapter)
    datamodule, recognizer = adapter.speech, adapter.recognizer
    callbacks = trained_callbacks(weights, config)
    for callback in callbacks:
        if isinstance(callback, NNAEmulation):
            callback.load_state_dict(weights.callbacks[callback.state_key])
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=callbacks, limit_test_batches=1
    )
    trainer.test(recognizer, datamodule, verbose=False)
    recognizer.eval()
    compared = list(itertools.islice(datamodule.test_dataloader(), batches))
    # A recurrent encoder takes one step after another, a Conformer the whole utterance.
    is_recurrent = isinstance(recognizer.model.encoder, Encoder)
    frames = None if is_recurrent else max(int(b.feature_lengths.max()) for b in compared)
    models = export_transducer(recognizer, folder, utterance_frames=frames)
    deployed = DeployedTransducer(folder)
    comparison = compare(recognizer, deployed, compared)
    deployed.calls.clear()
    return ExportedRecognizer(datamodule, models, deployed, compared, comparison)
