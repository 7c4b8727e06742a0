r"""Estimate the newest value by thresholding wavelet coefficients, with Haar or by a name.

Without a drift the details of an orthonormal wavelet transform are noise of deviation
:math:`\sigma`. They are shrunk by

.. math:: \lambda = c\,\sigma \sqrt{2 \log(\log_2 n / \delta)}, \qquad
    S_\lambda(d) = \operatorname{sgn}(d) \max(|d| - \lambda, 0),

and the newest value of the inverse transform is the estimate. For Haar the transform is that of
nested windows of the newest :math:`1 = r_0 < r_1 < \dots < r_K = n` values, with their means
:math:`m_r`,

.. math:: \hat\theta = m_n + \sum_{k=1}^{K} S_{\lambda s_k}(m_{r_{k-1}} - m_{r_k}), \qquad
    s_k^2 = \frac{1}{r_{k-1}} - \frac{1}{r_k}.

A window grows by the newest dyadic blocks of the series, counted from its start: 1 or 2 blocks of
each size :math:`1, 2, 4, \dots`, which is the one way to write :math:`n` so. For
:math:`n = 2^J` the windows are :math:`1, 2, 4, \dots, n` and :math:`s_k = 2^{-k/2}`; for another
:math:`n` no value is dropped or made up, and a window grows at most threefold. The sums of these
blocks are all that ``StreamingHaar`` stores.

Reference:
    Baby et al., "Adaptive estimation and learning under temporal distribution shift", ICML 2025,
    arXiv 2505.15803.

Differs from the paper: the windows for an :math:`n` that is not a power of two, the logarithm to
base 2 (at least 1), the constant :math:`c` (2 in theory, near 1 in practice) and the other rules
are ours: ``"hard"`` leaves a detail above :math:`\lambda` unchanged, and ``"tree"`` all coarser
ones too. For Haar that is the window of Mazzetto and Upfal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack, override

from lightning_nna.drift.estimators import (
    Estimate,
    LatestEstimator,
    Series,
    ThresholdEstimator,
    ThresholdSettings,
    noise_quantile,
    threshold_details,
)
from lightning_nna.drift.interval_estimator import IntervalWaveletEstimator
from lightning_nna.drift.symmetric_wavelets import SymmetricWaveletEstimator

Boundary: TypeAlias = Literal["symmetric", "interval"]


@dataclass(frozen=True, kw_only=True)
class HaarEstimator(ThresholdEstimator):
    """The closed form over nested windows; see the module.

    Args:
        sigma: Standard deviation of the noise, in the unit of the series; None to measure it.
        constant: Factor :math:`c` of the threshold, at least 0.
        delta: Probability that noise passes the threshold, for a constant of 1.
        rule: Treatment of the details above the threshold: ``"soft"`` shrinks them, ``"hard"``
            leaves them unchanged, ``"tree"`` leaves them and all coarser ones, which is the mean
            of one window.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> y = torch.tensor([0.0, 0.1, -0.1, 0.0, 1.0, 1.1, 0.9, 1.0])
        >>> estimate = HaarEstimator(sigma=0.1, rule="hard").latest(y)
        >>> round(float(estimate.value), 2), round(float(estimate.effective_window), 1)
        (1.0, 4.0)
    """

    @override
    def estimate_at(
        self,
        y: Float[Tensor, "*batch n"],
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        n = (times + 1).to(y.dtype)
        quantile = noise_quantile(n, self.delta)
        threshold = self.constant * quantile * sigma
        total = mean = shrunk = count = torch.zeros_like(sigma)
        window, variance = torch.zeros_like(n), (1 / n).expand_as(sigma)
        drifted = torch.zeros_like(sigma, dtype=torch.bool)
        for block, size, active in newest_blocks(y, times):
            wider = torch.where(active, window + size, window)
            total = torch.where(active, total + block, total)
            inner = active & (window > 0)
            excess = torch.where(inner, 1 / window - 1 / wider, 0.0)
            detail = torch.where(inner, mean - total / wider, 0.0)
            bound = torch.where(inner, threshold * excess.sqrt(), 0.0)
            drifted = drifted | (detail.abs() > bound)
            if self.rule == "tree":
                detail = torch.where(drifted, detail, 0.0)
            else:
                detail = threshold_details(detail, bound, self.rule)
            shrunk, count = shrunk + detail, count + (detail != 0)
            variance = variance + torch.where(detail != 0, excess, 0.0)
            window, mean = wider, torch.where(active, total / wider, mean)
        radius = quantile * sigma * variance.sqrt()
        return Estimate(mean + shrunk, radius, sigma, 1 / variance, count)


def newest_blocks(
    y: Float[Tensor, "*batch n"], times: Int[Tensor, " times"]
) -> Iterator[tuple[Float[Tensor, "*batch times"], int, Bool[Tensor, " times"]]]:
    """Yield dyadic blocks from the newest to the oldest, each ending where the last begins.

    Args:
        y: Series, shape ``(*batch, n)``.
        times: Indices into the series, shape ``(times,)``.

    Yields:
        Sums of the blocks, shape ``(*batch, times)``, their size, and the times at which the series
        has this block, shape ``(times,)``.
    """
    sums, size = y, 1
    left = ends = times + 1
    while bool((left > 0).any()):
        count = torch.where(left > 0, 2 - left % 2, 0)
        for number in (1, 2):
            active = count >= number
            yield sums[..., (ends // size - 1).clamp(0, sums.shape[-1] - 1)], size, active
            ends = torch.where(active, ends - size, ends)
        left = (left - count) // 2
        if sums.shape[-1] > 1:
            pairs = sums[..., : sums.shape[-1] // 2 * 2].unflatten(-1, (-1, 2))
            # Older plus newer, in this order, as a stream adds them.
            sums = pairs[..., 0] + pairs[..., 1]
        size *= 2


def haar_latest(y: Series, **settings: Unpack[ThresholdSettings]) -> Estimate:
    """Estimate the newest value from the means of nested windows.

    Args:
        y: Series, shape ``(*batch, n)``, the newest value last.
        **settings: Settings of :class:`HaarEstimator`.

    Raises:
        ValueError: If the series is empty, or a setting is out of range.

    Example:
        >>> haar_latest(torch.full((3, 100), 2.5)).value
        tensor([2.5000, 2.5000, 2.5000])
    """
    return HaarEstimator(**settings).latest(y)


def wavelet_estimator(
    wavelet: str = "db8",
    *,
    boundary: Boundary = "symmetric",
    **settings: Unpack[ThresholdSettings],
) -> LatestEstimator:
    """Build the estimator of a wavelet from its name.

    Args:
        wavelet: Name, ``"haar"`` or a discrete wavelet of PyWavelets.
        boundary: Treatment of the newest end, except for Haar, which has none: ``"symmetric"``
            extension, or ``"interval"`` for the boundary-corrected wavelets ``"db2"`` to ``"db8"``.
        **settings: Settings of :class:`~lightning_nna.drift.estimators.ThresholdEstimator`: sigma,
            constant, delta and rule; the rule ``"tree"`` is not one of symmetric extension.

    Raises:
        ValueError: If PyWavelets does not have the wavelet, there are no interval wavelets of it,
            or a setting is out of range.

    Example:
        >>> wavelet_estimator("db3", boundary="interval").order
        3
    """
    if boundary not in ("symmetric", "interval"):
        raise ValueError(f"boundary must be 'symmetric' or 'interval', got {boundary!r}")
    if wavelet in ("haar", "db1"):
        return HaarEstimator(**settings)
    if boundary == "symmetric":
        return SymmetricWaveletEstimator(wavelet=wavelet, **settings)
    order = wavelet.removeprefix("db")
    if not order.isdecimal() or wavelet == order:
        raise ValueError(
            f"interval wavelets are 'db2' to 'db8', got {wavelet!r}; take one of these, or "
            "boundary='symmetric'"
        )
    return IntervalWaveletEstimator(order=int(order), **settings)


def wavelet_latest(
    y: Series,
    *,
    wavelet: str = "db8",
    boundary: Boundary = "symmetric",
    **settings: Unpack[ThresholdSettings],
) -> Estimate:
    """Estimate the newest value with any wavelet.

    Args:
        y: Series, shape ``(*batch, n)``, the newest value last.
        wavelet: Name of the wavelet, see :func:`wavelet_estimator`.
        boundary: Treatment of the newest end, see :func:`wavelet_estimator`.
        **settings: Settings of the estimator, see :func:`wavelet_estimator`.

    Raises:
        ValueError: If the series is empty, or as :func:`wavelet_estimator` does.

    Example:
        >>> y = torch.arange(64.0)
        >>> estimate = wavelet_latest(y, wavelet="db2", boundary="interval", sigma=0.0)
        >>> round(float(estimate.value), 3)
        63.0
    """
    return wavelet_estimator(wavelet, boundary=boundary, **settings).latest(y)
