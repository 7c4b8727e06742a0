"""Take over the command of the process that started this one, and end with it."""

from __future__ import annotations

import os
import select
import shlex
import signal
import sys
import threading

#: Variable with the command of a sweep; the processes that it starts inherit it.
COMMAND = "LIGHTNING_NNA_COMMAND"


def command_line() -> str:
    """Return the command of this process, as one types it; in a worker that of the whole sweep."""
    if (command := os.environ.get(COMMAND)) is not None:
        return command
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name] if spec is not None else sys.argv[:1]
    return shlex.join(["python", *program, *sys.argv[1:]])


def end_with(process: int) -> None:
    """Kill this process as soon as another one has ended, even if that was killed.

    A worker of a study, a run of a sweep, or the second process of a run works for the one that has
    started it: it would go on for hours beside the same command started again. Nothing is asked of
    this process, which may wait for others. Runs are made to be killed anywhere.

    Args:
        process: Id of the process; its parent on this machine.
    """
    if sys.platform != "linux":  # Other systems do not tell of the end of another process.
        return
    try:
        end = os.pidfd_open(process)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return

    def wait() -> None:
        poll = select.poll()
        poll.register(end, select.POLLIN)
        poll.poll()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="end with parent").start()
