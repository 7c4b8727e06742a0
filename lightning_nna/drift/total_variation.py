r"""Denoising of a whole series: ``tv_denoise``, and exact total variation, ``taut_string``.

An estimator of the newest value, asked at every time, denoises a series as it comes in. With the
Haar estimator the squared error summed over a series of bounded variation grows as
:math:`n^{1/3}`, the best rate there is; no linear filter does better than :math:`n^{1/2}`. Where
the whole series is known, a second pass from its end helps: with windows :math:`r, r'` of the two
estimates that share the value itself,

.. math:: \hat\theta_t = \frac{r \hat\theta_t^{\text{past}} + r' \hat\theta_t^{\text{future}} - y_t}
    {r + r' - 1}.

Reference:
    Baby et al., "Adaptive estimation and learning under temporal distribution shift", ICML 2025,
    arXiv 2505.15803; Johnson, "A dynamic programming algorithm for the fused lasso and
    L0-segmentation", J. Comput. Graph. Stat. 22(2), 2013.

Differs from the paper: the two-sided estimate is ours.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lightning_nna.drift.estimators import LatestEstimator, Series
from lightning_nna.drift.wavelets import HaarEstimator


def tv_denoise(
    y: Series, estimator: LatestEstimator | None = None, *, two_sided: bool = False
) -> Series:
    r"""Estimate every value of a series.

    Args:
        y: Series, shape ``(*batch, n)``.
        estimator: Estimator of the newest value; None for Haar with a constant of 0.85: with much
            less, noise that passes somewhere adds up. Haar, interval wavelets and their mixture
            cost :math:`O(n \log n)`.
        two_sided: Whether later values count, too.

    Returns:
        The denoised series, shape ``(*batch, n)``, in the unit of ``y``.

    Raises:
        ValueError: If the series is empty.

    Example:
        >>> y = torch.tensor([0.0, 0.1, -0.1, 0.0, 1.0, 1.1, 0.9, 1.0])
        >>> tv_denoise(y, HaarEstimator(sigma=0.1, rule="hard"), two_sided=True).round(decimals=1)
        tensor([0., 0., 0., 0., 1., 1., 1., 1.])
    """
    estimator = HaarEstimator(constant=0.85) if estimator is None else estimator
    if not isinstance(y, Tensor):
        tensor = torch.from_numpy(np.asarray(y, dtype=np.float64))
        denoised = tv_denoise(tensor, estimator, two_sided=two_sided)
        assert isinstance(denoised, Tensor), "of a tensor"
        return denoised.numpy()
    past: Any = estimator.prefixes(y)
    if not two_sided:
        return past.value
    future: Any = estimator.prefixes(y.flip(-1))
    value, window = future.value.flip(-1), future.effective_window.flip(-1)
    together = past.effective_window * past.value + window * value - y
    return together / (past.effective_window + window - 1)


def taut_string(y: Float[np.ndarray, " n"], penalty: float) -> Float[np.ndarray, " n"]:
    r"""Denoise a series by exact total variation, in :math:`O(n)`.

    .. math:: \min_x \tfrac12 \sum_i (x_i - y_i)^2 + \tau \sum_i |x_{i+1} - x_i|

    The derivative of the best cost of :math:`x_1 \dots x_i` by :math:`x_i` is piecewise linear and
    rises; clipping it to :math:`\pm\tau` minimizes over :math:`x_i`, and only its ends change.

    Args:
        y: Series, shape ``(n,)``.
        penalty: Weight :math:`\tau \ge 0` of the total variation, in the unit of the series.

    Returns:
        The minimizer, shape ``(n,)``, in the unit of the series.

    Raises:
        ValueError: If the series is empty or the penalty negative.

    Example:
        >>> taut_string(np.array([0.0, 0.0, 3.0, 3.0]), 1.0)
        array([0.5, 0.5, 2.5, 2.5])
    """
    if not len(y) or not penalty >= 0:
        raise ValueError(
            f"a series needs a value and a penalty of at least 0, got {len(y)} and {penalty}"
        )
    # Knots, left to right, and by how much the derivative's slope and offset change there.
    knots: deque[tuple[float, float, float]] = deque()
    lower, upper = np.empty(len(y)), np.empty(len(y))
    left = right = (1.0, -float(y[0]))
    for number in range(len(y) - 1):
        lower[number], left = _cross(knots, left, -penalty, from_left=True)
        upper[number], right = _cross(knots, right, penalty, from_left=False)
        knots.appendleft((lower[number], left[0], left[1] + penalty))
        knots.append((upper[number], -right[0], -right[1] + penalty))
        following = float(y[number + 1])
        left, right = (1.0, -penalty - following), (1.0, penalty - following)
    x = np.empty(len(y))
    x[-1] = _cross(knots, left, 0.0, from_left=True)[0]
    for number in reversed(range(len(y) - 1)):
        x[number] = min(max(x[number + 1], lower[number]), upper[number])
    return x


def _cross(
    knots: deque[tuple[float, float, float]],
    line: tuple[float, float],
    level: float,
    *,
    from_left: bool,
) -> tuple[float, tuple[float, float]]:
    """Find the crossing of the derivative with a level, and remove the knots up to it."""
    slope, offset = line
    sign = 1.0 if from_left else -1.0
    while knots:
        knot, bend, shift = knots[0] if from_left else knots[-1]
        if sign * (slope * knot + offset - level) > 0:
            break
        slope, offset = slope + sign * bend, offset + sign * shift
        knots.popleft() if from_left else knots.pop()
    return (level - offset) / slope, (slope, offset)
