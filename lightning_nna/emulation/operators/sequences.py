"""Layout of a batch of sequences in rows, step after step, as packed sequences have it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Rows ``(rows, features)`` cut into steps; sequences stand longest first.

    Args:
        sizes: Sequences that go on at each step, never growing.

    Example:
        >>> Layout((2, 2, 1)).lengths
        [3, 2]
    """

    sizes: tuple[int, ...]

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.sizes[0]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(self.sizes)

    @property
    def one_length(self) -> bool:
        """Tell whether all sequences are of one length."""
        return self.sizes[-1] == self.sizes[0]

    @cached_property
    def lengths(self) -> list[int]:
        """Steps of every sequence."""
        return [sum(size > index for size in self.sizes) for index in range(self.batch)]

    @cached_property
    def _starts(self) -> list[int]:
        """First row of each step."""
        return [sum(self.sizes[:step]) for step in range(len(self.sizes))]

    def before(self, states: Tensor) -> Tensor:
        """State before each step, from the initial states followed by those after each step.

        Args:
            states: Shape ``(batch + rows, features)``.
        """
        if self.one_length:
            return states[: self.rows]
        starts = [0, *(self.batch + start for start in self._starts)]
        rows = [start + torch.arange(size) for start, size in zip(starts, self.sizes, strict=False)]
        return states[torch.cat(rows).to(states.device)]

    def last(self, states: Tensor) -> Tensor:
        """Select the state after the last step of each sequence, shape ``(batch, ...)``."""
        if self.one_length:
            return states[-self.batch :]
        rows = [self._starts[length - 1] + index for index, length in enumerate(self.lengths)]
        return states[torch.tensor(rows, device=states.device)]

    def reversed(self, rows: Tensor) -> Tensor:
        """Reverse every sequence of rows, shape ``(rows, ...)``; its own inverse."""
        if self.one_length:
            return rows.view(len(self.sizes), self.batch, -1).flip(0).reshape(rows.shape)
        lengths = self.lengths
        index = [
            self._starts[lengths[sequence] - 1 - step] + sequence
            for step, size in enumerate(self.sizes)
            for sequence in range(size)
        ]
        return rows[torch.tensor(index, device=rows.device)]
