"""``torch.compile`` set aside: compiled code would hide its functions from the dispatch."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

import torch

_HIDDEN = (
    "compiled code calls an emulated module, whose operators it would hide: call it "
    "inside `with emulate(module)`, where torch.compile is set aside, or strip(module)"
)


class CompilingSetAside:
    """Sets ``torch.compile`` aside in the whole process, as long as any thread intercepts."""

    def __init__(self) -> None:
        self._entered = 0
        self._lock = threading.Lock()
        self._stance: AbstractContextManager[None] | None = None

    def enter(self) -> None:
        """Set it aside.

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


#: One for the whole process.
COMPILING = CompilingSetAside()


def _without_compiling() -> AbstractContextManager[None]:
    """Set ``torch.compile`` aside until the result is exited."""
    require_untraced()
    try:
        return torch.compiler.set_stance("force_eager")
    except RuntimeError as error:
        raise RuntimeError(_HIDDEN) from error


def require_untraced() -> None:
    """Raise where ``torch.compile`` traces the caller, which could not see through the emulation.

    Raises:
        RuntimeError: If it does.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(_HIDDEN)
