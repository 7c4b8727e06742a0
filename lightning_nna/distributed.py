"""Runs of several processes."""

from __future__ import annotations

import torch


def is_distributed() -> bool:
    """Whether other ranks take part in this run."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
