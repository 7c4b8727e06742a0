"""Export an emulated module as a .tflite file, and run it with LiteRT.

The file is fully integer and has, in addition to the program, the ports that are needed to call it
from floats: the tensor of each argument and result. Its results are those of the emulated module,
in every bit, on LiteRT's *reference* kernels; the optimized ones are faster and may differ.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_nna.deploy.capture import capture, emulator_of, forward_of, on_chip
from lightning_nna.deploy.flatbuffer import build_model
from lightning_nna.deploy.graph import Port, Program, dtype_of_qparams, quantize
from lightning_nna.emulation.ranges import QParams
from lightning_nna.files import whole_file
from lightning_nna.weights.read_packed import NO_DIGEST, checked, sealed

_FORMAT = "lightning-nna program 1"
_METADATA = "lightning-nna"


@dataclass(frozen=True)
class TFLiteModel:
    """A .tflite file that was exported.

    Args:
        path: Path of the file.
        size_bytes: Bytes of the file.
        weight_bytes: Bytes of all constants, each counted once.
        operators: Number of instructions of each kind, in the order in which they first run.
        inputs: Ports of the caller's arguments.
        outputs: Ports of the results.
        fixed: Positions of arguments that are part of the program.
        spec: Name of the spec.
        left_out: Positions of results that are no activations, and so are none of the program's.
    """

    path: Path
    size_bytes: int
    weight_bytes: int
    operators: Mapping[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    fixed: tuple[int, ...]
    spec: str
    left_out: tuple[int, ...] = ()

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        rest = f"; without results {self.left_out}" if self.left_out else ""
        return f"{self.path}: {self.size_bytes} bytes for {self.spec}; {counts}{rest}"


class Agreement(float):
    """Fraction of outputs that are equal in every bit; 1.0 if all are.

    Args:
        equal: Number of outputs that are equal.
        outputs: Number of outputs that were compared.
        inputs: Number of sets of inputs that they came from.
        skipped: Number of sets of random inputs on which the module itself has no finite result.

    Attributes:
        outputs: Number of outputs that were compared.
        differing: Number of outputs that differ.
        inputs: Number of sets of inputs that they came from.
        skipped: Number of sets of random inputs on which the module itself has no finite result.

    Example:
        >>> Agreement(47, 48, inputs=5)
        0.9791666666666666 of 48 outputs from 5 inputs
        >>> Agreement(48, 48, inputs=5) == 1.0
        True
    """

    outputs: int
    differing: int
    inputs: int
    skipped: int

    def __new__(cls, equal: int, outputs: int, *, inputs: int = 1, skipped: int = 0) -> Agreement:
        """Compute the fraction ``equal / outputs``."""
        self = super().__new__(cls, equal / outputs)
        self.outputs, self.differing = outputs, outputs - equal
        self.inputs, self.skipped = inputs, skipped
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        settings = {"inputs": self.inputs, "skipped": self.skipped}
        return partial(Agreement, **settings), (self.outputs - self.differing, self.outputs)

    def __repr__(self) -> str:
        text = f"{float(self)!r} of {self.outputs:,} outputs from {self.inputs} inputs"
        return f"{text}, {self.skipped} skipped" if self.skipped else text


def export_tflite(
    module: nn.Module,
    example_inputs: Sequence[Any],
    path: str | Path,
    *,
    forward: Callable[..., Any] | None = None,
    allow_cpu: bool = False,
) -> TFLiteModel:
    """Write an emulated module as a fully integer .tflite program of one shape.

    The same module and inputs give the same bytes. Tensors are named by their call sites. A
    recurrent state that is an argument becomes an input that the program overwrites, and an output
    if it is a result: the streaming form. One that starts at zero is a variable of the program.

    Args:
        module: Emulated module, calibrated.
        example_inputs: Arguments of its forward.
        path: Path of the file, which is written completely or not at all.
        forward: Function of the module and the arguments that runs it; None for its own forward.
        allow_cpu: Whether float operators that no accelerator has may be in the program and run on
            the CPU, see :func:`.capture.capture`; it is not fully integer then.

    Returns:
        Path, sizes, operators and ports of the program.

    Raises:
        CaptureError: See :func:`.capture.capture`.

    Example:
        >>> import tempfile
        >>> from lightning_nna import calibrate
        >>> net, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(8, 4)
        >>> emulator = calibrate(net, [x])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = export_tflite(net, [x], f"{folder}/net.tflite")
        ...     dict(model.operators), verify(net, model.path, [x])
        ({'FULLY_CONNECTED': 1, 'TANH': 1}, 1.0 of 120 outputs from 5 inputs)
    """
    program = capture(module, example_inputs, forward=forward, allow_cpu=allow_cpu)
    contents = program_bytes(program)
    with whole_file(Path(path)) as unfinished:
        unfinished.write_bytes(contents)
    return TFLiteModel(
        Path(path),
        len(contents),
        program.weight_bytes,
        dict(Counter(operator.name for operator in program.operators)),
        program.inputs,
        program.outputs,
        tuple(program.fixed),
        program.spec,
        program.left_out,
    )


def program_bytes(program: Program) -> bytes:
    """Return the file of a program, with a checksum of all of it."""
    notes = {
        "format": _FORMAT,
        "version": version("lightning-nna"),
        "spec": program.spec,
        "inputs": [asdict(port) for port in program.inputs],
        "outputs": [asdict(port) for port in program.outputs],
        "fixed": {str(position): value for position, value in program.fixed.items()},
        "sha256": NO_DIGEST,
    }
    contents = build_model(
        program.tensors,
        program.operators,
        [port.tensor for port in program.inputs],
        list(dict.fromkeys(port.tensor for port in program.outputs)),
        {_METADATA: json.dumps(notes).encode()},
    )
    return sealed(contents)


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
        contents = checked(Path(path))
        notes = _notes(contents, path)
        self.spec = str(notes["spec"])
        self.inputs = tuple(_port(entry) for entry in notes["inputs"])
        self.outputs = tuple(_port(entry) for entry in notes["outputs"])
        self.fixed = {int(position): value for position, value in notes["fixed"].items()}
        kinds = OpResolverType
        try:
            self._interpreter = Interpreter(
                model_content=contents,
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
            Results that are activations, one after the other, dequantized to float32.

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


def _validate_fixed(position: int, value: Any, arguments: Sequence[NDArray[Any]]) -> None:
    """Validate that an argument has the value that the program was exported with."""
    argument = arguments[position].tolist() if position < len(arguments) else None
    if argument != value:
        raise ValueError(
            f"argument {position} is part of the program, which was exported with {value!r:.200}, "
            f"got {argument!r:.200}: export the module for these"
        )


def run_tflite(
    path: str | Path, inputs: Sequence[Any], *, optimized: bool = False
) -> list[NDArray[Any]]:
    """Run a program of :func:`export_tflite` once; see :class:`LiteRTProgram`.

    Args:
        path: Path of the file.
        inputs: Arguments of the module, tensors or arrays in its nesting.
        optimized: Whether the optimized kernels run, whose outputs may differ.

    Returns:
        Results that are activations, dequantized to float32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not one of :func:`export_tflite`, or was altered, or an argument
            does not fit.
    """
    return LiteRTProgram(path, optimized=optimized)(inputs)


def verify(
    module: nn.Module,
    path: str | Path,
    inputs: Sequence[Any],
    *,
    forward: Callable[..., Any] | None = None,
    optimized: bool = False,
    random_inputs: int = 4,
) -> Agreement:
    """Compare a program with the emulated module, in every bit.

    In addition to ``inputs``, random ones are compared: every other set lies within the ranges of
    the arguments, the rest reach three times as far. Integers and masks are drawn from the values
    in ``inputs``; arguments that are part of the program stay unchanged.

    Args:
        module: Module that was exported.
        path: Path of the file.
        inputs: Arguments of its forward.
        forward: Function that runs the module, as it was exported.
        optimized: Whether the optimized kernels run, whose outputs may differ.
        random_inputs: Number of sets of random inputs, the same in every call; 0 for none.

    Returns:
        The fraction of equal outputs, 1.0 if all are, with the number of outputs compared.

    Raises:
        ValueError: If results of the module have another shape or type than the program's, or
            see :func:`run_tflite`.
    """
    program = LiteRTProgram(path, optimized=optimized)
    emulator = emulator_of(module)
    leaves, form = tree_flatten(list(inputs))
    random = np.random.default_rng(0)
    run = forward_of(module, forward)
    equal = total = skipped = 0
    with on_chip(module, emulator):
        for trial in range(random_inputs + 1):
            if trial:
                leaves = _random_arguments(program, leaves, random, reach=1.0 if trial % 2 else 3.0)
            arguments = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
            for port in program.inputs:
                qparams = program.qparams_of(port)
                if port.from_chip and qparams is not None:
                    arguments[port.position] = fake_quantize(arguments[port.position], qparams)
                    emulator.state.set_qparams(arguments[port.position], qparams)
            outputs = program(leaves)
            try:
                results = tree_leaves(run(*tree_unflatten(arguments, form)))
            except FloatingPointError:
                if not trial:
                    raise
                skipped += 1
                continue
            positions = dict.fromkeys(port.position for port in program.outputs)
            for position, output in zip(positions, outputs, strict=True):
                expected = _comparable(position, output, results)
                equal += int(((expected == output) | (np.isnan(expected) & np.isnan(output))).sum())
                total += output.size
    return Agreement(equal, total, inputs=random_inputs + 1 - skipped, skipped=skipped)


def _comparable(position: int, output: NDArray[Any], results: Sequence[Any]) -> NDArray[Any]:
    """Return the result of the module that an output of the program can be compared with."""
    remedy = "export the module again, or pass the forward that it was exported with"
    result = results[position] if position < len(results) else None
    if not isinstance(result, Tensor) or not result.is_floating_point():
        kind = f"{result.dtype} tensor" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"result {position} is a {kind} in the module and {output.dtype} in the program: "
            f"{remedy}"
        )
    if tuple(result.shape) != output.shape:
        raise ValueError(
            f"result {position} has shape {tuple(result.shape)} in the module and {output.shape} "
            f"in the program: {remedy}"
        )
    return np.asarray(result.detach().float().cpu().numpy())


def _random_arguments(
    program: LiteRTProgram, leaves: Sequence[Any], random: np.random.Generator, reach: float
) -> list[Any]:
    """Replace the arguments that a program reads by random ones."""
    result = list(leaves)
    bounds: dict[int, tuple[float, float]] = {}
    for port in program.inputs:
        qparams, argument = program.qparams_of(port), leaves[port.position]
        if qparams is None:
            sample = random.choice(argument.numpy().reshape(-1), tuple(argument.shape))
            result[port.position] = torch.from_numpy(sample)
            continue
        low, high = (bound * qparams.scale for bound in qparams.bounds)
        known = bounds.get(port.position, (low, high))
        bounds[port.position] = min(known[0], low), max(known[1], high)
    for position, (low, high) in bounds.items():
        middle, half = (low + high) / 2, reach * (high - low) / 2
        values = random.uniform(middle - half, middle + half, tuple(leaves[position].shape))
        result[position] = torch.from_numpy(values).to(leaves[position].dtype)
    return result


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Round floats to the values that quantization parameters represent.

    Args:
        x: Floats, any shape.
        qparams: Quantization parameters.

    Returns:
        Float32 values, in the shape of ``x``.
    """
    dtype = dtype_of_qparams(qparams)
    integers = quantize(x.detach().numpy(), dtype, qparams.scale, qparams.zero_point)
    centered = torch.from_numpy(integers - qparams.zero_point).float()
    return centered * torch.tensor(qparams.scale, dtype=torch.float32)


def _notes(contents: bytes, path: str | Path) -> dict[str, Any]:
    """Read the metadata of a file whose checksum is right, and which so is complete."""
    start = contents.find(f'{{"format": "{_FORMAT}"'.encode())
    if start < 0:
        raise ValueError(f"{path} is no program of export_tflite: it has no metadata of one")
    notes, _ = json.JSONDecoder().raw_decode(contents[start:].decode("utf-8", "replace"))
    return dict(notes)


def _port(entry: Mapping[str, Any]) -> Port:
    shape, from_chip = tuple(entry["shape"]), bool(entry["from_chip"])
    part = None if entry["part"] is None else (int(entry["part"][0]), int(entry["part"][1]))
    return Port(str(entry["tensor"]), int(entry["position"]), shape, from_chip, part)
