"""Verify a program: compare it with the emulated module, in every bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

from lightning_nna.deploy.capture import emulated_evaluation, emulator_of, forward_of
from lightning_nna.deploy.graph import Port, dtype_of_qparams, quantize
from lightning_nna.deploy.program import Program, ProgramPorts
from lightning_nna.deploy.runtimes import Runtime
from lightning_nna.emulation.ranges import QParams


class Agreement(float):
    """Fraction of outputs that are equal in every bit; 1.0 if all are.

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
        """Compute the fraction ``equal / outputs``.

        Args:
            equal: Number of outputs that are equal.
            outputs: Number of outputs that were compared.
            inputs: Number of sets of inputs that they came from.
            skipped: Number of sets of random inputs on which the module has no finite result.
        """
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


def verify(
    module: nn.Module,
    path: str | Path,
    inputs: Sequence[Any],
    *,
    forward: Callable[..., Any] | None = None,
    runtime: str | Runtime | None = None,
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
        runtime: Name of a runtime, see :func:`.runtime_of`, or the runtime; None for the one whose
            kernels the program's spec is exact for.
        random_inputs: Number of sets of random inputs, the same in every call; 0 for none.

    Returns:
        The fraction of equal outputs, 1.0 if all are, with the number of outputs compared.

    Raises:
        ValueError: If results of the module have another shape or type than the program's, or
            see :func:`run_tflite`.
    """
    program = Program(path, runtime=runtime)
    calls = example_calls(program, inputs, random_inputs)
    emulated = emulated_results(module, program, inputs, calls, forward=forward)
    equal = total = skipped = 0
    for outputs, expected in zip(program.run_all(calls), emulated, strict=True):
        if expected is None:
            skipped += 1
            continue
        for output, x in zip(outputs, expected, strict=True):
            equal += int(((x == output) | (np.isnan(x) & np.isnan(output))).sum())
            total += output.size
    return Agreement(equal, total, inputs=random_inputs + 1 - skipped, skipped=skipped)


def example_calls(
    ports: ProgramPorts, inputs: Sequence[Any], random_inputs: int
) -> list[list[Any]]:
    """Return sets of arguments, without their nesting: those that are given, and random ones.

    Args:
        ports: Ports of the program.
        inputs: Arguments of the module's forward.
        random_inputs: Number of sets of random arguments, see :func:`verify`.
    """
    random = np.random.default_rng(0)
    calls = [tree_leaves(list(inputs))]
    for trial in range(random_inputs):
        reach = 3.0 if trial % 2 else 1.0
        calls.append(_random_arguments(ports, calls[-1], random, reach))
    return calls


def emulated_results(
    module: nn.Module,
    ports: ProgramPorts,
    inputs: Sequence[Any],
    calls: Sequence[Sequence[Any]],
    *,
    forward: Callable[..., Any] | None = None,
) -> list[list[NDArray[Any]] | None]:
    """Compute results of a program with the emulated module that was exported.

    Args:
        module: Emulated module.
        ports: Ports of the program.
        inputs: Arguments of the module's forward, whose nesting the calls have.
        calls: Sets of arguments, see :func:`example_calls`.
        forward: Function that runs the module, as it was exported.

    Returns:
        For each call the results that the program has, see :class:`.Program`; None for arguments
        after the first ones on which the module itself has no finite result.

    Raises:
        ValueError: If a result has another shape or type than the program's.
    """
    form = tree_structure(list(inputs))
    emulator, run = emulator_of(module), forward_of(module, forward)
    all_results: list[list[NDArray[Any]] | None] = []
    with emulated_evaluation(module, emulator):
        for number, leaves in enumerate(calls):
            arguments = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
            for port in ports.inputs:
                qparams = ports.qparams_of(port)
                if port.from_chip and qparams is not None:
                    arguments[port.position] = fake_quantize(arguments[port.position], qparams)
                    emulator.state.set_qparams(arguments[port.position], qparams)
            try:
                results = tree_leaves(run(*tree_unflatten(arguments, form)))
            except FloatingPointError:
                if number == 0:
                    raise
                all_results.append(None)
                continue
            by_position = {port.position: port for port in ports.outputs}
            all_results.append([_comparable(ports, port, results) for port in by_position.values()])
    return all_results


def _comparable(ports: ProgramPorts, port: Port, results: Sequence[Any]) -> NDArray[Any]:
    """Return the result of the module that an output of the program can be compared with."""
    remedy = "export the module again, or pass the forward that it was exported with"
    position, dtype = port.position, ports.dtype_of(port)
    result = results[position] if position < len(results) else None
    is_float = dtype == "float32"
    if not isinstance(result, Tensor) or result.is_floating_point() != is_float:
        kind = f"{result.dtype} tensor" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"result {position} is a {kind} in the module and {dtype} in the program: {remedy}"
        )
    if tuple(result.shape) != port.shape:
        raise ValueError(
            f"result {position} has shape {tuple(result.shape)} in the module and {port.shape} "
            f"in the program: {remedy}"
        )
    result = result.detach().cpu()
    return np.asarray((result.float() if is_float else result).numpy())


def _random_arguments(
    program: ProgramPorts, leaves: Sequence[Any], random: np.random.Generator, reach: float
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
