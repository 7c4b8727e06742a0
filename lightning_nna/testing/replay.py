"""Replay of emulated instructions on a runtime, with equality in every bit.

While a module runs emulated, every instruction is recorded with its operands and results.
:func:`check_instructions` runs each again as a program of one operator on the runtime whose kernels
the spec is exact for: LiteRT's *reference* kernels, or TFLite-Micro. It needs the extra ``deploy``.

    compared = replays(nn.Linear(8, 4), torch.randn(16, 8))
    compared["FULLY_CONNECTED"]  # 64 results, each of them TFLite-Micro's
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_nna.deploy import _extra as _extra
from lightning_nna.deploy.flatbuffer import OperatorSpec, TensorSpec, build_model, options_of
from lightning_nna.deploy.runtimes import runtime_of
from lightning_nna.emulation import emulate
from lightning_nna.emulation.program import Instruction, Stored
from lightning_nna.emulation.spec import NNASpec

#: Operators that LiteRT has in its optimized kernels only, which compute the same table.
WITHOUT_REFERENCE = frozenset({"ELU"})


def replays(
    module: nn.Module,
    *example: Any,
    inputs: Sequence[Any] | None = None,
    spec: str | NNASpec | Mapping[str, Any] | None = None,
    train: Callable[[nn.Module, Any], None] | None = None,
    forward: Callable[..., Any] | None = None,
) -> Counter[str]:
    """Calibrate a module, run it emulated, and compare every instruction with its runtime.

    Args:
        module: Any module.
        *example: Arguments of its forward for the calibration.
        inputs: Arguments of the emulated run; None for ``example``.
        spec: Accelerator; None for that of the module's emulator, or for the default preset.
        train: Called with the emulated module and its emulator before the run that is compared.
        forward: Function that runs the module; None for the module itself.

    Returns:
        Number of compared results by operator of the schema.

    Raises:
        AssertionError: If a result differs, see :func:`check_instructions`.

    Example:
        >>> replays(nn.Tanh(), torch.linspace(-2, 2, 100))["TANH"]
        100
    """
    run = module if forward is None else forward
    recorded: list[Instruction] = []
    with emulate(module, spec) as emulator:
        with emulator.observing(), torch.no_grad():
            run(*example)
        if train is not None:
            train(module, emulator)
        with emulator.running(recorder=recorded.append), torch.no_grad():
            run(*(example if inputs is None else inputs))
    return check_instructions(recorded, emulator.spec.runtime)


def check_instructions(
    instructions: Sequence[Instruction], runtime: str = "litert"
) -> Counter[str]:
    """Run instructions again on a runtime and demand equal integers.

    Args:
        instructions: Instructions with the integers of one run, as a recorder receives them.
        runtime: Name of the runtime, see :func:`.runtime_of`.

    Returns:
        Number of compared results by operator of the schema.

    Raises:
        AssertionError: If a result differs; the message names the call site, the instruction and
            the first element that differs, with both integers.
    """
    compared: Counter[str] = Counter()
    for instruction in instructions:
        references = on_runtime(instruction, runtime)
        pairs = zip(instruction.outputs, references, strict=True)
        for position, (output, reference) in enumerate(pairs):
            _compare(instruction, position, output.integers.numpy(), reference, runtime)
            compared[instruction.operator] += reference.size
    return compared


def on_runtime(
    instruction: Instruction, runtime: str = "litert", *, states: bool = False
) -> list[np.ndarray]:
    """Run one instruction on a runtime.

    Args:
        instruction: Instruction with the integers of its operands.
        runtime: Name of the runtime, see :func:`.runtime_of`.
        states: Return the variable tensors, too, after the results.

    Returns:
        Integers of every result.
    """
    tensors: dict[str, TensorSpec] = {}
    names: list[str] = []
    arguments: dict[str, np.ndarray] = {}
    for position, operand in enumerate(instruction.inputs):
        name = "" if operand is None else f"x{position}"
        names.append(name)
        if operand is not None:
            tensors[name], values = tensor_spec(operand)
            if tensors[name].data is None:
                arguments[name] = values
    outputs = [f"y{position}" for position in range(len(instruction.outputs))]
    for name, result in zip(outputs, instruction.outputs, strict=True):
        tensors[name] = replace(tensor_spec(result)[0], data=None)
    intermediates = [f"i{position}" for position in range(len(instruction.intermediates))]
    for name, value in zip(intermediates, instruction.intermediates, strict=True):
        tensors[name] = replace(tensor_spec(value)[0], data=None)
    operator = OperatorSpec(
        instruction.operator,
        tuple(names),
        tuple(outputs),
        options_of(instruction.operator, instruction.options),
        tuple(intermediates),
    )
    if states:
        outputs += [name for name, spec in tensors.items() if spec.is_variable]
    model = build_model(tensors, [operator], list(arguments), outputs)
    if runtime == "litert" and instruction.operator in WITHOUT_REFERENCE:
        runtime = "litert-optimized"
    # The host quantizes floats, outside of TOSA.
    if runtime == "tosa" and instruction.operator == "QUANTIZE" and _reads_floats(instruction):
        runtime = "litert"
    return run_model(model, list(arguments.values()), runtime)


def _reads_floats(instruction: Instruction) -> bool:
    return any(x is not None and x.dtype == "float32" for x in instruction.inputs)


def tensor_spec(stored: Stored) -> tuple[TensorSpec, np.ndarray]:
    """Return the form of an instruction's tensor in a program, and its integers."""
    values = stored.integers.numpy().astype(stored.dtype)
    scale = stored.scale
    return (
        TensorSpec(
            values.shape,
            stored.dtype,
            scale.numpy() if isinstance(scale, torch.Tensor) else float(scale),
            stored.zero_point,
            data=values if stored.constant else None,
            quantized_dimension=stored.channel_axis,
            is_variable=stored.variable,
        ),
        values,
    )


def run_model(
    model: bytes, inputs: Sequence[np.ndarray], runtime: str = "litert"
) -> list[np.ndarray]:
    """Run a program once, from its initial state.

    Args:
        model: Contents of a .tflite file.
        inputs: Integers of its inputs, in their order.
        runtime: Name of the runtime, see :func:`.runtime_of`.

    Returns:
        Integers of its outputs.
    """
    return run_calls(model, [inputs], runtime)[-1]


def run_calls(
    model: bytes, calls: Sequence[Sequence[np.ndarray]], runtime: str = "litert"
) -> list[list[np.ndarray]]:
    """Run a program once for each element of ``calls``; variables live on from call to call."""
    return runtime_of(runtime).load(model).run(calls, keep_state=True)


def _compare(
    instruction: Instruction,
    position: int,
    emulated: np.ndarray,
    reference: np.ndarray,
    runtime: str,
) -> None:
    """Raise if integers of one result differ."""
    name = f"{instruction.site}: result {position} of {instruction.operator}"
    options = f" {dict(instruction.options)}" if instruction.options else ""
    title = runtime_of(runtime).title
    if emulated.shape != reference.shape:
        raise AssertionError(
            f"{name}{options} has shape {emulated.shape}, on {title} {reference.shape}"
        )
    differs = emulated != reference.astype(np.int64)
    if differs.any():
        first = tuple(int(axis[0]) for axis in np.nonzero(differs))
        raise AssertionError(
            f"{name}{options} differs from {title} in {int(differs.sum())} of {differs.size} "
            f"elements, first at {list(first)}: {emulated[first]}, there {reference[first]}"
        )
