r"""Centroids of a scalar quantizer for a given entropy: least error plus a price on the code.

Lloyd-Max finds the centroids of the least error for their *number*. If indices are entropy-coded,
as compilers for NPUs do with weights, their entropy counts, and the best centroids are those of the
least

.. math:: D + \lambda H, \qquad H = -\sum_k p_k \log_2 p_k .

A value then goes where its squared error plus :math:`\lambda` times the length of the code,
:math:`l_k = -\log_2 p_k`, is least; the decision thresholds move towards the rarer centroid,

.. math:: t_k = \frac{z_k + z_{k+1}}{2} + \lambda \frac{l_{k+1} - l_k}{2 (z_{k+1} - z_k)},

a centroid is the mean of its cell, and centroids that no value goes to drop out. The spacing of
many centroids becomes even: fine in the tails, where Lloyd-Max is coarse, coarser in the middle.

Reference:
    Chou, Lookabaugh and Gray, "Entropy-constrained vector quantization", IEEE Trans. ASSP 37(1),
    1989; Farvardin and Modestino, "Optimum quantizer performance for a class of non-Gaussian
    memoryless sources", IEEE Trans. Inf. Theory 30(3), 1984.

Differs from the paper: values go to the nearest centroid, as with every codebook of this package,
and not to that of the least cost. So :math:`\lambda` is selected for the entropy of the *nearest*
centroids. At 3 bits and more this costs less than 0.03 bits of entropy; at
2 bits and less it is no small matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lightning_nna import elementary
from lightning_nna.quantization.lloyd_max import ScalarQuantizer, line_of, lloyd_max
from lightning_nna.quantization.optimal_cells import Floats, Line, Places

_MOST_ITERATIONS = 200
# Iterations end when no centroid moves by more than this fraction of the span.
_STILL = 1e-6
# Bits that the entropy may stay below the wanted one.
_NEAR = 0.002
# Where it is so far below, fewer centroids are tried, too.
_JUMP = 0.1
_MOST_DOUBLINGS = 48
_MOST_HALVINGS = 24


@dataclass(frozen=True)
class EntropyConstrainedQuantizer(ScalarQuantizer):
    r"""Centroids that values are rounded to, the nearest one, and the cost of their indices.

    ``iterations`` are those of the Lloyd-Max quantizer that it starts from.

    Args:
        max_entropy_bits: Entropy of the index of the nearest centroid, in bits a value.
        multiplier: :math:`\lambda`, in the squared unit of the values for a bit.
    """

    max_entropy_bits: float
    multiplier: float


def entropy_constrained(
    values: Float[Tensor, "..."],
    size: int,
    *,
    max_entropy_bits: float | None = None,
    multiplier: float | None = None,
    weights: Float[Tensor, "..."] | None = None,
    pin_zero: bool = False,
) -> EntropyConstrainedQuantizer:
    r"""Centroids with the least squared error for an entropy, of at most ``size`` centroids.

    The same input gives the same bits. The work is done on the CPU, in float64; it starts at the
    Lloyd-Max points, and after the sorting its time does not grow with the number of values.

    Args:
        values: Values to quantize, any shape, on any device.
        size: Greatest number of centroids, 1 to 65536.
        max_entropy_bits: Greatest entropy of the index of the nearest centroid, in bits a value,
            above 0 and at most :math:`\log_2` of ``size``. For many values, the result is less
            than 0.01 bits below while all centroids are in use, and up to some hundredths if one
            drops out. If Lloyd-Max needs no more, its centroids are the result. For few values,
            where equally frequent centroids have codes of one length, whatever the price, the
            search starts at fewer centroids, too, and the least error is the result.
        multiplier: :math:`\lambda` itself, in the squared unit of the values for a bit, instead of
            ``max_entropy_bits``; 0 is Lloyd-Max.
        weights: Weights of the values, in their shape, not negative; None for equal ones.
        pin_zero: Whether one centroid is exactly 0.

    Returns:
        Centroids, on the device of ``values``; where some dropped out, the largest is repeated. The
        distortion is that of the nearest centroids.

    Raises:
        ValueError: If not exactly one of ``max_entropy_bits`` and ``multiplier`` is given, if one
            is out of its bounds, or as :func:`.lloyd_max` does.
        FloatingPointError: If a value or weight is not finite.

    Example:
        >>> values = torch.linspace(-1, 1, 10001).pow(3)
        >>> found = entropy_constrained(values, 8, max_entropy_bits=2.5)
        >>> lloyd_max(values, 8).distortion < found.distortion
        True
        >>> round(found.max_entropy_bits, 2)
        2.5

    Reference:
        Chou, Lookabaugh and Gray, "Entropy-constrained vector quantization", IEEE Trans. ASSP
        37(1), 1989.
    """
    if (max_entropy_bits is None) == (multiplier is None):
        raise ValueError("give either max_entropy_bits or multiplier")
    if multiplier is not None and not 0 <= multiplier < math.inf:
        raise ValueError(f"multiplier must be at least 0 and finite, got {multiplier}")
    if max_entropy_bits is not None:
        require_rate(max_entropy_bits, math.log2(max(size, 1)))
    line = line_of(values, weights, centered=not pin_zero)
    candidates: list[EntropyConstrainedQuantizer] = []
    solution: tuple[Floats, float] | None
    for count in range(size, min(size, 1) - 1, -1):
        least = lloyd_max(values, count, weights=weights, pin_zero=pin_zero)
        start = np.unique(least.centroids.double().cpu().numpy())
        if max_entropy_bits is None:
            assert multiplier is not None
            solution = _of_multiplier(line, start, multiplier, pin_zero), multiplier
        else:
            solution = _of_rate(line, start, max_entropy_bits, pin_zero)
        if solution is not None:
            candidates.append(_rated(line, *solution, size, least))
        if max_entropy_bits is None or (
            candidates and not _jumped(candidates[-1], max_entropy_bits)
        ):
            break
    best = min(candidates, key=lambda quantizer: quantizer.distortion)
    return replace(best, centroids=best.centroids.to(values.device))


def require_rate(max_entropy_bits: float, bits: float) -> None:
    """Raise unless an entropy is one of indices of so many bits.

    Raises:
        ValueError: Shows both.

    Example:
        >>> require_rate(4.3, 5)
    """
    if not 0 < max_entropy_bits <= bits:
        raise ValueError(
            f"max_entropy_bits must be above 0 and at most {bits:g} bits, got {max_entropy_bits}"
        )


def _rated(
    line: Line, centroids: Floats, multiplier: float, size: int, start: ScalarQuantizer
) -> EntropyConstrainedQuantizer:
    cuts = line.nearest_cuts(centroids)
    padded = np.concatenate([centroids, np.full(size - len(centroids), centroids[-1])])
    return EntropyConstrainedQuantizer(
        torch.from_numpy(padded + 0.0).float(),
        float(line.errors(centroids, cuts).sum() / line.mass[-1]),
        start.iterations,
        _entropy(line, cuts),
        multiplier,
    )


def _jumped(quantizer: EntropyConstrainedQuantizer, max_entropy_bits: float) -> bool:
    """Say whether a price has brought the entropy far below the wanted one, as of few values."""
    return quantizer.multiplier > 0 and quantizer.max_entropy_bits < max_entropy_bits - _JUMP


def _of_rate(
    line: Line, start: Floats, max_entropy_bits: float, pin_zero: bool
) -> tuple[Floats, float] | None:
    """Centroids of the least multiplier that brings the entropy down, and that; None for none."""
    if _entropy(line, line.nearest_cuts(start)) <= max_entropy_bits:
        return start, 0.0
    # About the error of evenly spaced centroids: the price of a bit if there are many.
    high = (
        float(line.values[-1] - line.values[0]) ** 2 * elementary.exp2(-2 * max_entropy_bits) / 64
    )
    low = 0.0
    for _ in range(_MOST_DOUBLINGS):
        centroids = _of_multiplier(line, start, high, pin_zero)
        rate = _entropy(line, line.nearest_cuts(centroids))
        if rate <= max_entropy_bits:
            break
        low, high = high, 2 * high
    else:
        return None
    for _ in range(_MOST_HALVINGS):
        if rate >= max_entropy_bits - _NEAR:
            break
        middle = (low + high) / 2
        candidate = _of_multiplier(line, start, middle, pin_zero)
        entropy = _entropy(line, line.nearest_cuts(candidate))
        if entropy <= max_entropy_bits:
            centroids, rate, high = candidate, entropy, middle
        else:
            low = middle
    return centroids, high


def _of_multiplier(line: Line, start: Floats, multiplier: float, pin_zero: bool) -> Floats:
    """Iterate thresholds of the least cost, means and lengths; unused centroids drop out."""
    if multiplier == 0:
        return start
    small = _STILL * (line.values[-1] - line.values[0])
    centroids, mass = start, np.diff(line.mass[line.nearest_cuts(start)])
    for _ in range(_MOST_ITERATIONS):
        used = np.flatnonzero(mass > 0)
        cheapest = used[_cheapest(centroids[used], multiplier * _lengths(line, mass[used]))]
        z, cost = centroids[cheapest], multiplier * _lengths(line, mass[cheapest])
        cuts = line.cuts_at((z[1:] + z[:-1]) / 2 + np.diff(cost) / (2 * np.diff(z)))
        mass, moved = np.diff(line.mass[cuts]), line.means(cuts)
        if pin_zero:
            moved[z == 0.0] = 0.0
        change = np.abs(moved - z).max()
        centroids = moved
        if len(cheapest) == len(used) and change <= small:
            break
    centroids = centroids[mass > 0]
    return np.union1d(centroids, [0.0]) if pin_zero else centroids


def _cheapest(centroids: Floats, costs: Floats) -> Places:
    """Find the ascending centroids that are the cheapest for some value.

    The cost of a value is its square plus a line of slope -2z and height z² + cost: those that are
    lowest somewhere are the lower convex hull of (z, z² + cost).
    """
    heights = centroids**2 + costs
    slopes = np.diff(heights) / np.diff(centroids)
    if (slopes[1:] > slopes[:-1]).all():
        return np.arange(len(centroids))
    hull: list[int] = []
    for index in range(len(centroids)):
        while len(hull) > 1 and _is_above(centroids, heights, hull[-2], hull[-1], index):
            hull.pop()
        hull.append(index)
    return np.array(hull)


def _is_above(x: Floats, y: Floats, left: int, middle: int, right: int) -> bool:
    """Say whether the middle one of three points is on or above the line through the others."""
    first = (y[middle] - y[left]) * (x[right] - x[middle])
    return bool(first >= (y[right] - y[middle]) * (x[middle] - x[left]))


def _lengths(line: Line, mass: Floats) -> Floats:
    """Ideal lengths of the code, in bits."""
    return -elementary.log2(mass / line.mass[-1])


def _entropy(line: Line, cuts: Places) -> float:
    """Of the indices, in bits a value."""
    mass = np.diff(line.mass[cuts])
    mass = mass[mass > 0]
    return float((mass * _lengths(line, mass)).sum() / line.mass[-1]) + 0.0
