r"""Observers: what is kept of the values that a call site has shown, and the range that follows.

``min_max`` covers everything seen; ``moving_average`` smooths the bounds of the batches;
``percentile`` leaves out the outermost values of either tail; ``mse`` takes the range with the
least squared error of an 8-bit grid,

.. math:: \min_{a, b} \sum_k n_k \bigl(x_k - Q_{a,b}(x_k)\bigr)^2,

over a histogram with counts :math:`n_k`. The histogram spans :math:`\pm 2^e` and doubles when a
value falls outside, by adding neighboring bins: two of them can be added without loss.

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
#: Share of the values of a tail that a percentile leaves out.
_TAIL = 1e-4


class Range(ABC):
    """Values that a site has shown; from ``minimum`` to ``maximum`` they are to be covered."""

    minimum: float
    maximum: float

    @property
    def magnitude(self) -> float:
        """Largest absolute value of the range."""
        return max(abs(self.minimum), abs(self.maximum))

    @abstractmethod
    def update(self, x: Tensor, minimum: float, maximum: float) -> None:
        """Take in a batch of values, whose bounds are given."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Take in what another range of the same kind has seen."""

    @abstractmethod
    def state(self) -> list[Any]:
        """Plain values from which :func:`restore` builds the range again."""


@dataclass
class MinMax(Range):
    """Smallest and largest value.

    Example:
        >>> seen = MinMax()
        >>> seen.update(torch.tensor([-1.0, 2.0]), -1.0, 2.0)
        >>> seen.magnitude
        2.0
    """

    minimum: float = math.inf
    maximum: float = -math.inf

    def update(self, x: Tensor, minimum: float, maximum: float) -> None:
        """Widen the range."""
        self.minimum = min(self.minimum, minimum)
        self.maximum = max(self.maximum, maximum)

    def merge(self, other: MinMax) -> None:
        """Cover both."""
        self.update(torch.empty(0), other.minimum, other.maximum)

    def state(self) -> list[Any]:
        """Both bounds."""
        return ["min_max", self.minimum, self.maximum]


@dataclass
class MovingAverage(Range):
    """Exponential average of the bounds of batches; the first batch counts whole."""

    minimum: float = math.inf
    maximum: float = -math.inf

    def update(self, x: Tensor, minimum: float, maximum: float) -> None:
        """Move the bounds toward those of the batch."""
        if self.minimum > self.maximum:
            self.minimum, self.maximum = minimum, maximum
            return
        self.minimum += _MOMENTUM * (minimum - self.minimum)
        self.maximum += _MOMENTUM * (maximum - self.maximum)

    def merge(self, other: MovingAverage) -> None:
        """Cover both: the ranks of a run see batches of one distribution."""
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)

    def state(self) -> list[Any]:
        """Both bounds."""
        return ["moving_average", self.minimum, self.maximum]


@dataclass
class Histogram(Range):
    """Counts of values in equal bins over ±2^exponent.

    Args:
        kind: ``"percentile"`` or ``"mse"``: how the range follows from the counts.
        exponent: The histogram covers ±2^exponent.
        counts: int64, one per bin; the first is the lowest.

    Example:
        >>> seen = Histogram("percentile")
        >>> seen.update(torch.linspace(-1, 1, 100_001), -1.0, 1.0)
        >>> round(seen.maximum, 3)
        1.0
    """

    kind: Literal["percentile", "mse"]
    exponent: int | None = None
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))
    _bounds: tuple[float, float] | None = None

    def update(self, x: Tensor, minimum: float, maximum: float) -> None:
        """Count a batch, after making room for it."""
        needed = ceil_log2(max(-minimum, maximum, 2.0**-100))
        self._make_room(needed)
        assert self.exponent is not None
        edge = 2.0**self.exponent
        found = torch.histc(x.detach().float().cpu(), _BINS, -edge, edge)
        self.counts += found.long()
        self._bounds = None

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        if other.exponent is None:
            return
        self._make_room(other.exponent)
        assert self.exponent is not None
        added = Histogram(other.kind, other.exponent, other.counts.clone())
        added._make_room(self.exponent)
        self.counts += added.counts
        self._bounds = None

    def _make_room(self, exponent: int) -> None:
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
            step = 2.0 ** (self.exponent + 1) / _BINS
            edges = torch.arange(_BINS + 1, dtype=torch.float64) * step - 2.0**self.exponent
            choose = _percentile if self.kind == "percentile" else _least_squares
            self._bounds = choose(self.counts.double(), edges)
        return self._bounds

    def state(self) -> list[Any]:
        """Span, and counts without the empty bins."""
        filled = self.counts.nonzero()[:, 0]
        return [self.kind, self.exponent, filled.tolist(), self.counts[filled].tolist()]


def new_range(observer: Observer) -> Range:
    """An empty range of a kind.

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
    """The range that gave ``state``.

    Example:
        >>> restore(MinMax(-1.0, 2.0).state())
        MinMax(minimum=-1.0, maximum=2.0)
    """
    kind, *values = state
    if kind in ("min_max", "moving_average"):
        bounds = (float(values[0]), float(values[1]))
        return MinMax(*bounds) if kind == "min_max" else MovingAverage(*bounds)
    exponent, filled, found = values
    histogram = Histogram(kind, exponent)
    histogram.counts[torch.tensor(filled, dtype=torch.int64)] = torch.tensor(found)
    return histogram


def _percentile(counts: Tensor, edges: Tensor) -> tuple[float, float]:
    """Bounds that leave out ``_TAIL`` of the values on either side, linear within a bin."""
    below = counts.cumsum(0)
    total = float(below[-1])

    def quantile(share: float) -> float:
        wanted = torch.tensor(share * total, dtype=torch.float64)
        bin_ = int(torch.searchsorted(below, wanted).clamp_max(_BINS - 1))
        before = float(below[bin_] - counts[bin_])
        inside = (float(wanted) - before) / max(float(counts[bin_]), 1.0)
        return float(edges[bin_] + inside * (edges[bin_ + 1] - edges[bin_]))

    return quantile(_TAIL), quantile(1 - _TAIL)


def _least_squares(counts: Tensor, edges: Tensor) -> tuple[float, float]:
    """Bounds whose 8-bit grid has the least squared error; searched side by side."""
    filled = counts.nonzero()[:, 0]
    low, high = float(edges[filled[0]]), float(edges[filled[-1] + 1])
    centers, counts = ((edges[:-1] + edges[1:]) / 2)[filled], counts[filled]
    # From 1 down to 0.1, rounded correctly: evenly spaced numbers of a library may not be.
    shares = torch.arange(100, 9, -1, dtype=torch.float64) / 100
    best_low, best_high = low, high
    for _ in range(2):  # One side after the other, twice.
        if low < 0:
            errors = [_error(counts, centers, low * s, best_high) for s in shares.tolist()]
            best_low = low * float(shares[int(torch.tensor(errors).argmin())])
        if high > 0:
            errors = [_error(counts, centers, best_low, high * s) for s in shares.tolist()]
            best_high = high * float(shares[int(torch.tensor(errors).argmin())])
    return best_low, best_high


def _error(counts: Tensor, centers: Tensor, low: float, high: float) -> float:
    """Squared error of an 8-bit grid over [low, high], which includes 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = max((high - low) / 255, 1e-30)
    rounded = (centers.clamp(low, high) / step).round() * step
    # One after the other: the order of a sum depends on the processor.
    return float(((centers - rounded).square() * counts).cumsum(0)[-1])
