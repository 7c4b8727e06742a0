"""Capture one emulated forward of a module, at one shape, as a program of the accelerator.

Every operator reports the instruction that it has emulated; :mod:`.provenance` follows the origin
of its operands, and :mod:`.layout` lays them out. The module's code is never read: whatever it does
in Python, the program is the instructions that have run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_nna.deploy.fused_activation import with_fused_activations
from lightning_nna.deploy.graph import CapturedProgram, CaptureError, Port
from lightning_nna.deploy.recorder import Recorder, attributes_of
from lightning_nna.emulation.attachment import attached, emulate
from lightning_nna.emulation.emulator import Emulator
from lightning_nna.emulation.spec import LITERT_ACCUMULATOR, PRESETS, NNASpec
from lightning_nna.weights.pipeline import pipeline_of


def capture(
    module: nn.Module,
    example_inputs: Sequence[Any],
    *,
    forward: Callable[..., Any] | None = None,
    allow_cpu: bool = False,
    channels_last_inputs: Collection[int] = (),
    channels_last_outputs: Collection[int] = (),
) -> CapturedProgram:
    """Run a module emulated once and return its instructions as a program.

    Float arguments become integer inputs with the quantization parameters with which the network
    first reads them (one input for each); results of emulated operators keep theirs. Integer
    arguments are inputs if a table is looked up with them; if they only decide, as lengths do, they
    are fixed. Results that are no activations (integers that no instruction computes, masks,
    arguments that are passed on) are left out.

    Args:
        module: Emulated module, calibrated.
        example_inputs: Arguments of the forward, in any nesting of lists and tuples; their shapes
            are the program's.
        forward: Function of the module and the arguments that runs it; None for its own forward.
        allow_cpu: Whether operators of :mod:`.cpu_operators`, which no accelerator has, become
            float operators of the program that run on the CPU. Their results are not promised to be
            the emulation's in every bit; :func:`.verify` measures the fraction that is.
        channels_last_inputs: Positions of arguments, nested ones one after the other, that the
            program reads with their channels, axis 1, last. The caller passes them unchanged.
        channels_last_outputs: Positions of results that it writes in this way.

    Returns:
        The program.

    Raises:
        TypeError: If ``example_inputs`` is a tensor or a mapping.
        CaptureError: If the module is not emulated or not calibrated, if an operator is not
            emulated, if a value comes from one that is not, or if channels cannot be last.

    Example:
        >>> from lightning_nna import calibrate
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
        >>> emulator = calibrate(net, [torch.randn(8, 4)])
        >>> program = capture(net, [torch.zeros(1, 4)])
        >>> [operator.name for operator in program.operators]
        ['FULLY_CONNECTED', 'TANH']
    """
    if isinstance(example_inputs, (Tensor, Mapping)):
        raise TypeError(
            f"example_inputs is a list of the forward's arguments, got a "
            f"{type(example_inputs).__name__}: pass [x], and for arguments by keyword "
            f"forward=lambda module, x: module(name=x)"
        )
    emulator = emulator_of(module)
    leaves, form = tree_flatten(list(example_inputs))
    floats = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    if floats and not any(x.numel() for x in floats):
        raise CaptureError(
            f"the arguments are empty, of shape {tuple(floats[0].shape)}: a program has the shapes "
            "of its example, so export it with at least one of a batch"
        )
    recorder = Recorder(
        emulator,
        allow_cpu=allow_cpu,
        channels_last_inputs=channels_last_inputs,
        channels_last_outputs=channels_last_outputs,
    )
    with recorder.python_reads(), emulated_evaluation(module, emulator), recorder.recording():
        attributes = attributes_of(module)
        recorder.follow_attributes(attributes)
        copies = [recorder.argument(k, x) for k, x in enumerate(leaves)]
        result = forward_of(module, forward)(*tree_unflatten(copies, form))
        results = tree_leaves(result)
        outputs = [recorder.result(k, x) for k, x in enumerate(results)]
        recorder.validate_state(module, attributes)
    ports = [port for each in outputs for port in each]
    if not ports:
        raise CaptureError("no result of the forward is an activation: there is nothing to export")
    program = with_fused_activations(
        recorder.graph.finish(recorder.ports, ports, recorder.fixed(leaves), emulator.spec)
    )
    _validate_order("argument", channels_last_inputs, program.inputs)
    _validate_order("result", channels_last_outputs, program.outputs)
    left_out = [k for k, x in enumerate(results) if isinstance(x, Tensor) and not outputs[k]]
    return replace(program, left_out=tuple(left_out))


def _validate_order(kind: str, positions: Collection[int], ports: Sequence[Port]) -> None:
    """Validate that the program has channels last wherever that was asked for."""
    by_position = {position: [p for p in ports if p.position == position] for position in positions}
    for position, own in by_position.items():
        if not own:
            reason = f"it is no {'input' if kind == 'argument' else 'output'} of the program"
        elif any(port.order is None for port in own):
            parts = "several parts" if own[0].part is not None else f"shape {own[0].shape}"
            reason = f"it has {parts}; channels are axis 1 of floats of three axes or more"
        else:
            continue
        raise CaptureError(
            f"{kind} {position} cannot have its channels last: {reason}. Leave {position} out of "
            f"channels_last_{'inputs' if kind == 'argument' else 'outputs'}"
        )


@contextmanager
def emulated_evaluation(module: nn.Module, emulator: Emulator) -> Iterator[None]:
    """Run a module emulated and in evaluation mode; afterwards it is unchanged."""
    training = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with emulate(module, emulator.spec, targets=emulator.targets), torch.no_grad():
            yield
    finally:
        for each, mode in training:
            each.training = mode


def forward_of(module: nn.Module, forward: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return the function of the arguments that runs a module."""
    return module if forward is None else partial(forward, module)


