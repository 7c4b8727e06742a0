"""Export an emulated module as a .tflite file, and read its metadata back.

The file is fully integer and has, in addition to the program, the ports that are needed to call it
from floats: the tensor of each argument and result. Whatever runtime runs it reads these with
:func:`read_program`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from torch import nn

from lightning_nna.deploy.capture import capture
from lightning_nna.deploy.flatbuffer import DTYPES, build_model
from lightning_nna.deploy.graph import CapturedProgram, Port
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


def export_tflite(
    module: nn.Module,
    example_inputs: Sequence[Any],
    path: str | Path,
    *,
    forward: Callable[..., Any] | None = None,
    allow_cpu: bool = False,
    channels_last_inputs: Collection[int] = (),
    channels_last_outputs: Collection[int] = (),
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
        channels_last_inputs: Positions of arguments that the program reads with their channels,
            axis 1, last: an image as ``(batch, height, width, channels)``.
        channels_last_outputs: Positions of results that it writes in this way.

    Returns:
        Path, sizes, operators and ports of the program.

    Raises:
        CaptureError: See :func:`.capture.capture`.

    Example:
        >>> import tempfile, torch
        >>> from lightning_nna import calibrate
        >>> from lightning_nna.deploy import verify
        >>> net, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(8, 4)
        >>> emulator = calibrate(net, [x])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = export_tflite(net, [x], f"{folder}/net.tflite")
        ...     dict(model.operators), verify(net, model.path, [x])
        ({'FULLY_CONNECTED': 1, 'TANH': 1}, 1.0 of 120 outputs from 5 inputs)
    """
    program = capture(
        module,
        example_inputs,
        forward=forward,
        allow_cpu=allow_cpu,
        channels_last_inputs=channels_last_inputs,
        channels_last_outputs=channels_last_outputs,
    )
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


def program_bytes(program: CapturedProgram) -> bytes:
    """Return the file of a program, with a checksum of all of it."""
    notes = {
        "format": _FORMAT,
        "version": version("lightning-nna"),
        "spec": program.spec,
        "runtime": program.runtime,
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


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a program as its file describes it.

    Args:
        name: Name.
        dtype: Name of its type, as ``"int8"``.
        shape: Shape.
        qparams: Quantization parameters; None for plain integers, conditions and floats.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    qparams: QParams | None


@dataclass(frozen=True)
class ProgramFile:
    """A program as a runtime reads it.

    Args:
        contents: Bytes of the file.
        spec: Name of the spec.
        runtime: Name of the runtime whose kernels it is exact for.
        inputs: Ports of the arguments.
        outputs: Ports of the results.
        fixed: Arguments that are part of the program, by position.
        input_tensors: Tensors that it reads, in its order.
        output_tensors: Tensors that it returns, in its order.
    """

    contents: bytes
    spec: str
    runtime: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    fixed: Mapping[int, Any]
    input_tensors: tuple[StoredTensor, ...]
    output_tensors: tuple[StoredTensor, ...]


def read_program(path: str | Path) -> ProgramFile:
    """Read a program of :func:`export_tflite` and its metadata.

    Args:
        path: Path of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not one of :func:`export_tflite`, or was altered.
    """
    contents = checked(Path(path))
    notes = _notes(contents, path)
    graph = schema.Model.GetRootAs(contents).Subgraphs(0)
    return ProgramFile(
        contents,
        str(notes["spec"]),
        str(notes["runtime"]),
        tuple(_port(entry) for entry in notes["inputs"]),
        tuple(_port(entry) for entry in notes["outputs"]),
        {int(position): value for position, value in notes["fixed"].items()},
        tuple(_tensor(graph, graph.Inputs(k)) for k in range(graph.InputsLength())),
        tuple(_tensor(graph, graph.Outputs(k)) for k in range(graph.OutputsLength())),
    )


def _notes(contents: bytes, path: str | Path) -> dict[str, Any]:
    """Read the metadata of a file whose checksum is right, and which so is complete."""
    start = contents.find(f'{{"format": "{_FORMAT}"'.encode())
    if start < 0:
        raise ValueError(f"{path} is no program of export_tflite: it has no metadata of one")
    notes, _ = json.JSONDecoder().raw_decode(contents[start:].decode("utf-8", "replace"))
    return dict(notes)


def _tensor(graph: schema.SubGraph, index: int) -> StoredTensor:
    """Read the description of one tensor of a graph."""
    tensor = graph.Tensors(index)
    dtype = next(name for name, code in DTYPES.items() if code == tensor.Type())
    shape = tuple(tensor.Shape(axis) for axis in range(tensor.ShapeLength()))
    stored = tensor.Quantization()
    scale = stored.Scale(0) if stored is not None and stored.ScaleLength() else 0.0
    if not scale:
        return StoredTensor(tensor.Name().decode(), dtype, shape, None)
    limits, zero_point = np.iinfo(dtype), int(stored.ZeroPoint(0))
    qparams = QParams(float(scale), zero_point, int(limits.min), int(limits.max))
    return StoredTensor(tensor.Name().decode(), dtype, shape, qparams)


def _port(entry: Mapping[str, Any]) -> Port:
    shape, from_chip = tuple(entry["shape"]), bool(entry["from_chip"])
    part = None if entry["part"] is None else (int(entry["part"][0]), int(entry["part"][1]))
    # Files of earlier versions have the order of the caller alone.
    order = None if entry.get("order") is None else tuple(map(int, entry["order"]))
    return Port(str(entry["tensor"]), int(entry["position"]), shape, from_chip, part, order)
