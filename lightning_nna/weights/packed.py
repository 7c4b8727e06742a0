"""Packed weights: bits for zeros, indices of few distinct values, or plain values.

For each tensor the smallest of five layouts is taken:

========  ==================================================================================
layout    holds
========  ==================================================================================
dense     the values
sparse    one bit a weight, whether it is not zero; the values that are not
few       :math:`b` bits a weight; the :math:`2^b` values or fewer
both      one bit a weight, whether it is not zero; :math:`b` bits and the values of the others
channels  :math:`b` bits a weight; for each channel, the :math:`2^b` values or fewer
========  ==================================================================================

All of them restore every bit, that of a negative zero included. Weights of an emulated module are
stored as they are deployed, 8-bit integers in one of these layouts, and their scales.

The file is a safetensors file with a manifest and a checksum of the whole: one that was cut off or
altered is an error. :mod:`.read_packed` reads it with NumPy and safetensors alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.attachment import attached
from lightning_nna.files import whole_file
from lightning_nna.weights.read_packed import (
    FORMAT,
    NO_DIGEST,
    Bits,
    packed_bits,
    safetensors_numpy,
    sealed,
    width_of,
)

_MOST_VALUES = 256
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class PackedReport:
    """Sizes by tensor, in bytes.

    Args:
        layouts: ``"dense"``, ``"sparse"``, ``"few"``, ``"both"`` or ``"channels"``.
        packed: Size of each tensor in the file.
        plain: Size of each tensor unpacked.
        coded: Size of each tensor with entropy-coded indices, the distinct values included.
    """

    layouts: dict[str, str]
    packed: dict[str, int]
    plain: dict[str, int]
    coded: dict[str, int]

    @property
    def packed_bytes(self) -> int:
        """Size of all tensors in bytes; the file has a header of some hundred bytes besides."""
        return sum(self.packed.values())

    @property
    def plain_bytes(self) -> int:
        """Size of all unpacked tensors in bytes."""
        return sum(self.plain.values())

    @property
    def coded_bytes(self) -> int:
        """Size of all entropy-coded tensors in bytes."""
        return sum(self.coded.values())

    def __str__(self) -> str:
        width = max((len(name) for name in self.packed), default=6)
        lines = [f"{'tensor':{width}}  layout  {'bytes':>9}  of plain  {'coded':>9}"]
        for name, size in self.packed.items():
            share = size / max(self.plain[name], 1)
            lines.append(
                f"{name:{width}}  {self.layouts[name]:6}  {size:9}  {share:8.1%}"
                f"  {self.coded[name]:9}"
            )
        share = self.packed_bytes / max(self.plain_bytes, 1)
        lines.append(
            f"{'all':{width}}  {'':6}  {self.packed_bytes:9}  {share:8.1%}  {self.coded_bytes:9}"
        )
        return "\n".join(lines)


def save_packed(source: nn.Module | Mapping[str, Tensor], path: str | Path) -> PackedReport:
    """Write tensors in as few bytes as possible.

    Args:
        source: A module, whose ``state_dict`` is written, or tensors by name. Weights that an
            emulated module has used are written as they are deployed.
        path: Written whole or not at all.

    Returns:
        The sizes.

    Raises:
        TypeError: If a tensor is of a complex, quantized or sparse kind.

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
    grids = _grids(source) if isinstance(source, nn.Module) else {}
    parts: dict[str, NDArray[Any]] = {}
    entries: dict[str, dict[str, Any]] = {}
    packed, plain, coded = {}, {}, {}
    for name, tensor in tensors.items():
        integers, scales, axis = grids.get(name, (tensor, None, 0))
        bits = _bits_of(name, integers)
        rows = len(tensor) if tensor.ndim > 1 else 1
        layout, stored = _smallest(bits, rows if scales is None else 1 if axis else len(scales))
        if scales is not None:
            stored = {**stored, "scales": scales.detach().cpu().float().numpy()}
        entries[name] = {
            "layout": layout,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            **({"axis": axis} if axis else {}),
        }
        parts |= {f"{name}|{part}": array for part, array in stored.items()}
        packed[name] = sum(array.nbytes for array in stored.values())
        plain[name] = tensor.numel() * tensor.element_size()
        coded[name] = _coded_bytes(bits) + (0 if scales is None else 4 * len(scales))
    metadata = {"format": FORMAT, "tensors": json.dumps(entries), "sha256": NO_DIGEST}
    with whole_file(Path(path)) as unfinished:
        unfinished.write_bytes(sealed(safetensors_numpy().save(parts, metadata=metadata)))
    layouts = {name: entry["layout"] for name, entry in entries.items()}
    return PackedReport(layouts, packed, plain, coded)


