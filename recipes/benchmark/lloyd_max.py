"""Lloyd-Max on weights: time and distortion, beside k-means of scikit-learn and of DKM.

    python -m recipes.benchmark.lloyd_max               # what is missing, then the page
    python -m recipes.benchmark.lloyd_max --page-only

Reference:
    Cho et al., "DKM: differentiable k-means clustering layer for neural network compression",
    ICLR 2022, arXiv 2108.12659.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from lightning_nna.files import write_whole
from lightning_nna.quantization.lloyd_max import lloyd_max, nearest
from recipes.benchmark.emulation import machine
from recipes.benchmark.rows import Row, append_row, has_row, read_rows
from recipes.run_folder import command_line, git_commit

ROWS = Path("docs/results/lloyd_max.jsonl")
#: Weights and levels of a case.
CASES = ((100_000, 4), (100_000, 32), (1_000_000, 32), (1_000_000, 256), (10_000_000, 32))
#: The target: so many seconds at most for the last case, on one core.
TARGET_SECONDS = 3.0
_DKM_ITERATIONS = 10
# Rows of the matrix of distances that DKM holds at a time.
_CHUNK = 1_000_000


def ours(weights: Tensor, levels: int) -> Tensor:
    """The best cells, then Lloyd's iterations."""
    return lloyd_max(weights, levels).centroids


def ours_from_quantiles(weights: Tensor, levels: int) -> Tensor:
    """Cells of equal mass, then Lloyd's iterations."""
    return lloyd_max(weights, levels, initialization="quantiles").centroids


def scikit_learn(weights: Tensor, levels: int) -> Tensor:
    """k-means++ and Lloyd's iterations, from one start, which is scikit-learn's own setting."""
    found = KMeans(levels, random_state=0).fit(weights.numpy()[:, None])
    return torch.from_numpy(np.sort(found.cluster_centers_[:, 0]))


def dkm(weights: Tensor, levels: int) -> Tensor:
    """Attention of every weight to every centroid, iterated; the matrix is held in parts."""
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


METHODS: dict[str, tuple[str, Callable[[Tensor, int], Tensor]]] = {
    "ours": ("ours", ours),
    "quantiles": ("ours, from quantiles", ours_from_quantiles),
    "scikit-learn": ("scikit-learn KMeans", scikit_learn),
    "dkm": (f"DKM's k-means, {_DKM_ITERATIONS} iterations", dkm),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--most", type=int, default=CASES[-1][0], help="weights of a case")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if not options.page_only:
        for count, levels in CASES:
            if count <= options.most:
                measure(count, levels)
    write_whole(ROWS.with_suffix(".md"), page(read_rows(ROWS)))


def measure(count: int, levels: int) -> None:
    """Append the rows of a case that are missing."""
    weights = torch.randn(count, generator=torch.Generator().manual_seed(0))
    for name, (_, quantize) in METHODS.items():
        key = {"count": count, "levels": levels, "method": name}
        if has_row(read_rows(ROWS), **key):
            continue
        quantize(weights[:1000], levels)  # What is loaded and compiled at the first use.
        start = time.perf_counter()
        centroids = quantize(weights, levels)
        seconds = time.perf_counter() - start
        row: dict[str, Any] = {"command": command_line(), "commit": git_commit(), **key}
        row |= {"seconds": round(seconds, 3), "distortion": distortion(weights, centroids)}
        append_row(ROWS, row | {"machine": machine(torch.device("cpu")), "threads": 1})


def distortion(weights: Tensor, centroids: Tensor) -> float:
    """Mean squared error of rounding, in float64."""
    chosen = centroids.double()[nearest(weights, centroids)]
    return float((weights.double() - chosen).square().mean())


def page(rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    lines = [_HEAD]
    for count, levels in dict.fromkeys((row["count"], row["levels"]) for row in rows):
        here = {r["method"]: r for r in rows if (r["count"], r["levels"]) == (count, levels)}
        least = min(row["distortion"] for row in here.values())
        cells = [
            f"{here[name]['seconds']:.2f} s, {here[name]['distortion'] / least - 1:+.1e}"
            if name in here
            else "-"
            for name in METHODS
        ]
        lines.append(f"| {count:,} | {levels} | " + " | ".join(cells) + " |")
    count, levels = CASES[-1]
    for row in rows:
        if (row["count"], row["levels"], row["method"]) == (count, levels, "ours"):
            word = "met" if row["seconds"] < TARGET_SECONDS else "missed"
            lines.append(
                f"\n- {count:,} weights, {levels} levels in under {TARGET_SECONDS:g} s on one "
                f"core: {row['seconds']:.2f} s, {word}."
            )
    machines = ", ".join(dict.fromkeys(str(row["machine"]) for row in rows))
    commands = dict.fromkeys(row["command"] for row in rows)
    return "\n".join([*lines, f"\n{machines}, one thread.\n\n```bash", *commands, "```", ""])


_TITLES = " | ".join(title for title, _ in METHODS.values())
_HEAD = f"""# Lloyd-Max

Generated by `python -m recipes.benchmark.lloyd_max` from `lloyd_max.jsonl`.

Normal weights, quantized to so many levels with the least squared error. A cell has the time of one
call and how much greater the error is than the least in its row. With up to 4096 distinct values
ours is the optimum, which tests compare with exhaustive search; with more, tests find it within
1e-6 of the optimum.

| weights | levels | {_TITLES} |
|---|---|{"---|" * len(METHODS)}"""


if __name__ == "__main__":
    main()
