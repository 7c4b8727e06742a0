"""What an update of a stream costs, and how denoising a whole series scales."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pywt

from lightning_nna.drift.streaming_haar import StreamingHaar
from lightning_nna.drift.total_variation import taut_string, tv_denoise
from lightning_nna.drift.wavelets import HaarEstimator
from lightning_nna.drift.windows import FixedWindow
from recipes import require_extra

LENGTHS = (1_000, 10_000, 100_000, 1_000_000)
UPDATES = 2_000

RATE_LENGTHS = tuple(2**power for power in range(8, 17))
RATE_SEEDS = range(4)
_RATE_SIGMA = 0.5
_PENALTIES = tuple(_RATE_SIGMA * 2.0**power for power in range(0, 5))


def streaming(missing: Sequence[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """Median time of one more value, in microseconds, by method and values before it."""
    for method, n in missing:
        y = np.random.default_rng(0).standard_normal(n + UPDATES)
        if method == "streaming":
            stream = StreamingHaar(sigma=1.0)
            for value in y[:n].tolist():
                stream.push(value)
            times = [_timed(stream.update, value) for value in y[n:].tolist()]
        else:
            recompute = _RECOMPUTED[method]
            repeats = max(3, min(UPDATES, 3_000_000 // n))
            times = [_timed(recompute, y[:end]) for end in range(n + 1, n + 1 + repeats)]
        yield {"case": f"n = {n}", "n": n, "method": method, "update_us": float(np.median(times))}


def with_pywavelets(y: np.ndarray) -> float:
    """The estimate of the newest 2^J values, all of it computed again."""
    levels = len(y).bit_length() - 1
    coarse, *details = pywt.wavedec(y[-(2**levels) :], "haar", level=levels)
    threshold = np.sqrt(2 * np.log(levels / 0.1))
    shrunk = [pywt.threshold(detail, threshold, "soft") for detail in details]
    return float(pywt.waverec([coarse, *shrunk], "haar")[-1])


def with_batch(y: np.ndarray) -> float:
    """The closed form over the whole series."""
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
#: Ours: the estimator, and whether later values count.
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


def rate(missing: Sequence[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """Squared error summed over a series, by method and length; mean over seeds."""
    for method, n in missing:
        found = []
        for seed in RATE_SEEDS:
            truth = piecewise_constant(n)
            noise = np.random.default_rng([seed, 5]).standard_normal(n)
            found.append(_total_error(method, truth, truth + _RATE_SIGMA * noise))
        mean, spread = float(np.mean(found)), float(np.std(found, ddof=1) / len(found) ** 0.5)
        yield {"case": f"n = {n}", "n": n, "method": method, "error": mean, "error_error": spread}


def piecewise_constant(n: int) -> np.ndarray:
    """A hard series of total variation 4: half in one jump, half in n^(1/3) small ones."""
    pieces = round(n ** (1 / 3))
    small = (np.arange(n) * pieces // n % 2) * (2.0 / pieces)
    return small + 2.0 * (np.arange(n) >= n // 3)


def slope(lengths: Sequence[int], errors: Sequence[float]) -> float:
    """Exponent of a power law through the points, by least squares of the logarithms."""
    return float(np.polyfit(np.log(lengths), np.log(errors), 1)[0])


def _total_error(method: str, truth: np.ndarray, y: np.ndarray) -> float:
    def error(found: Any) -> float:
        return float(np.square(found - truth).sum())

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
    """Its wavelet denoiser with Haar, the noise known, and as many levels as it takes by itself.

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
