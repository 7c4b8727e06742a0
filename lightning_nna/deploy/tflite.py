"""A module on the chip as a .tflite file, and LiteRT to run it.

The file is fully integer and holds, beside the program, what is needed to call it from floats:
which of the caller's tensors goes where. Its results are those of the module on the chip, in every
bit, on LiteRT's *reference* kernels; the optimized ones are faster and may differ.
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

from lightning_nna.deploy.capture import called, capture, emulator_of, on_chip
from lightning_nna.deploy.flatbuffer import build_model
from lightning_nna.deploy.graph import Port, Program, quantized
from lightning_nna.emulation.ranges import QParams
from lightning_nna.files import whole_file
from lightning_nna.weights.read_packed import NO_DIGEST, checked, sealed

_FORMAT = "lightning-nna program 1"
_METADATA = "lightning-nna"


@dataclass(frozen=True)
class TFLiteModel:
    """What was written.

    Args:
        path: The file.
        size_bytes: Of the file.
        weight_bytes: Of all constants, each counted once.
        operators: How many instructions of each kind, in the order in which they first run.
        inputs: Where the caller's arguments enter.
        outputs: Where results leave.
        fixed: Positions of arguments that are part of the program.
        spec: Name of the chip.
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
    """Share of outputs that are equal in every bit; 1.0 where all are.

    Attributes:
        outputs: How many were compared.
        differing: How many of them differ.
        inputs: How many sets of inputs they came from.
        skipped: Sets of random inputs on which the module itself gives no finite value.

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
        """The share ``equal / outputs``."""
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
    """Write a module on the chip as a fully integer .tflite program of one shape.

    The same module and inputs give the same bytes. Tensors are called by their call sites. A
    recurrent state that is an argument becomes an input that the program overwrites, and an output
    where it is a result: the streaming form. One that starts at zero is a variable of the program.

    Args:
        module: A module on the chip, calibrated.
        example_inputs: Arguments of its forward.
        path: Written whole or not at all.
        forward: How the module runs, called with it and the arguments; None for its own forward.
        allow_cpu: Whether float operators that no chip has may stand in the program and run on the
            CPU, see :func:`.capture.capture`; it is not fully integer then.

    Returns:
        What was written.

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
    contents = write(program)
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


