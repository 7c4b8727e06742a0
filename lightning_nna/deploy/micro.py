"""Export a program for a microcontroller: what its firmware needs, in one folder.

model.tflite                 the program
model_data.h, .cc            the same bytes as an aligned array, sizes, quantization parameters
model_operators.h            the operators that the firmware has to include
model_test_vectors.h, .cc    inputs and expected outputs, as integers
model_input_0.npy, …         the same for NumPy
model_check.cc               a function that compares them on the device
README.md                    bytes of flash and RAM, ports, how to call it
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray
from torch import nn

from lightning_nna.deploy import micro_sources
from lightning_nna.deploy.capture import capture, emulator_of
from lightning_nna.deploy.decode import compressed
from lightning_nna.deploy.micro_export import MicroExport, readme
from lightning_nna.deploy.program import ProgramPorts
from lightning_nna.deploy.runtimes import MissingRuntimeError
from lightning_nna.deploy.runtimes.tflite_micro import TFLiteMicro, sufficient_arena_bytes
from lightning_nna.deploy.tflite import ProgramFile, program_bytes, read_program
from lightning_nna.deploy.vela import VelaError, VelaProgram, compile_with_vela
from lightning_nna.deploy.verification import Agreement, emulated_results, example_calls
from lightning_nna.files import whole_folder

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = ("std", "tflite")
_RUNTIME = TFLiteMicro()


@dataclass(frozen=True)
class _Run:
    """Outputs of TFLite-Micro for every test vector, and a working memory that is enough."""

    outputs: list[list[NDArray[Any]]]
    arena_bytes: int


def export_micro(
    module: nn.Module,
    example_inputs: Sequence[Any],
    folder: str | Path,
    *,
    name: str = "model",
    forward: Callable[..., Any] | None = None,
    compress: bool = False,
    accelerator: str | None = None,
    system: str | None = None,
    memory_mode: str | None = None,
    test_vectors: int = 4,
    any_spec: bool = False,
) -> MicroExport:
    """Write what the firmware of a microcontroller needs of an emulated module.

    Args:
        module: Emulated module, calibrated.
        example_inputs: Arguments of its forward, the first test vector.
        folder: Folder, which is written completely or not at all; an earlier export in it is
            replaced.
        name: Name of the files and the C++ namespace, lowercase.
        forward: Function of the module and the arguments that runs it; None for its own forward.
        compress: Whether constants are stored as lookup tables or without their zeros, each where
            that makes the file smaller; TFLite-Micro decodes them into the arena, see
            :mod:`.decode`.
        accelerator: Name of an Ethos-U, for which Vela compiles the program, see
            :func:`.vela_report`; None for the processor alone.
        system: See :func:`.vela_report`.
        memory_mode: See :func:`.vela_report`.
        test_vectors: Number of test vectors, positive; those after the first are random, see
            :func:`.verify`.
        any_spec: Whether a spec is accepted whose integers TFLite-Micro does not promise.

    Returns:
        The figures of the program.

    Raises:
        ValueError: If the spec is not one of TFLite-Micro, the name is none of C++, the folder has
            other files, or both ``compress`` and ``accelerator`` are given.
        CaptureError: See :func:`.capture.capture`.
        UnsupportedProgramError: If TFLite-Micro lacks an operator of the program, which it names.
        VelaError: If Vela is missing or rejects the program.
        RuntimeError: If TFLite-Micro computes other outputs than the emulation of its own spec.

    Example:
        >>> import tempfile, torch
        >>> from lightning_nna import calibrate
        >>> net, x = nn.Sequential(nn.Linear(64, 32), nn.Tanh()), torch.randn(1, 64)
        >>> emulator = calibrate(net, [x], spec="tflm-int8")
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     micro = export_micro(net, [x], f"{parent}/firmware")
        ...     sorted(file.suffix for file in micro.folder.iterdir())[:3], micro.agreement
        (['.cc', '.cc', '.cc'], 1.0 of 128 outputs from 4 inputs)
    """
    folder = Path(folder)
    _validate(module, folder, name, test_vectors, any_spec)
    if compress and accelerator is not None:
        raise ValueError(
            f"compress=True is for a processor, and Vela compresses the weights for {accelerator} "
            "itself: leave compress out"
        )
    captured = capture(module, example_inputs, forward=forward)
    for operator in captured.operators:
        micro_sources.resolver_function(operator.name)
    plain = program_bytes(captured)
    program, tensors = compressed(captured) if compress else (captured, ())
    contents = program_bytes(program)
    with whole_folder(folder) as unfinished:
        path = unfinished / f"{name}.tflite"
        path.write_bytes(contents)
        file = read_program(path)
        ports = ProgramPorts(file)
        calls = example_calls(ports, example_inputs, test_vectors - 1)
        results = emulated_results(module, ports, example_inputs, calls, forward=forward)
        inputs = [ports.integers_of(c) for c, r in zip(calls, results, strict=True) if r]
        expected = [ports.output_integers_of(r) for r in results if r]
        before = _run(plain, inputs)
        after = _run(contents, inputs) if tensors else before
        agreement = _agreement(file, expected, before, after)
        vela = None
        if accelerator is not None:
            vela = _compile(unfinished, name, accelerator, system, memory_mode)
        export = MicroExport(
            folder=folder,
            path=folder / f"{name}.tflite",
            spec=file.spec,
            flash_bytes=path.stat().st_size,
            plain_flash_bytes=len(plain),
            arena_bytes=None if after is None or vela is not None else after.arena_bytes,
            plain_arena_bytes=None if before is None else before.arena_bytes,
            operators=_operators(path.read_bytes()),
            compressed=tensors,
            agreement=agreement,
            vela=None if vela is None else replace(vela, path=folder / path.name),
        )
        _write(unfinished, name, export, file, _stacked(inputs), _stacked(expected))
    return export


def _validate(
    module: nn.Module, folder: Path, name: str, test_vectors: int, any_spec: bool
) -> None:
    """Validate everything that is known before the program."""
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise ValueError(
            f"name is that of files and of a C++ namespace, lowercase letters, digits and _, got "
            f"{name!r}"
        )
    if test_vectors < 1:
        raise ValueError(f"test_vectors must be at least 1, got {test_vectors}")
    spec = emulator_of(module).spec
    if spec.runtime != _RUNTIME.name and not any_spec:
        raise ValueError(
            f"the spec {spec.name!r} has the integers of {spec.runtime!r}, and those of "
            "TFLite-Micro may differ: emulate the module with 'tflm-int8' or 'tflm-int16x8', or "
            "pass any_spec=True and read the agreement"
        )
    if folder.exists():
        earlier = re.compile(rf"README\.md|{name}(\.tflite|_\w+\.(h|cc|npy|tflite))")
        others = [each.name for each in folder.iterdir() if not earlier.fullmatch(each.name)]
        if others:
            raise ValueError(
                f"{folder} has files of no earlier export, as {others[0]}, which would be lost: "
                "pass another folder"
            )


def _run(contents: bytes, inputs: Sequence[Sequence[NDArray[Any]]]) -> _Run | None:
    """Run a program on TFLite-Micro; None with a warning if it is not installed."""
    try:
        loaded = _RUNTIME.load(contents)
    except MissingRuntimeError as error:
        warnings.warn(f"the program is not compared and has no arena size: {error}", stacklevel=3)
        return None
    outputs = loaded.run(inputs)
    return _Run(outputs, sufficient_arena_bytes(contents, loaded.arena_bytes()))


def _agreement(
    file: ProgramFile,
    expected: Sequence[Sequence[NDArray[Any]]],
    before: _Run | None,
    after: _Run | None,
) -> Agreement | None:
    """Compare outputs with the emulation, and those before and after compression."""
    if before is None or after is None:
        return None
    equal = total = 0
    for plain, outputs, references in zip(before.outputs, after.outputs, expected, strict=True):
        for x, output, reference in zip(plain, outputs, references, strict=True):
            if not np.array_equal(x, output):
                raise RuntimeError("TFLite-Micro decodes another program than the one compressed")
            equal += int((output == reference).sum())
            total += output.size
    agreement = Agreement(equal, total, inputs=len(expected))
    if agreement != 1.0 and file.runtime == _RUNTIME.name:
        raise RuntimeError(
            f"TFLite-Micro {_RUNTIME.version()} computes {agreement.differing} of {total} outputs "
            f"otherwise than the emulation of {file.spec!r}: export with any_spec=True to look at "
            "them, and report it with the module"
        )
    return agreement


def _compile(
    folder: Path, name: str, accelerator: str, system: str | None, memory_mode: str | None
) -> VelaProgram:
    """Replace a program by the one that Vela makes of it; the first stays as ``*_source``."""
    path, source = folder / f"{name}.tflite", folder / f"{name}_source.tflite"
    path.rename(source)
    tables = folder / "vela"
    tables.mkdir()
    vela = compile_with_vela(
        source, tables, accelerator=accelerator, system=system, memory_mode=memory_mode
    )
    vela.path.rename(path)
    shutil.rmtree(tables)
    if _ports_of(path.read_bytes()) != _ports_of(source.read_bytes()):
        raise VelaError(
            f"Vela's program for {accelerator} has other inputs or outputs than the one it was "
            "made of. It drops the cell state of an LSTM's kernel: take the preset ethos-u, whose "
            'LSTM is elementary operators, or lstm="elementary" in a spec of your own; of other '
            "networks, export without accelerator and compile by hand"
        )
    return vela


def _write(
    folder: Path,
    name: str,
    export: MicroExport,
    file: ProgramFile,
    inputs: Sequence[NDArray[Any]],
    outputs: Sequence[NDArray[Any]],
) -> None:
    """Write sources, arrays and the page of a program that is in a folder."""
    arena = export.arena_bytes
    texts = {
        f"{name}_data.h": micro_sources.data_header(name, export.flash_bytes, arena, file),
        f"{name}_data.cc": micro_sources.data_source(
            name, (folder / f"{name}.tflite").read_bytes()
        ),
        f"{name}_operators.h": micro_sources.operators_header(name, export.operators),
        f"{name}_test_vectors.h": micro_sources.vectors_header(name, inputs, outputs),
        f"{name}_test_vectors.cc": micro_sources.vectors_source(name, inputs, outputs),
        f"{name}_check.cc": micro_sources.check_source(name, len(inputs), len(outputs)),
        "README.md": readme(name, export, file),
    }
    for each, text in texts.items():
        (folder / each).write_text(text, encoding="utf-8")
    for kind, arrays in (("input", inputs), ("output", outputs)):
        for number, values in enumerate(arrays):
            np.save(folder / f"{name}_{kind}_{number}.npy", values)


def _stacked(calls: Sequence[Sequence[NDArray[Any]]]) -> list[NDArray[Any]]:
    """Return each tensor of several calls as one array, the call first."""
    return [np.stack(each) for each in zip(*calls, strict=True)]


def _ports_of(contents: bytes) -> list[tuple[int, list[int]]]:
    """Return type and shape of the inputs and outputs of a program."""
    graph = schema.ModelT.InitFromPackedBuf(contents).subgraphs[0]
    tensors = [graph.tensors[number] for number in (*graph.inputs, *graph.outputs)]
    return [(each.type, list(each.shape)) for each in tensors]


def _operators(contents: bytes) -> dict[str, int]:
    """Count the instructions of each operator of a program, by its name."""
    model = schema.ModelT.InitFromPackedBuf(contents)
    codes = {code: each for each, code in vars(schema.BuiltinOperator).items() if each.isupper()}
    names = [
        each.customCode.decode() if each.customCode else codes[each.builtinCode]
        for each in model.operatorCodes
    ]
    return dict(Counter(names[each.opcodeIndex] for each in model.subgraphs[0].operators))
