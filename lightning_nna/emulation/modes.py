"""The mode in which each thread runs a module.

As with ``torch.no_grad``, a mode belongs to the thread that entered it. Threads of autograd's
engine enter none: if activation checkpointing runs forwards in them, the mode is that of the thread
that called the backward.
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
#: What becomes of a call: an operator of the accelerator; a data-movement operator; a constant of
#: the program, because no activation is among its operands; or a fallback, in float on the CPU.
Treatment = Literal["emulated", "layout", "constant", "fallback"]


@dataclass(frozen=True, eq=False)
class SiteCall:
    """Describe one call of a site to a listener.

    Args:
        key: Key of the site.
        where: What becomes of the call.
        function: PyTorch's own name of the function, as ``"torch.nn.functional.hardtanh"``.
        source: File and line of the code that calls it, as ``"model.py:12"``.
        remedy: For a fallback, what to write instead; empty if nothing is known.
        operands: Positional and keyword arguments.
        result: Result of the call.
    """

    key: str
    where: Treatment
    function: str
    source: str
    remedy: str
    operands: Any
    result: Any


#: Receives every call of a site.
Listener = Callable[[SiteCall], None]
#: Receives every instruction that runs in exact fidelity.
Recorder = Callable[[Instruction], None]


@dataclass(frozen=True, eq=False)
class Mode:
    """Describe how a module runs.

    Args:
        phase: ``"float"``, ``"observe"`` (in float, with ranges observed) or ``"emulate"``.
        fidelity: ``"exact"``, or ``"fast"`` for float rounding in the requantization to 8 bits.
        telemetry: Receiver of the metrics of every site, or None.
        recorder: Receiver of every instruction, or None.
        listener: Receiver of every site, or None.
    """

    phase: Phase = "float"
    fidelity: Fidelity = "exact"
    telemetry: Telemetry | None = None
    recorder: Recorder | None = None
    listener: Listener | None = None


_FLOAT = Mode()


class Modes:
    """Hold the mode of every thread; a thread that has entered none runs in float.

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
        """Mode of this thread; read with every torch function, so it must be fast.

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
        """Set the mode of this thread.

        Args:
            mode: Mode of the thread from now on; None for none of its own.

        Returns:
            The mode that the thread had before.
        """
        before = self._by_thread.pop(get_ident(), None)
        if mode is not None:
            self._by_thread[get_ident()] = mode
        return before

    def others_run(self) -> bool:
        """Tell whether a living thread other than this one has entered a mode."""
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