def write(program: Program) -> bytes:
    """The file of a program, with a checksum of all of it."""
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
    """A program of :func:`export_tflite` on LiteRT.

    Args:
        path: The file.
        optimized: Take the kernels that are made for speed; their outputs may differ.
        threads: Of the optimized kernels.

    Attributes:
        inputs: Where arguments enter.
        outputs: Where results leave.
        fixed: Arguments that are part of the program, by position.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not one of :func:`export_tflite`, or not as it was written.
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
                f"{path} has an ELU, and LiteRT has no reference kernel of it: give optimized=True"
            ) from error
        self._interpreter.allocate_tensors()
        details = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        self._details = {each["name"]: each for side in details for each in side}

    def __call__(self, inputs: Sequence[Any]) -> list[NDArray[Any]]:
        """Run once, from the state that the arguments give, or from zero.

        Args:
            inputs: Arguments as the module takes them, nested as it likes: tensors or arrays.

        Returns:
            Results that are activations, one after the other, as float32 on their grids; those of
            an operator of the CPU are on none.

        Raises:
            ValueError: If an argument is missing, has another shape than the program, or another
                value than the one that is part of it.
        """
        given = [np.asarray(x) for x in tree_leaves(list(inputs))]
        for position, value in self.fixed.items():
            _demand_fixed(position, value, given)
        self._interpreter.reset_all_variables()
        for port in self.inputs:
            self._set(port, given)
        self._interpreter.invoke()
        found: dict[int, NDArray[Any]] = {}
        for port in self.outputs:
            values = self._get(port)
            whole = found.setdefault(port.position, np.empty(port.shape, values.dtype).reshape(-1))
            whole[slice(*(port.part or (None,)))] = values.reshape(-1)
        shapes = {port.position: port.shape for port in self.outputs}
        return [values.reshape(shapes[position]) for position, values in found.items()]

    def grid_of(self, port: Port) -> QParams | None:
        """The grid of a tensor that enters or leaves, None for plain integers."""
        detail = self._details[port.tensor]
        scale, zero_point = detail["quantization"]
        if not scale:
            return None
        limits = np.iinfo(detail["dtype"])
        return QParams(float(scale), int(zero_point), int(limits.min), int(limits.max))

    def _set(self, port: Port, given: Sequence[NDArray[Any]]) -> None:
        if port.position >= len(given):
            raise ValueError(f"argument {port.position} is missing: {len(given)} were given")
        value, detail = given[port.position], self._details[port.tensor]
        if value.shape != port.shape:
            raise ValueError(
                f"argument {port.position} has shape {value.shape}, the program {port.shape}; "
                "export it for another shape"
            )
        grid = self.grid_of(port)
        if not np.isfinite(value).all():
            raise ValueError(f"argument {port.position} has values that are not finite")
        if grid is not None:
            value = quantized(value, np.dtype(detail["dtype"]).name, grid.scale, grid.zero_point)
        if port.part is not None:
            value = value.reshape(-1)[slice(*port.part)]
        held = value.astype(detail["dtype"]).reshape(detail["shape"])
        self._interpreter.set_tensor(detail["index"], held)

    def _get(self, port: Port) -> NDArray[Any]:
        grid = self.grid_of(port)
        integers = self._interpreter.get_tensor(self._details[port.tensor]["index"])
        if grid is None:  # Of an operator of the CPU.
            return np.asarray(integers)
        centered = integers.astype(np.int32) - grid.zero_point
        return np.asarray(centered.astype(np.float32) * np.float32(grid.scale))


def _demand_fixed(position: int, value: Any, given: Sequence[NDArray[Any]]) -> None:
    """Refuse another value of an argument than the program was made for."""
    found = given[position].tolist() if position < len(given) else None
    if found != value:
        raise ValueError(
            f"argument {position} is part of the program, which was exported with {value!r:.200}, "
            f"got {found!r:.200}: export the module for these"
        )


def run_tflite(
    path: str | Path, inputs: Sequence[Any], *, optimized: bool = False
) -> list[NDArray[Any]]:
    """Run a program of :func:`export_tflite` once; see :class:`LiteRTProgram`.

    Args:
        path: The file.
        inputs: Arguments as the module takes them.
        optimized: Take the kernels that are made for speed; their outputs may differ.

    Returns:
        Results that are activations, as float32 on their grids.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not one of :func:`export_tflite`, or not as it was written, or
            an argument does not fit.
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
    """Compare a program with the module on the chip, in every bit.

    Beside the inputs that are given, random ones are compared: every other set lies within the
    ranges of the arguments, the rest reach three times as far. Integers and masks are drawn from
    the values that are given; arguments that are part of the program stay as they are.

    Args:
        module: The module that was exported.
        path: The file.
        inputs: Arguments of its forward.
        forward: How the module runs, as it was exported.
        optimized: Look at the kernels that are made for speed.
        random_inputs: Sets of random inputs, the same in every call; 0 for none.

    Returns:
        The share of equal outputs, 1.0 where all are, which says how many were compared.

    Raises:
        ValueError: If results of the module have another shape or type than the program's, or
            see :func:`run_tflite`.
    """
    program = LiteRTProgram(path, optimized=optimized)
    emulator = emulator_of(module)
    leaves, form = tree_flatten(list(inputs))
    random = np.random.default_rng(0)
    equal = total = skipped = 0
    with on_chip(module, emulator):
        for trial in range(random_inputs + 1):
            if trial:
                leaves = _drawn(program, leaves, random, reach=1.0 if trial % 2 else 3.0)
            arguments = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
            for port in program.inputs:
                grid = program.grid_of(port)
                if port.from_chip and grid is not None:
                    arguments[port.position] = on_grid(arguments[port.position], grid)
                    emulator.state.set_qparams(arguments[port.position], grid)
            found = program(leaves)
            try:
                results = tree_leaves(called(module, forward)(*tree_unflatten(arguments, form)))
            except FloatingPointError:
                if not trial:
                    raise
                skipped += 1
                continue
            positions = dict.fromkeys(port.position for port in program.outputs)
            for position, ours in zip(positions, found, strict=True):
                theirs = _comparable(position, ours, results)
                equal += int(((theirs == ours) | (np.isnan(theirs) & np.isnan(ours))).sum())
                total += ours.size
    return Agreement(equal, total, inputs=random_inputs + 1 - skipped, skipped=skipped)


