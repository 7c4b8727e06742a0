"""Tell whether Python may look at values without waiting for a device.

Where a processor computes, it is fast to look at the values first: most often nothing is clipped,
and on short vectors (one number a channel) a function of NumPy takes a third to two thirds of the
time of one of PyTorch. On a GPU each look stops its queue, so that the general form runs. It
runs for an export, too, which follows values through the functions of PyTorch and sees no other.
Both compute the same integers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Device(threading.local):
    pretended = False


_DEVICE = _Device()


def on_host(x: Tensor) -> bool:
    """Tell whether a tensor of any shape is in the processor's memory, and nobody follows it."""
    return x.is_cpu and not _DEVICE.pretended and not torch._C._len_torch_dispatch_stack()


def in_memory(x: Tensor) -> bool:
    """Tell whether a tensor of any shape is in the processor's memory, where a look is free."""
    return x.is_cpu and not _DEVICE.pretended


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """Take the branches of a GPU inside of the block, on whatever computes; for tests."""
    before, _DEVICE.pretended = _DEVICE.pretended, True
    try:
        yield
    finally:
        _DEVICE.pretended = before
