r"""Daubechies wavelets on an interval: orthonormal, and exact for polynomials up to the edge.

A signal :math:`x_0 \dots x_{m-1}` becomes :math:`m/2` averages and :math:`m/2` details. In the
interior both are products with the filters of the line; output :math:`k` covers the inputs
:math:`2k - N + 1 \dots 2k + N`, and :math:`k` runs from :math:`N` to :math:`m/2 - N - 1`. At each
edge the signals on the first :math:`3N - 1` entries that are orthogonal to all of these have
:math:`2N` dimensions. The part of the polynomials of degree below :math:`N` in there is spanned by
:math:`N` edge averages; what is left by :math:`N` edge details, which therefore vanish on
polynomials. The averages of a polynomial are the polynomial of the next level.

Reference:
    Cohen, Daubechies and Vial, "Wavelets on the interval and fast wavelet transforms", Appl.
    Comput. Harmon. Anal. 1(1), 1993; with Jawerth, C. R. Acad. Sci. Paris 316, 1993.

Differs from the paper: the inner product is the sum over samples and not the integral, so that the
first level needs no preconditioning. The filters of an edge then depend on the level.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pywt
import torch
from jaxtyping import Float
from torch import Tensor

#: More levels than any series has values for.
_MOST_LEVELS = 40
ORDERS = range(1, 9)


@dataclass(frozen=True)
class EdgeFilters:
    """Filters from the first entries of a level to the edge entries of the next.

    Args:
        low: Rows of the edge averages, shape ``(order, block)``.
        high: Rows of the edge details, shape ``(order, block)``.
        polynomials: Edge averages of polynomials, shape ``(order, order)``, a column each; the
            first columns are those of the lowest degrees.
    """

    low: Float[np.ndarray, "order block"]
    high: Float[np.ndarray, "order block"]
    polynomials: Float[np.ndarray, "order order"]


def scaling_filter(order: int) -> Float[np.ndarray, " taps"]:
    """Return Daubechies' filter of averages; order 1 is Haar.

    Args:
        order: Number of vanishing moments, 1 to 8.

    Raises:
        ValueError: If ``order`` is not between 1 and 8.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of 1 to 8, got {order}")
    return np.asarray(pywt.Wavelet(f"db{order}").rec_lo)


def detail_filter(scaling: Float[np.ndarray, " taps"]) -> Float[np.ndarray, " taps"]:
    """Return the quadrature mirror filter of a filter of averages.

    Args:
        scaling: Filter of averages, shape ``(taps,)``.
    """
    return scaling[::-1] * (-1.0) ** np.arange(len(scaling))


@lru_cache(maxsize=2 * len(ORDERS))
def edge_filters(order: int, *, mirrored: bool = False) -> tuple[EdgeFilters, ...]:
    """Compute the edge filters of each level, the finest first.

    Args:
        order: Number of vanishing moments, 1 to 8.
        mirrored: Filters of the far edge, whose entries are counted from the end.
    """
    scaling = scaling_filter(order)
    scaling = scaling[::-1] if mirrored else scaling
    complement = _complement(order, scaling)
    block = np.arange(3 * order - 1)
    inner = block[order:]
    # Polynomials of a level: their values at the edge entries, and in the interior a fixed basis.
    edge, interior = polynomials_at_edge(order), _polynomials(order, inner)
    fed = _polynomials(order, 2 * inner[:, None] - order + 1 + np.arange(2 * order))
    averaged = np.einsum("l,klp->kp", scaling, fed)
    to_next = np.linalg.lstsq(interior, averaged, rcond=None)[0]
    levels = []
    for _ in range(_MOST_LEVELS):
        values = np.concatenate([edge, interior])
        basis = np.linalg.qr(complement.T @ values, mode="complete")[0]
        low = _staggered((complement @ basis[:, :order]).T)
        high = _staggered((complement @ basis[:, order:]).T)
        edge = np.linalg.solve(to_next.T, (low @ values).T).T
        levels.append(EdgeFilters(low, high, edge))
    return tuple(levels)


def polynomials_at_edge(order: int) -> Float[np.ndarray, "order order"]:
    """Return the polynomials at the edge samples, before the first level.

    Args:
        order: Number of vanishing moments, 1 to 8.
    """
    return _polynomials(order, np.arange(order))


