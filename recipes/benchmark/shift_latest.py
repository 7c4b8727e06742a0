"""Newest value of noisy series: mean squared error of every estimator over all prefixes.

Every method, ours and others, has one setting for all series and noises. It was chosen with
:func:`tune`, on other seeds than those that are reported: the one of the least geometric mean, over
series and noise, of the error over that of the best fixed window.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean
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
from recipes.benchmark.grid import Run
from recipes.benchmark.report import line, met, ruled
from recipes.benchmark.rows import Row, select

LENGTH = 1024
SIGMAS = (0.2, 0.5, 1.0)
SEEDS = range(10)
TUNING_SEEDS = range(1000, 1006)
WINDOWS = (*range(1, 20), *range(20, 100, 4), 128, 160, 200, 256, 384, 512, LENGTH)
#: Largest error over the best fixed window's, and smallest fraction of cases that ours is first in.
_ORACLE_FACTOR, _FIRST_FRACTION = 1.5, 0.8
# Methods whose errors are shown by case.
_SHOWN = ("mixture", "haar_hard", "db2", "window", "exponential", "arw", "doubling", "aligator")


@dataclass(frozen=True)
class Method:
    """An estimator of the table.

    Attributes:
        title: Name in tables.
        estimator: Estimator with its settings; its ``sigma`` is replaced.
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

#: Constructors of estimators, and the settings that :func:`tune` tries.
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
    """Make the true courses, each of mean 0 and standard deviation 1.

    Args:
        seed: Seed of the random walk; the others are fixed.

    Reference:
        The first four are those of Donoho and Johnstone, "Ideal spatial adaptation by wavelet
        shrinkage", Biometrika 81(3), 1994.
    """
    t = np.arange(1, LENGTH + 1) / LENGTH
    positions = np.array([0.1, 0.13, 0.15, 0.23, 0.25, 0.4, 0.44, 0.65, 0.76, 0.78, 0.81])
    steps = np.array([4, -5, 3, -4, 5, -4.2, 2.1, 4.3, -3.1, 2.1, -4.2])
    heights = np.array([4, 5, 3, 4, 5, 4.2, 2.1, 4.3, 3.1, 5.1, 4.2])
    widths = np.array([5, 5, 6, 10, 10, 30, 10, 10, 5, 8, 5]) / 1000
    offsets = t[:, None] - positions
    courses = {
        "Doppler": np.sqrt(t * (1 - t)) * np.sin(2 * np.pi * 1.05 / (t + 0.05)),
        "blocks": ((1 + np.sign(offsets)) / 2 * steps).sum(1),
        "bumps": (heights / (1 + np.abs(offsets / widths)) ** 4).sum(1),
        "heavisine": 4 * np.sin(4 * np.pi * t) - np.sign(t - 0.3) - np.sign(0.72 - t),
        "random walk": np.random.default_rng([seed, 1]).standard_normal(LENGTH).cumsum(),
        "ramps": np.abs(4 * t % 2 - 1),
        "drop": (t < 0.5).astype(float),
        "sines": np.sin(6 * np.pi * t) + 0.5 * np.sin(22 * np.pi * t),
    }
    return {name: (course - course.mean()) / course.std() for name, course in courses.items()}


CASES = tuple(series(0))


def noisy(seeds: Sequence[int], sigma: float) -> tuple[Tensor, Tensor]:
    """Make true and noisy series, both of shape ``(seeds, cases, time)``."""
    truth = np.array([list(series(seed).values()) for seed in seeds])
    noise = [np.random.default_rng([seed, 2]).standard_normal(truth.shape[1:]) for seed in seeds]
    return torch.from_numpy(truth), torch.from_numpy(truth + sigma * np.array(noise))


def errors(estimator: LatestEstimator, truth: Tensor, y: Tensor) -> Tensor:
    """Compute the squared error, mean over all prefixes, of shape ``(seeds, cases)``."""
    estimates = torch.as_tensor(estimator.prefixes(y).value)
    return (estimates - truth).square().mean(-1)


