"""The oracle of everything the emulator runs: each instruction again, on LiteRT's kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_nna import emulate
from lightning_nna.deploy.flatbuffer import options_of
from lightning_nna.emulation.program import Instruction, Stored
from tests import litert
from tests.litert import OperatorSpec, TensorSpec


def replays(
    module: nn.Module,
    *example: Any,
    inputs: Sequence[Any] | None = None,
    spec: str | Mapping[str, Any] = "litert-int8",
    train: Callable[[nn.Module, Any], None] | None = None,
    forward: Callable[..., Any] | None = None,
) -> Counter[str]:
    """Calibrate on ``example``, run ``inputs`` on the chip, and demand LiteRT's integers.

    ``train`` gets the module on the chip before the run that counts. Returns the number of
    outputs that were compared, by LiteRT operator.
    """
    run = module if forward is None else forward
    recorded: list[Instruction] = []
    with emulate(module, spec) as chip:
        with chip.observing(), torch.no_grad():
            run(*example)
        if train is not None:
            train(module, chip)
        chip.recorder = recorded.append
        with torch.no_grad():
            run(*(example if inputs is None else inputs))
        chip.recorder = None
    return check_instructions(recorded)


def check_instructions(instructions: Sequence[Instruction]) -> Counter[str]:
    """Run every instruction on LiteRT and demand equal integers; count them by operator."""
    compared: Counter[str] = Counter()
    for instruction in instructions:
        expected = on_litert(instruction)
        for output, reference in zip(instruction.outputs, expected, strict=True):
            found = output.integers.numpy()
            message = f"{instruction.site}: {instruction.operator} {dict(instruction.options)}"
            np.testing.assert_array_equal(found, reference.astype(np.int64), err_msg=message)
            compared[instruction.operator] += reference.size
    return compared


def on_litert(instruction: Instruction, *, states: bool = False) -> list[np.ndarray]:
    """Outputs of one instruction on the reference kernels, then what it left in its state."""
    tensors: dict[str, TensorSpec] = {}
    names: list[str] = []
    given: dict[str, np.ndarray] = {}
    for position, operand in enumerate(instruction.inputs):
        name = "" if operand is None else f"x{position}"
        names.append(name)
        if operand is not None:
            tensors[name], values = tensor_spec(operand)
            if tensors[name].data is None:
                given[name] = values
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
    model = litert.build_model(tensors, [operator], list(given), outputs)
    # ELU has no reference kernel; the other one is the same table.
    optimized = instruction.operator == "ELU"
    return litert.run_model(model, list(given.values()), optimized=optimized)


def tensor_spec(stored: Stored) -> tuple[TensorSpec, np.ndarray]:
    """Form of a tensor for LiteRT, and its values."""
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
