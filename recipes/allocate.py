"""Choose bits for every weight of a trained recognizer, from the loss of some training batches.

python -m recipes.allocate ckpt=runs/an4_rnnt/seed1/checkpoints/last.ckpt target_mean_bits=4
python -m recipes.train experiment=an4_rnnt_finetune compression=gq bit_overrides=<run>/bits.json
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from lightning_nna.weights.allocation import BitAllocation, allocate_bits
from recipes.asr.batches import Batch
from recipes.asr.recognizer import TransducerRecognizer
from recipes.evaluate import recipe_of
from recipes.settings import check_settings
from recipes.train import build_recognizer
from recipes.weights import load_weights

_log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../conf", config_name="allocate")
def main(config: DictConfig) -> None:
    """Run :func:`allocate` and print its table."""
    _log.info("\n%s", allocate(config))


def allocate(config: DictConfig) -> BitAllocation:
    """Measure and choose as ``config`` says, and write ``bits.json`` into the run folder.

    Args:
        config: The composed configuration ``allocate`` of ``conf/``.

    Raises:
        FileNotFoundError: If ``ckpt`` does not exist.
        ValueError: See :func:`.allocate_bits`.
    """
    check_settings(config, "allocate")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    weights = load_weights(config.ckpt)
    recipe = recipe_of(weights, config)
    datamodule = instantiate(recipe.data)
    recognizer = build_recognizer(recipe, datamodule, weights)
    torch.manual_seed(0)  # Augmentation draws from it.
    batches = list(itertools.islice(datamodule.train_dataloader(), config.batches))
    found = allocate_bits(
        recognizer,
        lambda module: _loss(module, batches),
        target_bytes=config.target_bytes,
        target_mean_bits=config.target_mean_bits,
        targets=list(config.targets),
        candidates=list(config.candidates),
        granularity=config.granularity,
        grid_bits=config.grid_bits,
    )
    found.save(Path(config.run_dir) / "bits.json")
    return found


def _loss(module: nn.Module, batches: Sequence[Batch]) -> float:
    """Of the transducer, in nats per label."""
    assert isinstance(module, TransducerRecognizer)
    total = sum(float(module.losses(batch)[0]) for batch in batches)
    return total / sum(int(batch.target_lengths.sum()) for batch in batches)


if __name__ == "__main__":
    main()
