"""Disable autocast and function modes in the emulated arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def float32_arithmetic(x: Tensor) -> AbstractContextManager[None]:
    """Disable autocast and function modes in a ``with`` block.

    Args:
        x: Tensor of any shape on the device of the arithmetic.
    """
    return _Float32Arithmetic(x)


class _Float32Arithmetic(AbstractContextManager[None]):
    """Enter and exit without a generator, which would take twice the time for every instruction."""

    __slots__ = ("cast", "functions", "kind")

    def __init__(self, x: Tensor) -> None:
        self.kind = x.device.type
        self.functions = torch._C.DisableTorchFunction()
        self.cast: torch.autocast | None = None

    def __enter__(self) -> None:
        self.functions.__enter__()
        if torch.is_autocast_enabled(self.kind):
            self.cast = torch.autocast(self.kind, enabled=False)
            self.cast.__enter__()

    def __exit__(self, *exception: Any) -> None:
        if self.cast is not None:
            self.cast.__exit__(*exception)
        self.functions.__exit__(*exception)
