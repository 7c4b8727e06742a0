"""Choose the bits of every weight of a trained recognizer from the loss of training batches.

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
from omegaconf import DictConfig
from torch import nn

from lightning_nna.weights.allocation import BitAllocation, allocate_bits
from recipes.asr.batches import Batch
from recipes.asr.recognizer import TransducerRecognizer
from recipes.preparation import prepare_process, rebuild
from recipes.weights import load_weights

_log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../conf", config_name="allocate")
def main(config: DictConfig) -> None:
    """Run :func:`allocate` and print its table."""
    _log.info("\n%s", allocate(config))


def allocate(config: DictConfig) -> BitAllocation:
    """Measure the loss, allocate bits, and write ``bits.json`` into the run folder.

    Args:
        config: Composed configuration ``allocate`` of ``conf/``.

    Returns:
        Bits of every selected tensor.

    Raises:
        FileNotFoundError: If ``ckpt`` does not exist.
        ValueError: See :func:`.allocate_bits`.
    """
    prepare_process(config, "allocate")
    _, datamodule, recognizer = rebuild(load_weights(config.ckpt), config)
    torch.manual_seed(0)  # Augmentation draws from it.
    batches = list(itertools.islice(datamodule.train_dataloader(), config.batches))
    allocation = allocate_bits(
        recognizer,
        lambda module: _loss(module, batches),
        target_bytes=config.target_bytes,
        target_mean_bits=config.target_mean_bits,
        targets=list(config.targets),
        candidates=list(config.candidates),
        granularity=config.granularity,
        codebook=config.codebook,
        grid_bits=config.grid_bits,
    )
    allocation.save(Path(config.run_dir) / "bits.json")
    return allocation


def _loss(module: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the transducer's loss per token of all batches together, in nats."""
    assert isinstance(module, TransducerRecognizer)
    total = sum(float(module.losses(batch)[0]) for batch in batches)
    return total / sum(int(batch.target_lengths.sum()) for batch in batches)


if __name__ == "__main__":
    main()