def load_packed(path: str | Path) -> dict[str, Tensor]:
    """Read what :func:`save_packed` wrote, every bit of it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file was not written by :func:`save_packed`, or has changed since.
    """
    return {
        name: _tensor_of(bits, getattr(torch, dtype)).reshape(shape)
        for name, (bits, dtype, shape) in packed_bits(path).items()
    }


def _grids(module: nn.Module) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Return integers, scales and their axis of the weights that an emulated module has used."""
    emulator = attached(module)
    if emulator is None:
        return {}
    integers_and_scales = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        rows = emulator.state.rows_of(parameter)
        if rows is not None:
            quantized = emulator.state.weight(parameter, rows)
            # Without rows that share one, every scale is that of an index.
            scales = quantized.scales.reshape(-1, rows or 1)[:, 0]
            integers_and_scales[name] = (
                quantized.stored.reshape(parameter.shape).to(torch.int8),
                scales,
                quantized.axis,
            )
    return integers_and_scales


def packed_size(weight: QuantizedWeight, rows_per_scale: int) -> int:
    """Count the bytes of a quantized weight in its smallest layout, scales included.

    Args:
        weight: Quantized weight of an emulated module.
        rows_per_scale: Number of rows that share a scale, or :data:`.SECOND_AXIS`.
    """
    integers = weight.stored.to(torch.int8)
    scales = len(weight.scales) // (rows_per_scale or 1)
    _, stored = _smallest(_bits_of("a weight", integers), scales if rows_per_scale else 1)
    return sum(array.nbytes for array in stored.values()) + 4 * scales


def _coded_bytes(bits: Bits) -> int:
    """Entropy of the values, in whole bytes, and the values."""
    distinct, counts = np.unique(bits, return_counts=True)
    fractions = counts / max(bits.size, 1)
    entropy = float(-(fractions * np.log2(fractions)).sum()) if bits.size else 0.0
    return math.ceil(bits.size * entropy / 8) + distinct.nbytes


def _smallest(bits: Bits, channels: int) -> tuple[str, dict[str, NDArray[Any]]]:
    """The layout with the fewest bytes, and its parts."""
    choices: dict[str, dict[str, NDArray[Any]]] = {"dense": {"values": bits}}
    is_nonzero = bits != 0
    nonzero = bits[is_nonzero]
    mask = {"mask": np.packbits(is_nonzero)}
    choices["sparse"] = {**mask, "values": nonzero}
    for name, some, more in (("few", bits, {}), ("both", nonzero, mask)):
        distinct, indices = np.unique(some, return_inverse=True)
        if 0 < len(distinct) <= _MOST_VALUES:
            choices[name] = {**more, "levels": distinct, "indices": _pack(indices, len(distinct))}
    if channels > 1 and bits.size:
        choices |= _by_channel(bits.reshape(channels, -1))
    sizes = {name: sum(x.nbytes for x in parts.values()) for name, parts in choices.items()}
    best = min(sizes, key=lambda name: sizes[name])
    return best, choices[best]


def _by_channel(rows: Bits) -> dict[str, dict[str, NDArray[Any]]]:
    """The layout ``channels`` of the rows of a tensor; none if a row has too many values.

    The rows (7, 3, 7) and (5, 5, 5) have the levels (3, 7) and (5, 5), and indices (1, 0, 1) and
    (0, 0, 0) of one bit.
    """
    order = np.argsort(rows, axis=1, kind="stable")
    values = np.take_along_axis(rows, order, 1)
    ranks = np.cumsum(np.diff(values, axis=1, prepend=values[:, :1]) != 0, axis=1)
    size = int(ranks.max()) + 1
    if size > _MOST_VALUES:
        return {}
    levels = np.repeat(values[:, -1:], size, axis=1)
    np.put_along_axis(levels, ranks, values, 1)
    indices = np.empty_like(ranks)
    np.put_along_axis(indices, order, ranks, 1)
    return {"channels": {"levels": levels, "indices": _pack(indices, size)}}


def _pack(indices: NDArray[np.intp], size: int) -> NDArray[np.uint8]:
    """Indices in as many bits as they need, the highest first, one after the other."""
    width = width_of(size)
    positions = np.arange(width - 1, -1, -1)
    return np.packbits((indices.reshape(-1, 1) >> positions & 1).astype(np.uint8))


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
