"""The newest value of noisy series: mean squared error of every estimator at every time.

The settings of every method, ours and others, are one for all cells. They were chosen with
:func:`tune`, on other seeds than those that are reported: those of the least geometric mean, over
series and noise, of the error over that of the best fixed window.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_nna.drift.aligator import Aligator
from lightning_nna.drift.estimators import LatestEstimator
from lightning_nna.drift.interval_estimator import IntervalWaveletEstimator
from lightning_nna.drift.symmetric_wavelets import SymmetricWaveletEstimator
from lightning_nna.drift.wavelet_mixture import WaveletMixture
from lightning_nna.drift.wavelets import HaarEstimator
from lightning_nna.drift.windows import (
    AdaptiveRollingWindow,
    DoublingWindow,
    ExponentialAverage,
    FixedWindow,
    WholeAverage,
)

LENGTH = 1024
SIGMAS = (0.2, 0.5, 1.0)
SEEDS = range(10)
TUNING_SEEDS = range(1000, 1006)
WINDOWS = (*range(1, 20), *range(20, 100, 4), 128, 160, 200, 256, 384, 512, LENGTH)


@dataclass(frozen=True)
class Method:
    """An estimator of the table.

    Args:
        title: In tables.
        estimator: With its settings; the noise is put in.
        ours: Whether it is one of ours.
    """

    title: str
    estimator: Any
    ours: bool = False


METHODS: dict[str, Method] = {
    "mixture": Method("mixture of wavelets", WaveletMixture(), True),
    "haar": Method("Haar, soft", HaarEstimator(constant=0.35), True),
    "haar_hard": Method("Haar, hard", HaarEstimator(constant=1.0, rule="hard"), True),
    "db1_tree": Method("db1 interval, tree", IntervalWaveletEstimator(order=1, rule="tree"), True),
    "db1_hard": Method("db1 interval, hard", IntervalWaveletEstimator(order=1, rule="hard"), True),
    "db2": Method("db2 interval", IntervalWaveletEstimator(order=2, constant=0.45), True),
    "db4": Method("db4 interval", IntervalWaveletEstimator(order=4, constant=0.5), True),
    "db8": Method("db8 interval", IntervalWaveletEstimator(order=8, constant=0.5), True),
    "db4_symmetric": Method(
        "db4 symmetric", SymmetricWaveletEstimator(wavelet="db4", constant=0.9), True
    ),
    "db8_symmetric": Method(
        "db8 symmetric", SymmetricWaveletEstimator(wavelet="db8", constant=0.7), True
    ),
    "whole": Method("whole average", WholeAverage()),
    "window": Method("fixed window", FixedWindow(window=6)),
    "exponential": Method("exponential average", ExponentialAverage(decay=0.75)),
    "arw": Method("ARW, M = 0", AdaptiveRollingWindow(constant=0.45)),
    "arw_bound": Method("ARW, M = 1", AdaptiveRollingWindow(constant=0.2, bound=1.0)),
    "doubling": Method("Mazzetto-Upfal", DoublingWindow(constant=0.7)),
    "aligator": Method("Aligator", Aligator(rate=0.3)),
}

#: What :func:`tune` tries.
GRIDS: dict[str, tuple[Callable[[Any], LatestEstimator], Sequence[Any]]] = {
    "haar": (lambda c: HaarEstimator(constant=c), (0.3, 0.35, 0.4, 0.45, 0.5, 0.6)),
    "haar_hard": (
        lambda c: HaarEstimator(constant=c, rule="hard"),
        (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2),
    ),
    "db1_tree": (
        lambda c: IntervalWaveletEstimator(order=1, constant=c, rule="tree"),
        (0.8, 0.9, 1.0, 1.1, 1.2),
    ),
    "db1_hard": (
        lambda c: IntervalWaveletEstimator(order=1, constant=c, rule="hard"),
        (0.8, 0.9, 1.0, 1.1, 1.2),
    ),
    "db2": (lambda c: IntervalWaveletEstimator(order=2, constant=c), (0.4, 0.45, 0.5, 0.55, 0.6)),
    "db4": (lambda c: IntervalWaveletEstimator(order=4, constant=c), (0.4, 0.5, 0.55, 0.6, 0.7)),
    "db8": (lambda c: IntervalWaveletEstimator(order=8, constant=c), (0.4, 0.5, 0.6, 0.7)),
    "db4_symmetric": (
        lambda c: SymmetricWaveletEstimator(wavelet="db4", constant=c),
        (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    ),
    "db8_symmetric": (
        lambda c: SymmetricWaveletEstimator(wavelet="db8", constant=c),
        (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    ),
    "mixture": (
        lambda x: WaveletMixture(soft=x[0], tree=x[1], rate=x[2]),
        [
            (soft, tree, rate)
            for soft in ((0.35, 0.7), (0.4, 0.8))
            for tree in ((0.9,), (0.8, 1.0), (0.9, 1.2))
            for rate in (0.1, 0.15, 0.2)
        ],
    ),
    "window": (lambda r: FixedWindow(window=r), (3, 4, 5, 6, 8, 10, 12, 16, 24)),
    "exponential": (
        lambda d: ExponentialAverage(decay=d),
        (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9),
    ),
    "arw": (
        lambda c: AdaptiveRollingWindow(constant=c),
        (0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.8, 1.0),
    ),
    "arw_bound": (
        lambda c: AdaptiveRollingWindow(constant=c, bound=1.0),
        (0.2, 0.3, 0.4, 0.5, 0.6, 1.0),
    ),
    "doubling": (lambda c: DoublingWindow(constant=c), (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
    "aligator": (lambda eta: Aligator(rate=eta), (0.05, 0.1, 0.2, 0.3, 0.5)),
}


def series(seed: int) -> dict[str, np.ndarray]:
    """The true courses, each of mean 0 and standard deviation 1; the seed is the random walk's.

    Reference:
        The first four are those of Donoho and Johnstone, "Ideal spatial adaptation by wavelet
        shrinkage", Biometrika 81(3), 1994.
    """
    t = np.arange(1, LENGTH + 1) / LENGTH
    at = np.array([0.1, 0.13, 0.15, 0.23, 0.25, 0.4, 0.44, 0.65, 0.76, 0.78, 0.81])
    steps = np.array([4, -5, 3, -4, 5, -4.2, 2.1, 4.3, -3.1, 2.1, -4.2])
    heights = np.array([4, 5, 3, 4, 5, 4.2, 2.1, 4.3, 3.1, 5.1, 4.2])
    widths = np.array([5, 5, 6, 10, 10, 30, 10, 10, 5, 8, 5]) / 1000
    away = t[:, None] - at
    courses = {
        "Doppler": np.sqrt(t * (1 - t)) * np.sin(2 * np.pi * 1.05 / (t + 0.05)),
        "blocks": ((1 + np.sign(away)) / 2 * steps).sum(1),
        "bumps": (heights / (1 + np.abs(away / widths)) ** 4).sum(1),
        "heavisine": 4 * np.sin(4 * np.pi * t) - np.sign(t - 0.3) - np.sign(0.72 - t),
        "random walk": np.random.default_rng([seed, 1]).standard_normal(LENGTH).cumsum(),
        "ramps": np.abs(4 * t % 2 - 1),
        "drop": (t < 0.5).astype(float),
        "sines": np.sin(6 * np.pi * t) + 0.5 * np.sin(22 * np.pi * t),
    }
    return {name: (course - course.mean()) / course.std() for name, course in courses.items()}


CASES = tuple(series(0))


def noisy(seeds: Sequence[int], sigma: float) -> tuple[Tensor, Tensor]:
    """True and noisy series, of shape (seeds, cases, time)."""
    truth = np.array([list(series(seed).values()) for seed in seeds])
    noise = [np.random.default_rng([seed, 2]).standard_normal(truth.shape[1:]) for seed in seeds]
    return torch.from_numpy(truth), torch.from_numpy(truth + sigma * np.array(noise))


def errors(estimator: LatestEstimator, truth: Tensor, y: Tensor) -> Tensor:
    """Squared error, mean over all prefixes, of shape (seeds, cases)."""
    found = torch.as_tensor(estimator.prefixes(y).value)
    return (found - truth).square().mean(-1)


def oracle(truth: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of the fixed window that is best for each case, and these windows."""
    # The noise is given only because a mean does not need it.
    every = torch.stack([errors(FixedWindow(window=r, sigma=1.0), truth, y) for r in WINDOWS])
    best = every.mean(1).argmin(0)
    return every[best, :, torch.arange(len(CASES))].T, torch.tensor(WINDOWS)[best]


