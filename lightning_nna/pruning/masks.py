"""Masks: the stage of the weight pipeline that prunes, and how a budget is shared by layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from lightning_nna.pruning.sparsity_pattern import SparsityPattern, greatest

# Of as many bytes as a float.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class MaskStage:
    """Zeroes a parameter where its mask is False; the dense weight lives on under it.

    Args:
        method: Name of the method, for messages.
        weight: The parameter; the mask keeps all of it at first.

    Attributes:
        mask: True where weights are kept.
        kept: How many weights are.
        revives: Whether zeroed weights are trained on, with the gradient that reached their zero,
            so that they may return; else they get none.
    """

    place = 0
    grid = None

    def __init__(self, method: str, weight: Tensor, *, revives: bool) -> None:
        self.method, self.revives = method, revives
        self.mask: Bool[Tensor, "*shape"] = torch.ones_like(weight, dtype=torch.bool)
        self.kept = weight.numel()
        # All bits of what is kept: much faster to apply than a mask of truth values.
        self._bits: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle has the mask once."""
        return {**self.__dict__, "_bits": None}

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.kept / self.mask.numel()

    @property
    def keeps_all(self) -> bool:
        """Whether no weight is zeroed."""
        return self.kept == self.mask.numel()

    def set_mask(self, mask: Bool[Tensor, "*shape"]) -> None:
        """Replace the mask by one of the weight's shape."""
        assert mask.shape == self.mask.shape, "a matrix is brought into the weight's shape first"
        self.mask = mask.to(self.mask.device)
        self.kept = int(self.mask.sum())
        self._bits = None

    def transform(self, weight: Tensor, *, hard: bool) -> Tensor:
        """The masked weight."""
        return weight if self.keeps_all else self._kept(weight)

    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        """The gradient as it is where weights may return, else that of the kept ones."""
        return grad if self.revives or self.keeps_all else self._kept(grad)

    def zero_(self, weight: Tensor) -> None:
        """Zero in place what is not kept."""
        bits = self._bits_for(weight)
        weight.view(bits.dtype).bitwise_and_(bits)

    def _kept(self, x: Tensor) -> Tensor:
        bits = self._bits_for(x)
        return (x.view(bits.dtype) & bits).view(x.dtype)

    def _bits_for(self, x: Tensor) -> Tensor:
        integers = _INTEGERS[x.element_size()]
        if self._bits is None or self._bits.dtype != integers:
            self._bits = self.mask.to(integers).neg_()
        return self._bits

    def state_dict(self) -> dict[str, Any]:
        """The mask."""
        return {"mask": self.mask.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the mask by a saved one."""
        self.set_mask(state["mask"])


@dataclass(frozen=True)
class MatrixLayout:
    """Layout of a weight as a matrix: outputs are rows, and input channels lie side by side.

    A kernel ``(out, in, *places)`` becomes rows of ``places`` times ``in``, as accelerators store
    it: N neighbors of M, and the columns of a block, are input channels at one place. A weight
    without places is flattened from its second axis on.

    Args:
        shape: Of the weight.
        is_kernel: Whether its axes from the third on are places of a convolution.
        transposed_groups: Groups of a transposed convolution, whose weight is
            ``(in, out / groups, *places)``; 0 for any other.
    """

    shape: torch.Size
    is_kernel: bool = False
    transposed_groups: int = 0

    @classmethod
    def of(cls, owner: nn.Module, weight: Tensor) -> MatrixLayout:
        """Choose the layout of a weight.

        Args:
            owner: Module that the weight is a parameter of. If it is no layer of PyTorch, a weight
                of four axes or more is taken for a kernel.
            weight: Any weight of two axes or more.

        Example:
            >>> conv = nn.Conv2d(8, 16, 3)
            >>> MatrixLayout.of(conv, conv.weight).matrix_shape, conv.weight.shape
            ((16, 72), torch.Size([16, 8, 3, 3]))
        """
        if isinstance(owner, nn.modules.conv._ConvTransposeNd):
            return cls(weight.shape, True, owner.groups)
        is_own = not type(owner).__module__.startswith("torch.nn.")
        is_kernel = isinstance(owner, nn.modules.conv._ConvNd) or (is_own and weight.ndim > 3)
        return cls(weight.shape, is_kernel)

    @property
    def channels(self) -> int:
        """Columns that lie side by side: the input channels of a kernel, else all."""
        if self.transposed_groups:
            return self.shape[0] // self.transposed_groups
        return self.shape[1] if self.is_kernel else prod(self.shape[1:])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows = self.shape[0]
        if self.transposed_groups:
            rows = self.shape[1] * self.transposed_groups
        return rows, self.shape.numel() // rows

    def to_matrix(self, weight: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "rows columns"]:
        """See a weight, or anything of its shape, as a matrix; without gradient."""
        held = weight.detach()
        if not self.is_kernel:
            return held.flatten(1)
        return self._turned(held).transpose(1, 2).flatten(1)

    def from_matrix(self, matrix: Shaped[Tensor, "rows columns"]) -> Shaped[Tensor, "*shape"]:
        """Undo :meth:`to_matrix`."""
        if not self.is_kernel:
            return matrix.reshape(self.shape)
        rows, columns = self.matrix_shape
        held = matrix.view(rows, columns // self.channels, self.channels).transpose(1, 2)
        if self.transposed_groups:
            held = held.unflatten(0, (self.transposed_groups, -1)).transpose(1, 2)
        return held.reshape(self.shape)

    def _turned(self, weight: Tensor) -> Tensor:
        """Outputs, input channels and places of a kernel."""
        held = weight.flatten(2)
        if not self.transposed_groups:
            return held
        grouped = held.unflatten(0, (self.transposed_groups, -1))
        return grouped.transpose(1, 2).flatten(0, 1)


def global_sparsities(
    energies: Mapping[str, Tensor],
    sparsities: Mapping[str, float],
    pattern: SparsityPattern,
    shapes: Mapping[str, tuple[int, int]],
    *,
    relative: bool = True,
) -> dict[str, float]:
    """Share of zeros for each layer under one budget: the least energies of all layers go.

    Args:
        energies: Of the units of each layer.
        sparsities: What each layer would lose by itself; their mean over weights is the budget.
        pattern: Of the units.
        shapes: Rows and columns of the layers.
        relative: Take energies relative to their layer's sum, so that each layer is worth the
            same; False where they are in one unit.

    Returns:
        At most 0.99 for each.
    """
    weights = {name: rows * columns for name, (rows, columns) in shapes.items()}
    budget = sum(sparsities[name] * weights[name] for name in energies)
    worths, sizes, owners = [], [], []
    for place, (name, energy) in enumerate(energies.items()):
        flat = energy.flatten()
        if relative:
            flat = flat.double() / flat.sum(dtype=torch.float64).clamp_min(1e-300)
        size = weights[name] / pattern.units(shapes[name])
        worths.append(flat / size)
        sizes.append(torch.full_like(flat, size))
        owners.append(torch.full_like(flat, place, dtype=torch.int64))
    gone = _least(torch.cat(worths), torch.cat(sizes), budget)
    counts = torch.bincount(torch.cat(owners)[gone], minlength=len(energies))
    return {
        name: min(int(count) / energies[name].numel(), 0.99)
        for name, count in zip(energies, counts, strict=True)
    }


def _least(worths: Tensor, sizes: Tensor, budget: float) -> Bool[Tensor, " units"]:
    """Mask of the units of least worth, as many as the budget has room for."""
    if bool((sizes == sizes[0]).all()):
        return ~greatest(worths, len(worths) - int((budget + 1e-9) / float(sizes[0])))
    order = worths.argsort(stable=True)
    gone = torch.zeros_like(worths, dtype=torch.bool)
    gone[order[sizes[order].cumsum(0, dtype=torch.float64) <= budget + 1e-9]] = True
    return gone
