r"""The best division of a line of weighted values into cells, for the quantizer of Lloyd and Max.

With the first :math:`j` values in :math:`k` cells, the greatest sum of :math:`g = S_1^2 / S_0` is

.. math:: G_k(j) = \max_{i \le j} G_{k-1}(i) + g(i, j).

The best :math:`i` does not fall as :math:`j` grows, so a layer is found by halving: the best
:math:`i` of a middle :math:`j` bounds those on both sides. All middles of a depth are done in one
vectorized step.

Reference:
    Wu, "Optimal quantization by matrix searching", J. Algorithms 12(4), 1991.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_nna import elementary

#: With more cells the best cells are not looked for.
MOST_CELLS = 256

# Up to so many distinct values the dynamic programme is done over all of them.
_MOST_VALUES = 4096
_FEWEST_BINS = 512
_BINS_PER_CELL = 8
# Candidates on either side of a cut while cuts are moved, and how much finer each round is.
_REACH = 8
_FINER = 4
_MOST_ROUNDS = 20
# Of what is added to a gain, this share is rounding.
_NOISE = 1e-14
_TINY = 1e-300

Floats = NDArray[np.float64]
Places = NDArray[np.intp]


@dataclass(frozen=True)
class Line:
    """Distinct values in order, with their prefix sums.

    Args:
        values: n ascending values.
        mass: n + 1 sums of the weights before each place.
        sums: n + 1 sums of the weighted distances from ``origin``.
        origin: What is taken off before values are summed, so that sums stay small.
    """

    values: Floats
    mass: Floats
    sums: Floats
    origin: float

    @staticmethod
    def of(x: NDArray[np.floating], mass: Floats | None, *, centered: bool) -> Line:
        """The line of sorted values.

        Example:
            >>> Line.of(np.array([1.0, 1.0, 4.0]), None, centered=True)
            Line(values=array([1., 4.]), mass=array([0., 2., 3.]),
                 sums=array([ 0., -2.,  0.]), origin=2.0)
        """
        starts = np.flatnonzero(np.concatenate([[True], x[1:] != x[:-1]]))
        values = x[starts].astype(np.float64)
        if mass is None:
            before = np.append(starts, len(x)).astype(np.float64)
            each = np.diff(before)
        else:
            each = np.add.reduceat(mass, starts)
            before = np.concatenate([[0.0], np.cumsum(each)])
        origin = float((values * each).sum() / before[-1]) if centered else 0.0
        each *= values - origin
        sums = np.empty_like(before)
        sums[0] = 0.0
        np.cumsum(each, out=sums[1:])
        return Line(values, before, sums, origin)

    def nearest_cuts(self, centroids: Floats) -> Places:
        """Places where the cells of ascending centroids begin and end.

        Example:
            >>> line = Line.of(np.array([0.0, 1.0, 9.0]), None, centered=True)
            >>> line.nearest_cuts(np.array([0.5, 9.0]))
            array([0, 2, 3])
        """
        return self.cuts_at((centroids[:-1] + centroids[1:]) / 2)

    def cuts_at(self, thresholds: Floats) -> Places:
        """Places where cells with these inner thresholds begin and end; a value there is below.

        Example:
            >>> Line.of(np.array([0.0, 1.0, 9.0]), None, centered=True).cuts_at(np.array([1.0]))
            array([0, 2, 3])
        """
        inner = np.searchsorted(self.values, thresholds, side="right")
        return np.concatenate([[0], inner, [len(self.values)]])

    def means(self, cuts: Places) -> Floats:
        """Mean of every cell; of an empty one, the value it begins at."""
        mass = np.diff(self.mass[cuts])
        means = self.origin + np.diff(self.sums[cuts]) / np.maximum(mass, _TINY)
        begins = self.values[np.minimum(cuts[:-1], len(self.values) - 1)]
        return np.where(mass > 0, means, begins)

    def errors(self, centroids: Floats, cuts: Places) -> Floats:
        """Weighted sum of squared errors in every cell."""
        return np.array(
            [
                (np.diff(self.mass[a : b + 1]) * (self.values[a:b] - centroid) ** 2).sum()
                for centroid, a, b in zip(centroids, cuts[:-1], cuts[1:], strict=True)
            ]
        )


def best_cells(line: Line, size: int, *, pin_zero: bool) -> tuple[Places, int | None]:
    """Cells with the least squared error: the best ones of all if distinct values are few.

    Args:
        line: More distinct values than cells; its origin is 0 if zero is pinned.
        size: Number of cells.
        pin_zero: The centroid of one cell is 0.

    Returns:
        size + 1 places where cells begin and end, and the index of the cell of zero, or None.

    Example:
        >>> line = Line.of(np.array([0.0, 1.0, 10.0, 11.0]), None, centered=True)
        >>> best_cells(line, 2, pin_zero=False)
        (array([0, 2, 4]), None)
    """
    n = len(line.values)
    if n <= _MOST_VALUES:
        return _programme(line.mass, line.sums, size, pin_zero)
    edges = _edges(line, max(_FEWEST_BINS, _BINS_PER_CELL * size))
    coarse, pinned = _programme(line.mass[edges], line.sums[edges], size, pin_zero)
    inner = coarse[1:-1]
    width = edges[np.minimum(inner + 1, len(edges) - 1)] - edges[np.maximum(inner - 1, 0)]
    return _move(line, edges[coarse], width / _FINER, pinned), pinned


def spread_cuts(line: Line, cells: int, *, dense: bool) -> Places:
    """Cells of equal mass; or, ``dense``, of equal integral of the cube root of the density.

    Example:
        >>> line = Line.of(np.arange(8.0), None, centered=True)
        >>> spread_cuts(line, 4, dense=False)
        array([0, 2, 4, 6, 8])
    """
    n = len(line.values)
    if dense:
        # Single values matter at the ends, where the density is low.
        ends = min(n, cells)
        marks = np.linspace(0, n, 16 * cells + 1).astype(np.intp)
        marks = np.unique(np.concatenate([marks, np.arange(ends), n - np.arange(ends)]))
        points = line.values[np.minimum(marks, n - 1)]
        amount = _cube_root(np.diff(line.mass[marks]) * np.diff(points) ** 2)
        total = np.concatenate([[0.0], np.cumsum(amount)])
    else:
        marks, total = np.arange(n + 1), line.mass
    wanted = np.linspace(0.0, total[-1], cells + 1)[1:-1]
    inner = marks[np.minimum(np.searchsorted(total, wanted), len(marks) - 1)]
    return np.concatenate([[0], inner, [n]])


def _cube_root(x: Floats) -> Floats:
    """Of numbers that are not negative; the same on every processor."""
    logarithm = elementary.log2(np.maximum(x, _TINY))
    return np.where(x > 0, elementary.exp2(torch.from_numpy(logarithm / 3)).numpy(), 0.0)


def _edges(line: Line, bins: int) -> Places:
    """Edges of bins: half follow the density's cube root, and half, for safety, the mass."""
    halves = [spread_cuts(line, bins // 2, dense=dense) for dense in (True, False)]
    # However the mass lies, there are more bins than cells.
    evenly = np.linspace(0, len(line.values), bins // 4 + 1).astype(np.intp)
    return np.unique(np.concatenate([*halves, evenly]))


def _programme(mass: Floats, sums: Floats, size: int, pin_zero: bool) -> tuple[Places, int | None]:
    """The dynamic programme over all places of the prefix sums."""
    n = len(mass) - 1
    free = sums**2 / np.maximum(mass, _TINY)
    with_zero = np.zeros(n + 1)
    before = np.zeros((size, n + 1), np.int32)
    before_with_zero = np.zeros((size, n + 1), np.int32)
    is_zero = np.zeros((size, n + 1), bool)
    is_zero[0] = True
    for k in range(1, size):
        if pin_zero:
            # The cell of zero adds nothing, so that it is best begun at the greatest gain so far.
            top = np.maximum.accumulate(free)
            rises = np.concatenate([[True], free[1:] > top[:-1]])
            begin = np.maximum.accumulate(np.where(rises, np.arange(n + 1), 0))
            gain, start = _layer(with_zero, mass, sums)
            is_zero[k] = top >= gain
            with_zero = np.where(is_zero[k], top, gain)
            before_with_zero[k] = np.where(is_zero[k], begin, start)
        free, before[k] = _layer(free, mass, sums)
    cuts = np.zeros(size + 1, np.intp)
    cuts[-1] = n
    pinned = None
    for k in range(size - 1, -1, -1):
        seeks_zero = pin_zero and pinned is None
        cuts[k] = (before_with_zero if seeks_zero else before)[k, cuts[k + 1]]
        if seeks_zero and is_zero[k, cuts[k + 1]]:
            pinned = k
    return cuts, pinned


def _layer(gains: Floats, mass: Floats, sums: Floats) -> tuple[Floats, Places]:
    """Greatest gain with one cell more that ends at each place, and where that cell begins."""
    n = len(mass) - 1
    best = np.zeros(n + 1)
    begin = np.zeros(n + 1, np.intp)
    half = 1 << n.bit_length()
    while half:
        ends = np.arange(half - 1, n + 1, 2 * half)
        if len(ends):
            low = np.where(ends >= half, begin[ends - half], 0)
            right = np.minimum(ends + half, n)
            high = np.where(ends + half <= n, np.minimum(begin[right], ends), ends)
            counts = high - low + 1
            starts = np.cumsum(counts) - counts
            tried = np.arange(counts.sum()) - np.repeat(starts - low, counts)
            weight = np.repeat(mass[ends], counts) - mass[tried]
            total = np.repeat(sums[ends], counts) - sums[tried]
            totals = gains[tried] + total * total / np.maximum(weight, _TINY)
            top = np.maximum.reduceat(totals, starts)
            hits = np.flatnonzero(totals == np.repeat(top, counts))
            first = hits[np.searchsorted(hits, starts)]
            best[ends], begin[ends] = top, tried[first]
        half //= 2
    return best, begin


def _move(line: Line, cuts: Places, steps: Floats, pinned: int | None) -> Places:
    """Move all cuts together, to the best of several places around each, in ever finer steps."""
    gain = -np.inf
    while True:
        for _ in range(_MOST_ROUNDS):
            moved, greater = _move_once(line, cuts, steps, pinned)
            if greater <= gain + _NOISE * abs(greater):
                break
            cuts, gain = moved, greater
        if steps.max(initial=0.0) <= 1:
            return cuts
        steps = np.maximum(steps / _FINER, 1.0)


def _move_once(line: Line, cuts: Places, steps: Floats, pinned: int | None) -> tuple[Places, float]:
    """The dynamic programme over some places around every cut."""
    n = len(line.values)
    reach = np.arange(-_REACH, _REACH + 1)
    inner = np.clip(cuts[1:-1, None] + np.rint(np.outer(steps, reach)).astype(np.intp), 0, n)
    width = len(reach)
    candidates = np.concatenate([np.zeros((1, width), np.intp), inner, np.full((1, width), n)])
    mass, sums = line.mass[candidates], line.sums[candidates]
    weight = mass[1:, None, :] - mass[:-1, :, None]
    with np.errstate(over="ignore"):  # Of cells that end before they begin, ruled out below.
        gains = (sums[1:, None, :] - sums[:-1, :, None]) ** 2 / np.maximum(weight, _TINY)
    if pinned is not None:
        gains[pinned] = 0.0
    gains[candidates[1:, None, :] < candidates[:-1, :, None]] = -np.inf
    total = gains[0, 0]
    choices = np.zeros((len(gains), width), np.intp)
    columns = np.arange(width)
    for k in range(1, len(gains)):
        sum_ = total[:, None] + gains[k]
        choices[k] = sum_.argmax(0)
        total = sum_[choices[k], columns]
    choice = 0
    moved = cuts.copy()
    for k in range(len(gains) - 1, 0, -1):
        choice = choices[k, choice]
        moved[k] = candidates[k, choice]
    return moved, float(total[0])
