r"""Observers: rules by which the range of a call site follows from its observed values.

``min_max`` covers all values; ``moving_average`` smooths the bounds of the batches; ``percentile``
leaves out the outermost values of either tail; ``mse`` takes the range whose 8-bit quantization has
the least squared error,

.. math:: \min_{a, b} \sum_k n_k \bigl(x_k - Q_{a,b}(x_k)\bigr)^2,

over a histogram with counts :math:`n_k`. The histogram spans :math:`\pm 2^e`. When a value falls
outside, neighboring bins are added and the span doubles, so histograms can be merged without loss.

Reference:
    Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: a whitepaper",
    arXiv 1806.08342, 2018; Nagel et al., "A white paper on neural network quantization",
    arXiv 2106.08295, 2021.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_nna.elementary import ceil_log2

Observer = Literal["min_max", "moving_average", "percentile", "mse"]
OBSERVERS: tuple[Observer, ...] = ("min_max", "moving_average", "percentile", "mse")

_BINS = 2048
#: Weight of a new batch in the moving average.
_MOMENTUM = 0.1
#: Fraction of the values that a percentile leaves out at either tail.
_TAIL = 1e-4


class Range(ABC):
    """Summarize the observed values of a site as a range from ``minimum`` to ``maximum``."""

    minimum: float
    maximum: float

    @property
    def magnitude(self) -> float:
        """Largest absolute value of the range."""
        return max(abs(self.minimum), abs(self.maximum))

    @abstractmethod
    def update(self, x: Tensor, minimum: float, maximum: float) -> None:
        """Include a batch of values.

        Args:
            x: Values, float, any shape.
            minimum: Smallest value of ``x``.
            maximum: Largest value of ``x``.
        """

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Include the values of another range of the same kind."""

    @abstractmethod
    def state(self) -> list[Any]:
        """Return plain values from which :func:`restore` builds the range again."""


@dataclass
class MinMax(Range):
    """Keep the smallest and the largest value.

    Example:
        >>> observed = MinMax()
        >>> observed.update(torch.tensor([-1.0, 2.0]), -1.0, 2.0)
        >>> observed.magnitude
        2.0
    """

    minimum: float = math.inf
    maximum: float = -math.inf

    def update(self, x: Tensor, minimum: float, maximum: float) -> None:
        """Widen the range to the bounds of ``x``, of any shape."""
        self.minimum = min(self.minimum, minimum)
        self.maximum = max(self.maximum, maximum)

    def merge(self, other: MinMax) -> None:
        """Cover both ranges."""
        self.update(torch.empty(0), other.minimum, other.maximum)

    def state(self) -> list[Any]:
        """Return the kind and both bounds."""
        return ["min_max", self.minimum, self.maximum]


@dataclass
class MovingAverage(Range):
    """Average the bounds of batches exponentially, starting at those of the first batch."""

    minimum: float = math.inf
    maximum: float = -math.inf

    def update(self, x: Tensor, minimum: float, maximum: float) -> None:
        """Move the bounds toward those of ``x``, of any shape."""
        if self.minimum > self.maximum:
            self.minimum, self.maximum = minimum, maximum
            return
        self.minimum += _MOMENTUM * (minimum - self.minimum)
        self.maximum += _MOMENTUM * (maximum - self.maximum)

    def merge(self, other: MovingAverage) -> None:
        """Cover both ranges: the ranks of a run have batches of one distribution."""
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)

    def state(self) -> list[Any]:
        """Return the kind and both bounds."""
        return ["moving_average", self.minimum, self.maximum]


