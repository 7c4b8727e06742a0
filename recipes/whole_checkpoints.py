"""Checkpoints that are complete on the disk before they take their name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_nna.files import whole_file


class WholeCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, flush it, and rename it.

    Lightning writes it into the folder of temporary files and moves it. Where that is another file
    system, which is common, moving is copying, and a process that is killed leaves half a file as
    the run's last checkpoint; and without a flush, a power cut leaves an empty one.

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
            torch.save(checkpoint, unfinished)
