"""Read checkpoints without running code that is in them: ``load_checkpoint``."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of tensors and plain containers; code in it does not run.

    Args:
        path: A file that Lightning or ``torch.save`` wrote.

    Returns:
        The file's content, tensors on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or holds objects of any other class: reading these can
            run code of whoever wrote the file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 3}, f"{folder}/last.ckpt")
        ...     load_checkpoint(f"{folder}/last.ckpt")
        {'epoch': 3}
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not read: it is damaged, or holds objects other than tensors and plain "
            f"containers, which could run code: {str(error).splitlines()[-1]}"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} is no checkpoint of a Trainer: it holds a {type(checkpoint).__name__}"
        )
    return checkpoint
