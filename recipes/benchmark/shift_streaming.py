"""Cost of one update of a stream, and error of denoising a series by its length."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pywt

from lightning_nna.drift.streaming_haar import StreamingHaar
from lightning_nna.drift.total_variation import taut_string, tv_denoise
from lightning_nna.drift.wavelets import HaarEstimator
from lightning_nna.drift.windows import FixedWindow
from recipes import require_extra
from recipes.benchmark.grid import Run
from recipes.benchmark.report import line
from recipes.benchmark.rows import Row, select

LENGTHS = (1_000, 10_000, 100_000, 1_000_000)
UPDATES = 2_000

RATE_LENGTHS = tuple(2**power for power in range(8, 17))
RATE_SEEDS = range(4)
_RATE_SIGMA = 0.5
_PENALTIES = tuple(_RATE_SIGMA * 2.0**power for power in range(0, 5))


def with_pywavelets(y: np.ndarray) -> float:
    """Estimate from the newest 2^J values, all of it computed again."""
    levels = len(y).bit_length() - 1
    coarse, *details = pywt.wavedec(y[-(2**levels) :], "haar", level=levels)
    threshold = np.sqrt(2 * np.log(levels / 0.1))
    shrunk = [pywt.threshold(detail, threshold, "soft") for detail in details]
    return float(pywt.waverec([coarse, *shrunk], "haar")[-1])


def with_batch(y: np.ndarray) -> float:
    """Estimate by the closed form over the whole series."""
    return float(HaarEstimator(sigma=1.0).latest(y).value)


_RECOMPUTED: dict[str, Callable[[np.ndarray], float]] = {
    "pywavelets": with_pywavelets,
    "batch": with_batch,
}
STREAMING: dict[str, str] = {
    "streaming": "StreamingHaar.update",
    "batch": "haar_latest of all values",
    "pywavelets": "PyWavelets, transform and inverse of all values",
}

RATES: dict[str, str] = {
    "haar": "tv_denoise, Haar, soft",
    "haar_hard": "tv_denoise, Haar, hard",
    "haar_two_sided": "tv_denoise, Haar, soft, two-sided",
    "haar_hard_two_sided": "tv_denoise, Haar, hard, two-sided",
    "taut_string": "exact total variation, best penalty",
    "skimage_visushrink": "scikit-image, VisuShrink, soft",
    "skimage_visushrink_hard": "scikit-image, VisuShrink, hard",
    "skimage_bayesshrink": "scikit-image, BayesShrink, soft",
    "window": "best fixed window",
}
#: Estimators of ours, and whether later values count.
HAAR: dict[str, tuple[HaarEstimator, bool]] = {
    f"{name}{two_sided}": (estimator, bool(two_sided))
    for name, estimator in (
        ("haar", HaarEstimator(sigma=_RATE_SIGMA, constant=0.85)),
        ("haar_hard", HaarEstimator(sigma=_RATE_SIGMA, constant=1.2, rule="hard")),
    )
    for two_sided in ("", "_two_sided")
}
_SCIKIT_IMAGE: dict[str, dict[str, str]] = {
    "skimage_visushrink": {"method": "VisuShrink", "mode": "soft"},
    "skimage_visushrink_hard": {"method": "VisuShrink", "mode": "hard"},
    "skimage_bayesshrink": {"method": "BayesShrink", "mode": "soft"},
}


@dataclass(frozen=True)
class StreamingRun(Run):
    """One way to estimate again after one more value of a stream.

    Attributes:
        n: Number of values before it.
        method: A key of :data:`STREAMING`.
        table: Name of the table.
    """

    n: int
    method: str
    table: str = "streaming"

    def rows(self) -> Iterator[Row]:
        """Measure the median time of an update in microseconds."""
        y = np.random.default_rng(0).standard_normal(self.n + UPDATES)
        if self.method == "streaming":
            stream = StreamingHaar(sigma=1.0)
            for value in y[: self.n].tolist():
                stream.push(value)
            times = [_timed(stream.update, value) for value in y[self.n :].tolist()]
        else:
            recompute = _RECOMPUTED[self.method]
            repeats = max(3, min(UPDATES, 3_000_000 // self.n))
            ends = range(self.n + 1, self.n + 1 + repeats)
            times = [_timed(recompute, y[:end]) for end in ends]
        yield {**self.keys[0], "case": f"n = {self.n}", "update_us": float(np.median(times))}


@dataclass(frozen=True)
class RateRun(Run):
    """One way to denoise a series.

    Attributes:
        n: Length of the series.
        method: A key of :data:`RATES`.
        table: Name of the table.
    """

    n: int
    method: str
    table: str = "rate"

    def rows(self) -> Iterator[Row]:
        """Measure the squared error summed over the series, mean over seeds."""
        totals = []
        for seed in RATE_SEEDS:
            truth = piecewise_constant(self.n)
            noise = np.random.default_rng([seed, 5]).standard_normal(self.n)
            totals.append(_total_error(self.method, truth, truth + _RATE_SIGMA * noise))
        spread = float(np.std(totals, ddof=1) / len(totals) ** 0.5)
        row = {"case": f"n = {self.n}", "error": float(np.mean(totals)), "error_error": spread}
        yield {**self.keys[0], **row}


def streaming_runs() -> list[StreamingRun]:
    """List the grid of updates, length by length."""
    return [StreamingRun(n, method) for n, method in itertools.product(LENGTHS, STREAMING)]


def rate_runs() -> list[RateRun]:
    """List the grid of denoising, length by length."""
    return [RateRun(n, method) for n, method in itertools.product(RATE_LENGTHS, RATES)]


def streaming_lines(rows: Sequence[Row]) -> list[str]:
    """Format one line a way to estimate again."""
    lines = []
    for method, title in STREAMING.items():
        selected = select(rows, table="streaming", method=method)
        by_length = {row["n"]: f"{row['update_us']:,.1f} µs" for row in selected}
        if by_length:
            lines.append(line(title, *(by_length.get(n, "-") for n in LENGTHS)))
    return lines


def rate_lines(rows: Sequence[Row]) -> list[str]:
    """Format one line a way to denoise, with the exponent of its error."""
    lines = []
    for method, title in RATES.items():
        selected = select(rows, table="rate", method=method)
        if len(selected) > 1:
            lengths, errors = zip(*((row["n"], row["error"]) for row in selected), strict=True)
            exponent = f"{slope(lengths, errors):.3f}"
            lines.append(line(title, exponent, f"{errors[0]:.1f}", f"{errors[-1]:.1f}"))
    return lines


def piecewise_constant(n: int) -> np.ndarray:
    """Make a hard series of total variation 4: half in one jump, half in n^(1/3) small ones."""
    pieces = round(n ** (1 / 3))
    small = (np.arange(n) * pieces // n % 2) * (2.0 / pieces)
    return small + 2.0 * (np.arange(n) >= n // 3)


def slope(lengths: Sequence[int], errors: Sequence[float]) -> float:
    """Fit the exponent of a power law, by least squares of the logarithms."""
    return float(np.polyfit(np.log(lengths), np.log(errors), 1)[0])


def _total_error(method: str, truth: np.ndarray, y: np.ndarray) -> float:
    def error(estimate: Any) -> float:
        return float(np.square(estimate - truth).sum())

    if method == "taut_string":
        return min(error(taut_string(y, penalty)) for penalty in _PENALTIES)
    if method == "window":
        windows = [2**power for power in range(len(y).bit_length())]
        return min(error(tv_denoise(y, FixedWindow(window=r, sigma=1.0))) for r in windows)
    if method in _SCIKIT_IMAGE:
        return error(by_scikit_image(y, **_SCIKIT_IMAGE[method]))
    estimator, two_sided = HAAR[method]
    return error(tv_denoise(y, estimator, two_sided=two_sided))


def by_scikit_image(y: np.ndarray, **settings: str) -> np.ndarray:
    """Denoise with scikit-image: Haar, the noise known, its default number of levels.

    Raises:
        ImportError: If scikit-image is missing: install the extra ``bench``.
    """
    require_extra("bench", "skimage")
    from skimage.restoration import denoise_wavelet

    return np.asarray(denoise_wavelet(y, sigma=_RATE_SIGMA, wavelet="db1", **settings))


def _timed(call: Callable[[Any], Any], argument: Any) -> float:
    start = time.perf_counter()
    call(argument)
    return (time.perf_counter() - start) * 1e6