def interval_transform(
    x: Float[Tensor, "*batch m"], order: int, levels: int
) -> tuple[Float[Tensor, "*batch coarse"], list[Tensor]]:
    """Transform signals on an interval, orthonormally.

    Args:
        x: Signals, shape ``(*batch, m)``; ``m`` divides by ``2 ** levels``, and every level has at
            least ``6 * order - 2`` entries.
        order: Number of vanishing moments, 1 to 8.
        levels: Number of transforms of the averages.

    Returns:
        Averages, shape ``(*batch, m / 2 ** levels)``, and the details of each level, the finest
        first.

    Raises:
        ValueError: If the length does not fit.

    Example:
        >>> averages, (details,) = interval_transform(torch.arange(10.0), 2, 1)
        >>> bool(details.abs().max() < 1e-5)
        True
    """
    details = []
    for level in range(levels):
        matrix = _matrix(x.shape[-1], order, level).to(x)
        averages_and_details = x @ matrix.T
        x, detail = averages_and_details.tensor_split(2, dim=-1)
        details.append(detail)
    return x, details


def inverse_interval_transform(
    averages: Float[Tensor, "*batch coarse"], details: list[Tensor], order: int
) -> Float[Tensor, "*batch m"]:
    """Compute the signals of a transform, the inverse of :func:`interval_transform`.

    Args:
        averages: Averages of the coarsest level, shape ``(*batch, coarse)``.
        details: Details of each level, the finest first.
        order: Number of vanishing moments, 1 to 8.
    """
    x = averages
    for level in reversed(range(len(details))):
        both = torch.cat([x, details[level]], dim=-1)
        x = both @ _matrix(both.shape[-1], order, level).to(x)
    return x


def most_levels(n: int, order: int) -> int:
    """Count the levels of :func:`interval_transform` that a length allows.

    Args:
        n: Number of values.
        order: Number of vanishing moments, 1 to 8.
    """
    levels = 0
    while n % 2 == 0 and n >= 6 * order - 2:
        n, levels = n // 2, levels + 1
    return levels


def _matrix(m: int, order: int, level: int) -> Tensor:
    """Return one level as an orthogonal matrix; averages first."""
    if m % 2 or m < 6 * order - 2:
        raise ValueError(
            f"a level of {m} entries cannot be transformed with order {order}: it must be even and "
            f"at least {6 * order - 2}; take fewer levels"
        )
    scaling = scaling_filter(order)
    near, far = edge_filters(order)[level], edge_filters(order, mirrored=True)[level]
    halves = []
    for taps, first, last in (
        (scaling, near.low, far.low),
        (detail_filter(scaling), near.high, far.high),
    ):
        half = np.zeros((m // 2, m))
        half[:order, : 3 * order - 1] = first
        half[m // 2 - order :, m - 3 * order + 1 :] = last[::-1, ::-1]
        for k in range(order, m // 2 - order):
            half[k, 2 * k - order + 1 : 2 * k + order + 1] = taps
        halves.append(half)
    return torch.from_numpy(np.concatenate(halves))


def _complement(order: int, scaling: np.ndarray) -> np.ndarray:
    """Return orthonormal columns: signals on the block that no interior row sees."""
    size = 3 * order - 1
    rows = [np.zeros(size)]
    for k in range(order, 2 * order):
        start = 2 * k - order + 1
        for taps in (scaling, detail_filter(scaling)):
            inside = taps[: max(size - start, 0)]
            rows.append(np.concatenate([np.zeros(min(start, size)), inside]))
    return np.linalg.svd(np.array(rows))[2][order - 1 :].T


def _polynomials(order: int, entries: np.ndarray) -> np.ndarray:
    """Evaluate Legendre polynomials over the block of an edge, at any entries."""
    last = max(3 * order - 2, 1)
    return np.polynomial.legendre.legvander(2.0 * entries / last - 1.0, order - 1)


def _staggered(rows: np.ndarray) -> np.ndarray:
    """Return rows of growing support for the same space, the shortest first."""
    triangular = np.linalg.qr(rows[:, ::-1])[1]
    staggered = triangular[::-1, ::-1]
    signs = np.sign(staggered[np.arange(len(rows)), np.abs(staggered).argmax(1)])
    return staggered * signs[:, None]