@dataclass
class Histogram(Range):
    """Count values in equal bins over ±2^exponent.

    Args:
        kind: Rule by which the range follows from the counts: ``"percentile"`` or ``"mse"``.
        exponent: Exponent of the span ±2^exponent; None before the first batch.
        counts: Count of values in each bin, lowest bin first, int64, shape ``(2048,)``.

    Example:
        >>> observed = Histogram("percentile")
        >>> observed.update(torch.linspace(-1, 1, 100_001), -1.0, 1.0)
        >>> round(observed.maximum, 3)
        1.0
    """

    kind: Literal["percentile", "mse"]
    exponent: int | None = None
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))
    _bounds: tuple[float, float] | None = None

    def update(self, x: Tensor, minimum: float, maximum: float) -> None:
        """Count the values of ``x``, of any shape, after widening the span to hold them."""
        self._widen(ceil_log2(max(-minimum, maximum, 2.0**-100)))
        assert self.exponent is not None
        edge = 2.0**self.exponent
        self.counts += torch.histc(x.detach().float().cpu(), _BINS, -edge, edge).long()
        self._bounds = None

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        if other.exponent is None:
            return
        self._widen(other.exponent)
        assert self.exponent is not None
        added = Histogram(other.kind, other.exponent, other.counts.clone())
        added._widen(self.exponent)
        self.counts += added.counts
        self._bounds = None

    def _widen(self, exponent: int) -> None:
        """Double the span until it reaches ±2^exponent."""
        if self.exponent is None:
            self.exponent = exponent
        while self.exponent < exponent:
            quarter = _BINS // 4
            inner = self.counts.view(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[quarter : quarter + _BINS // 2] = inner
            self.exponent += 1

    @property
    def minimum(self) -> float:  # type: ignore[override]
        """Lower bound by the histogram's rule."""
        return self._range()[0]

    @property
    def maximum(self) -> float:  # type: ignore[override]
        """Upper bound by the histogram's rule."""
        return self._range()[1]

    def _range(self) -> tuple[float, float]:
        if self._bounds is None:
            assert self.exponent is not None, "a range is asked for after a batch was counted"
            width = 2.0 ** (self.exponent + 1) / _BINS
            edges = torch.arange(_BINS + 1, dtype=torch.float64) * width - 2.0**self.exponent
            rule = _percentile if self.kind == "percentile" else _least_squares
            self._bounds = rule(self.counts.double(), edges)
        return self._bounds

    def state(self) -> list[Any]:
        """Return the kind, the exponent, and the counts without the empty bins."""
        filled = self.counts.nonzero()[:, 0]
        return [self.kind, self.exponent, filled.tolist(), self.counts[filled].tolist()]


def new_range(observer: Observer) -> Range:
    """Create an empty range.

    Args:
        observer: Kind of the range.

    Raises:
        ValueError: If the kind is unknown.

    Example:
        >>> new_range("min_max")
        MinMax(minimum=inf, maximum=-inf)
    """
    if observer == "min_max":
        return MinMax()
    if observer == "moving_average":
        return MovingAverage()
    if observer in ("percentile", "mse"):
        return Histogram(observer)
    raise ValueError(f"observer must be one of {list(OBSERVERS)}, got {observer!r}")


def restore(state: list[Any]) -> Range:
    """Build a range from its state.

    Args:
        state: Plain values that :meth:`Range.state` has returned.

    Example:
        >>> restore(MinMax(-1.0, 2.0).state())
        MinMax(minimum=-1.0, maximum=2.0)
    """
    kind, *values = state
    if kind in ("min_max", "moving_average"):
        bounds = (float(values[0]), float(values[1]))
        return MinMax(*bounds) if kind == "min_max" else MovingAverage(*bounds)
    exponent, filled, counts = values
    histogram = Histogram(kind, exponent)
    histogram.counts[torch.tensor(filled, dtype=torch.int64)] = torch.tensor(counts)
    return histogram


def _percentile(counts: Tensor, edges: Tensor) -> tuple[float, float]:
    """Return bounds that leave out the fraction ``_TAIL`` of the values on either side.

    Bounds within a bin are interpolated linearly.

    Args:
        counts: Counts, float64, shape ``(bins,)``.
        edges: Edges of the bins, float64, shape ``(bins + 1,)``.
    """
    below = counts.cumsum(0)
    total = float(below[-1])

    def quantile(fraction: float) -> float:
        rank = torch.tensor(fraction * total, dtype=torch.float64)
        bin_ = int(torch.searchsorted(below, rank).clamp_max(_BINS - 1))
        before = float(below[bin_] - counts[bin_])
        inside = (float(rank) - before) / max(float(counts[bin_]), 1.0)
        return float(edges[bin_] + inside * (edges[bin_ + 1] - edges[bin_]))

    return quantile(_TAIL), quantile(1 - _TAIL)


def _least_squares(counts: Tensor, edges: Tensor) -> tuple[float, float]:
    """Return the bounds whose 8-bit quantization has the least squared error.

    Args:
        counts: Counts, float64, shape ``(bins,)``.
        edges: Edges of the bins, float64, shape ``(bins + 1,)``.
    """
    filled = counts.nonzero()[:, 0]
    low, high = float(edges[filled[0]]), float(edges[filled[-1] + 1])
    centers, counts = ((edges[:-1] + edges[1:]) / 2)[filled], counts[filled]
    # From 1 down to 0.1. The quotients are correctly rounded; those of ``linspace`` may not be.
    fractions = torch.arange(100, 9, -1, dtype=torch.float64) / 100
    best_low, best_high = low, high
    for _ in range(2):  # The lower bound, then the upper, twice.
        if low < 0:
            errors = [_error(counts, centers, low * s, best_high) for s in fractions.tolist()]
            best_low = low * float(fractions[int(torch.tensor(errors).argmin())])
        if high > 0:
            errors = [_error(counts, centers, best_low, high * s) for s in fractions.tolist()]
            best_high = high * float(fractions[int(torch.tensor(errors).argmin())])
    return best_low, best_high


def _error(counts: Tensor, centers: Tensor, low: float, high: float) -> float:
    """Compute the squared error of 8-bit quantization over [low, high], extended to include 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, 1e-30)
    rounded = (centers.clamp(low, high) / scale).round() * scale
    # A cumulative sum adds in a fixed order; that of ``sum`` depends on the processor.
    return float(((centers - rounded).square() * counts).cumsum(0)[-1])
