"""Small LiteRT programs as an oracle: write a .tflite of a few operators and run it.

The files are run on LiteRT's *reference* kernels (``BUILTIN_REF``), the only ones whose arithmetic
the emulator claims to equal.

    x = TensorSpec((2, 3), "int8", scale=0.1, zero_point=-4)
    weight = TensorSpec.constant(np.ones((5, 3), np.int8), scale=0.02)
    y = TensorSpec((2, 5), "int8", scale=0.3)
    (outputs,) = run_model(fully_connected_model(x, weight, None, y), [inputs])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ai_edge_litert import schema_py_generated as schema

from lightning_nna.deploy.flatbuffer import OperatorSpec, TensorSpec, build_model
from lightning_nna.testing.replay import run_calls, run_model

__all__ = ["OperatorSpec", "TensorSpec", "build_model", "run_calls", "run_model"]


def fully_connected_model(
    x: TensorSpec, weight: TensorSpec, bias: TensorSpec | None, y: TensorSpec, *, relu: bool = False
) -> bytes:
    """Return y = x weight^T + bias; ``weight`` is (out, in), ``bias`` int32 of scale x * weight."""
    tensors = {"x": x, "weight": weight, "y": y} | ({} if bias is None else {"bias": bias})
    options = schema.FullyConnectedOptionsT(
        fusedActivationFunction=_activation(relu), keepNumDims=len(x.shape) > 2
    )
    operator = OperatorSpec(
        "FULLY_CONNECTED", ("x", "weight", "" if bias is None else "bias"), ("y",), options
    )
    return build_model(tensors, [operator], ["x"], ["y"])


def binary_model(
    name: str, a: TensorSpec, b: TensorSpec, y: TensorSpec, *, relu: bool = False
) -> bytes:
    """Return y = a op b for ``name`` ADD, SUB or MUL; shapes broadcast."""
    options = {"ADD": schema.AddOptionsT, "SUB": schema.SubOptionsT, "MUL": schema.MulOptionsT}
    operator = OperatorSpec(
        name, ("a", "b"), ("y",), options[name](fusedActivationFunction=_activation(relu))
    )
    return build_model({"a": a, "b": b, "y": y}, [operator], ["a", "b"], ["y"])


def unary_model(name: str, x: TensorSpec, y: TensorSpec) -> bytes:
    """Return y = op(x) for ``name`` LOGISTIC, TANH, RELU, QUANTIZE or DEQUANTIZE."""
    options = {"QUANTIZE": schema.QuantizeOptionsT, "DEQUANTIZE": schema.DequantizeOptionsT}
    operator = OperatorSpec(name, ("x",), ("y",), options.get(name, lambda: None)())
    return build_model({"x": x, "y": y}, [operator], ["x"], ["y"])


def concatenation_model(parts: Sequence[TensorSpec], y: TensorSpec, *, axis: int) -> bytes:
    """Return the concatenation of ``parts``; all of them have the quantization of ``y``."""
    names = tuple(f"x{position}" for position in range(len(parts)))
    operator = OperatorSpec("CONCATENATION", names, ("y",), schema.ConcatenationOptionsT(axis=axis))
    tensors = dict(zip(names, parts, strict=True)) | {"y": y}
    return build_model(tensors, [operator], names, ["y"])


def gather_model(table: TensorSpec, indices: TensorSpec, y: TensorSpec) -> bytes:
    """Return the rows of the constant ``table`` at the int32 ``indices``."""
    operator = OperatorSpec("GATHER", ("table", "indices"), ("y",), schema.GatherOptionsT(axis=0))
    tensors = {"table": table, "indices": indices, "y": y}
    return build_model(tensors, [operator], ["indices"], ["y"])


def embedding_lookup_model(table: TensorSpec, indices: TensorSpec, y: TensorSpec) -> bytes:
    """Return the rows of ``table`` by EMBEDDING_LOOKUP; ``indices`` have one axis."""
    operator = OperatorSpec("EMBEDDING_LOOKUP", ("indices", "table"), ("y",))
    tensors = {"table": table, "indices": indices, "y": y}
    return build_model(tensors, [operator], ["indices"], ["y"])


def lstm_model(
    x: TensorSpec,
    input_weights: Sequence[TensorSpec],
    recurrent_weights: Sequence[TensorSpec],
    biases: Sequence[TensorSpec],
    hidden: TensorSpec,
    cell: TensorSpec,
    *,
    cell_clip: float = 0.0,
) -> bytes:
    """Return the fused 8x8_16 LSTM over ``x``, (batch, time, input).

    The four gates come in the order input, forget, cell, output, which is PyTorch's. Weights are
    int8 with one scale a tensor (the kernel zeroes the gate otherwise), biases int32 of scale
    x * input weight. ``hidden`` (int8) and ``cell`` (int16, zero point 0, scale a power of two
    from 2^-15 to 2^-9) are (batch, units). The output has the quantization of ``hidden``; the
    state is kept from call to call.
    """
    gates = ("input", "forget", "cell", "output")
    inputs = [""] * 24
    tensors = {"x": x}
    inputs[0] = "x"
    for first, kind, specs in ((1, "w", input_weights), (5, "r", recurrent_weights)):
        names = [f"{kind}_{gate}" for gate in gates]
        inputs[first : first + 4] = names
        tensors |= zip(names, specs, strict=True)
    inputs[12:16] = [f"b_{gate}" for gate in gates]
    tensors |= zip(inputs[12:16], biases, strict=True)
    inputs[18:20] = ["hidden", "cell"]
    tensors["hidden"] = replace(hidden, is_variable=True)
    tensors["cell"] = replace(cell, is_variable=True)
    tensors["y"] = replace(hidden, shape=(*x.shape[:2], hidden.shape[1]))
    # Five are demanded; the kernel reads the last alone: the scale in which it writes the state.
    intermediates = [f"intermediate_{position}" for position in range(5)]
    tensors |= {name: TensorSpec((), "int16", 2.0**-12) for name in intermediates[:4]}
    tensors[intermediates[4]] = replace(hidden, shape=())
    options = schema.UnidirectionalSequenceLSTMOptionsT(
        fusedActivationFunction=schema.ActivationFunctionType.TANH, cellClip=cell_clip
    )
    operator = OperatorSpec(
        "UNIDIRECTIONAL_SEQUENCE_LSTM", tuple(inputs), ("y",), options, tuple(intermediates)
    )
    return build_model(tensors, [operator], ["x"], ["y"])


def _activation(relu: bool) -> int:
    kinds = schema.ActivationFunctionType
    return int(kinds.RELU if relu else kinds.NONE)
