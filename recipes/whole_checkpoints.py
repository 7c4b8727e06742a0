"""Checkpoints that are complete on the disk before they take their name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf

from lightning_nna.files import whole_file


class WholeCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, flush it, and rename it.

    Lightning writes it into the folder of temporary files and moves it. Where that is another file
    system, which is common, moving is copying, and a process that is killed leaves half a file as
    the run's last checkpoint; and without a flush, a power cut leaves an empty one.

    Hyperparameters that are objects, as ``save_hyperparameters()`` keeps an optimizer's class, are
    left out: what could run code is not read again, and the settings of the run have them.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "last.ckpt"
        ...     WholeCheckpointIO().save_checkpoint({"epoch": 3}, path)
        ...     torch.load(path, weights_only=True)
        {'epoch': 3}
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; one in an object store is written as Lightning does.

        Args:
            checkpoint: Everything that the trainer and its callbacks have to store.
            path: Path of the file, or the address of an object.
            storage_options: Not used, as in Lightning.

        Raises:
            OSError: If the file cannot be written; an older one is unchanged.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole_file(Path(path)) as unfinished:
            torch.save(_without_objects(checkpoint), unfinished)


def is_plain(value: Any) -> bool:
    """Tell whether a value in a checkpoint can be read again: tensors and plain containers can.

    Example:
        >>> is_plain({"lr": 0.1, "mean": torch.zeros(2)}), is_plain(torch.optim.Adam)
        (True, False)
    """
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    # It runs what the objects of others do to be written.
    except Exception:
        return False
    return True


def _without_objects(checkpoint: dict[str, Any]) -> dict[str, Any]:
    kept = dict(checkpoint)
    for owner in (LightningModule, LightningDataModule):
        kept.pop(owner.CHECKPOINT_HYPER_PARAMS_TYPE, None)
        key = owner.CHECKPOINT_HYPER_PARAMS_KEY
        values = kept.get(key)
        if isinstance(values, DictConfig):
            values = OmegaConf.to_container(values, resolve=True)
        if isinstance(values, dict):
            kept[key] = {name: value for name, value in values.items() if is_plain(value)}
    return kept
