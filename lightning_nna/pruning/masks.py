"""Masks: the transform that prunes a weight, and the sparsities of layers under one budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from lightning_nna.pruning.sparsity_pattern import SparsityPattern, greatest

#: Integer types by the number of bytes of a float.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class MaskTransform:
    """Zero a parameter where its mask is False; the latent weight stays dense.

    Args:
        method: Name of the method, for messages.
        weight: Parameter, any shape; the first mask keeps all of it.
        revives: Whether zeroed weights get the gradient of their zeros, and so may return.

    Attributes:
        mask: Mask in the shape of the weight, bool: True for kept weights.
        kept_count: Number of kept weights.
        revives: See above; it may change during a run.
    """

    order = 0
    grid = None

    def __init__(self, method: str, weight: Tensor, *, revives: bool) -> None:
        self.method, self.revives = method, revives
        self.mask: Bool[Tensor, "*shape"] = torch.ones_like(weight, dtype=torch.bool)
        self.kept_count = weight.numel()
        # Integers with all bits set for kept weights: much faster to apply than a bool mask.
        self._bits: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: the mask once."""
        return {**self.__dict__, "_bits": None}

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.kept_count / self.mask.numel()

    @property
    def keeps_all(self) -> bool:
        """True if no weight is zeroed."""
        return self.kept_count == self.mask.numel()

    def set_mask(self, mask: Bool[Tensor, "*shape"]) -> None:
        """Replace the mask.

        Args:
            mask: Mask in the shape of the weight, bool: True for kept weights.
        """
        assert mask.shape == self.mask.shape, "a matrix is brought into the weight's shape first"
        self.mask = mask.to(self.mask.device)
        self.kept_count = int(self.mask.sum())
        self._bits = None

    def apply(self, weight: Tensor, *, hard: bool) -> Tensor:
        """Zero the weight where the mask is False."""
        return weight if self.keeps_all else self._kept(weight)

    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient unchanged if weights may return, else zero it like the weight."""
        return grad if self.revives or self.keeps_all else self._kept(grad)

    def zero_(self, weight: Tensor) -> None:
        """Zero a weight in place where the mask is False.

        Args:
            weight: Weight in the shape of the mask, float.
        """
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
        """Return a copy of the mask."""
        return {"mask": self.mask.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the mask by a saved one."""
        self.set_mask(state["mask"])


