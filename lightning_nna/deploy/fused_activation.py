"""Let an instruction clip its result itself instead of an activation after it.

Kernels such as ``CONV_2D`` and ``ADD`` clip their integers at bounds that an option names, their
fused activation. A ReLU that alone reads their result, on the same quantization parameters, becomes
this option; one that clips nothing, because the integers begin where it would clip, is dropped.

    CONV_2D -> RELU       becomes    CONV_2D with fusedActivationFunction RELU
"""

from __future__ import annotations

from collections import Counter
from copy import copy
from dataclasses import replace

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from lightning_nna.deploy.flatbuffer import OperatorSpec, TensorSpec
from lightning_nna.deploy.graph import CapturedProgram
from lightning_nna.emulation.operators.catalog import kernels

_KINDS = schema.ActivationFunctionType
#: Bounds of the activations that can be fused, and their numbers in the schema, by kernel.
_ACTIVATIONS = {
    "RELU": (0.0, np.inf, _KINDS.RELU),
    "RELU_N1_TO_1": (-1.0, 1.0, _KINDS.RELU_N1_TO_1),
    "RELU6": (0.0, 6.0, _KINDS.RELU6),
}


def with_fused_activations(program: CapturedProgram) -> CapturedProgram:
    """Return a program whose activations are fused into the operators before them.

    Args:
        program: Program, unchanged.

    Returns:
        Program with the same outputs in every bit; the tensor of an operator that an activation is
        fused into keeps its name.
    """
    readers = Counter(name for each in program.operators for name in each.inputs)
    readers.update(port.tensor for port in program.outputs)
    inputs = {port.tensor for port in program.inputs}
    producers: dict[str, int] = {}
    operators: list[OperatorSpec | None] = []
    names: dict[str, str] = {}
    for original in program.operators:
        sources = tuple(names.get(name, name) for name in original.inputs)
        each = replace(original, inputs=sources)
        if _is_plain_activation(each, program):
            (source,), (result,) = each.inputs, each.outputs
            number = producers.get(source)
            producer = None if number is None else operators[number]
            if number is not None and producer is not None and readers[original.inputs[0]] == 1:
                fused = _fused(producer, each.name)
                if fused is not None:
                    operators[number] = fused
                    names[result] = source
                    readers[source] = readers[result]
                    operators.append(None)
                    continue
            if source not in inputs and clips_nothing(each.name, program.tensors[source]):
                names[result] = source
                readers[source] += readers[result] - 1
                operators.append(None)
                continue
        producers.update(dict.fromkeys(each.outputs, len(operators)))
        operators.append(each)
    pairs = [
        (each, site)
        for each, site in zip(operators, program.sites, strict=True)
        if each is not None
    ]
    return replace(
        program,
        operators=tuple(each for each, _ in pairs),
        sites=tuple(site for _, site in pairs),
        tensors={name: spec for name, spec in program.tensors.items() if name not in names},
        outputs=tuple(
            replace(port, tensor=names.get(port.tensor, port.tensor)) for port in program.outputs
        ),
    )


def clips_nothing(name: str, spec: TensorSpec) -> bool:
    """Tell if an activation changes no integer of a tensor.

    Args:
        name: Kernel of the activation.
        spec: Type and quantization parameters of the tensor.

    Example:
        >>> bool(clips_nothing("RELU", TensorSpec((2,), "int8", 0.5, zero_point=-128)))
        True
        >>> clips_nothing("RELU6", TensorSpec((2,), "int8", 0.5, zero_point=-128))  # 12 steps
        False
    """
    limits, scale = np.iinfo(spec.dtype), float(spec.scales[0])
    low, high, _ = _ACTIVATIONS[name]
    begins = spec.zero_point + round(low / scale) <= limits.min
    return begins and (np.isinf(high) or spec.zero_point + round(high / scale) >= limits.max)


def _is_plain_activation(each: OperatorSpec, program: CapturedProgram) -> bool:
    """Tell if an operator is an activation that leaves the quantization parameters unchanged."""
    if each.name not in _ACTIVATIONS:
        return False
    x, y = program.tensors[each.inputs[0]], program.tensors[each.outputs[0]]
    parameters = ((s.shape, s.dtype, float(s.scales[0]), s.zero_point) for s in (x, y))
    return next(parameters) == next(parameters) and not x.is_variable


def _fused(producer: OperatorSpec, activation: str) -> OperatorSpec | None:
    """Return a producer with a fused activation; None if its kernel has none, or has one yet."""
    options = producer.options
    if not kernels()[producer.name].fuses_activation or options.fusedActivationFunction:
        return None
    fused = copy(options)
    fused.fusedActivationFunction = _ACTIVATIONS[activation][2]
    return replace(producer, options=fused)
