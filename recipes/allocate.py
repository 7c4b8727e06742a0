"""Choose the bits of every weight of a trained recognizer from the loss of training batches.

    python -m recipes.allocate ckpt=runs/an4_rnnt/seed1/checkpoints/last.ckpt target_mean_bits=4
    python -m recipes.allocate ckpt=... budget=cycles target_price_ratio=0.6
    python -m recipes.train experiment=an4_rnnt_finetune compression=gq bit_overrides=RUN/bits.json

With ``budget`` bits have prices, which Vela measures on the weights' layers: cycles of a mean
utterance of the calibration batches in greedy decoding, or bytes of memory. With ``zeros``, too,
what a zero of each weight saves is measured instead, for pruning with that budget.

    python -m recipes.allocate ckpt=... budget=cycles zeros=0.8
    python -m recipes.train experiment=an4_rnnt_finetune compression=csp sparsity=0.8
        +callbacks.prune.prices=RUN/zero_prices.json
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from lightning_nna.deploy import VelaPrice
from lightning_nna.files import write_whole
from lightning_nna.pruning.zero_prices import prices_of_zeros
from lightning_nna.weights.allocation import BitAllocation, allocate_bits
from recipes.adapter import Adapter
from recipes.preparation import prepare_process, rebuild
from recipes.program import as_program
from recipes.weights import load_weights

_log = logging.getLogger(__name__)


@as_program("allocate")
def main(config: DictConfig) -> None:
    """Run :func:`allocate`, or :func:`price_zeros` with ``zeros``, and print its table."""
    if config.zeros is None:
        _log.info("\n%s", allocate(config))
        return
    for name, saving in price_zeros(config).items():
        _log.info("%s: a zero saves %.4g", name, saving)


def allocate(config: DictConfig) -> BitAllocation:
    """Measure the loss, allocate bits, and write ``bits.json`` into the run folder.

    Args:
        config: Composed configuration ``allocate`` of ``recipes/conf``.

    Returns:
        Bits of every selected tensor.

    Raises:
        FileNotFoundError: If ``ckpt`` does not exist.
        ValueError: See :func:`.allocate_bits`.
    """
    adapter, batches = calibration_of(config)
    price = None if config.budget is None else vela_price(adapter, batches, config)
    allocation = allocate_bits(
        adapter.module,
        lambda _: adapter.loss(batches),
        target_bytes=config.target_bytes,
        target_mean_bits=config.target_mean_bits,
        price=price,
        target_price=config.target_price,
        target_price_ratio=config.target_price_ratio,
        targets=list(config.targets),
        candidates=list(config.candidates),
        granularity=config.granularity,
        codebook=config.codebook,
        grid_bits=config.grid_bits,
    )
    allocation.save(Path(config.run_dir) / "bits.json")
    return allocation


def price_zeros(config: DictConfig) -> dict[str, float]:
    """Measure what a zero of each weight saves, and write ``zero_prices.json`` into the run folder.

    Args:
        config: Composed configuration ``allocate`` of ``recipes/conf``, with ``zeros``
            and ``budget``.

    Raises:
        FileNotFoundError: If ``ckpt`` does not exist.
        ValueError: If ``budget`` is null, or see :func:`.prices_of_zeros`.
    """
    if config.budget is None:
        raise ValueError("zeros needs a budget: add budget=cycles or budget=memory")
    adapter, batches = calibration_of(config)
    prices = prices_of_zeros(
        adapter.module,
        vela_price(adapter, batches, config),
        config.zeros,
        pattern=config.zeros_pattern,
        targets=list(config.targets),
    )
    write_whole(Path(config.run_dir) / "zero_prices.json", json.dumps(prices, indent=1) + "\n")
    return prices


def vela_price(adapter: Adapter, batches: Sequence[Any], config: DictConfig) -> VelaPrice:
    """Price the module's weights for one unit of its work, such as a mean utterance of the batches.

    Args:
        adapter: Trained module.
        batches: Training batches.
        config: Composed configuration ``allocate``, with ``budget``.
    """
    example, forward = adapter.priced(batches, config)
    return VelaPrice(
        adapter.module,
        example,
        forward=forward,
        budget=config.budget,
        accelerator=config.accelerator,
        system=config.system,
        memory_mode=config.memory_mode,
        cache=config.price_cache,
    )


def calibration_of(config: DictConfig) -> tuple[Adapter, list[Any]]:
    """Return the trained module and the batches whose loss is measured.

    Args:
        config: Composed configuration ``allocate``; its ``targets`` are set if they are null.
    """
    prepare_process(config, "allocate")
    targets = config.targets
    _, adapter = rebuild(load_weights(config.ckpt), config)
    if targets is not None:
        config.targets = targets
    torch.manual_seed(0)  # Augmentation draws from it.
    return adapter, list(itertools.islice(adapter.training_batches(), config.batches))


if __name__ == "__main__":
    main()
