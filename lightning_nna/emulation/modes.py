"""The mode in which a module runs, thread by thread.

As with ``torch.no_grad``, a mode belongs to the thread that entered it. Threads of autograd's
engine have none of their own: where activation checkpointing calls forwards in them again, the mode
is that of the thread that called the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import enumerate as enumerate_threads
from threading import get_ident
from typing import Any, Literal

import torch

from lightning_nna.emulation.program import Instruction
from lightning_nna.emulation.telemetry import Telemetry

Fidelity = Literal["exact", "fast"]
FIDELITIES: tuple[Fidelity, ...] = ("exact", "fast")
Phase = Literal["float", "observe", "emulate"]
#: Where a site runs: on the accelerator, on the CPU, or nowhere, being a constant of the program.
Location = Literal["chip", "cpu", "constant"]
#: Receives the key of a site, where it runs, its operands and its result.
Listener = Callable[[str, Location, Any, Any], None]
#: Receives every instruction that runs in exact fidelity.
Recorder = Callable[[Instruction], None]


@dataclass(frozen=True, eq=False)
class Mode:
    """A way to run a module.

    Args:
        phase: In float, in float with its ranges observed, or emulated.
        fidelity: Fidelity of the emulation.
        telemetry: Receives the metrics of every site; None for none.
        recorder: Receives every instruction; None for nobody.
        listener: Receives every site; None for nobody.
    """

    phase: Phase = "float"
    fidelity: Fidelity = "exact"
    telemetry: Telemetry | None = None
    recorder: Recorder | None = None
    listener: Listener | None = None


_FLOAT = Mode()


class Modes:
    """The mode of every thread; float where a thread has entered none.

    Example:
        >>> modes = Modes()
        >>> outer = modes.enter(Mode("observe"))
        >>> modes.current.phase
        'observe'
        >>> _ = modes.enter(outer)
        >>> modes.current.phase
        'float'
    """

    def __init__(self) -> None:
        #: Threads that are inside a backward, which may call forwards again.
        self.in_backward: list[int] = []
        self._by_thread: dict[int, Mode] = {}

    @property
    def idle(self) -> bool:
        """Tell whether no thread has entered a mode."""
        return not self._by_thread

    @property
    def current(self) -> Mode:
        """The mode of this thread; asked for with every torch function.

        Raises:
            RuntimeError: In a thread of autograd's engine, if backwards of several modes run.
        """
        if not self._by_thread:
            return _FLOAT
        mode = self._by_thread.get(get_ident())
        if mode is not None:
            return mode
        if torch._C._current_graph_task_id() != -1:
            return self._of_backward()
        return _FLOAT

    def enter(self, mode: Mode | None) -> Mode | None:
        """Let this thread have a mode; None for no mode of its own.

        Returns:
            The mode that it had before.
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
        """Return the mode of the thread whose backward called this thread of autograd's engine."""
        threads = list(self.in_backward) or list(self._by_thread)
        modes = [self._by_thread.get(thread, _FLOAT) for thread in threads]
        if len({(mode.phase, mode.fidelity) for mode in modes}) > 1:
            raise RuntimeError(
                "several threads run backwards of one emulated module in different modes, and "
                "activation checkpointing cannot tell which of them calls this forward: run them "
                "one after the other, or emulate a copy of the module in each thread"
            )
        return modes[0]