def _comparable(position: int, ours: NDArray[Any], results: Sequence[Any]) -> NDArray[Any]:
    """A result of the module that a program's can be compared with."""
    remedy = "export the module anew, or give the forward that it was exported with"
    theirs = results[position] if position < len(results) else None
    if not isinstance(theirs, Tensor) or not theirs.is_floating_point():
        kind = f"{theirs.dtype} tensor" if isinstance(theirs, Tensor) else type(theirs).__name__
        raise ValueError(
            f"result {position} is a {kind} in the module and {ours.dtype} in the program: {remedy}"
        )
    if tuple(theirs.shape) != ours.shape:
        raise ValueError(
            f"result {position} has shape {tuple(theirs.shape)} in the module and {ours.shape} in "
            f"the program: {remedy}"
        )
    return np.asarray(theirs.detach().float().cpu().numpy())


def _drawn(
    program: LiteRTProgram, leaves: Sequence[Any], random: np.random.Generator, reach: float
) -> list[Any]:
    """Random arguments in the place of those that a program reads."""
    result = list(leaves)
    bounds: dict[int, tuple[float, float]] = {}
    for port in program.inputs:
        grid, given = program.grid_of(port), leaves[port.position]
        if grid is None:
            choice = random.choice(given.numpy().reshape(-1), tuple(given.shape))
            result[port.position] = torch.from_numpy(choice)
            continue
        low, high = (bound * grid.scale for bound in grid.bounds)
        known = bounds.get(port.position, (low, high))
        bounds[port.position] = min(known[0], low), max(known[1], high)
    for position, (low, high) in bounds.items():
        middle, half = (low + high) / 2, reach * (high - low) / 2
        values = random.uniform(middle - half, middle + half, tuple(leaves[position].shape))
        result[position] = torch.from_numpy(values).to(leaves[position].dtype)
    return result


def on_grid(x: Tensor, grid: QParams) -> Tensor:
    """Floats as the chip has them."""
    kind = "int8" if grid.bits == 8 else "int16"
    integers = quantized(x.detach().numpy(), kind, grid.scale, grid.zero_point)
    centered = torch.from_numpy(integers - grid.zero_point).float()
    return centered * torch.tensor(grid.scale, dtype=torch.float32)


def _notes(contents: bytes, path: str | Path) -> dict[str, Any]:
    """What the file says of itself; its checksum is right, so it is all there."""
    start = contents.find(f'{{"format": "{_FORMAT}"'.encode())
    if start < 0:
        raise ValueError(f"{path} is no program of export_tflite: it says nothing of one")
    notes, _ = json.JSONDecoder().raw_decode(contents[start:].decode("utf-8", "replace"))
    return dict(notes)


def _port(entry: Mapping[str, Any]) -> Port:
    shape, from_chip = tuple(entry["shape"]), bool(entry["from_chip"])
    part = None if entry["part"] is None else (int(entry["part"][0]), int(entry["part"][1]))
    return Port(str(entry["tensor"]), int(entry["position"]), shape, from_chip, part)
