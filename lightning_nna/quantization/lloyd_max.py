r"""Lloyd-Max: the centroids of a scalar quantizer with the least mean squared error.

Between neighboring centroids lies a threshold, and a centroid is the mean of its cell:

.. math:: t_k = \frac{z_k + z_{k+1}}{2}, \qquad z_k = E[w \mid t_{k-1} < w \le t_k]

Values on a line make this exact and fast. They are sorted once; prefix sums then give the mean and
the error of any cell at once, and a dynamic programme finds the best cells: over the distinct
values if these are few, else over bins whose edges are afterwards moved, all of them together, in
ever finer steps down to single values. Since the sum of squares is given, the least error is the
greatest sum of :math:`S_1^2 / S_0` over the cells, of mass :math:`S_0` and sum :math:`S_1`; a cell
whose centroid is held at zero adds nothing.

Reference:
    Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28(2), 1982; Max,
    "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6(1), 1960; Wu, "Optimal
    quantization by matrix searching", J. Algorithms 12(4), 1991.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lightning_nna.quantization.optimal_cells import MOST_CELLS, Line, best_cells, spread_cuts

Initialization = Literal["optimal", "quantiles"]

_MOST_CENTROIDS = 65536


@dataclass(frozen=True)
class ScalarQuantizer:
    """Centroids that values are rounded to.

    Args:
        centroids: Codebook entries, ascending, float32, shape ``(centroids,)``. If there are fewer
            distinct values than centroids, these are the values, the largest one repeated.
        distortion: (Weighted) mean squared error, in the squared unit of the values, of the
            centroids before they were rounded to float32.
        iterations: Lloyd iterations that were done.
    """

    centroids: Float[Tensor, " centroids"]
    distortion: float
    iterations: int


def lloyd_max(
    values: Float[Tensor, "..."],
    size: int,
    *,
    weights: Float[Tensor, "..."] | None = None,
    initialization: Initialization = "optimal",
    pin_zero: bool = False,
    max_iterations: int = 200,
    tolerance: float = 1e-9,
) -> ScalarQuantizer:
    """Compute the centroids with the least mean squared error.

    The same input gives the same bits. The work is done on the CPU, in float64. A cell that runs
    empty goes to the cell of greatest distortion: its centroid moves to the value there that is
    farthest from its own.

    Args:
        values: Values to quantize, any shape, on any device.
        size: Number of centroids, 1 to 65536.
        weights: Weights of the values, in their shape, not negative; None for equal ones.
        initialization: ``"optimal"`` starts at the best cells: with at most 4096 distinct values
            the result is the optimum. ``"quantiles"`` starts at cells of equal mass and may end in
            a poorer optimum. Above 256 centroids, ``"optimal"`` starts at cells as wide as the
            density to the power of -1/3, which is best for many centroids.
        pin_zero: Whether one centroid is exactly 0.
        max_iterations: Greatest number of Lloyd iterations.
        tolerance: Iterations end when no centroid moves by more than this fraction of the span.

    Returns:
        Centroids, on the device of ``values``, with their error.

    Raises:
        ValueError: If ``size`` is out of its bounds, if there are no values, if weights are
            negative, all zero or of another shape, or if the initialization is unknown.
        FloatingPointError: If a value or weight is not finite.

    Example:
        >>> lloyd_max(torch.tensor([0.0, 1.0, 10.0, 11.0, 30.0]), 3)
        ScalarQuantizer(centroids=tensor([ 0.5000, 10.5000, 30.0000]), distortion=0.2, iterations=1)

    Reference:
        Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28(2), 1982.
    """
    if not 1 <= size <= _MOST_CENTROIDS:
        raise ValueError(f"size must be 1 to {_MOST_CENTROIDS}, got {size}")
    if initialization not in ("optimal", "quantiles"):
        raise ValueError(f'initialization must be "optimal" or "quantiles", got {initialization!r}')
    line = line_of(values, weights, centered=not pin_zero)
    distinct = np.union1d(line.values, [0.0]) if pin_zero else line.values
    if len(distinct) <= size:
        padding = np.full(size - len(distinct), distinct[-1])
        centroids, distortion, iterations = np.concatenate([distinct, padding]), 0.0, 0
    else:
        if initialization == "optimal" and size <= MOST_CELLS:
            cuts, pinned = best_cells(line, size, pin_zero=pin_zero)
        else:
            cuts, pinned = spread_cuts(line, size, dense=initialization == "optimal"), None
        start = line.means(cuts)
        if pin_zero:
            start[np.abs(start).argmin() if pinned is None else pinned] = 0.0
        # More centroids than places to cut at leave cells empty.
        start = start[(cuts[1:] > cuts[:-1]) | (start == 0.0)]
        start = np.sort(np.concatenate([start, np.full(size - len(start), start[-1])]))
        centroids, iterations = _lloyd(line, start, pin_zero, max_iterations, tolerance)
        distortion = line.errors(centroids, line.nearest_cuts(centroids)).sum() / line.mass[-1]
    rounded = torch.from_numpy(centroids + 0.0).to(values.device, torch.float32)
    return ScalarQuantizer(rounded, float(distortion), iterations)


def lloyd_max_groups(
    groups: Float[Tensor, "groups values"],
    size: int,
    *,
    weights: Float[Tensor, "groups values"] | None = None,
    initialization: Initialization = "optimal",
    pin_zero: bool = False,
    max_iterations: int = 200,
    tolerance: float = 1e-9,
) -> Float[Tensor, "groups centroids"]:
    """Compute the centroids of every row by itself, with the arguments of :func:`lloyd_max`.

    Example:
        >>> lloyd_max_groups(torch.tensor([[0.0, 2.0, 9.0], [1.0, 5.0, 7.0]]), 2)
        tensor([[1., 9.],
                [1., 6.]])
    """
    if groups.shape[0] == 0:
        raise ValueError("there are no groups")
    if weights is not None and weights.shape != groups.shape:
        raise ValueError(f"weights have shape {list(weights.shape)}, not {list(groups.shape)}")
    rows = [
        lloyd_max(
            group,
            size,
            weights=None if weights is None else weights[index],
            initialization=initialization,
            pin_zero=pin_zero,
            max_iterations=max_iterations,
            tolerance=tolerance,
        ).centroids
        for index, group in enumerate(groups)
    ]
    return torch.stack(rows)


def nearest(
    values: Float[Tensor, "*shape"], centroids: Float[Tensor, " centroids"]
) -> Int[Tensor, "*shape"]:
    """Look up the nearest centroid; the lower one of two that are equally near.

    Args:
        values: Any values, on the device of ``centroids``.
        centroids: Ascending; equal ones are one, and any of their indices may be given.

    Returns:
        int64 indices.

    Example:
        >>> nearest(torch.tensor([-3.0, 0.5, 0.6]), torch.tensor([0.0, 1.0]))
        tensor([0, 0, 1])
    """
    wide = centroids.detach().double()
    exact = (wide[:-1] + wide[1:]) / 2
    if values.dtype == torch.float64:
        return torch.bucketize(values.detach(), exact)
    # A float32 is at most t where it is at most the largest float32 that is: no wide copy needed.
    thresholds = exact.float()
    below = torch.nextafter(thresholds, torch.full_like(thresholds, -torch.inf))
    thresholds = torch.where(thresholds.double() > exact, below, thresholds)
    return torch.bucketize(values.detach().float(), thresholds)


def snap_to_grid(
    centroids: Float[Tensor, " centroids"], scale: float, *, maximum: int = 127
) -> Float[Tensor, " centroids"]:
    r"""Round centroids to integers: the nearest to ``centroids / scale``, yet distinct.

    Centroids that would share an integer spread over its neighbors, in their order, with the
    least squared movement before the rounding: an isotonic regression of :math:`z_k / s - k`.
    Equal centroids stay equal, and zero stays zero. Where the grid has no room they share.

    Args:
        centroids: Centroids in the unit of ``scale``, ascending, shape ``(centroids,)``.
        scale: Distance of neighboring integers, positive.
        maximum: Largest integer; the smallest is its negative.

    Returns:
        Whole numbers in the dtype of ``centroids``.

    Raises:
        ValueError: If ``scale`` or ``maximum`` is not positive.

    Example:
        >>> snap_to_grid(torch.tensor([-0.2, 0.0, 0.2, 1.1, 200.0]), 1.0)
        tensor([ -1.,   0.,   1.,   2., 127.])
    """
    if not scale > 0 or maximum < 1:
        raise ValueError(f"scale and maximum must be positive, got {scale} and {maximum}")
    exact, indices = torch.unique(centroids.detach().double().cpu() / scale, return_inverse=True)
    points = exact.numpy()
    below, above = points[points < 0], points[points > 0]
    if len(below) + len(above) < len(points):
        parts = [_distinct(below, -maximum, -1), np.zeros(1), _distinct(above, 1, maximum)]
        snapped = np.concatenate(parts)
    else:
        snapped = _distinct(points, -maximum, maximum)
    return torch.from_numpy(snapped)[indices].to(centroids)


def _distinct(points: NDArray[np.float64], lowest: int, highest: int) -> NDArray[np.float64]:
    """Ascending integers in the bounds, near ascending places; distinct if they fit."""
    spare = highest - lowest + 1 - len(points)
    if spare < 0:
        return np.clip(np.floor(points + 0.5), lowest, highest)
    blocks: list[tuple[float, int]] = []
    for index, point in enumerate(points):
        mean, size = float(point) - index, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean = (mean * size + before * count) / (size + count)
            size += count
        blocks.append((mean, size))
    means = np.repeat([mean for mean, _ in blocks], [size for _, size in blocks])
    # Half up, in contrast to half to even, gives the same after a shift by an integer.
    integers = np.clip(np.floor(means + 0.5), lowest, lowest + spare)
    return integers + np.arange(len(points))


def line_of(
    values: Float[Tensor, "..."], weights: Float[Tensor, "..."] | None, *, centered: bool
) -> Line:
    """Distinct values in order, with prefix sums; the arguments are those of :func:`lloyd_max`.

    Raises:
        ValueError: If there are no values, or weights are negative, all zero or of another shape.
        FloatingPointError: If a value or weight is not finite.

    Example:
        >>> line_of(torch.tensor([4.0, 1.0, 1.0]), None, centered=False).values
        array([1., 4.])
    """
    if values.numel() == 0:
        raise ValueError("there are no values to quantize")
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    x = values.detach().flatten().to("cpu", dtype).numpy()
    if weights is None:
        x = np.sort(x)
        mass = None
    else:
        if weights.shape != values.shape:
            raise ValueError(f"weights have shape {list(weights.shape)}, not {list(values.shape)}")
        mass = weights.detach().flatten().to("cpu", torch.float64).numpy()
        if not np.isfinite(mass).all() or not np.isfinite(x).all():
            raise FloatingPointError("values or weights are not finite")
        if mass.min() < 0 or mass.max() == 0:
            raise ValueError(
                f"weights must not be negative nor all zero, got {mass.min()} to {mass.max()}"
            )
        order = np.argsort(x, kind="stable")
        order = order[mass[order] > 0]
        x, mass = x[order], mass[order]
    # Sorted, what is not finite is at an end.
    if not np.isfinite(x[[0, -1]]).all():
        raise FloatingPointError("values are not finite")
    return Line.of(x, mass, centered=centered)


def _lloyd(
    line: Line,
    centroids: NDArray[np.float64],
    pin_zero: bool,
    max_iterations: int,
    tolerance: float,
) -> tuple[NDArray[np.float64], int]:
    """Iterate thresholds and means."""
    small = tolerance * (line.values[-1] - line.values[0])
    for iteration in range(1, max_iterations + 1):
        cuts = line.nearest_cuts(centroids)
        moved = line.means(cuts)
        empty = cuts[1:] == cuts[:-1]
        moved[empty] = centroids[empty]
        if pin_zero:
            pinned = np.abs(centroids).argmin()
            moved[pinned], empty[pinned] = 0.0, False
        if empty.any():
            moved = _fill(line, moved, cuts, np.flatnonzero(empty))
        change = np.abs(moved - centroids).max()
        centroids = moved
        if change <= small:
            return centroids, iteration
    return centroids, max_iterations


def _fill(
    line: Line, centroids: NDArray[np.float64], cuts: NDArray[np.intp], empty: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Move centroids of empty cells to the cells of greatest distortion, one to each."""
    worst = np.argsort(-line.errors(centroids, cuts), kind="stable")[: len(empty)]
    first, last = line.values[cuts[worst]], line.values[np.maximum(cuts[worst + 1] - 1, 0)]
    own = centroids[worst]
    centroids[empty] = np.where(own - first > last - own, first, last)
    return np.sort(centroids)
