"""The .tflite format: tensors and operators of one graph as bytes, and nothing else.

Files are written through the flatbuffer schema that ai-edge-litert ships. The same graph always
gives the same bytes: constants of equal contents share a buffer, and nothing depends on time or
path.

    x = TensorSpec((2, 3), "int8", scale=0.1, zero_point=-4)
    y = TensorSpec((2, 3), "int8", scale=1 / 256, zero_point=-128)
    logistic = OperatorSpec("LOGISTIC", ("x",), ("y",))
    file = build_model({"x": x, "y": y}, [logistic], ["x"], ["y"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from lightning_nna.emulation.operators.catalog import kernels
from lightning_nna.emulation.operators.record import Kernel

DTYPES = {
    "float32": schema.TensorType.FLOAT32,
    "int8": schema.TensorType.INT8,
    "int16": schema.TensorType.INT16,
    "int32": schema.TensorType.INT32,
    "int64": schema.TensorType.INT64,
    "uint8": schema.TensorType.UINT8,
    "bool": schema.TensorType.BOOL,
}
# Where runtimes expect the data of a buffer to begin.
_ALIGNMENT = 16


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a program: real value = scale (stored value - zero point).

    ``scale`` is one number, or one for each index of ``quantized_dimension`` (then every zero
    point is ``zero_point``), or 0 for a tensor that is not quantized. A tensor with ``data`` is
    a constant; one with ``is_variable`` keeps its value from call to call.
    """

    shape: tuple[int, ...]
    dtype: str
    scale: float | np.ndarray = 0.0
    zero_point: int = 0
    data: np.ndarray | None = None
    quantized_dimension: int = 0
    is_variable: bool = False

    @classmethod
    def constant(cls, data: np.ndarray, scale: float | np.ndarray = 0.0) -> TensorSpec:
        """Return the symmetric constant that holds ``data``, scaled along its first axis."""
        return cls(data.shape, str(data.dtype), scale, data=data)

    @property
    def scales(self) -> np.ndarray:
        """The scales as float32, the precision in which a file holds them."""
        return np.atleast_1d(np.asarray(self.scale, np.float32))


