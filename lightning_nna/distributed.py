"""Tell runs of several processes from runs of one."""

from __future__ import annotations

import torch


def is_distributed() -> bool:
    """Tell if other ranks take part in this run."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_first_process() -> bool:
    """Return whether this process reports for all; True outside of a distributed run.

    Example:
        >>> is_first_process()
        True
    """
    return not is_distributed() or torch.distributed.get_rank() == 0
