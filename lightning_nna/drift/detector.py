r"""Detect the drift of a noisy series from the best level that it had: ``DriftDetector``.

After each value the newest level is estimated. With :math:`\hat\theta_t \pm \rho_t` the estimate
and its radius, where less is better, a series has drifted if

.. math:: \hat\theta_t - \rho_t > \min_{s < t} (\hat\theta_s + \rho_s):

it is surely above a level that it was surely below. A falling series never is, however steep it
falls, so that a training curve needs no detrending; a series that rises slowly is, once it has
risen beyond the radii.

The noise is the mean difference of neighbors, without those above four deviations (by the median),
times :math:`1 + 4 / n`, since few differences measure it badly. It is measured over the newest
thousand differences.

Differs from the paper: the test against the best level and the measure of noise are ours.

Reference:
    Baby et al., "Adaptive estimation and learning under temporal distribution shift", ICML 2025,
    arXiv 2505.15803.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from lightning_nna.drift.estimators import MEDIAN_OF_NORMAL, Estimate
from lightning_nna.drift.streaming_haar import StreamingHaar
from lightning_nna.drift.wavelets import wavelet_estimator

Mode: TypeAlias = Literal["min", "max"]

_DEVIATIONS = 4.0
# Mean absolute value of a standard normal variable that is known to be below four.
_MEAN_OF_NORMAL = 0.7976642
_UNCERTAINTY = 4.0
#: Number of differences that the noise is measured on, and of values that wavelets except Haar see.
MEMORY = 1024


@dataclass(frozen=True)
class DriftReading:
    """The state of a series after a value.

    Args:
        raw: Value, in the unit of the series.
        value: Estimated level, in the unit of the series.
        radius: Radius of the estimate; infinite after one value.
        effective_window: Number of values whose plain mean would be as noisy.
        reference: Best level before; not a number during the warm-up.
        reference_radius: Radius of the best level.
        drift: Whether the level is worse than the reference beyond both radii.
    """

    raw: float
    value: float
    radius: float
    effective_window: float
    reference: float
    reference_radius: float
    drift: bool


class DriftDetector:
    """Detect drift in a stream, one value after another; see the module.

    Args:
        wavelet: Name of the wavelet: ``"haar"``, at a cost that does not grow with the series;
            ``"db2"`` to ``"db8"`` on an interval, or any other discrete wavelet of PyWavelets with
            symmetric extension, over the newest 1024 values.
        mode: Direction, ``"min"`` if less is better, ``"max"`` if more is.
        constant: Factor of the threshold of details, at least 0.
        delta: Probability of error of the threshold and the radius: less means fewer alarms, later.
        warmup: Number of values before the first reference, at least 2.
        min_delta: Least worsening that is a drift, in the unit of the series, at least 0.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> detector = DriftDetector(warmup=4)
        >>> quiet = [detector.update(y).drift for y in (0.2, 0.3, 0.2, 0.3, 0.2, 0.3, 0.2, 0.3)]
        >>> loud = [detector.update(y).drift for y in (1.2, 1.3, 1.2)]
        >>> any(quiet), loud
        (False, [True, True, True])
    """

    def __init__(
        self,
        *,
        wavelet: str = "haar",
        mode: Mode = "min",
        constant: float = 0.45,
        delta: float = 0.2,
        warmup: int = 6,
        min_delta: float = 0.0,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        if warmup < 2:
            raise ValueError(f"warmup must be at least 2, got {warmup}")
        if not min_delta >= 0:
            raise ValueError(f"min_delta must not be negative, got {min_delta}")
        self.wavelet, self.mode, self.constant, self.delta = wavelet, mode, constant, delta
        self.warmup, self.min_delta = warmup, min_delta
        self._stream = StreamingHaar(sigma=0.0, constant=constant, delta=delta)
        self._estimator(0.0)
        #: The newest values; differences in their order and by size.
        self._newest: deque[float] = deque(maxlen=MEMORY + 1)
        self._ordered: list[float] = []
        self._reference: tuple[float, float] | None = None

    @property
    def n(self) -> int:
        """Return the number of values so far."""
        return self._stream.n

    @property
    def constant_so_far(self) -> bool:
        """Tell if all of the newest values were equal: then nothing is known of the noise."""
        return not self._ordered or self._ordered[-1] == 0

    def update(self, y: float) -> DriftReading:
        """Take in a value and test for drift.

        Args:
            y: Newest value, finite.

        Raises:
            ValueError: If it is not finite: the detector is unchanged, and may go on.
        """
        self._stream.push(y)
        self._take_difference(y)
        self._newest.append(y)
        estimate = self._estimate()
        value, radius = float(estimate.value), float(estimate.radius)
        sign = 1.0 if self.mode == "min" else -1.0
        reference, reference_radius = self._reference or (math.nan, math.nan)
        worse = sign * (value - reference) - radius - reference_radius
        reading = DriftReading(
            raw=y,
            value=value,
            radius=radius,
            effective_window=float(estimate.effective_window),
            reference=reference,
            reference_radius=reference_radius,
            drift=worse > self.min_delta,
        )
        bound = sign * reference + reference_radius
        if self.n > self.warmup and not sign * value + radius >= bound:
            self._reference = value, radius
        return reading

    def noise_level(self) -> float:
        """Measure the noise, on the safe side; infinite after one value."""
        count = len(self._ordered)
        if not count:
            return math.inf
        middle = (self._ordered[(count - 1) // 2] + self._ordered[count // 2]) / 2
        # Where most neighbors are equal, as in a coarse metric, all differences count.
        inside = bisect_right(self._ordered, _DEVIATIONS * middle / MEDIAN_OF_NORMAL)
        differences = self._ordered[:inside] if middle else self._ordered
        mean = math.fsum(differences) / len(differences)
        return mean / (_MEAN_OF_NORMAL * math.sqrt(2)) * (1 + _UNCERTAINTY / (count + 1))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the detector, in plain numbers."""
        return {
            "stream": self._stream.state_dict(),
            "newest": list(self._newest),
            "reference": None if self._reference is None else list(self._reference),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`."""
        self._stream.load_state_dict(state["stream"])
        self._newest = deque(state["newest"], maxlen=MEMORY + 1)
        self._ordered = sorted(np.abs(np.diff(list(self._newest))).tolist())
        reference = state["reference"]
        self._reference = None if reference is None else (reference[0], reference[1])

    def _take_difference(self, y: float) -> None:
        if len(self._newest) == MEMORY + 1:
            oldest = abs(self._newest[1] - self._newest[0])
            del self._ordered[bisect_left(self._ordered, oldest)]
        if self._newest:
            insort(self._ordered, abs(y - self._newest[-1]))

    def _estimate(self) -> Estimate:
        sigma = self.noise_level()
        if self.wavelet == "haar":
            return self._stream.estimate(sigma)
        if not math.isfinite(sigma):
            return Estimate(self._newest[-1], math.inf, sigma, 1.0, 0)
        return self._estimator(sigma).latest(np.array(self._newest))

    def _estimator(self, sigma: float) -> Any:
        interval = self.wavelet in {f"db{order}" for order in range(2, 9)}
        return wavelet_estimator(
            self.wavelet,
            boundary="interval" if interval else "symmetric",
            sigma=sigma,
            constant=self.constant,
            delta=self.delta,
        )