@dataclass(frozen=True)
class OperatorSpec:
    """One operator: its name in the schema, and the names of its tensors ("" for an absent one).

    An operator that ``is_custom`` has a name that a runtime knows and the schema does not.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: Any = None
    intermediates: tuple[str, ...] = ()
    is_custom: bool = False


def options_of(operator: str, options: Mapping[str, Any]) -> Any:
    """Return the options table of an operator, None if it has none.

    Args:
        operator: Name of a registered kernel.
        options: Values by the schema's own names of fields.

    Raises:
        ValueError: If no record has the kernel.

    Example:
        >>> options_of("SOFTMAX", {"beta": 1.0}).beta
        1.0
    """
    name = _kernel(operator).options
    if name is None:
        name = f"{operator.title().replace('_', '')}Options"
    return getattr(schema, f"{name}T")(**options) if name else None


def version_of(operator: OperatorSpec, tensors: Mapping[str, TensorSpec]) -> int:
    """Return the lowest version of an operator that has its operands and options.

    A runtime rejects a program whose operator has a version that it does not know. The rules are
    those of the TensorFlow Lite converter (``op_version.cc``); kernels have them in their records.

    Args:
        operator: Operator of a registered kernel.
        tensors: All tensors of its program, by name.

    Raises:
        ValueError: If no record has the kernel.

    Example:
        >>> x = TensorSpec((2, 1), "int8", scale=0.1)
        >>> version_of(OperatorSpec("BROADCAST_TO", ("x", "shape"), ("y",)), {"x": x})
        3
    """
    kernel = _kernel(operator.name)
    operands = [tensors[name] for name in operator.inputs if name in tensors]
    version = kernel.versions.get(operands[0].dtype, 1)
    axes = max(len(spec.shape) for spec in operands)
    for most, needed in kernel.versions_by_rank:
        version = max(version, needed if axes > most else 1)
    return version if kernel.version is None else kernel.version(version, operator, tensors)


def _kernel(name: str) -> Kernel:
    known = kernels().get(name)
    if known is None:
        raise ValueError(
            f"the versions of {name} are not known: enter its kernel with register_kernel, or in "
            "the record of its operator"
        )
    return known


def build_model(
    tensors: Mapping[str, TensorSpec],
    operators: Sequence[OperatorSpec],
    inputs: Sequence[str],
    outputs: Sequence[str],
    metadata: Mapping[str, bytes] | None = None,
) -> bytes:
    """Return the .tflite file of one graph.

    Args:
        tensors: Tensors by name.
        operators: Operators, in the order in which they run.
        inputs: Names of the graph's inputs.
        outputs: Names of its outputs.
        metadata: Bytes that are stored with the graph, by name.
    """
    index = {name: position for position, name in enumerate(tensors)} | {"": -1}
    codes: dict[str, int] = {}
    for operator in operators:  # One code for all uses, at the highest version among them.
        version = 1 if operator.is_custom else version_of(operator, tensors)
        codes[operator.name] = max(version, codes.get(operator.name, version))
    custom = {operator.name for operator in operators if operator.is_custom}
    buffers = _Buffers()
    graph = schema.SubGraphT(
        tensors=[_tensor(name, spec, buffers) for name, spec in tensors.items()],
        inputs=[index[name] for name in inputs],
        outputs=[index[name] for name in outputs],
        operators=[_operator(operator, index, list(codes)) for operator in operators],
        name="main",
    )
    notes = [
        schema.MetadataT(name=name, buffer=buffers.add(np.frombuffer(data, np.uint8)))
        for name, data in (metadata or {}).items()
    ]
    model = schema.ModelT(
        version=3,
        operatorCodes=[
            _custom_code(name) if name in custom else _operator_code(name, version)
            for name, version in codes.items()
        ],
        subgraphs=[graph],
        buffers=buffers.tables,
        metadata=notes or None,
    )
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


class _AlignedBuffer(schema.BufferT):
    """A buffer whose data begin where a runtime can read them in place."""

    def Pack(self, builder: Any) -> Any:  # noqa: N802
        raw = self.data.tobytes()
        builder.StartVector(1, len(raw), _ALIGNMENT)
        builder.head -= len(raw)
        builder.Bytes[builder.head : builder.head + len(raw)] = raw
        data = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, data)
        return schema.BufferEnd(builder)


class _Buffers:
    """Data of constants; the first buffer is empty, as the format demands."""

    def __init__(self) -> None:
        self.tables: list[Any] = [schema.BufferT()]
        self._known: dict[bytes, int] = {}

    def add(self, data: np.ndarray) -> int:
        """Return the number of the buffer that holds some data."""
        contents = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        key = sha256(contents.data).digest()
        if key not in self._known:
            self._known[key] = len(self.tables)
            self.tables.append(_AlignedBuffer(data=contents))
        return self._known[key]


def _tensor(name: str, spec: TensorSpec, buffers: _Buffers) -> Any:
    """Return the tensor's table; a constant's data go to ``buffers``."""
    quantization = None
    if spec.scales.any():
        quantization = schema.QuantizationParametersT(
            scale=spec.scales.tolist(),
            zeroPoint=[spec.zero_point] * len(spec.scales),
            quantizedDimension=spec.quantized_dimension,
        )
    return schema.TensorT(
        shape=list(spec.shape),
        type=DTYPES[spec.dtype],
        buffer=0 if spec.data is None else buffers.add(spec.data),
        name=name,
        quantization=quantization,
        isVariable=spec.is_variable,
        hasRank=True,
    )


def _operator(spec: OperatorSpec, index: Mapping[str, int], codes: Sequence[str]) -> Any:
    kind = type(spec.options).__name__.removesuffix("T")
    return schema.OperatorT(
        opcodeIndex=codes.index(spec.name),
        inputs=[index[name] for name in spec.inputs],
        outputs=[index[name] for name in spec.outputs],
        builtinOptionsType=getattr(schema.BuiltinOptions, kind if spec.options else "NONE"),
        builtinOptions=spec.options,
        intermediates=[index[name] for name in spec.intermediates],
    )


def _operator_code(name: str, version: int) -> Any:
    code = getattr(schema.BuiltinOperator, name)
    # Codes up to 127 stand in the field of older files too, which LiteRT still reads.
    return schema.OperatorCodeT(
        builtinCode=code, deprecatedBuiltinCode=min(code, 127), version=version
    )


def _custom_code(name: str) -> Any:
    code = schema.BuiltinOperator.CUSTOM
    return schema.OperatorCodeT(
        builtinCode=code, deprecatedBuiltinCode=code, customCode=name, version=1
    )