def emulator_of(module: nn.Module) -> Emulator:
    """Return the emulator of a module that can be exported.

    Args:
        module: Emulated module, calibrated.

    Raises:
        CaptureError: If it cannot be exported; the message has the reason.
    """
    emulator = attached(module)
    if emulator is None or not emulator.calibrated:
        raise CaptureError(
            "the module has no ranges yet: call calibrate(module, batches), or train it with "
            "NNAEmulation, before it is exported"
        )
    if differences := _differences(emulator.spec):
        exact = (name for name, spec in PRESETS.items() if not _differences(spec))
        raise CaptureError(
            f"there is no .tflite program in the arithmetic of {emulator.spec.name!r}: "
            f"{'; '.join(differences)}; emulate the module with a spec without that, as the "
            f"presets {', '.join(sorted(exact))} are"
        )
    if pipeline_of(module).phase == "train":
        raise CaptureError(
            "in a training step the weights are not the deployed ones: export after it"
        )
    return emulator


def _differences(spec: NNASpec) -> list[str]:
    """List fields of a spec whose arithmetic the kernels of a .tflite program do not have.

    Weights and biases of fewer bits, one weight scale a tensor and operators that run on the CPU
    change the integers of a program and not its kernels. Processors run a program of 8 bits with
    two roundings everywhere.
    """
    bits = spec.activation_bits
    roundings = ("reference", "double") if bits == 8 else ("reference",)
    widest_bias = 32 if bits == 8 else 64
    kernels: dict[str, tuple[bool, str]] = {
        "rounding": (spec.rounding in roundings, " or ".join(map(repr, roundings))),
        "table_entries": (spec.table_entries == 0, "0"),
        "accumulator_bits": (
            spec.accumulator_bits == LITERT_ACCUMULATOR[bits],
            str(LITERT_ACCUMULATOR[bits]),
        ),
        "accumulator_overflow": (spec.accumulator_overflow == "wrap", "'wrap'"),
        "bias_bits": (spec.bias_bits <= widest_bias, f"at most {widest_bias}"),
    }
    return [
        f"{name} is {getattr(spec, name)!r}, and the kernels of {bits}-bit activations have {other}"
        for name, (same, other) in kernels.items()
        if not same
    ]
