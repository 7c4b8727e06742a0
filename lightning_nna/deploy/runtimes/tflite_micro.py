"""TFLite-Micro: the interpreter of microcontrollers, and of the host of an Ethos-U.

Its package runs the reference kernels on this computer; those of CMSIS-NN, which microcontrollers
have, promise the same integers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lightning_nna.deploy.runtimes.interface import (
    MissingRuntimeError,
    Tensors,
    UnsupportedProgramError,
)

_PACKAGE = "tflite-micro"
# Memory that is not touched costs nothing.
_LEAST_ARENA = 64 * 2**20
_ARENA_PER_BYTE = 16
# Of the arena and of what is in it.
_ALIGNMENT = 16
_LEAST_STEP = 1024
_MOST_STEPS = 64
# Prints every size that it tries, and "runs" after the first that is enough.
_TRIAL = """
import sys
import numpy as np
from tflite_micro.python.tflite_micro import runtime
contents = open(sys.argv[1], "rb").read()
inputs = runtime.schema_fb.Model.GetRootAs(contents).Subgraphs(0).InputsLength()
for size in map(int, sys.argv[2:]):
    print(size, flush=True)
    try:
        interpreter = runtime.Interpreter.from_bytes(contents, arena_size=size)
        for index in range(inputs):  # What is not set is any index of a table.
            form = interpreter.get_input_details(index)
            interpreter.set_input(np.zeros(form["shape"], form["dtype"]), index)
        interpreter.invoke()
    except RuntimeError:
        continue
    print("runs")
    break
"""
_ALLOCATION = re.compile(r"Arena allocation total (\d+) bytes")


class TFLiteMicro:
    """TFLite-Micro in this process.

    Example:
        >>> TFLiteMicro().name
        'tflm'
    """

    name = "tflm"
    title = "TFLite-Micro"

    def version(self) -> str:
        """Return the version of the installed package.

        Raises:
            MissingRuntimeError: If it is not installed.
        """
        try:
            return version(_PACKAGE)
        except PackageNotFoundError as error:
            raise _missing() from error

    def load(self, contents: bytes) -> LoadedTFLiteMicro:
        """Load a program, see :meth:`.Runtime.load`."""
        return LoadedTFLiteMicro(contents)


class LoadedTFLiteMicro:
    """A program in an interpreter, see :class:`.LoadedProgram`.

    Args:
        contents: Bytes of a .tflite file.
        arena_bytes: Bytes of its working memory; None for more than programs take.
    """

    def __init__(self, contents: bytes, *, arena_bytes: int | None = None) -> None:
        try:
            from tflite_micro.python.tflite_micro import runtime
        except ImportError as error:
            raise _missing() from error
        arena = arena_bytes or max(_LEAST_ARENA, _ARENA_PER_BYTE * len(contents))
        with _explained("cannot load the program"):
            self._interpreter = runtime.Interpreter.from_bytes(contents, arena_size=arena)
        model = runtime.schema_fb.Model.GetRootAs(contents)
        graph = model.Subgraphs(0)
        self._inputs, self._outputs = graph.InputsLength(), graph.OutputsLength()

    def run(
        self, calls: Sequence[Tensors], *, keep_state: bool = False
    ) -> list[list[NDArray[Any]]]:
        """Run once for each element of ``calls``, see :meth:`.LoadedProgram.run`."""
        for inputs in calls:
            if len(inputs) != self._inputs:
                raise ValueError(f"the program has {self._inputs} inputs, got {len(inputs)}")
        results = []
        with _explained("cannot run the program"):
            for number, inputs in enumerate(calls):
                if not (keep_state and number):
                    self._interpreter.reset()
                for index, values in enumerate(inputs):
                    # Another function of NumPy would make one axis of none.
                    self._interpreter.set_input(np.asarray(values, order="C"), index)
                self._interpreter.invoke()
                outputs = (self._interpreter.get_output(index) for index in range(self._outputs))
                results.append([np.array(each) for each in outputs])
        return results

    def arena_bytes(self) -> int:
        """Return the bytes of working memory that are in use after a run."""
        with _stderr() as written:
            self._interpreter.print_allocations()
            allocation = _ALLOCATION.search(_read(written))
        assert allocation is not None
        return int(allocation[1])


def sufficient_arena_bytes(contents: bytes, used_bytes: int) -> int:
    """Return the bytes of an arena in which a program is allocated and runs.

    It may be larger than what is used after a run: while TFLite-Micro plans the tensors, its plan
    is in the arena, too. Sizes are tried from the used one on, in steps of a kilobyte or of a
    sixteenth of it, in a process of their own: an arena that is too small may end it.

    Args:
        contents: Bytes of a .tflite file that runs.
        used_bytes: Bytes in use after a run, see :meth:`LoadedTFLiteMicro.arena_bytes`.

    Raises:
        UnsupportedProgramError: If the program runs in none of these arenas.
    """
    step = max(_LEAST_STEP, used_bytes // _ARENA_PER_BYTE)
    sizes = [_aligned(used_bytes + k * step) for k in range(_MOST_STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.tflite"
        path.write_bytes(contents)
        while sizes:
            command = [sys.executable, "-c", _TRIAL, str(path), *map(str, sizes)]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            tried = ended.stdout.split()
            if tried and tried[-1] == "runs":
                return int(tried[-2])
            sizes = sizes[max(1, len(tried)) :]
    raise UnsupportedProgramError(
        f"TFLite-Micro runs the program in a large arena, and in none of up to "
        f"{used_bytes + _MOST_STEPS * step} bytes: {ended.stderr.strip()[-200:]}"
    )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _missing() -> MissingRuntimeError:
    return MissingRuntimeError(
        "TFLite-Micro is not installed: pip install 'lightning-nna[deploy]'; its package is built "
        "for Linux on x86-64 alone. Elsewhere, programs of a preset of LiteRT (litert-int8) can be "
        "verified",
        name=_PACKAGE,
    )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raise an error with what the interpreter says on the standard error stream."""
    with _stderr() as written:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            said = " ".join(_read(written).split()) or str(error)
            raise UnsupportedProgramError(f"TFLite-Micro {what}: {said}") from error


@contextmanager
def _stderr() -> Iterator[IO[bytes]]:
    """Lead what C++ code writes to the standard error stream into a file."""
    sys.stderr.flush()
    stream = os.dup(2)
    # A file in memory: a program of a few microseconds is called often.
    with open(os.memfd_create("stderr"), "w+b") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(stream, 2)
            os.close(stream)


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")
