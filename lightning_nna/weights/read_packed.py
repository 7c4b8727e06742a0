"""A reader of packed weights that needs only NumPy and safetensors.

This file imports nothing of the package: where the weights are unpacked it can be used by itself.

    python read_packed.py network.safetensors
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = "lightning-nna packed 3"
#: The format without levels by channel.
_EARLIER_FORMAT = "lightning-nna packed 2"
NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'"sha256": ?"([0-9a-f]{64})"')
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Bytes of an element, by the name that torch has for its type.
_SIZES = {"bfloat16": 2, "bool": 1}

Bits = NDArray[np.unsignedinteger[Any]]


def read_packed(path: str | Path) -> dict[str, NDArray[Any]]:
    """Read every tensor of a file of ``save_packed``; bfloat16 comes as float32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is another, or not as it was written.
    """
    return {name: _array(*parts) for name, parts in packed_bits(path).items()}


def safetensors_numpy() -> ModuleType:
    """Import safetensors, which weights of a network need only when they are packed or unpacked.

    Raises:
        ModuleNotFoundError: If it is not installed; names the extra that has it.
    """
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ModuleNotFoundError(
            "packed weights need safetensors: pip install 'lightning-nna[deploy]', or safetensors "
            "alone to read them",
            name="safetensors",
        ) from error
    return safetensors.numpy


def packed_bits(path: str | Path) -> dict[str, tuple[Bits, str, tuple[int, ...]]]:
    """Bits, type and shape of every tensor of a file, see :func:`read_packed`."""
    contents = checked(Path(path))
    header = json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])
    metadata = header.get("__metadata__", {})
    if metadata.get("format") not in (FORMAT, _EARLIER_FORMAT):
        raise ValueError(
            f"{path} is no file of save_packed that this version reads: its format is "
            f"{metadata.get('format')}, not {FORMAT}"
        )
    parts: dict[str, dict[str, NDArray[Any]]] = {}
    for key, array in safetensors_numpy().load(contents).items():
        name, _, part = key.rpartition("|")
        parts.setdefault(name, {})[part] = array
    tensors = {}
    for name, entry in json.loads(metadata["tensors"]).items():
        shape, dtype = tuple(entry["shape"]), str(entry["dtype"])
        count = int(np.prod(shape, dtype=np.int64))
        scaled = "scales" in parts[name]
        size = 1 if scaled else _SIZES.get(dtype) or np.dtype(dtype).itemsize
        bits = unpacked(parts[name], count, _UNSIGNED[size])
        if scaled:
            axis = int(entry.get("axis", 0))
            bits = _scaled(bits.reshape(shape), parts[name]["scales"], axis).view(np.uint32)
        tensors[name] = bits, dtype, shape
    return tensors


def checked(path: Path) -> bytes:
    """Contents of a file that holds the checksum of itself.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds none, or is not as it was written.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    contents = path.read_bytes()
    places = list(_DIGEST.finditer(contents))
    if len(places) != 1:
        raise ValueError(f"{path} is no file of this project: it has {len(places)} checksums")
    digest = hashlib.sha256(_with_digest(contents, places[0], NO_DIGEST)).hexdigest()
    if digest != places[0][1].decode():
        raise ValueError(f"{path} is not as it was written: its checksum differs; write it again")
    return contents


def sealed(contents: bytes) -> bytes:
    """Contents whose empty checksum is replaced by that of all of them."""
    (place,) = _DIGEST.finditer(contents)
    return _with_digest(contents, place, hashlib.sha256(contents).hexdigest())


def _with_digest(contents: bytes, place: re.Match[bytes], digest: str) -> bytes:
    """Contents with another checksum in its place; weights may have the same bytes as it."""
    return contents[: place.start(1)] + digest.encode() + contents[place.end(1) :]


def unpacked(parts: Mapping[str, NDArray[Any]], count: int, kind: type) -> Bits:
    """Restore the bits of a tensor from its parts: distinct values by index, mask of nonzeros.

    Levels of two axes are those of each channel.
    """
    nonzero = count
    is_nonzero = None
    if "mask" in parts:
        is_nonzero = np.unpackbits(parts["mask"], count=count).astype(bool)
        nonzero = int(is_nonzero.sum())
    if "indices" in parts:
        levels = parts["levels"]
        indices = _indices(parts["indices"], nonzero, levels.shape[-1])
        if levels.ndim == 1:
            values = levels[indices]
        else:
            rows = indices.reshape(len(levels), -1)
            values = np.take_along_axis(levels, rows, 1).reshape(-1)
    else:
        values = parts["values"]
    if is_nonzero is None:
        return values.astype(kind)
    bits: Bits = np.zeros(count, kind)
    bits[is_nonzero] = values
    return bits


def width_of(size: int) -> int:
    """Return the bits of an index of ``size`` distinct values."""
    return max(size - 1, 0).bit_length()


def _indices(packed: NDArray[np.uint8], count: int, size: int) -> NDArray[np.intp]:
    width = width_of(size)
    bits = np.unpackbits(packed, count=count * width).reshape(count, width)
    return bits.astype(np.intp) @ (1 << np.arange(width - 1, -1, -1))


def _scaled(integers: Bits, scales: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Multiply 8-bit integers by the scale of each group of rows, or of the second axis."""
    signed = integers.view(np.int8).astype(np.float32)
    if axis:
        return (signed * scales.reshape(-1, *[1] * (signed.ndim - 2))).reshape(-1)
    return (signed.reshape(len(scales), -1) * scales[:, None]).reshape(-1)


def _array(bits: Bits, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.ascontiguousarray(bits).view(np.dtype(dtype)).reshape(shape)


if __name__ == "__main__":
    for key, value in read_packed(sys.argv[1]).items():
        print(key, value.dtype, value.shape)
