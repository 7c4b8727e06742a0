"""Tell runs of several processes from runs of one."""

from __future__ import annotations

import torch


def is_distributed() -> bool:
    """Tell if other ranks take part in this run."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
