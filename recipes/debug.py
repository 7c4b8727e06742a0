"""A short run that tries a command out: ``debug=true``.

    python -m recipes.train experiment=an4_rnnt compression=gq bits=4 debug=true

It has two epochs of a few batches and trains as the long run would, emulated if that is: the
calibration is shortened, too. Its folder is not that of a run (``runs/<name>/debug/<time>``, or
``debug`` in the folder that ``hydra.run.dir`` names), and it is never resumed.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import PurePath
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

_log = logging.getLogger(__name__)

_EPOCHS = 2  # Some methods act between epochs.
_STEPS = 6  # Of an epoch.
_SCORED_BATCHES = 2
_CALIBRATION_STEPS = 2
_UTTERANCES = 64
"""Of a part of a corpus that is synthesized; others are read as they are."""

FOLDER = "debug"


def debug_folder(folder: str, debug: Any) -> str:
    """Return the folder of a run, or that of a debug run in its place.

    Args:
        folder: Folder of runs or of a run.
        debug: Whether the run is a debug run.

    Example:
        >>> debug_folder("runs/mine", True), debug_folder("runs/mine", False)
        ('runs/mine/debug', 'runs/mine')
        >>> debug_folder("runs/digits/debug/2026-01-01_12-00-00", True)
        'runs/digits/debug/2026-01-01_12-00-00'
    """
    is_inside = FOLDER in PurePath(folder).parts[-2:]
    return folder if debug is not True or is_inside else f"{folder}/{FOLDER}"


def shortened(config: DictConfig) -> DictConfig:
    """Return the settings of a debug run, and tell what they are.

    Limits of batches that the command sets stay as they are.

    Args:
        config: Composed configuration ``train`` of ``recipes/conf``.

    Returns:
        ``config`` itself without ``debug=true``, and a changed copy with it.

    Raises:
        ValueError: If ``debug`` is neither true nor false.
    """
    debug = config.get("debug", False)
    if not isinstance(debug, bool):
        raise ValueError(f"debug must be true or false, got {debug!r}")
    if not debug:
        return config
    config = deepcopy(config)
    with open_dict(config):
        _shorten_trainer(config.trainer)
        calibration = _shorten_calibration(config)
        if config.get("parq_steps") is not None:
            config.parq_steps = min(config.parq_steps, _EPOCHS * _STEPS)
        for node in config.callbacks.values():
            if isinstance(node, DictConfig) and isinstance(node.get("every_n_steps"), int):
                node.every_n_steps = min(node.every_n_steps, _STEPS)
        for key in ("train_size", "validation_size", "test_size"):
            if config.data.get(key) is not None:
                config.data[key] = min(config.data[key], _UTTERANCES)
        config.resume = False
    trainer = config.trainer
    _log.info(
        "debug=true: %s epochs of %s training batches, %s of validation and %s of testing%s; the "
        "folder %s is not that of a run",
        trainer.max_epochs,
        trainer.limit_train_batches,
        trainer.limit_val_batches,
        trainer.limit_test_batches,
        calibration,
        config.run_dir,
    )
    return config


def _shorten_trainer(trainer: DictConfig) -> None:
    limits = {
        "limit_train_batches": _STEPS * (trainer.get("accumulate_grad_batches") or 1),
        "limit_val_batches": _SCORED_BATCHES,
        "limit_test_batches": _SCORED_BATCHES,
    }
    for key, limit in limits.items():
        if trainer.get(key) is None:
            trainer[key] = limit
    epochs = trainer.get("max_epochs")
    trainer.max_epochs = min(epochs, _EPOCHS) if epochs is not None and epochs > 0 else _EPOCHS
    trainer.update(check_val_every_n_epoch=1, val_check_interval=None, log_every_n_steps=1)
    trainer.update(min_epochs=None, min_steps=None)


def _shorten_calibration(config: DictConfig) -> str:
    """Shorten the calibration of an emulation; return the part of the message that tells so."""
    steps = OmegaConf.select(config, "callbacks.nna.calibration_steps")
    if steps is None or steps <= _CALIBRATION_STEPS:
        return ""
    config.callbacks.nna.calibration_steps = _CALIBRATION_STEPS
    return (
        f"; callbacks.nna.calibration_steps={_CALIBRATION_STEPS}, not {steps}, so that the steps "
        "after these are emulated"
    )


# Hydra composes after this module was imported, by recipes.program.
OmegaConf.register_new_resolver("debug_folder", debug_folder, replace=True)
