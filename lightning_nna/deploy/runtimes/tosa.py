"""TOSA: the specification of the operators of NPUs, by Arm's reference model of it.

A program is converted by Arm's converter for .tflite files; what that has no form for cannot run.
Its packages ask for a NumPy that is not ours: a worker in an environment of its own, one for each
process of ours, converts and runs, see :mod:`.environment`.

Reference:
    TOSA, the Tensor Operator Set Architecture; packages ``tosa-tools`` and
    ``tosa-converter-for-tflite``.
"""

from __future__ import annotations

import atexit
import os
import pickle
import re
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_nna.deploy.runtimes.environment import COMMAND, python_of, versions
from lightning_nna.deploy.runtimes.interface import (
    MissingRuntimeError,
    Tensors,
    UnsupportedProgramError,
)

_PACKAGES = ("tosa-tools", "tosa-converter-for-tflite")
# What the model says of the debugger that it does not find.
_NOISE = re.compile("Backtrace generation|Attaching debugger|Caught signal")
_WORKER = Path(__file__).with_name("tosa_worker.py")


class TOSA:
    """TOSA's reference model in a process of its own.

    Example:
        >>> TOSA().name
        'tosa'
    """

    name = "tosa"
    title = "TOSA's reference model"

    def version(self) -> str:
        """Return the versions of its packages.

        Raises:
            MissingRuntimeError: If its environment was not made.
        """
        _python()
        return versions(self.name, _PACKAGES)

    def load(self, contents: bytes) -> LoadedTOSA:
        """Convert a program, see :meth:`.Runtime.load`."""
        return LoadedTOSA(converted(contents))


class LoadedTOSA:
    """A converted program, see :class:`.LoadedProgram`.

    Args:
        contents: Bytes of a .tosa file, which has no variables.
    """

    def __init__(self, contents: bytes) -> None:
        self.contents = contents

    def run(
        self, calls: Sequence[Tensors], *, keep_state: bool = False
    ) -> list[list[NDArray[Any]]]:
        """Run once for each element of ``calls``, see :meth:`.LoadedProgram.run`."""
        packed = [[(x.dtype.str, x.shape, x.tobytes()) for x in inputs] for inputs in calls]
        kind, outputs = _ask("run", self.contents, packed)
        if kind != "outputs":
            raise UnsupportedProgramError(
                f"TOSA's reference model cannot run the program: {outputs}"
            )
        return [
            [np.frombuffer(data, dtype).reshape(shape).copy() for dtype, shape, data in each]
            for each in outputs
        ]


def converted(contents: bytes) -> bytes:
    """Convert a program to a .tosa file.

    Args:
        contents: Bytes of a .tflite file.

    Raises:
        MissingRuntimeError: If the environment of the runtime was not made.
        UnsupportedProgramError: If an operator of the program has no form in TOSA.
    """
    kind, result = _ask("convert", contents)
    if kind == "left":
        names = ", ".join(name.upper() for name in result)
        raise UnsupportedProgramError(f"the converter has no form in TOSA for {names}")
    if kind != "tosa":
        raise UnsupportedProgramError(f"the program cannot be converted to TOSA: {result}")
    assert isinstance(result, bytes)
    return result


def _ask(*request: Any) -> tuple[str, Any]:
    """Send a request to the worker, a new one if the last has died, and return its answer."""
    with _LOCK:
        worker = _worker(os.getpid())
        answer = worker.ask(request)
        if not worker.alive:
            _worker.cache_clear()
    return answer


_LOCK = threading.Lock()


@lru_cache(maxsize=1)
def _worker(process: int) -> _Worker:
    """Return the worker of this process; a forked one needs its own."""
    return _Worker(_python())


class _Worker:
    """A process of ``tosa_worker.py``."""

    def __init__(self, python: Path) -> None:
        self._said = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, "-I", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            # Without a path the model finds no debugger, which it would ask about every error.
            env={**os.environ, "PATH": ""},
        )
        self.alive = True
        atexit.register(self.close)

    def ask(self, request: Any) -> tuple[str, Any]:
        """Return the answer to a request; one that failed has the words of the tools."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._said.seek(0)
        self._said.truncate()
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            kind, result = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            kind, result = "failed", f"the process ended with {self._process.wait()}"
        if kind == "failed":
            self._said.seek(0)
            lines = self._said.read().decode("utf-8", "replace").splitlines()
            said = " ".join(" ".join(line for line in lines if not _NOISE.search(line)).split())
            result = f"{said} ({result})" if said else result
        if self._process.returncode is not None:
            self.close()
        return kind, result

    def close(self) -> None:
        """End the process, which holds nothing that is needed later."""
        if not self.alive:
            return
        self.alive = False
        atexit.unregister(self.close)
        self._process.terminate()
        # Closes both pipes. What a dead process has not read is lost.
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._said.close()


def _python() -> Path:
    python = python_of("tosa")
    if python is None:
        raise MissingRuntimeError(
            f"TOSA's reference model is not installed: run {COMMAND}", name="tosa-tools"
        )
    return python
