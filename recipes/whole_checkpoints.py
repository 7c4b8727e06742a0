"""Checkpoints that are complete on the disk before they take their name."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lightning_nna.files import whole_file

_PLAIN = (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


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
    if type(value) in (dict, OrderedDict):
        return all(is_plain(each) for pair in value.items() for each in pair)
    if type(value) in (list, tuple, set):
        return all(map(is_plain, value))
    return value is None or type(value) in _PLAIN or isinstance(value, Tensor)


def _without_objects(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint without hyperparameters that cannot be read again."""
    content = dict(checkpoint)
    for owner in (LightningModule, LightningDataModule):
        content.pop(owner.CHECKPOINT_HYPER_PARAMS_TYPE, None)
        key = owner.CHECKPOINT_HYPER_PARAMS_KEY
        values = content.get(key)
        if isinstance(values, DictConfig):
            values = OmegaConf.to_container(values, resolve=True)
        if isinstance(values, dict):
            content[key] = {name: value for name, value in values.items() if is_plain(value)}
    return content
