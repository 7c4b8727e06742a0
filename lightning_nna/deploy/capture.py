"""One forward of a module on the chip, at one shape, as a program of the chip.

Every operator reports the instruction that it has emulated; :mod:`.provenance` says where its
operands came from, and :mod:`.movement` what moves them there. So nothing is taken from the
module's code: whatever it does in Python, the program is what has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_nna.deploy.graph import CaptureError, Program
from lightning_nna.deploy.recorder import Recorder, attributes_of
from lightning_nna.emulation.attachment import attached, emulate
from lightning_nna.emulation.emulator import Emulator
from lightning_nna.emulation.spec import LITERT_ACCUMULATOR, NNASpec
from lightning_nna.weights.pipeline import pipeline_of


def capture(
    module: nn.Module,
    example_inputs: Sequence[Any],
    *,
    forward: Callable[..., Any] | None = None,
    allow_cpu: bool = False,
) -> Program:
    """Run a module on the chip once and give its instructions as a program.

    Float arguments become integer inputs on the grid on which the network first reads them (one
    input for each grid); those that an operator of the chip has made keep theirs. Integer arguments
    are inputs where a table is looked up; where they only steer, as lengths do, they are fixed.
    Results that are no activations (integers, masks, arguments that are passed on) are left out.

    Args:
        module: A module on the chip, calibrated.
        example_inputs: Arguments of the forward, nested in lists and tuples as it likes; their
            shapes are the program's.
        forward: How the module runs, called with it and the arguments; None for its own forward.
        allow_cpu: Whether operators of :mod:`.cpu_operators`, which no chip has, become float
            operators of the program that run on the CPU. What they give is not promised to be the
            emulation's in every bit; :func:`.verify` says how much of it is.

    Returns:
        The program.

    Raises:
        TypeError: If ``example_inputs`` is a tensor or a mapping.
        CaptureError: If the module is not on a chip or not calibrated, if an operator is not the
            chip's, or if a value comes from one that is not.

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
    recorder = Recorder(emulator, allow_cpu=allow_cpu)
    with recorder.asked(), on_chip(module, emulator), recorder.listening():
        kept = attributes_of(module)
        recorder.follow_state(kept)
        copies = [recorder.argument(k, x) for k, x in enumerate(leaves)]
        result = called(module, forward)(*tree_unflatten(copies, form))
        results = tree_leaves(result)
        outputs = [recorder.result(k, x) for k, x in enumerate(results)]
        recorder.refuse_state(module, kept)
    ports = [port for each in outputs for port in each]
    if not ports:
        raise CaptureError("no result of the forward is an activation: there is nothing to export")
    program = recorder.graph.finish(
        recorder.ports, ports, recorder.fixed(leaves), emulator.spec.name
    )
    left_out = [k for k, x in enumerate(results) if isinstance(x, Tensor) and not outputs[k]]
    return replace(program, left_out=tuple(left_out))


@contextmanager
def on_chip(module: nn.Module, emulator: Emulator) -> Iterator[None]:
    """Every bit of evaluation on the chip; afterwards the module is as it was."""
    training = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with emulate(module, emulator.spec, targets=emulator.targets), torch.no_grad():
            yield
    finally:
        for each, mode in training:
            each.training = mode


def called(module: nn.Module, forward: Callable[..., Any] | None) -> Callable[..., Any]:
    """How a module runs."""
    return module if forward is None else partial(forward, module)


def emulator_of(module: nn.Module) -> Emulator:
    """The emulator of a module that can be exported; a :class:`CaptureError` says why not."""
    emulator = attached(module)
    if emulator is None or not emulator.calibrated:
        raise CaptureError(
            "the module has no ranges yet: call calibrate(module, batches), or train it with "
            "NNAEmulation, before it is exported"
        )
    if differences := _differences(emulator.spec):
        raise CaptureError(
            f"there is no .tflite program in the arithmetic of {emulator.spec.name!r}: "
            f"{'; '.join(differences)}; put the module on a spec without that, as the presets "
            f"litert-int8, litert-int16x8 and ethos-u are"
        )
    if pipeline_of(module).phase == "train":
        raise CaptureError("in the middle of a training step weights are not those that deploy")
    return emulator


def _differences(spec: NNASpec) -> list[str]:
    """Fields of a spec whose arithmetic the kernels of a .tflite program do not have.

    Weights and biases of fewer bits, one weight scale a tensor and operators that run on the CPU
    change the integers of a program and not its kernels. Rounding twice everywhere is what
    processors make of a program of 8 bits.
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