@dataclass(frozen=True)
class MatrixLayout:
    """Layout of a weight as a matrix: outputs are rows, and input channels lie side by side.

    A kernel ``(out, in, *positions)`` becomes rows of ``positions`` times ``in``, as accelerators
    store it: N neighbors of M, and the columns of a block, are input channels at one position. A
    weight without positions is flattened from its second axis on.

    Args:
        shape: Shape of the weight.
        is_kernel: Whether its axes from the third on are kernel positions of a convolution.
        transposed_groups: Number of groups of a transposed convolution, whose weight is
            ``(in, out / groups, *positions)``; 0 for any other.
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
            weight: Weight of two axes or more.

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
        """Number of columns side by side: the input channels of a kernel, else all."""
        if self.transposed_groups:
            return self.shape[0] // self.transposed_groups
        return self.shape[1] if self.is_kernel else prod(self.shape[1:])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        rows = self.shape[0]
        if self.transposed_groups:
            rows = self.shape[1] * self.transposed_groups
        return rows, self.shape.numel() // rows

    def to_matrix(self, weight: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "rows columns"]:
        """Bring a tensor of the weight's shape into the shape of the matrix, without gradient.

        Args:
            weight: Weight, gradient or mask in the weight's shape.
        """
        plain = weight.detach()
        if not self.is_kernel:
            return plain.flatten(1)
        return self._turned(plain).transpose(1, 2).flatten(1)

    def from_matrix(self, matrix: Shaped[Tensor, "rows columns"]) -> Shaped[Tensor, "*shape"]:
        """Invert :meth:`to_matrix`.

        Args:
            matrix: Tensor of shape ``(rows, columns)``.
        """
        if not self.is_kernel:
            return matrix.reshape(self.shape)
        rows, columns = self.matrix_shape
        kernel = matrix.view(rows, columns // self.channels, self.channels).transpose(1, 2)
        if self.transposed_groups:
            kernel = kernel.unflatten(0, (self.transposed_groups, -1)).transpose(1, 2)
        return kernel.reshape(self.shape)

    def _turned(self, weight: Tensor) -> Tensor:
        """Bring a kernel into the shape (outputs, input channels, positions)."""
        kernel = weight.flatten(2)
        if not self.transposed_groups:
            return kernel
        grouped = kernel.unflatten(0, (self.transposed_groups, -1))
        return grouped.transpose(1, 2).flatten(0, 1)


def global_sparsities(
    scores: Mapping[str, Tensor],
    sparsities: Mapping[str, float],
    pattern: SparsityPattern,
    shapes: Mapping[str, tuple[int, int]],
    *,
    relative: bool = True,
    prices: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Compute the sparsity of each layer under one budget: the least scores of all layers go.

    With prices, the units with the least score for what they save go.

    Args:
        scores: Importance scores of the units of each layer, not negative.
        sparsities: Sparsity of each layer by itself; their mean over weights is the budget.
        pattern: Pattern of the units.
        shapes: Numbers of rows and columns of the layers.
        relative: Divide scores by their layer's sum, so that each layer is worth the same; False if
            the scores of all layers are in one unit.
        prices: What a zero of each layer saves, not negative; None or empty if all save the same.
            The budget is what the sparsities of all layers would save.

    Returns:
        Sparsities by layer, at most 0.99 each; 0 where zeros save nothing.

    Example:
        >>> scores = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[3.0, 4.0]])}
        >>> shapes, half = {"a": (1, 2), "b": (1, 2)}, {"a": 0.5, "b": 0.5}
        >>> pattern = SparsityPattern.of("unstructured")
        >>> global_sparsities(scores, half, pattern, shapes, relative=False)
        {'a': 0.99, 'b': 0.0}

        A zero of ``b`` saves ten times as much: 3 / 10 and 4 / 10 are less than 1 and 2.

        >>> global_sparsities(scores, half, pattern, shapes, relative=False,
        ...     prices={"a": 1.0, "b": 10.0})
        {'a': 0.0, 'b': 0.5}
    """
    if prices:
        dearest = max(prices.values()) or 1.0
        prices = {name: price / dearest for name, price in prices.items()}
        scores = {name: of_layer for name, of_layer in scores.items() if prices[name] > 0}
        unpaid = {name: 0.0 for name in shapes if name not in scores}
        if not scores:
            return unpaid
    else:
        prices, unpaid = dict.fromkeys(scores, 1.0), {}
    weights = {name: rows * columns * prices[name] for name, (rows, columns) in shapes.items()}
    budget = sum(sparsities[name] * weights[name] for name in scores)
    worths, sizes, owners = [], [], []
    for owner, (name, of_layer) in enumerate(scores.items()):
        flat = of_layer.flatten()
        if relative:
            flat = flat.double() / flat.sum(dtype=torch.float64).clamp_min(1e-300)
        size = weights[name] / pattern.units(shapes[name])
        worths.append(flat / size)
        sizes.append(torch.full_like(flat, size))
        owners.append(torch.full_like(flat, owner, dtype=torch.int64))
    pruned = _least(torch.cat(worths), torch.cat(sizes), budget)
    counts = torch.bincount(torch.cat(owners)[pruned], minlength=len(scores))
    return unpaid | {
        name: min(int(count) / scores[name].numel(), 0.99)
        for name, count in zip(scores, counts, strict=True)
    }


def _least(worths: Tensor, sizes: Tensor, budget: float) -> Bool[Tensor, " units"]:
    """Mask the units of the least worth, as many as the budget has room for."""
    if bool((sizes == sizes[0]).all()):
        return ~greatest(worths, len(worths) - int((budget + 1e-9) / float(sizes[0])))
    order = worths.argsort(stable=True)
    pruned = torch.zeros_like(worths, dtype=torch.bool)
    pruned[order[sizes[order].cumsum(0, dtype=torch.float64) <= budget + 1e-9]] = True
    return pruned
