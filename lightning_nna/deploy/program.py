"""Run programs of :func:`.export_tflite` from the module's own arguments.

The results are those of the emulated module, in every bit, on the runtime that its spec names;
other runtimes have other kernels and may differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_nna.deploy.graph import Port, quantize
from lightning_nna.deploy.runtimes import Runtime, runtime_of
from lightning_nna.deploy.tflite import ProgramFile, StoredTensor, read_program
from lightning_nna.emulation.ranges import QParams

# Of all inputs and outputs of the calls whose numbers are converted together.
_ELEMENTS_AT_ONCE = 1 << 20


class ProgramPorts:
    """The entries and exits of a program: from the module's arguments to integers, and back.

    Args:
        program: Contents of a program's file.

    Attributes:
        spec: Name of the spec.
        inputs: Ports of the arguments.
        outputs: Ports of the results.
        fixed: Arguments that are part of the program, by position.
    """

    def __init__(self, program: ProgramFile) -> None:
        self.spec, self.fixed = program.spec, program.fixed
        self.inputs, self.outputs = program.inputs, program.outputs
        self._entries, self._exits = program.input_tensors, program.output_tensors
        self._tensors = {each.name: each for each in (*self._entries, *self._exits)}

    def qparams_of(self, port: Port) -> QParams | None:
        """Return the quantization parameters of a port; None for plain integers and floats.

        Args:
            port: Port of an argument or a result.
        """
        return self._tensors[port.tensor].qparams

    def dtype_of(self, port: Port) -> str:
        """Return the type of a port's result in the module: float32 if it is quantized.

        Args:
            port: Port of a result.
        """
        tensor = self._tensors[port.tensor]
        return tensor.dtype if tensor.qparams is None else "float32"

    def integers_of(self, inputs: Sequence[Any]) -> list[NDArray[Any]]:
        """Quantize arguments to the integers of the program's inputs, in its order.

        Args:
            inputs: Arguments of the module, tensors or arrays in its nesting.

        Raises:
            ValueError: If an argument is missing, has another shape than in the program, or another
                value than the one that is part of the program.
        """
        return self.integers_of_calls([inputs])[0]

    def integers_of_calls(self, calls: Sequence[Sequence[Any]]) -> list[list[NDArray[Any]]]:
        """Quantize the arguments of several calls at once; see :meth:`integers_of`.

        Args:
            calls: Arguments of each call.

        Raises:
            TypeError: If a tensor stands in place of the list of arguments.
            ValueError: See :meth:`integers_of`.
        """
        for inputs in calls:
            if isinstance(inputs, (Tensor, np.ndarray)):
                raise TypeError(
                    f"the inputs of a program are a list of the module's arguments, got a "
                    f"{type(inputs).__name__}: pass [x]"
                )
        arguments = [[np.asarray(x) for x in tree_leaves(list(inputs))] for inputs in calls]
        for each in arguments:
            for position, value in self.fixed.items():
                _validate_fixed(position, value, each)
        by_tensor = {
            port.tensor: _quantized(port, self._tensors[port.tensor], arguments)
            for port in self.inputs
        }
        inputs = [by_tensor[each.name] for each in self._entries]
        return [[values[number] for values in inputs] for number in range(len(calls))]

    def results_of(self, outputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Dequantize the program's outputs, and join the parts of each result.

        Args:
            outputs: Integers of the program's outputs, in its order.
        """
        return self.results_of_calls([outputs])[0]

    def results_of_calls(self, calls: Sequence[Sequence[NDArray[Any]]]) -> list[list[NDArray[Any]]]:
        """Dequantize the outputs of several calls at once; see :meth:`results_of`.

        Args:
            calls: Integers of the program's outputs in each call.
        """
        count = len(calls)
        by_tensor = {
            each.name: np.stack(outputs)
            for each, outputs in zip(self._exits, zip(*calls, strict=True), strict=True)
        }
        results: dict[int, NDArray[Any]] = {}
        for port in self.outputs:
            values = _dequantized(by_tensor[port.tensor], self.qparams_of(port))
            if port.order is not None:
                ordered = values.reshape(count, *(port.shape[axis] for axis in port.order))
                values = ordered.transpose(0, *(np.argsort(port.order) + 1))
            empty = np.empty((count, prod(port.shape)), values.dtype)
            flat = results.setdefault(port.position, empty)
            flat[:, slice(*(port.part or (None,)))] = values.reshape(count, -1)
        shapes = {port.position: port.shape for port in self.outputs}
        shaped = [values.reshape(count, *shapes[position]) for position, values in results.items()]
        return [[values[number] for values in shaped] for number in range(count)]

    def output_integers_of(self, results: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Return the integers of the program's outputs that stand for results of the module.

        Args:
            results: Results of the emulated module that are the program's, see :class:`Program`:
                multiples of their scales.
        """
        positions = list(dict.fromkeys(port.position for port in self.outputs))
        by_position = dict(zip(positions, results, strict=True))
        by_tensor = {}
        for port in self.outputs:
            tensor, qparams = self._tensors[port.tensor], self.qparams_of(port)
            values = by_position[port.position].reshape(-1)[slice(*(port.part or (None,)))]
            if port.order is not None:
                values = values.reshape(port.shape).transpose(port.order)
            if qparams is not None:
                values = np.rint(values.astype(np.float64) / qparams.scale) + qparams.zero_point
            by_tensor[port.tensor] = values.astype(tensor.dtype).reshape(tensor.shape)
        return [by_tensor[each.name] for each in self._exits]


class Program(ProgramPorts):
    """A program of :func:`.export_tflite`, loaded into a runtime.

    Args:
        path: Path of the file.
        runtime: Name of a runtime, see :func:`.runtime_of`, or the runtime; None for the one whose
            kernels the program's spec is exact for.

    Attributes:
        spec: Name of the spec.
        runtime: Runtime.
        inputs: Ports of the arguments.
        outputs: Ports of the results.
        fixed: Arguments that are part of the program, by position.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not one of :func:`.export_tflite`, or was altered, or the runtime
            cannot run it.
        MissingRuntimeError: If the runtime is not installed.
    """

    def __init__(self, path: str | Path, *, runtime: str | Runtime | None = None) -> None:
        program = read_program(path)
        super().__init__(program)
        name = program.runtime if runtime is None else runtime
        self.runtime = runtime_of(name) if isinstance(name, str) else name
        self._loaded = self.runtime.load(program.contents)

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
        return self.run_all([inputs])[0]

    def run_all(self, calls: Sequence[Sequence[Any]]) -> list[list[NDArray[Any]]]:
        """Run once for each set of arguments, each from the state in them, or from zero.

        A program has the batch of its example, which is 1 for a streaming one, and a runtime calls
        it once for each set of arguments; what is done for all of them at once is to quantize and
        to dequantize. A runtime in a process of its own is started once for all of them.

        Args:
            calls: Arguments of each run, see :meth:`__call__`.

        Returns:
            Results of each run, see :meth:`__call__`.

        Raises:
            ValueError: See :meth:`__call__`.
        """
        integers = [each for group in self._groups(calls) for each in self.integers_of_calls(group)]
        outputs = self._loaded.run(integers)
        return [each for group in self._groups(outputs) for each in self.results_of_calls(group)]

    def _groups(self, calls: Sequence[Sequence[Any]]) -> Iterator[Sequence[Sequence[Any]]]:
        """Yield calls whose numbers are converted at once, as many as take some megabytes."""
        elements = sum(prod(port.shape) for port in (*self.inputs, *self.outputs))
        size = max(1, _ELEMENTS_AT_ONCE // max(1, elements))
        for start in range(0, len(calls), size):
            yield calls[start : start + size]


def run_tflite(
    path: str | Path, inputs: Sequence[Any], *, runtime: str | Runtime | None = None
) -> list[NDArray[Any]]:
    """Run a program of :func:`.export_tflite` once; see :class:`Program`.

    Args:
        path: Path of the file.
        inputs: Arguments of the module, tensors or arrays in its nesting.
        runtime: Name of a runtime, see :func:`.runtime_of`, or the runtime; None for the one whose
            kernels the program's spec is exact for.

    Returns:
        Results that are activations, dequantized to float32; indices that it computes, int32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not one of :func:`.export_tflite`, or was altered, an argument
            does not fit, or the runtime cannot run it.
        MissingRuntimeError: If the runtime is not installed.
    """
    return Program(path, runtime=runtime)(inputs)


def _quantized(
    port: Port, tensor: StoredTensor, calls: Sequence[Sequence[NDArray[Any]]]
) -> NDArray[Any]:
    """Quantize the argument of a port in each call, in the shape and type of the program's tensor.

    Returns:
        Integers, shape ``(calls, *shape of the tensor)``.
    """
    for arguments in calls:
        if port.position >= len(arguments):
            raise ValueError(f"argument {port.position} is missing: got {len(arguments)}")
        shape = arguments[port.position].shape
        if shape != port.shape:
            raise ValueError(
                f"argument {port.position} has shape {shape}, the program {port.shape}; "
                "export it for another shape"
            )
    value, qparams = np.stack([each[port.position] for each in calls]), tensor.qparams
    if not np.isfinite(value).all():
        raise ValueError(f"argument {port.position} has values that are not finite")
    if qparams is not None:
        value = quantize(value, tensor.dtype, qparams.scale, qparams.zero_point)
    if port.part is not None:
        value = value.reshape(len(calls), -1)[:, slice(*port.part)]
    if port.order is not None:
        value = value.transpose(0, *(axis + 1 for axis in port.order))
    return value.astype(tensor.dtype, order="C").reshape(len(calls), *tensor.shape)


def _dequantized(integers: NDArray[Any], qparams: QParams | None) -> NDArray[Any]:
    if qparams is None:  # The result of an operator of the CPU.
        return np.asarray(integers)
    centered = integers.astype(np.int32) - qparams.zero_point
    return np.asarray(centered.astype(np.float32) * np.float32(qparams.scale))


def _validate_fixed(position: int, value: Any, arguments: Sequence[NDArray[Any]]) -> None:
    """Validate that an argument has the value that the program was exported with."""
    argument = arguments[position].tolist() if position < len(arguments) else None
    if argument != value:
        raise ValueError(
            f"argument {position} is part of the program, which was exported with {value!r:.200}, "
            f"got {argument!r:.200}: export the module for these"
        )