def oracle(truth: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the errors of the fixed window that is best for each case, and these windows."""
    # The noise is given only because a mean does not need it.
    every = torch.stack([errors(FixedWindow(window=r, sigma=1.0), truth, y) for r in WINDOWS])
    best = every.mean(1).argmin(0)
    return every[best, :, torch.arange(len(CASES))].T, torch.tensor(WINDOWS)[best]


@dataclass(frozen=True)
class LatestRun(Run):
    """One method at one noise, on all series.

    Attributes:
        sigma: Standard deviation of the noise.
        sigma_known: Whether the estimator is told it.
        method: A key of :data:`METHODS`, or ``"oracle"``.
    """

    sigma: float
    sigma_known: bool
    method: str

    @property
    def keys(self) -> list[dict[str, Any]]:
        """Values that identify the rows of this run, one mapping for each series."""
        return [
            {"table": "latest", "case": case, **super(LatestRun, self).keys[0]} for case in CASES
        ]

    def rows(self) -> Iterator[Row]:
        """Yield the error of every series and its standard error over seeds."""
        truth, y = noisy(SEEDS, self.sigma)
        windows: list[dict[str, int]] = [{}] * len(CASES)
        if self.method == "oracle":
            squared, best = oracle(truth, y)
            windows = [{"window": window} for window in best.tolist()]
        else:
            sigma = self.sigma if self.sigma_known else None
            squared = errors(replace(METHODS[self.method].estimator, sigma=sigma), truth, y)
        deviation = squared.std(0) / len(squared) ** 0.5
        for number, key in enumerate(self.keys):
            mse, error = float(squared[:, number].mean()), float(deviation[number])
            yield {**key, "mse": mse, "mse_error": error, **windows[number]}


def runs() -> list[LatestRun]:
    """List the grid, method by method."""
    return [
        LatestRun(sigma, known, method)
        for method in ("oracle", *METHODS)
        for sigma in SIGMAS
        for known in (True, False)
    ]


#: A series, its noise, and whether the noise is known.
Case = tuple[str, float, bool]


def rows_by_case(rows: Sequence[Row]) -> dict[Case, dict[str, Row]]:
    """Group the rows of the table by case and method."""
    cases: dict[Case, dict[str, Row]] = {}
    for row in select(rows, table="latest"):
        key = (row["case"], row["sigma"], row["sigma_known"])
        cases.setdefault(key, {})[row["method"]] = row
    return cases


def ratios(cases: Mapping[Case, Mapping[str, Row]], method: str) -> dict[Case, float]:
    """Divide the errors of a method by those of the best fixed window, by case."""
    return {
        case: by_method[method]["mse"] / by_method["oracle"]["mse"]
        for case, by_method in cases.items()
        if method in by_method and "oracle" in by_method
    }


def is_first(row: Row, rival: Row) -> bool:
    """Return whether an error is less than another's, or more by at most one standard error."""
    error = (row["mse_error"] ** 2 + rival["mse_error"] ** 2) ** 0.5
    return bool(row["mse"] - rival["mse"] <= error)


def checks(rows: Sequence[Row]) -> list[str]:
    """Check how often ours is first, and how far it is from the best fixed window."""
    cases = rows_by_case(rows)
    family = [name for name, method in METHODS.items() if method.ours]
    groups = {"the best of ours in each case": family, "the mixture": ["mixture"]}
    return [_check(cases, label, names) for label, names in groups.items()] if cases else []


def _check(cases: Mapping[Case, Mapping[str, Row]], label: str, names: Sequence[str]) -> str:
    first, worst = 0, 0.0
    for by_method in cases.values():
        ours = min((by_method[name] for name in names), key=lambda row: row["mse"])
        others = [
            row for name, row in by_method.items() if name != "oracle" and not METHODS[name].ours
        ]
        first += is_first(ours, min(others, key=lambda row: row["mse"]))
        worst = max(worst, ours["mse"] / by_method["oracle"]["mse"])
    fraction = first / len(cases)
    return (
        f"- Newest value, {label}: first or tied in {first} of {len(cases)} cases "
        f"({fraction:.0%}; target {_FIRST_FRACTION:.0%}, {met(fraction >= _FIRST_FRACTION)}); at "
        f"worst {worst:.2f} times the best fixed window of the case (target {_ORACLE_FACTOR}, "
        f"{met(worst <= _ORACLE_FACTOR)})."
    )


def method_lines(rows: Sequence[Row]) -> list[str]:
    """Format one line a method: its error over the best fixed window's, by noise."""
    cases = rows_by_case(rows)
    lines = []
    for name, method in METHODS.items():
        by_case = ratios(cases, name)
        if not by_case:
            continue
        columns = []
        for known, sigma in itertools.product((True, False), SIGMAS):
            selected = [x for (_, s, k), x in by_case.items() if (s, k) == (sigma, known)]
            columns.append(f"{geometric_mean(selected):.2f}" if selected else "-")
        title = f"**{method.title}**" if method.ours else method.title
        every = list(by_case.values())
        lines.append(line(title, *columns, f"{geometric_mean(every):.2f}", f"{max(every):.2f}"))
    return lines


def case_lines(rows: Sequence[Row]) -> list[str]:
    """Format the errors themselves where the noise is known, of a few methods, with a head."""
    cases = {case: by_method for case, by_method in rows_by_case(rows).items() if case[2]}
    if not cases:
        return []
    names = [name for name in _SHOWN if any(name in by_method for by_method in cases.values())]
    titles = [METHODS[name].title for name in names]
    lines = ruled(["series", "noise", *titles, "best fixed window"])
    for (case, sigma, _), by_method in cases.items():
        columns = [f"{by_method[name]['mse']:.4f}" for name in names if name in by_method]
        oracle_row = by_method["oracle"]
        best = f"{oracle_row['mse']:.4f} ({oracle_row['window']})"
        lines.append(line(case, sigma, *columns, best))
    return lines


def tune(names: Sequence[str]) -> None:
    """Print, for each setting, the geometric mean of the error over the best fixed window's."""
    data = {sigma: noisy(TUNING_SEEDS, sigma) for sigma in SIGMAS}
    best = {sigma: oracle(*pair)[0].mean(0) for sigma, pair in data.items()}
    for name in names:
        make, settings = GRIDS[name]
        for setting in settings:
            over_best = []
            for sigma, (truth, y) in data.items():
                estimator: Any = make(setting)
                squared = errors(replace(estimator, sigma=sigma), truth, y).mean(0)
                over_best.append(squared / best[sigma])
            every = torch.cat(over_best)
            mean, worst = float(every.log().mean().exp()), float(every.max())
            print(f"{name} {setting}: {mean:.3f}, worst {worst:.2f}", flush=True)


def main() -> None:
    """Tune from the command line."""
    parser = argparse.ArgumentParser(description=tune.__doc__)
    parser.add_argument("names", nargs="*", default=list(GRIDS))
    torch.set_num_threads(1)
    tune(parser.parse_args().names)


if __name__ == "__main__":
    main()
