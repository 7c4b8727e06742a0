"""Patterns of zeros for accelerators: single weights, blocks, N of M, whole rows or columns.

A weight is seen as a matrix of output rows and input columns. A pattern divides it into units that
are kept or zeroed together. The columns of a convolution are input channels side by side, place by
place of its kernel (:class:`.MatrixLayout`), since accelerators take neighbors along the input
channel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class SparsityPattern:
    """Arrangement of the zeros that a pattern allows. Use :meth:`of`.

    Args:
        name: Name of the pattern, as :meth:`of` takes it.
        rows: Number of rows of a unit; 0 for all rows of the weight.
        columns: Number of columns of a unit; 0 for all columns.
        keep: With N:M, number of units kept in each group; 0 for a budget over the whole weight.
        group: With N:M, neighboring units of a row in a group; 0 without groups.
    """

    name: str
    rows: int = 1
    columns: int = 1
    keep: int = 0
    group: int = 0

    @classmethod
    def of(cls, pattern: str | SparsityPattern) -> SparsityPattern:
        """Parse the name of a pattern.

        Args:
            pattern: ``"unstructured"``, ``"row"``, ``"column"``, blocks of rows and columns such as
                ``"1x16"``, or N weights kept of M neighbors in a row such as ``"2:4"``.

        Raises:
            ValueError: If there is no such pattern, or N is not between 1 and M.

        Example:
            >>> SparsityPattern.of("4x1").rows, SparsityPattern.of("2:4").least_density
            (4, 0.5)
        """
        if isinstance(pattern, SparsityPattern):
            return pattern
        if pattern == "unstructured":
            return cls(pattern)
        if pattern == "row":
            return cls(pattern, columns=0)
        if pattern == "column":
            return cls(pattern, rows=0)
        match = re.fullmatch(r"([1-9]\d*)([x:])([1-9]\d*)", pattern)
        if match is None:
            raise ValueError(
                f"unknown pattern {pattern!r}: choose unstructured, row, column, a block such as "
                f"1x16, or N:M such as 2:4"
            )
        first, second = int(match[1]), int(match[3])
        if match[2] == "x":
            return cls(pattern, rows=first, columns=second)
        if first > second:
            raise ValueError(f"pattern {pattern!r} keeps {first} weights of {second}: N is over M")
        return cls(pattern, keep=first, group=second)

    @property
    def least_density(self) -> float:
        """Fraction of weights that N:M keeps at least; 0 for other patterns."""
        return self.keep / self.group if self.group else 0.0

    def fits(self, shape: tuple[int, int], channels: int | None = None) -> bool:
        """Say whether units divide a matrix.

        Args:
            shape: Rows and columns.
            channels: Columns that lie side by side; None for all.

        Example:
            >>> SparsityPattern.of("2:4").fits((8, 36)), SparsityPattern.of("2:4").fits((8, 36), 2)
            (True, False)
        """
        rows, columns = shape
        wide = self.group or self.columns
        return not rows % (self.rows or rows) and not (wide and (channels or columns) % wide)

    def require_fit(self, shape: tuple[int, int], name: str = "the weight") -> None:
        """Raise unless units divide a matrix.

        Args:
            shape: Rows and columns.
            name: Name of the weight, for the message.

        Raises:
            ValueError: Names the weight, its shape and the pattern.
        """
        if not self.fits(shape):
            raise ValueError(
                f"{name} has {shape[0]} rows of {shape[1]} weights, which pattern {self.name!r} "
                f"does not divide: exclude it, or choose another pattern for it"
            )

    def units(self, shape: tuple[int, int]) -> int:
        """Count the units in a matrix."""
        rows, columns = shape
        return (rows // (self.rows or rows)) * (columns // (self.columns or columns))

    def importance_scores(
        self, weight: Float[Tensor, "rows columns"]
    ) -> Float[Tensor, "high wide"]:
        """Sum of squares of each unit.

        Example:
            >>> SparsityPattern.of("1x2").importance_scores(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
            tensor([[5., 9.]])
        """
        rows, columns = weight.shape
        high, wide = self.rows or rows, self.columns or columns
        squares = weight.square()
        if (high, wide) == (1, 1):
            return squares
        return squares.reshape(rows // high, high, columns // wide, wide).sum((1, 3))

    def mask(
        self, scores: Float[Tensor, "high wide"], sparsity: float, shape: tuple[int, int]
    ) -> Bool[Tensor, "rows columns"]:
        """Keep the units of the greatest importance scores.

        Of two units with the same score the one that comes first is kept.

        Args:
            scores: Importance scores of the units, not negative.
            sparsity: Fraction of units that are zeroed, 0 to 1, rounded to whole units; with N:M,
                each group loses its fraction, and keeps N at least.
            shape: Rows and columns of the weight.

        Example:
            >>> pattern = SparsityPattern.of("2:4")
            >>> pattern.mask(torch.tensor([[4.0, 1.0, 3.0, 3.0]]), 0.5, (1, 4))
            tensor([[ True, False,  True, False]])
        """
        if self.group:
            keep = max(self.keep, self.group - int(sparsity * self.group))
            grouped = scores.reshape(-1, self.group)
            order = grouped.argsort(dim=1, descending=True, stable=True)[:, :keep]
            mask = torch.zeros_like(grouped, dtype=torch.bool).scatter_(1, order, True)
            return mask.view(shape)
        units = greatest(
            scores,
            scores.numel() - round(sparsity * scores.numel()),
        )
        rows, columns = shape
        high, wide = rows // scores.shape[0], columns // scores.shape[1]
        if (high, wide) == (1, 1):
            return units
        return units.repeat_interleave(high, 0).repeat_interleave(wide, 1)


def greatest(values: Tensor, count: int) -> Tensor:
    """Mask the ``count`` greatest; of equal ones, the first in row-major order.

    Args:
        values: Floats that are not negative, of any shape.
        count: At most 0 for none.

    Example:
        >>> greatest(torch.tensor([1.0, 3.0, 2.0, 3.0]), 1)
        tensor([False,  True, False, False])
    """
    flat = values.flatten()
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    if count >= len(flat):
        return torch.ones_like(values, dtype=torch.bool)
    # Floats that are not negative are in the order of their bits: the upper ones say which are in,
    # which are out, and which few have to be sorted.
    exact = flat + 0.0 if flat.dtype == torch.float64 else flat.float() + 0.0
    is_double = exact.dtype == torch.float64
    upper = (exact.view(torch.int64) >> 47).int() if is_double else exact.view(torch.int32) >> 15
    sizes = torch.bincount(upper, minlength=1 << 16).flip(0)
    reached = sizes.cumsum(0)
    full = int((reached < count).sum())
    bucket = (1 << 16) - 1 - full
    mask = upper > bucket
    near = (upper == bucket).nonzero().flatten()
    order = exact[near].argsort(descending=True, stable=True)
    mask[near[order[: count - int(reached[full] - sizes[full])]]] = True
    return mask.view_as(values)
