r"""The Haar estimate of a stream, value by value: ``StreamingHaar``.

The stream is cut into dyadic blocks, 1 or 2 of each size :math:`1, 2, 4, \dots`, the newest of size
1. A new value is a block of its own; three blocks of a size become one and a block of twice the
size. So a value costs :math:`O(1)` amortized to take in, an estimate :math:`O(\log n)`, and the
sums of at most :math:`2 \log_2 n` blocks are stored. They are the windows of
:func:`~lightning_nna.drift.wavelets.haar_latest`, whatever :math:`n` is.

Reference:
    Datar, Gionis, Indyk and Motwani, "Maintaining stream statistics over sliding windows", SIAM J.
    Comput. 31(6), 2002, has such blocks.
"""

from __future__ import annotations

import math
from typing import Any

from lightning_nna.drift.estimators import MEDIAN_OF_NORMAL, Estimate, validate_settings

# Bins of the histogram of differences grow by this factor: the median is known to half a per cent.
_GROWTH = 1.01
# The bin of equal neighbors.
_NONE = -(2**31)


class StreamingHaar:
    """Estimate the newest value of a stream, one value after another.

    Args:
        sigma: Standard deviation of the noise, in the unit of the stream; None to measure it by the
            median difference of neighbors. That is read from a histogram with bins of 1 %, so that
            it may differ by 0.5 % from the noise of the whole series.
        constant: Factor :math:`c` of the threshold, at least 0.
        delta: Probability that noise passes the threshold, for a constant of 1.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> stream = StreamingHaar(sigma=0.1)
        >>> for y in (0.0, 0.1, -0.1, 0.0, 1.0, 1.1, 0.9, 1.0):
        ...     estimate = stream.update(y)
        >>> round(estimate.value, 2), stream.n, stream.blocks
        (0.91, 8, [1.0, 0.9, 2.1, 0.0])
    """

    def __init__(
        self, *, sigma: float | None = None, constant: float = 1.0, delta: float = 0.1
    ) -> None:
        validate_settings(sigma=sigma, delta=delta, constant=constant)
        self.sigma, self.constant, self.delta = sigma, constant, delta
        self.n = 0
        # By level: the sum of the only or newer block, and of the older one if there are two.
        self._newer: list[float] = []
        self._older: list[float | None] = []
        self._last = 0.0
        self._differences: dict[int, int] = {}

    @property
    def blocks(self) -> list[float]:
        """Return the sums of the blocks, from the newest to the oldest."""
        both = zip(self._newer, self._older, strict=True)
        return [total for pair in both for total in pair if total is not None]

    def update(self, y: float) -> Estimate:
        """Take in a value and estimate it.

        Args:
            y: Newest value, finite.

        Raises:
            ValueError: If it is not finite: the stream is unchanged, and may go on.
        """
        self.push(y)
        return self.estimate()

    def push(self, y: float) -> None:
        """Take in a value, without an estimate.

        Args:
            y: Newest value, finite.

        Raises:
            ValueError: If it is not finite.
        """
        if not math.isfinite(y):
            raise ValueError(f"a value must be finite, got {y}; leave it out")
        if self.n and self.sigma is None:
            size = abs(y - self._last)
            number = math.floor(math.log(size) / math.log(_GROWTH)) if size else _NONE
            self._differences[number] = self._differences.get(number, 0) + 1
        self._last = y
        self.n += 1
        newer, older = self._newer, self._older
        for level in range(len(newer)):
            second = older[level]
            if second is None:
                newer[level], older[level] = y, newer[level]
                return
            # The two older of three blocks become one of the next level.
            newer[level], older[level], y = y, None, second + newer[level]
        newer.append(y)
        older.append(None)

    def noise_level(self) -> float:
        """Return the noise as given or measured; infinite after one value."""
        if self.sigma is not None:
            return self.sigma
        count = sum(self._differences.values())
        if not count:
            return math.inf
        middle = (self._difference((count - 1) // 2) + self._difference(count // 2)) / 2
        return middle / (math.sqrt(2) * MEDIAN_OF_NORMAL)

    def estimate(self, sigma: float | None = None) -> Estimate:
        """Estimate the newest value.

        Args:
            sigma: Standard deviation of the noise, instead of the stream's own.

        Raises:
            ValueError: If no value was taken in.
        """
        if not self.n:
            raise ValueError("a stream needs at least one value: update it first")
        sigma = self.noise_level() if sigma is None else sigma
        quantile = math.sqrt(2 * math.log(max(math.log2(self.n), 1.0) / self.delta))
        threshold = self.constant * quantile * sigma
        total = mean = self._newer[0]
        shrunk, variance, window, count, size = 0.0, 1 / self.n, 1, 0, 1
        for level in range(len(self._newer)):
            for block in (None if level == 0 else self._newer[level], self._older[level]):
                if block is None:
                    continue
                total += block
                wider = window + size
                excess = 1 / window - 1 / wider
                detail = mean - total / wider
                beyond = abs(detail) - threshold * math.sqrt(excess)
                if beyond > 0:
                    shrunk += math.copysign(beyond, detail)
                    variance += excess
                    count += 1
                window, mean = wider, total / wider
            size *= 2
        radius = quantile * sigma * math.sqrt(variance)
        return Estimate(mean + shrunk, radius, sigma, 1 / variance, count)

    def _difference(self, rank: int) -> float:
        """Return the difference of a rank, to the precision of the histogram."""
        for number in sorted(self._differences):
            rank -= self._differences[number]
            if rank < 0:
                break
        return 0.0 if number == _NONE else _GROWTH ** (number + 0.5)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the stream, in plain numbers."""
        return {
            "n": self.n,
            "newer": list(self._newer),
            "older": list(self._older),
            "last": self._last,
            "differences": dict(self._differences),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`."""
        self.n, self._last = state["n"], state["last"]
        self._newer, self._older = list(state["newer"]), list(state["older"])
        self._differences = dict(state["differences"])
