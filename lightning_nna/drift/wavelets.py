r"""The newest value by thresholding wavelet coefficients: ``haar_latest`` and ``wavelet_latest``.

Details of an orthonormal wavelet transform are noise of deviation :math:`\sigma` where nothing
drifts. They are shrunk by

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
blocks are all that ``StreamingHaar`` keeps.

Reference:
    Baby et al., "Adaptive estimation and learning under temporal distribution shift", ICML 2025,
    arXiv 2505.15803.

Differs from the paper: the windows for an :math:`n` that is not a power of two, the logarithm to
base 2 (at least 1), the constant :math:`c` (2 in theory, near 1 in practice) and the other rules
are ours: ``"hard"`` keeps a detail above :math:`\lambda` as it is, and ``"tree"`` all coarser ones
with it. For Haar that is the window of Mazzetto and Upfal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from lightning_nna.drift.estimate import Estimate, LatestEstimator, Series, require_settings
from lightning_nna.drift.interval_latest import IntervalWaveletEstimator
from lightning_nna.drift.symmetric_wavelets import SymmetricWaveletEstimator
from lightning_nna.drift.thresholds import Rule, noise_quantile, threshold_details

Boundary: TypeAlias = Literal["symmetric", "interval"]


@dataclass(frozen=True, kw_only=True)
class HaarEstimator(LatestEstimator):
    """The closed form over nested windows; see the module.

    Args:
        sigma: Standard deviation of the noise; None to measure it.
        constant: Of the threshold.
        delta: Probability that noise passes the threshold, for a constant of 1.
        rule: Whether details above the threshold are shrunk (``"soft"``) or kept (``"hard"``), or
            kept with all that are coarser (``"tree"``), which is the mean of one window.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> y = torch.tensor([0.0, 0.1, -0.1, 0.0, 1.0, 1.1, 0.9, 1.0])
        >>> found = HaarEstimator(sigma=0.1, rule="hard").latest(y)
        >>> round(float(found.value), 2), round(float(found.effective_window), 1)
        (1.0, 4.0)
    """

    sigma: float | None = None
    constant: float = 1.0
    delta: float = 0.1
    rule: Rule = "soft"

    def __post_init__(self) -> None:
        require_settings(sigma=self.sigma, delta=self.delta, constant=self.constant, rule=self.rule)

    @override
    def at(
        self,
        y: Float[Tensor, "*batch n"],
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        n = (times + 1).to(y.dtype)
        quantile = noise_quantile(n, self.delta)
        threshold = self.constant * quantile * sigma
        total = mean = passed = kept = torch.zeros_like(sigma)
        window, variance = torch.zeros_like(n), (1 / n).expand_as(sigma)
        drifted = torch.zeros_like(sigma, dtype=torch.bool)
        for block, size, active in newest_blocks(y, times):
            wider = torch.where(active, window + size, window)
            total = torch.where(active, total + block, total)
            inner = active & (window > 0)
            share = torch.where(inner, 1 / window - 1 / wider, 0.0)
            detail = torch.where(inner, mean - total / wider, 0.0)
            bound = torch.where(inner, threshold * share.sqrt(), 0.0)
            drifted = drifted | (detail.abs() > bound)
            if self.rule == "tree":
                detail = torch.where(drifted, detail, 0.0)
            else:
                detail = threshold_details(detail, bound, self.rule)
            passed, kept = passed + detail, kept + (detail != 0)
            variance = variance + torch.where(detail != 0, share, 0.0)
            window, mean = wider, torch.where(active, total / wider, mean)
        radius = quantile * sigma * variance.sqrt()
        return Estimate(mean + passed, radius, sigma, 1 / variance, kept)


def newest_blocks(
    y: Float[Tensor, "*batch n"], times: Int[Tensor, " times"]
) -> Iterator[tuple[Float[Tensor, "*batch times"], int, Bool[Tensor, " times"]]]:
    """Dyadic blocks that end where the one before begins, from the newest to the oldest.

    Yields:
        Sums of the blocks, their size, and at which times the series has this block.
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


def haar_latest(
    y: Series,
    *,
    sigma: float | None = None,
    constant: float = 1.0,
    delta: float = 0.1,
    rule: Rule = "soft",
) -> Estimate:
    """Estimate the newest value from the means of nested windows.

    Arguments and errors are those of :class:`HaarEstimator`.

    Example:
        >>> haar_latest(torch.full((3, 100), 2.5)).value
        tensor([2.5000, 2.5000, 2.5000])
    """
    return HaarEstimator(sigma=sigma, constant=constant, delta=delta, rule=rule).latest(y)


def wavelet_estimator(
    wavelet: str = "db8",
    *,
    boundary: Boundary = "symmetric",
    sigma: float | None = None,
    constant: float = 1.0,
    delta: float = 0.1,
    rule: Rule = "soft",
) -> LatestEstimator:
    """The estimator of a wavelet by its name.

    Args:
        wavelet: ``"haar"``, or a discrete wavelet of PyWavelets.
        boundary: How the newest end is treated, but for Haar, which has none: ``"symmetric"``
            extension, or ``"interval"`` for the boundary-corrected wavelets ``"db2"`` to ``"db8"``.
        sigma: Standard deviation of the noise; None to measure it.
        constant: Of the threshold.
        delta: Probability that noise passes the threshold, for a constant of 1.
        rule: ``"soft"``, ``"hard"`` or, but with symmetric extension, ``"tree"``.

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
        return HaarEstimator(sigma=sigma, constant=constant, delta=delta, rule=rule)
    if boundary == "symmetric":
        return SymmetricWaveletEstimator(
            wavelet=wavelet, sigma=sigma, constant=constant, delta=delta, rule=rule
        )
    order = wavelet.removeprefix("db")
    if not order.isdecimal() or wavelet == order:
        raise ValueError(
            f"interval wavelets are 'db2' to 'db8', got {wavelet!r}; take one of these, or "
            "boundary='symmetric'"
        )
    return IntervalWaveletEstimator(
        order=int(order), sigma=sigma, constant=constant, delta=delta, rule=rule
    )


def wavelet_latest(
    y: Series,
    *,
    wavelet: str = "db8",
    boundary: Boundary = "symmetric",
    sigma: float | None = None,
    constant: float = 1.0,
    delta: float = 0.1,
    rule: Rule = "soft",
) -> Estimate:
    """Estimate the newest value with any wavelet.

    Arguments and errors are those of :func:`wavelet_estimator`.

    Example:
        >>> y = torch.arange(64.0)
        >>> found = wavelet_latest(y, wavelet="db2", boundary="interval", sigma=0.0)
        >>> round(float(found.value), 3)
        63.0
    """
    estimator = wavelet_estimator(
        wavelet, boundary=boundary, sigma=sigma, constant=constant, delta=delta, rule=rule
    )
    return estimator.latest(y)
