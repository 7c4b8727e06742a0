"""LiteRT: TensorFlow Lite's interpreter, with its reference kernels or faster ones."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal

from ai_edge_litert.interpreter import Interpreter, OpResolverType
from numpy.typing import NDArray

from lightning_nna.deploy.runtimes.interface import Tensors, UnsupportedProgramError

_KERNELS = {
    "reference": ("litert", OpResolverType.BUILTIN_REF),
    "optimized": ("litert-optimized", OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES),
    # What an application gets unless it asks for other kernels.
    "XNNPACK": ("litert-xnnpack", OpResolverType.AUTO),
}


class LiteRT:
    """LiteRT in this process.

    Args:
        kernels: ``"reference"``; ``"optimized"`` for the faster ones of its own, whose outputs may
            differ; or ``"XNNPACK"`` for the fastest, whose outputs may depend on the processor.
        threads: Number of threads of the faster kernels.

    Example:
        >>> LiteRT("optimized").name
        'litert-optimized'
    """

    def __init__(
        self, kernels: Literal["reference", "optimized", "XNNPACK"] = "reference", threads: int = 1
    ) -> None:
        self.name, self._resolver = _KERNELS[kernels]
        self.threads, self.title = threads, f"LiteRT, {kernels} kernels"

    def version(self) -> str:
        """Return the version of the installed package."""
        return version("ai-edge-litert")

    def load(self, contents: bytes) -> LoadedLiteRT:
        """Load a program, see :meth:`.Runtime.load`."""
        try:
            interpreter = Interpreter(
                model_content=contents,
                experimental_op_resolver_type=self._resolver,
                num_threads=self.threads,
            )
        except ValueError as error:
            if self.name != "litert" or "builtin opcode 'ELU'" not in str(error):
                raise UnsupportedProgramError(f"{self.title}: {error}") from error
            raise UnsupportedProgramError(
                "the program has an ELU, and LiteRT has no reference kernel of it: pass "
                "runtime='litert-optimized'"
            ) from error
        try:
            interpreter.allocate_tensors()
        except RuntimeError as error:
            raise UnsupportedProgramError(f"{self.title}: {error}") from error
        return LoadedLiteRT(interpreter, self.title)


class LoadedLiteRT:
    """A program in an interpreter, see :class:`.LoadedProgram`."""

    def __init__(self, interpreter: Interpreter, title: str) -> None:
        self._interpreter, self._title = interpreter, title
        self._inputs = [detail["index"] for detail in interpreter.get_input_details()]
        self._outputs = [detail["index"] for detail in interpreter.get_output_details()]

    def run(
        self, calls: Sequence[Tensors], *, keep_state: bool = False
    ) -> list[list[NDArray[Any]]]:
        """Run once for each element of ``calls``, see :meth:`.LoadedProgram.run`."""
        results = []
        for number, inputs in enumerate(calls):
            if not (keep_state and number):
                self._interpreter.reset_all_variables()
            for index, values in zip(self._inputs, inputs, strict=True):
                self._interpreter.set_tensor(index, values)
            try:
                self._interpreter.invoke()
            except RuntimeError as error:
                raise UnsupportedProgramError(f"{self._title}: {error}") from error
            results.append([self._interpreter.get_tensor(index) for index in self._outputs])
        return results