def measure(sigma: float, *, sigma_known: bool, missing: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of the methods that are missing, for every case.

    Yields:
        case, sigma, sigma_known, method, mse and its standard error over seeds.
    """
    truth, y = noisy(SEEDS, sigma)
    key = {"sigma": sigma, "sigma_known": sigma_known}
    for method in missing:
        extra: Mapping[str, Any] = {}
        if method == "oracle":
            found, windows = oracle(truth, y)
            extra = dict(zip(CASES, windows.tolist(), strict=True))
        else:
            estimator = METHODS[method].estimator
            found = errors(replace(estimator, sigma=sigma if sigma_known else None), truth, y)
        spread = found.std(0) / len(found) ** 0.5
        for number, case in enumerate(CASES):
            row = {"case": case, **key, "method": method, "mse": float(found[:, number].mean())}
            row["mse_error"] = float(spread[number])
            yield row | ({"window": extra[case]} if extra else {})


def tune(names: Sequence[str]) -> None:
    """Print, for each setting, the geometric mean of the error over the best fixed window's."""
    data = {sigma: noisy(TUNING_SEEDS, sigma) for sigma in SIGMAS}
    best = {sigma: oracle(*pair)[0].mean(0) for sigma, pair in data.items()}
    for name in names:
        make, grid = GRIDS[name]
        for setting in grid:
            ratios = []
            for sigma, (truth, y) in data.items():
                estimator: Any = make(setting)
                found = errors(replace(estimator, sigma=sigma), truth, y).mean(0)
                ratios.append(found / best[sigma])
            all_ratios = torch.cat(ratios)
            mean, worst = float(all_ratios.log().mean().exp()), float(all_ratios.max())
            print(f"{name} {setting}: {mean:.3f}, worst {worst:.2f}", flush=True)


def main() -> None:
    """Tune from the command line."""
    parser = argparse.ArgumentParser(description=tune.__doc__)
    parser.add_argument("names", nargs="*", default=list(GRIDS))
    torch.set_num_threads(1)
    tune(parser.parse_args().names)


if __name__ == "__main__":
    main()
