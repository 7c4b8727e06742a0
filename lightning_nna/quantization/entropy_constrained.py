r"""Levels of a scalar quantizer for a given entropy: least error plus a price on the code.

Lloyd-Max finds the levels of the least error for their *number*. Where indices are entropy-coded,
as a compiler for an NPU does with weights, what counts is their entropy, and the levels to have are
those of least

.. math:: D + \lambda H, \qquad H = -\sum_k p_k \log_2 p_k .

A value then goes where its squared error plus :math:`\lambda` times the length of the code,
:math:`l_k = -\log_2 p_k`, is least; the borders of Lloyd-Max move towards the rarer level,

.. math:: t_k = \frac{z_k + z_{k+1}}{2} + \lambda \frac{l_{k+1} - l_k}{2 (z_{k+1} - z_k)},

a centroid is the mean of its cell, and levels that no value goes to drop out. For many levels their
spacing becomes even: fine in the tails, where Lloyd-Max is coarse, and coarser in the middle.

Reference:
    Chou, Lookabaugh and Gray, "Entropy-constrained vector quantization", IEEE Trans. ASSP 37(1),
    1989; Farvardin and Modestino, "Optimum quantizer performance for a class of non-Gaussian
    memoryless sources", IEEE Trans. Inf. Theory 30(3), 1984.

Differs from the paper: what is rounded with the levels goes to the nearest one, as everything that
uses a codebook here has it, and not to that of the least cost. So :math:`\lambda` is chosen for the
entropy of the *nearest* levels. At 3 bits and more this costs less than 0.03 bits of entropy; at
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
# Iterations end when no centroid moves by more than this share of the span.
_STILL = 1e-6
# Bits that the entropy may stay below the wanted one.
_NEAR = 0.002
# Where it is so far below, fewer levels are tried, too.
_JUMP = 0.1
_MOST_DOUBLINGS = 48
_MOST_HALVINGS = 24


@dataclass(frozen=True)
class EntropyConstrainedQuantizer(ScalarQuantizer):
    r"""Levels that values are rounded to, nearest first, and what their indices cost.

    ``iterations`` are those of the Lloyd-Max quantizer that it starts from.

    Args:
        max_entropy_bits: Entropy of the index of the nearest centroid, in bits a value.
        multiplier: :math:`\lambda`, in the squared unit of the values for a bit.
    """

    max_entropy_bits: float
    multiplier: float


def entropy_constrained(
    values: Float[Tensor, "..."],
    levels: int,
    *,
    max_entropy_bits: float | None = None,
    multiplier: float | None = None,
    weights: Float[Tensor, "..."] | None = None,
    pin_zero: bool = False,
) -> EntropyConstrainedQuantizer:
    r"""Centroids with the least squared error for an entropy, of so many levels at most.

    The same input gives the same bits. The work is done on the CPU, in float64; it starts at the
    Lloyd-Max points, and after the sorting its time does not grow with the number of values.

    Args:
        values: What is to be quantized, on any device.
        levels: Most centroids, 1 to 65536.
        max_entropy_bits: Greatest entropy of the index of the nearest centroid, in bits a value,
            above 0 and at most :math:`\log_2` of ``levels``. Of many values, what is found lies
            less than 0.01 bits below while all levels are in use, and up to some hundredths where
            one drops out. If Lloyd-Max needs no more, its levels are the answer. Of few values,
            where levels as frequent have codes of one length, whatever the price, it starts at
            fewer levels, too, and the least error is the answer.
        multiplier: :math:`\lambda` itself, in the squared unit of the values for a bit, instead of
            ``max_entropy_bits``; 0 is Lloyd-Max.
        weights: How much every value counts, in the shape of ``values``; None: all the same.
        pin_zero: One centroid is exactly 0.

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
        require_rate(max_entropy_bits, math.log2(max(levels, 1)))
    line = line_of(values, weights, centered=not pin_zero)
    found: list[EntropyConstrainedQuantizer] = []
    reached: tuple[Floats, float] | None
    for count in range(levels, min(levels, 1) - 1, -1):
        least = lloyd_max(values, count, weights=weights, pin_zero=pin_zero)
        start = np.unique(least.centroids.double().cpu().numpy())
        if max_entropy_bits is None:
            assert multiplier is not None
            reached = _of_multiplier(line, start, multiplier, pin_zero), multiplier
        else:
            reached = _of_rate(line, start, max_entropy_bits, pin_zero)
        if reached is not None:
            found.append(_rated(line, *reached, levels, least))
        if max_entropy_bits is None or (found and not _jumped(found[-1], max_entropy_bits)):
            break
    best = min(found, key=lambda quantizer: quantizer.distortion)
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
    line: Line, centroids: Floats, multiplier: float, levels: int, start: ScalarQuantizer
) -> EntropyConstrainedQuantizer:
    cuts = line.nearest_cuts(centroids)
    padded = np.concatenate([centroids, np.full(levels - len(centroids), centroids[-1])])
    return EntropyConstrainedQuantizer(
        torch.from_numpy(padded + 0.0).float(),
        float(line.errors(centroids, cuts).sum() / line.mass[-1]),
        start.iterations,
        _entropy(line, cuts),
        multiplier,
    )


def _jumped(quantizer: EntropyConstrainedQuantizer, max_entropy_bits: float) -> bool:
    """Whether a price has brought the entropy far below the wanted one, as of few values."""
    return quantizer.multiplier > 0 and quantizer.max_entropy_bits < max_entropy_bits - _JUMP


def _of_rate(
    line: Line, start: Floats, max_entropy_bits: float, pin_zero: bool
) -> tuple[Floats, float] | None:
    """Centroids of the least multiplier that brings the entropy down, and that; None for none."""
    if _entropy(line, line.nearest_cuts(start)) <= max_entropy_bits:
        return start, 0.0
    # About the error of even levels a bit: what a bit costs where levels are many.
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
        tried = _of_multiplier(line, start, middle, pin_zero)
        found = _entropy(line, line.nearest_cuts(tried))
        if found <= max_entropy_bits:
            centroids, rate, high = tried, found, middle
        else:
            low = middle
    return centroids, high


def _of_multiplier(line: Line, start: Floats, multiplier: float, pin_zero: bool) -> Floats:
    """Iterate borders of the least cost, means and lengths; levels without values drop out."""
    if multiplier == 0:
        return start
    small = _STILL * (line.values[-1] - line.values[0])
    centroids, mass = start, np.diff(line.mass[line.nearest_cuts(start)])
    for _ in range(_MOST_ITERATIONS):
        used = np.flatnonzero(mass > 0)
        kept = used[_cheapest(centroids[used], multiplier * _lengths(line, mass[used]))]
        z, cost = centroids[kept], multiplier * _lengths(line, mass[kept])
        cuts = line.cuts_at((z[1:] + z[:-1]) / 2 + np.diff(cost) / (2 * np.diff(z)))
        mass, moved = np.diff(line.mass[cuts]), line.means(cuts)
        if pin_zero:
            moved[z == 0.0] = 0.0
        change = np.abs(moved - z).max()
        centroids = moved
        if len(kept) == len(used) and change <= small:
            break
    centroids = centroids[mass > 0]
    return np.union1d(centroids, [0.0]) if pin_zero else centroids


def _cheapest(centroids: Floats, costs: Floats) -> Places:
    """Which of ascending centroids are the cheapest anywhere.

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
    """Whether the middle one of three points is on or above the line through the others."""
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
