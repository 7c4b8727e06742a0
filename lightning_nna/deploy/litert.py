"""Run programs on LiteRT.

The results are those of the emulated module, in every bit, on LiteRT's *reference* kernels; the
optimized ones are faster and may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from numpy.typing import NDArray
from torch.utils._pytree import tree_leaves

from lightning_nna.deploy.graph import Port, quantize
from lightning_nna.deploy.tflite import read_program
from lightning_nna.emulation.ranges import QParams


class LiteRTProgram:
    """A program of :func:`export_tflite`, loaded into LiteRT.

    Args:
        path: Path of the file.
        optimized: Whether the optimized kernels run, whose outputs may differ.
        threads: Number of threads of the optimized kernels.

    Attributes:
        spec: Name of the spec.
        inputs: Ports of the arguments.
        outputs: Ports of the results.
        fixed: Arguments that are part of the program, by position.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not one of :func:`export_tflite`, or was altered.
    """

    def __init__(self, path: str | Path, *, optimized: bool = False, threads: int = 1) -> None:
        program = read_program(path)
        self.spec, self.fixed = program.spec, program.fixed
        self.inputs, self.outputs = program.inputs, program.outputs
        kinds = OpResolverType
        try:
            self._interpreter = Interpreter(
                model_content=program.contents,
                experimental_op_resolver_type=kinds.AUTO if optimized else kinds.BUILTIN_REF,
                num_threads=threads,
            )
        except ValueError as error:
            if optimized or "builtin opcode 'ELU'" not in str(error):
                raise
            raise ValueError(
                f"{path} has an ELU, and LiteRT has no reference kernel of it: pass optimized=True"
            ) from error
        self._interpreter.allocate_tensors()
        details = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        self._details = {each["name"]: each for side in details for each in side}

    def __call__(self, inputs: Sequence[Any]) -> list[NDArray[Any]]:
        """Run once, from the state in the arguments, or from zero.

        Args:
            inputs: Arguments of the module, tensors or arrays in its nesting.

        Returns:
            Results that are activations, one after the other, dequantized to float32; indices that
            it computes, int32.

        Raises:
            ValueError: If an argument is missing, has another shape than in the program, or another
                value than the one that is part of the program.
        """
        arguments = [np.asarray(x) for x in tree_leaves(list(inputs))]
        for position, value in self.fixed.items():
            _validate_fixed(position, value, arguments)
        self._interpreter.reset_all_variables()
        for port in self.inputs:
            self._set(port, arguments)
        self._interpreter.invoke()
        results: dict[int, NDArray[Any]] = {}
        for port in self.outputs:
            values = self._get(port)
            flat = results.setdefault(port.position, np.empty(port.shape, values.dtype).reshape(-1))
            flat[slice(*(port.part or (None,)))] = values.reshape(-1)
        shapes = {port.position: port.shape for port in self.outputs}
        return [values.reshape(shapes[position]) for position, values in results.items()]

    def qparams_of(self, port: Port) -> QParams | None:
        """Return the quantization parameters of a port; None for plain integers and floats.

        Args:
            port: Port of an argument or a result.
        """
        detail = self._details[port.tensor]
        scale, zero_point = detail["quantization"]
        if not scale:
            return None
        limits = np.iinfo(detail["dtype"])
        return QParams(float(scale), int(zero_point), int(limits.min), int(limits.max))

    def _set(self, port: Port, arguments: Sequence[NDArray[Any]]) -> None:
        if port.position >= len(arguments):
            raise ValueError(f"argument {port.position} is missing: got {len(arguments)}")
        value, detail = arguments[port.position], self._details[port.tensor]
        if value.shape != port.shape:
            raise ValueError(
                f"argument {port.position} has shape {value.shape}, the program {port.shape}; "
                "export it for another shape"
            )
        qparams = self.qparams_of(port)
        if not np.isfinite(value).all():
            raise ValueError(f"argument {port.position} has values that are not finite")
        if qparams is not None:
            dtype = np.dtype(detail["dtype"]).name
            value = quantize(value, dtype, qparams.scale, qparams.zero_point)
        if port.part is not None:
            value = value.reshape(-1)[slice(*port.part)]
        stored = value.astype(detail["dtype"]).reshape(detail["shape"])
        self._interpreter.set_tensor(detail["index"], stored)

    def _get(self, port: Port) -> NDArray[Any]:
        qparams = self.qparams_of(port)
        integers = self._interpreter.get_tensor(self._details[port.tensor]["index"])
        if qparams is None:  # The result of an operator of the CPU.
            return np.asarray(integers)
        centered = integers.astype(np.int32) - qparams.zero_point
        return np.asarray(centered.astype(np.float32) * np.float32(qparams.scale))


def run_tflite(
    path: str | Path, inputs: Sequence[Any], *, optimized: bool = False
) -> list[NDArray[Any]]:
    """Run a program of :func:`export_tflite` once; see :class:`LiteRTProgram`.

    Args:
        path: Path of the file.
        inputs: Arguments of the module, tensors or arrays in its nesting.
        optimized: Whether the optimized kernels run, whose outputs may differ.

    Returns:
        Results that are activations, dequantized to float32; indices that it computes, int32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not one of :func:`export_tflite`, or was altered, or an argument
            does not fit.
    """
    return LiteRTProgram(path, optimized=optimized)(inputs)


def _validate_fixed(position: int, value: Any, arguments: Sequence[NDArray[Any]]) -> None:
    """Validate that an argument has the value that the program was exported with."""
    argument = arguments[position].tolist() if position < len(arguments) else None
    if argument != value:
        raise ValueError(
            f"argument {position} is part of the program, which was exported with {value!r:.200}, "
            f"got {argument!r:.200}: export the module for these"
        )
