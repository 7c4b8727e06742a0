"""Weights in as few bytes as they need: bits for zeros, indices of few values, or as they are.

For each tensor the smallest of four layouts is taken:

========  ==================================================================================
layout    holds
========  ==================================================================================
dense     the values
sparse    one bit a weight, whether it is not zero; the values that are not
few       :math:`b` bits a weight; the :math:`2^b` values or fewer
both      one bit a weight, whether it is not zero; :math:`b` bits and the values of the others
========  ==================================================================================

All of them give every bit back, that of a negative zero included. The file is a safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from lightning_nna.files import whole_file

_MOST_VALUES = 256
_FORMAT = "lightning-nna packed 1"
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Bits = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class PackedReport:
    """Sizes by tensor, in bytes.

    Args:
        layouts: ``"dense"``, ``"sparse"``, ``"few"`` or ``"both"``.
        packed: What each tensor takes in the file.
        plain: What it takes as it is.
    """

    layouts: dict[str, str]
    packed: dict[str, int]
    plain: dict[str, int]

    @property
    def packed_bytes(self) -> int:
        """Of all tensors; the file has a header of some hundred bytes besides."""
        return sum(self.packed.values())

    @property
    def plain_bytes(self) -> int:
        """Of all tensors as they are."""
        return sum(self.plain.values())

    def __str__(self) -> str:
        width = max((len(name) for name in self.packed), default=6)
        lines = [f"{'tensor':{width}}  layout  {'bytes':>9}  of plain"]
        for name, size in self.packed.items():
            share = size / max(self.plain[name], 1)
            lines.append(f"{name:{width}}  {self.layouts[name]:6}  {size:9}  {share:8.1%}")
        share = self.packed_bytes / max(self.plain_bytes, 1)
        lines.append(f"{'all':{width}}  {'':6}  {self.packed_bytes:9}  {share:8.1%}")
        return "\n".join(lines)


def save_packed(source: nn.Module | Mapping[str, Tensor], path: str | Path) -> PackedReport:
    """Write tensors in as few bytes as they need.

    Args:
        source: A module, whose ``state_dict`` is written, or tensors by name.
        path: Written whole or not at all.

    Returns:
        The sizes.

    Raises:
        TypeError: If a tensor is of a complex, quantised or sparse kind.

    Example:
        >>> import tempfile
        >>> weight = torch.tensor([[0.0, 0.5, 0.0, 0.0, -0.5, 0.0, 0.0, 0.0]]).repeat(8, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = save_packed({"weight": weight}, f"{folder}/packed.safetensors")
        ...     found = load_packed(f"{folder}/packed.safetensors")
        >>> report.packed_bytes, report.plain_bytes, torch.equal(found["weight"], weight)
        (88, 2048, True)
    """
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    parts: dict[str, NDArray[Any]] = {}
    entries: dict[str, dict[str, Any]] = {}
    packed, plain = {}, {}
    for name, tensor in tensors.items():
        layout, held = _smallest(_bits_of(name, tensor))
        entries[name] = {
            "layout": layout,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
        parts |= {f"{name}|{part}": array for part, array in held.items()}
        packed[name] = sum(array.nbytes for array in held.values())
        plain[name] = tensor.numel() * tensor.element_size()
    with whole_file(Path(path)) as unfinished:
        save_file(parts, unfinished, metadata={"format": _FORMAT, "tensors": json.dumps(entries)})
    return PackedReport({name: entry["layout"] for name, entry in entries.items()}, packed, plain)


def load_packed(path: str | Path) -> dict[str, Tensor]:
    """Read what :func:`save_packed` wrote, every bit of it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file was not written by :func:`save_packed`.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path}")
    with safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is no file of save_packed: its format is {metadata.get('format')}"
        )
    parts: dict[str, dict[str, NDArray[Any]]] = {}
    for key, array in load_file(path).items():
        name, _, part = key.rpartition("|")
        parts.setdefault(name, {})[part] = array
    found = {}
    for name, entry in json.loads(metadata["tensors"]).items():
        dtype = getattr(torch, entry["dtype"])
        count = int(np.prod(entry["shape"], dtype=np.int64))
        bits = _unpacked(parts[name], count, _UNSIGNED[torch.empty(0, dtype=dtype).element_size()])
        found[name] = _tensor_of(bits, dtype).reshape(entry["shape"])
    return found


def _smallest(bits: Bits) -> tuple[str, dict[str, NDArray[Any]]]:
    """The layout with the fewest bytes, and its parts."""
    choices: dict[str, dict[str, NDArray[Any]]] = {"dense": {"values": bits}}
    is_kept = bits != 0
    kept = bits[is_kept]
    mask = {"mask": np.packbits(is_kept)}
    choices["sparse"] = {**mask, "values": kept}
    for name, some, more in (("few", bits, {}), ("both", kept, mask)):
        levels, indices = np.unique(some, return_inverse=True)
        if 0 < len(levels) <= _MOST_VALUES:
            choices[name] = {**more, "levels": levels, "indices": _pack(indices, len(levels))}
    sizes = {name: sum(x.nbytes for x in parts.values()) for name, parts in choices.items()}
    best = min(sizes, key=lambda name: sizes[name])
    return best, choices[best]


def _unpacked(held: Mapping[str, NDArray[Any]], count: int, kind: type) -> Bits:
    """Undo :func:`_smallest`."""
    kept = count
    is_kept = None
    if "mask" in held:
        is_kept = np.unpackbits(held["mask"], count=count).astype(bool)
        kept = int(is_kept.sum())
    if "indices" in held:
        values = held["levels"][_unpack(held["indices"], kept, len(held["levels"]))]
    else:
        values = held["values"]
    if is_kept is None:
        return values.astype(kind)
    bits: Bits = np.zeros(count, kind)
    bits[is_kept] = values
    return bits


def _width(levels: int) -> int:
    return max(levels - 1, 0).bit_length()


def _pack(indices: NDArray[np.intp], levels: int) -> NDArray[np.uint8]:
    """Indices in as many bits as they need, the highest first, one after the other."""
    width = _width(levels)
    places = np.arange(width - 1, -1, -1)
    return np.packbits((indices.reshape(-1, 1) >> places & 1).astype(np.uint8))


def _unpack(packed: NDArray[np.uint8], count: int, levels: int) -> NDArray[np.intp]:
    width = _width(levels)
    bits = np.unpackbits(packed, count=count * width).reshape(count, width)
    return bits.astype(np.intp) @ (1 << np.arange(width - 1, -1, -1))


def _bits_of(name: str, tensor: Tensor) -> Bits:
    """The numbers of a tensor as unsigned integers with the same bits."""
    if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
        raise TypeError(f"{name} is a tensor of {tensor.dtype} that cannot be packed")
    flat = tensor.detach().cpu().contiguous().flatten()
    raw: NDArray[np.uint8] = (
        flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)
    )
    return raw.view(_UNSIGNED[tensor.element_size()])


def _tensor_of(bits: Bits, dtype: torch.dtype) -> Tensor:
    if bits.size == 0:
        return torch.empty(0, dtype=dtype)
    raw = np.ascontiguousarray(bits).view(np.uint8).copy()
    return torch.from_numpy(raw).view(dtype)
