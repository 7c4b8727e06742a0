"""Disable ``torch.compile`` while emulating: the dispatch cannot see functions of compiled code."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

import torch

_HIDDEN = (
    "compiled code calls an emulated module, whose operators the emulation cannot see: call it "
    "inside `with emulate(module)`, where torch.compile is disabled, or call strip(module)"
)


class CompilationDisabled:
    """Disable ``torch.compile`` in the whole process while any thread dispatches."""

    def __init__(self) -> None:
        self._entered = 0
        self._lock = threading.Lock()
        self._stance: AbstractContextManager[None] | None = None

    def enter(self) -> None:
        """Disable compilation; calls nest.

        Raises:
            RuntimeError: If compiled code is running already.
        """
        with self._lock:
            if self._entered == 0:
                self._stance = _without_compiling()
            self._entered += 1

    def leave(self) -> None:
        """Undo one :meth:`enter`."""
        with self._lock:
            self._entered -= 1
            if self._entered == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)


#: State of the whole process.
COMPILATION_DISABLED = CompilationDisabled()


def _without_compiling() -> AbstractContextManager[None]:
    """Disable ``torch.compile`` until the returned context is exited."""
    require_untraced()
    try:
        return torch.compiler.set_stance("force_eager")
    except RuntimeError as error:
        raise RuntimeError(_HIDDEN) from error


def require_untraced() -> None:
    """Raise if ``torch.compile`` traces the caller, since it cannot trace the emulation.

    Raises:
        RuntimeError: If compiled code is traced.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(_HIDDEN)
