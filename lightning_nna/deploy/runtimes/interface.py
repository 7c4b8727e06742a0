"""What all runtimes have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

#: Integers of every input, or of every output, of one call, in the order of the program.
Tensors = Sequence[NDArray[Any]]


class MissingRuntimeError(ModuleNotFoundError):
    """A runtime is not installed; the message has the command that installs it."""


class UnsupportedProgramError(ValueError):
    """A runtime cannot run a program; the message has the runtime's own words."""


class LoadedProgram(Protocol):
    """A program that a runtime has loaded."""

    def run(
        self, calls: Sequence[Tensors], *, keep_state: bool = False
    ) -> list[list[NDArray[Any]]]:
        """Run once for each element of ``calls``.

        Args:
            calls: Integers of the inputs of each call, in the shapes and types of the program.
            keep_state: Whether the variables of the program live on from call to call; each call
                starts from their initial values otherwise.

        Returns:
            Integers of the outputs of each call.

        Raises:
            UnsupportedProgramError: If the program fails while it runs.
        """
        ...


class Runtime(Protocol):
    """Something that runs programs.

    Attributes:
        name: Name in arguments, pages and messages.
        title: Name in sentences.
    """

    name: str
    title: str

    def version(self) -> str:
        """Return the version of the installed package.

        Raises:
            MissingRuntimeError: If it is not installed.
        """
        ...

    def load(self, contents: bytes) -> LoadedProgram:
        """Load a program.

        Args:
            contents: Bytes of a .tflite file.

        Raises:
            MissingRuntimeError: If the runtime is not installed.
            UnsupportedProgramError: If it lacks an operator of the program, or a form of one.
        """
        ...
