"""Lloyd-Max on weights: time and distortion, compared with k-means of scikit-learn and of DKM.

    python -m recipes.benchmark.lloyd_max               # run what is missing, then report
    python -m recipes.benchmark.lloyd_max --page-only

Reference:
    Cho et al., "DKM: differentiable k-means clustering layer for neural network compression",
    ICLR 2022, arXiv 2108.12659.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from lightning_nna.quantization.lloyd_max import Initialization, lloyd_max, nearest
from recipes.benchmark.grid import Run, Study
from recipes.benchmark.report import Fields, line, met
from recipes.benchmark.rows import Row, select
from recipes.benchmark.timing import machine

#: Number of weights and of centroids of each case.
CASES = ((100_000, 4), (100_000, 32), (1_000_000, 32), (1_000_000, 256), (10_000_000, 32))
#: Longest time of the last case, on one core.
TARGET_SECONDS = 3.0
_DKM_ITERATIONS = 10
# Rows of the matrix of distances that DKM has in memory at a time.
_CHUNK = 1_000_000


def ours(weights: Tensor, levels: int, *, initialization: Initialization = "optimal") -> Tensor:
    """Fit with :func:`~lightning_nna.quantization.lloyd_max.lloyd_max`."""
    return lloyd_max(weights, levels, initialization=initialization).centroids


def scikit_learn(weights: Tensor, levels: int) -> Tensor:
    """Fit by k-means++ and Lloyd's iterations, from one start: scikit-learn's default."""
    means = KMeans(levels, random_state=0).fit(weights.numpy()[:, None])
    return torch.from_numpy(np.sort(means.cluster_centers_[:, 0]))


def dkm(weights: Tensor, levels: int) -> Tensor:
    """Fit by attention of every weight to every centroid, iterated; the matrix comes in parts."""
    centroids = torch.quantile(weights[:_CHUNK], (torch.arange(levels) + 0.5) / levels)
    temperature = float(weights.var()) / levels**2
    for _ in range(_DKM_ITERATIONS):
        mass, sums = torch.zeros(levels), torch.zeros(levels)
        for part in weights.split(_CHUNK):
            attention = (-(part[:, None] - centroids).square_() / temperature).softmax(1)
            mass += attention.sum(0)
            sums += part @ attention
        centroids = sums / mass.clamp_min(1e-12)
    return centroids.sort().values


#: Titles and functions from weights and a number of centroids to the centroids.
METHODS: dict[str, tuple[str, Callable[[Tensor, int], Tensor]]] = {
    "ours": ("ours", ours),
    "quantiles": ("ours, from quantiles", partial(ours, initialization="quantiles")),
    "scikit-learn": ("scikit-learn KMeans", scikit_learn),
    "dkm": (f"DKM's k-means, {_DKM_ITERATIONS} iterations", dkm),
}


@dataclass(frozen=True)
class LloydMaxRun(Run):
    """One method on one case.

    Attributes:
        count: Number of weights.
        levels: Number of centroids.
        method: A key of :data:`METHODS`.
    """

    count: int
    levels: int
    method: str

    def rows(self) -> Iterator[Row]:
        """Time one call and measure the distortion."""
        torch.set_num_threads(1)
        weights = torch.randn(self.count, generator=torch.Generator().manual_seed(0))
        _, fit = METHODS[self.method]
        fit(weights[:1000], self.levels)  # Loads and compiles what the first use needs.
        start = time.perf_counter()
        centroids = fit(weights, self.levels)
        yield {
            **self.keys[0],
            "seconds": round(time.perf_counter() - start, 3),
            "distortion": distortion(weights, centroids),
            "machine": machine(torch.device("cpu")),
            "threads": 1,
        }


def runs(*, most: int = CASES[-1][0]) -> list[LloydMaxRun]:
    """List the grid, case by case.

    Args:
        most: Largest number of weights.
    """
    return [
        LloydMaxRun(count, levels, method)
        for count, levels in CASES
        if count <= most
        for method in METHODS
    ]


def distortion(weights: Tensor, centroids: Tensor) -> float:
    """Compute the mean squared error of rounding, in float64."""
    rounded = centroids.double()[nearest(weights, centroids)]
    return float((weights.double() - rounded).square().mean())


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report."""
    lines = []
    for count, levels in dict.fromkeys((row["count"], row["levels"]) for row in rows):
        by_method = {row["method"]: row for row in select(rows, count=count, levels=levels)}
        least = min(row["distortion"] for row in by_method.values())
        columns = [
            f"{row['seconds']:.2f} s, {row['distortion'] / least - 1:+.1e}" if row else "-"
            for row in (by_method.get(name) for name in METHODS)
        ]
        lines.append(line(f"{count:,}", levels, *columns))
    count, levels = CASES[-1]
    return {
        "titles": " | ".join(title for title, _ in METHODS.values()),
        "rule": "---|" * len(METHODS),
        "cases": lines,
        "checks": [
            f"- {count:,} weights, {levels} centroids in under {TARGET_SECONDS:g} s on one core: "
            f"{row['seconds']:.2f} s, {met(row['seconds'] < TARGET_SECONDS)}."
            for row in select(rows, count=count, levels=levels, method="ours")
        ],
        "machines": ", ".join(dict.fromkeys(str(row["machine"]) for row in rows)),
    }


STUDY = Study(
    name="lloyd_max",
    runs=runs,
    report=report,
    options={"most": {"type": int, "default": CASES[-1][0], "help": "weights of a case"}},
)

if __name__ == "__main__":
    STUDY.main()
