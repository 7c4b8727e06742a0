"""In which mode an emulator runs its module, thread by thread.

As with ``torch.no_grad``, a mode belongs to the thread that entered it. Threads of autograd's
engine have none of their own: where activation checkpointing calls forwards in them again, the mode
is that of the thread that called the backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import enumerate as enumerate_threads
from threading import get_ident
from typing import Literal

import torch

Fidelity = Literal["exact", "fast"]
Phase = Literal["float", "observe", "emulate"]


@dataclass(frozen=True)
class Mode:
    """A way to run a module.

    Args:
        phase: In float, in float with its ranges observed, or emulated.
        fidelity: Of the emulation.
    """

    phase: Phase = "float"
    fidelity: Fidelity = "exact"


class Modes:
    """The mode of every thread; float where a thread has entered none.

    Args:
        fidelity: Of modes that do not say any.

    Example:
        >>> modes = Modes("exact")
        >>> modes.set(Mode("observe"))
        >>> modes.current.phase
        'observe'
    """

    def __init__(self, fidelity: Fidelity) -> None:
        self.fidelity = fidelity
        #: Threads that are inside a backward, which may call forwards again.
        self.in_backward: list[int] = []
        self._by_thread: dict[int, Mode] = {}

    @property
    def idle(self) -> bool:
        """Tell whether no thread has entered a mode."""
        return not self._by_thread

    @property
    def current(self) -> Mode:
        """The mode of this thread.

        Raises:
            RuntimeError: In a thread of autograd's engine, if backwards of several modes run.
        """
        if not self._by_thread:
            return Mode("float", self.fidelity)
        mode = self._by_thread.get(get_ident())
        if mode is not None:
            return mode
        if torch._C._current_graph_task_id() != -1:
            return self._of_backward()
        return Mode("float", self.fidelity)

    @property
    def phase(self) -> Phase:
        """The phase of this thread; asked for with every torch function."""
        if not self._by_thread:
            return "float"
        mode = self._by_thread.get(get_ident())
        return self.current.phase if mode is None else mode.phase

    def set(self, mode: Mode | None) -> Mode | None:
        """Let this thread have a mode; None for no mode of its own.

        Returns:
            What it had before.
        """
        before = self._by_thread.pop(get_ident(), None)
        if mode is not None:
            self._by_thread[get_ident()] = mode
        return before

    def others_run(self) -> bool:
        """Tell whether another thread has entered a mode."""
        alive = {thread.ident for thread in enumerate_threads()} - {get_ident()}
        return any(thread in alive for thread in list(self._by_thread))

    def _of_backward(self) -> Mode:
        """The mode of the thread whose backward called this thread of autograd's engine."""
        threads = list(self.in_backward) or list(self._by_thread)
        modes = {self._by_thread.get(thread, Mode("float", self.fidelity)) for thread in threads}
        if len(modes) > 1:
            raise RuntimeError(
                "several threads run backwards of one emulated module in different modes, and "
                "activation checkpointing cannot tell which of them calls this forward: run them "
                "one after the other, or emulate a copy of the module in each thread"
            )
        return modes.pop()
