r"""Estimate the newest value with wavelets on an interval: ``IntervalWaveletEstimator``.

Of the orthonormal transform of ``interval_wavelets`` only the averages and details of the newest
edge reach the newest value, so that the estimate is

.. math:: \hat\theta = \sum_j \psi_j \cdot S_\lambda(d_j) + \varphi \cdot S^0_\lambda(a),

with :math:`d_j` the :math:`N` edge details of level :math:`j`, :math:`a` the :math:`N` edge
averages of the coarsest, and :math:`\psi_j, \varphi` the values of their wavelets at the newest
time. The edge averages span polynomials: they are rotated so that the first is the part of a
constant, which is never thresholded, and :math:`S^0` shrinks the others. All prefixes of a series
share their interior averages, so that all of them together cost :math:`O(n \log n)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from lightning_nna.drift.estimators import (
    Estimate,
    Rule,
    ThresholdEstimator,
    noise_quantile,
    threshold_details,
)
from lightning_nna.drift.interval_wavelets import (
    edge_filters,
    polynomials_at_edge,
    scaling_filter,
)

# A series needs so many values for each vanishing moment.
_VALUES_PER_MOMENT = 8


@dataclass(frozen=True, kw_only=True)
class IntervalWaveletEstimator(ThresholdEstimator):
    """Boundary-corrected Daubechies wavelets; see the module.

    A prefix of fewer than ``8 * order`` values is estimated with the greatest order that it has
    enough values for, at last with Haar. Values older than the coarsest edge do not count.

    Args:
        order: Number of vanishing moments, 1 (Haar) to 8: a course that is locally a polynomial of
            a lower degree is estimated without bias.
        sigma: Standard deviation of the noise, in the unit of the series; None to measure it.
        constant: Factor :math:`c` of the threshold, at least 0.
        delta: Probability that noise passes the threshold, for a constant of 1.
        rule: Treatment of the details above the threshold: ``"soft"`` shrinks them, ``"hard"``
            leaves them unchanged, ``"tree"`` leaves all details of the finest level that has one
            above the threshold and of all coarser levels.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> y = torch.linspace(0, 1, 200, dtype=torch.float64) ** 2
        >>> estimator = IntervalWaveletEstimator(order=3, sigma=0.0)
        >>> round(float(estimator.latest(y).value), 6)
        1.0
    """

    order: int = 2

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        scaling_filter(self.order)

    @override
    def estimate_at(
        self,
        y: Float[Tensor, "*batch n"],
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        orders = ((times + 1) // _VALUES_PER_MOMENT).clamp(1, self.order)
        parts = [
            self._of_order(order, y, times[orders == order], sigma[..., orders == order])
            for order in orders.unique().tolist()
        ]
        joined = {
            field.name: torch.cat([getattr(part, field.name) for part in parts], -1)
            for field in fields(Estimate)
        }
        return Estimate(**joined)

    def _of_order(self, order: int, y: Tensor, times: Tensor, sigma: Tensor) -> Estimate:
        quantile = noise_quantile((times + 1).to(y.dtype), self.delta)
        threshold = (self.constant * quantile * sigma)[..., None]
        value = variance = count = torch.zeros_like(sigma)
        # Whether this or a finer level has a detail above the threshold, for the rule "tree".
        drifted = torch.zeros_like(sigma, dtype=torch.bool)[..., None]
        averages = y[..., (times[:, None] - torch.arange(order, device=y.device)).clamp_min(0)]
        # Values of the edge averages' wavelets at the newest time, and the polynomials in them.
        at_newest = torch.eye(order, dtype=y.dtype, device=y.device)[0].expand(len(times), -1)
        basis = _as(polynomials_at_edge(order), y).expand(len(times), -1, -1)
        for level, (block, reached) in enumerate(_interior(y, times, order)):
            filters = edge_filters(order, mirrored=True)[level]
            low, high = _as(filters.low, y), _as(filters.high, y)
            entries = torch.cat([averages, block], -1)
            wavelets = at_newest @ high[:, :order].T
            # A series that is too short for the level has no details there.
            details = entries @ high.T * reached[:, None]
            details, drifted = _threshold(details, threshold, self.rule, drifted)
            value = value + (details * wavelets).sum(-1)
            variance = variance + ((details != 0) * wavelets.square()).sum(-1)
            count = count + (details != 0).sum(-1)
            reach = reached[:, None]
            averages = torch.where(reach, entries @ low.T, averages)
            at_newest = torch.where(reach, at_newest @ low[:, :order].T, at_newest)
            basis = torch.where(reach[..., None], _as(filters.polynomials, y), basis)
        rotation = torch.linalg.qr(basis).Q
        rotated = torch.einsum("...to,top->...tp", averages, rotation)
        at_newest = torch.einsum("to,top->tp", at_newest, rotation)
        slopes, _ = _threshold(rotated[..., 1:], threshold, self.rule, drifted)
        value = value + rotated[..., 0] * at_newest[:, 0] + (slopes * at_newest[:, 1:]).sum(-1)
        variance = variance + at_newest[:, 0].square()
        variance = variance + ((slopes != 0) * at_newest[:, 1:].square()).sum(-1)
        count = count + (slopes != 0).sum(-1)
        radius = quantile * sigma * variance.sqrt()
        return Estimate(value, radius, sigma, 1 / variance, count)


def _threshold(
    details: Tensor, threshold: Tensor, rule: Rule, drifted: Tensor
) -> tuple[Tensor, Tensor]:
    """Threshold the details of a level; tell, too, if they or finer ones were above."""
    if rule != "tree":
        return threshold_details(details, threshold, rule), drifted
    drifted = drifted | (details.abs() > threshold).any(-1, keepdim=True)
    return torch.where(drifted, details, 0.0), drifted


def _interior(
    y: Float[Tensor, "*batch n"], times: Int[Tensor, " times"], order: int
) -> Iterator[tuple[Float[Tensor, "*batch times inner"], Bool[Tensor, " times"]]]:
    """Yield the interior averages next to the newest edge by level, and the times with them."""
    taps = _as(scaling_filter(order)[::-1], y)
    inner = torch.arange(order, 3 * order - 1, device=y.device)
    averages, ahead, step = y, 0, 1
    while True:
        reached = times + 1 >= step * (4 * order - 2) - order + 1
        if not bool(reached.any()):
            return
        index = times[:, None] - step * inner + ahead
        yield averages[..., index.clamp(0, y.shape[-1] - 1)], reached
        # Averages are stored at the time of their newest value, which is `ahead` of their own.
        flat = F.pad(averages.reshape(-1, 1, y.shape[-1]), (step * (2 * order - 1), 0))
        averages = F.conv1d(flat, taps.flip(0)[None, None], dilation=step).reshape(y.shape)
        ahead, step = ahead + step * (order - 1), 2 * step


def _as(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like)
