"""Compress the constants of a program for TFLite-Micro, which decodes them while it runs.

The custom operator ``TFLM_DECODE`` stands before the operator that reads a constant and writes it
into the arena. Its operands are the encoded constant and a table that begins with 16 bytes: type,
version of the operator, two zeros, and what the type needs.

    lookup table   type 0, version 1, axis (15: one table for all) << 4 | bits, distance of the
                   tables; then the tables. The constant is indices of 1 to 7 bits, the highest bit
                   first.
    pruning        type 2, version 1; then the values that are no zero, in their order.
                   The constant is one bit an element, the highest bit first: 1 if it is no zero.

``[[3, 0, 0, 5, 0, 0, 0, 0]]`` as pruning is the byte ``0b1001_0000`` and the values ``3, 5``. As
one lookup table it is the values ``0, 3, 5`` and two bits an element, ``01 00 00 10 00 00 00 00``.

Kernels take the channels from the scales of the constant, not from the axis: after each channel of
a constant with several scales they go on by the distance of the tables. One table for all of them
therefore has distance 0. (The tool of tflite-micro 0.dev20261023 writes its number of values, and
the kernel of the same version decodes other integers.) A weight with one scale gets that scale for
each channel where tables of its channels make the file smaller: its kernel computes the same
integers.

Reference:
    tensorflow/tflite-micro, ``kernels/decode.cc``, ``decode_state_lut.cc`` and
    ``decode_state_prune.cc``, and its tool ``compression``, whose lookup tables have these bytes
    otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_nna.deploy.flatbuffer import OperatorSpec, TensorSpec
from lightning_nna.deploy.graph import CapturedProgram
from lightning_nna.deploy.tflite import program_bytes

#: Name of the custom operator.
DECODE = "TFLM_DECODE"

# Of the weight of operators whose kernels take a scale for each channel.
_CHANNEL_AXES = {"FULLY_CONNECTED": 0, "CONV_2D": 0, "DEPTHWISE_CONV_2D": -1}
_LOOKUP_TABLE, _PRUNING = 0, 2
_VERSION = 1
_HEADER_BYTES = 16
_ONE_TABLE = 15
_MOST_BITS = 7


@dataclass(frozen=True)
class CompressedTensor:
    """A constant that a program decodes while it runs.

    Args:
        name: Name of the tensor.
        method: ``"lookup table"``, ``"lookup table per channel"`` or ``"pruning"``.
        bits: Bits of an index, 1 for pruning.
        before_bytes: Bytes of the constant.
        after_bytes: Bytes of what it is decoded from, with its table.
    """

    name: str
    method: str
    bits: int
    before_bytes: int
    after_bytes: int


@dataclass(frozen=True)
class Encoding:
    """A constant in encoded form.

    Args:
        method: See :class:`CompressedTensor`.
        bits: Bits of an index, 1 for pruning.
        encoded: Indices, or the mask.
        table: Header and values.
    """

    method: str
    bits: int
    encoded: bytes
    table: bytes

    @property
    def size_bytes(self) -> int:
        """Return the bytes of the encoded constant and its table."""
        return len(self.encoded) + len(self.table)


def compressed(program: CapturedProgram) -> tuple[CapturedProgram, tuple[CompressedTensor, ...]]:
    """Compress every constant of a program that makes its file smaller.

    Of the forms of a constant, the one of the fewest bytes is taken. Constants of equal contents
    are stored once and are compressed together or not at all.

    Args:
        program: Program without compressed constants.

    Returns:
        The program with the operators that decode, and its compressed constants; the same program
        if no constant makes it smaller.
    """
    by_contents: dict[bytes, list[str]] = {}
    for name, spec in program.tensors.items():
        if spec.data is not None:
            by_contents.setdefault(spec.data.tobytes(), []).append(name)
    by_channel = _with_scales_of_channels(program)
    taken: dict[str, Encoding] = {}
    plain, result, smallest = program, program, len(program_bytes(program))
    for _, names in sorted(by_contents.items(), key=lambda item: -len(item[0])):
        one_form = {name: program.tensors[name] for name in names}
        other_form = {name: by_channel.get(name, spec) for name, spec in one_form.items()}
        best = None
        for specs in (one_form, other_form) if by_channel.keys() & set(names) else (one_form,):
            encodings = _encodings(specs)
            if encodings is None:
                continue
            candidate = replace(plain, tensors={**plain.tensors, **specs})
            decoding = with_decoding(candidate, taken | encodings)
            if len(program_bytes(decoding)) < smallest:
                best = candidate, encodings
                result, smallest = decoding, len(program_bytes(decoding))
        if best is not None:
            plain, taken = best[0], taken | best[1]
    tensors = tuple(
        CompressedTensor(name, each.method, each.bits, _bytes_of(program, name), each.size_bytes)
        for name, each in taken.items()
    )
    return result, tensors


def _encodings(specs: Mapping[str, TensorSpec]) -> dict[str, Encoding] | None:
    """Encode constants of equal contents; None if they take as many bytes as one of them."""
    encodings = {}
    for name, spec in specs.items():
        encoding = smallest_encoding(spec)
        if encoding is None:
            return None
        encodings[name] = encoding
    size = max(spec.data.nbytes for spec in specs.values() if spec.data is not None)
    is_smaller = sum(encoding.size_bytes for encoding in encodings.values()) < size
    return encodings if is_smaller else None


def _with_scales_of_channels(program: CapturedProgram) -> dict[str, TensorSpec]:
    """Return the weights that have one scale, with that scale for each channel."""
    reads = Counter(name for each in program.operators for name in each.inputs)
    as_weight = Counter(
        (each.inputs[1], _CHANNEL_AXES[each.name])
        for each in program.operators
        if each.name in _CHANNEL_AXES
    )
    weights = {}
    for (name, axis), count in as_weight.items():
        spec = program.tensors[name]
        is_symmetric = len(spec.scales) == 1 and spec.zero_point == 0
        if spec.data is not None and is_symmetric and count == reads[name]:
            axis %= len(spec.shape)
            scales = np.repeat(spec.scales, spec.shape[axis])
            weights[name] = replace(spec, scale=scales, quantized_dimension=axis)
    return weights


def smallest_encoding(spec: TensorSpec) -> Encoding | None:
    """Return the form of a constant with the fewest bytes; None if it has no other form.

    Args:
        spec: Constant. One without quantization parameters, as a shape is, has no other form:
            kernels read it before the program runs.
    """
    if spec.data is None or not spec.scales.any() or not spec.data.size:
        return None
    axes = (0, len(spec.shape) - 1) if len(spec.scales) > 1 else (0,)
    if spec.quantized_dimension not in axes:  # The kernels have no other.
        return None
    forms = [lookup_tables(spec, per_channel=False), pruning(spec)]
    if len(spec.scales) > 1:
        forms.append(lookup_tables(spec, per_channel=True))
    return min((x for x in forms if x is not None), key=lambda x: x.size_bytes, default=None)


def lookup_tables(spec: TensorSpec, *, per_channel: bool) -> Encoding | None:
    """Encode a constant as indices of tables of its values.

    Args:
        spec: Constant, quantized along its first or its last axis.
        per_channel: Whether each channel with a scale of its own has a table of its own.

    Returns:
        The encoded constant; None if a table needs more than 128 values.

    Example:
        >>> spec = TensorSpec.constant(np.array([[3, 0, 0, 5, 0, 0, 0, 0]], np.int8), 0.1)
        >>> encoding = lookup_tables(spec, per_channel=False)
        >>> encoding.bits, encoding.encoded.hex(), encoding.table[16:].hex()
        (2, '4200', '000305')
    """
    assert spec.data is not None
    axis = spec.quantized_dimension
    tables, indices = [], []
    for channel in np.moveaxis(spec.data, axis, 0) if per_channel else [spec.data]:
        values, places = np.unique(channel, return_inverse=True)
        if len(values) > 1 << _MOST_BITS:
            return None
        tables.append(values)
        indices.append(places.reshape(channel.shape))
    stacked = np.moveaxis(np.stack(indices), 0, axis) if per_channel else indices[0]
    most = max(map(len, tables))
    bits = max(1, (most - 1).bit_length())
    digits = stacked.reshape(-1, 1) >> np.arange(bits - 1, -1, -1) & 1
    distance = 0 if len(spec.scales) > len(tables) else most
    header = (_VERSION, (axis if per_channel else _ONE_TABLE) << 4 | bits, distance)
    padded = [np.pad(table, (0, most - len(table))) for table in tables]
    return Encoding(
        "lookup table per channel" if per_channel else "lookup table",
        bits,
        np.packbits(digits.astype(np.uint8).reshape(-1)).tobytes(),
        _header(_LOOKUP_TABLE, header) + np.concatenate(padded).tobytes(),
    )


def pruning(spec: TensorSpec) -> Encoding | None:
    """Encode a constant as a mask and the values that are no zero.

    Args:
        spec: Constant, quantized along its first or its last axis.

    Returns:
        The encoded constant; None if it has a zero point and more than 8 bits, which the kernel
        does not decode.

    Example:
        >>> spec = TensorSpec.constant(np.array([[3, 0, 0, 5, 0, 0, 0, 0]], np.int8), 0.1)
        >>> encoding = pruning(spec)
        >>> encoding.encoded.hex(), encoding.table[16:].hex()
        ('90', '0305')
    """
    assert spec.data is not None
    if spec.dtype != "int8" and spec.zero_point:
        return None
    values = spec.data.reshape(-1)
    is_nonzero = values != spec.zero_point
    table = _header(_PRUNING, (_VERSION,)) + values[is_nonzero].tobytes()
    return Encoding("pruning", 1, np.packbits(is_nonzero).tobytes(), table)


def with_decoding(program: CapturedProgram, encodings: Mapping[str, Encoding]) -> CapturedProgram:
    """Return a program that decodes constants before each operator that reads them.

    The memory of a decoded constant is free again after that operator.

    Args:
        program: Program without compressed constants.
        encodings: Encoded constants by name.
    """
    tensors: dict[str, TensorSpec] = {}
    for name, spec in program.tensors.items():
        if name in encodings:
            tensors[name] = _raw(encodings[name].encoded)
            tensors[f"{name}/table"] = _raw(encodings[name].table)
        else:
            tensors[name] = spec
    operators: list[OperatorSpec] = []
    sites: list[str] = []
    for site, operator in zip(program.sites, program.operators, strict=True):
        encoded = [name for name in dict.fromkeys(operator.inputs) if name in encodings]
        decoded = {name: f"{name}/decoded{len(operators)}" for name in encoded}
        for name, output in decoded.items():
            tensors[output] = replace(program.tensors[name], data=None)
        if encoded:
            operands = [each for name in encoded for each in (name, f"{name}/table")]
            operators.append(
                OperatorSpec(DECODE, tuple(operands), tuple(decoded.values()), is_custom=True)
            )
            sites.append(site)
        inputs = tuple(decoded.get(name, name) for name in operator.inputs)
        operators.append(replace(operator, inputs=inputs))
        sites.append(site)
    return replace(program, tensors=tensors, operators=tuple(operators), sites=tuple(sites))


def _header(kind: int, settings: Sequence[int]) -> bytes:
    return bytes((kind, _VERSION, 0, 0, *settings)).ljust(_HEADER_BYTES, b"\0")


def _raw(contents: bytes) -> TensorSpec:
    data = np.frombuffer(contents, np.uint8)
    return TensorSpec(data.shape, "uint8", data=data)


def _bytes_of(program: CapturedProgram, name: str) -> int:
    data = program.tensors[name].data
    assert data is not None
    return data.nbytes
