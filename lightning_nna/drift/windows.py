r"""Estimate the newest value by the mean of a window; wavelets are compared with these.

:math:`m_r` is the mean of the newest :math:`r` values, or of all if there are fewer.

Reference:
    Han, Huang and Wang, "Model assessment and selection under temporal distribution shift", ICML
    2024, arXiv 2402.08672; Mazzetto and Upfal, "An adaptive algorithm for learning with unknown
    distribution drift", NeurIPS 2023, arXiv 2305.02252.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from lightning_nna.drift.estimators import (
    Estimate,
    LatestEstimator,
    noise_quantile,
    validate_settings,
)


@dataclass(frozen=True, kw_only=True)
class WindowEstimator(LatestEstimator):
    """An estimator by the mean of a window.

    Args:
        sigma: Standard deviation of the noise, in the unit of the series; None to measure it.
        delta: Probability of error of the radius, between 0 and 1.
    """

    def estimate_of_window(
        self,
        value: Float[Tensor, "*batch times"],
        window: Tensor,
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        """Return the mean of a window as an estimate, with the radius of its noise.

        Args:
            value: Means, shape ``(*batch, times)``.
            window: Number of values of each mean, a shape that broadcasts to that of ``value``.
            times: Indices into the series, shape ``(times,)``.
            sigma: Noise at each time, shape ``(*batch, times)``, in the unit of the series.
        """
        window = window.to(value.dtype)
        quantile = noise_quantile((times + 1).to(value.dtype), self.delta)
        radius = quantile * sigma / window.sqrt()
        return Estimate(value, radius, sigma, window, torch.zeros_like(value))


@dataclass(frozen=True, kw_only=True)
class WholeAverage(WindowEstimator):
    """The mean of all values.

    Args:
        sigma: Standard deviation of the noise, for the radius; None to measure it.
        delta: Probability of error of the radius, between 0 and 1.

    Example:
        >>> float(WholeAverage().latest(torch.tensor([1.0, 2.0, 6.0])).value)
        3.0
    """

    @override
    def estimate_at(
        self,
        y: Float[Tensor, "*batch n"],
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        window = (times + 1).expand(sigma.shape)
        return self.estimate_of_window(window_means(y, times, times + 1), window, times, sigma)


@dataclass(frozen=True, kw_only=True)
class FixedWindow(WindowEstimator):
    """The mean of a fixed number of the newest values.

    Args:
        window: Number of values, at least 1.
        sigma: Standard deviation of the noise, for the radius; None to measure it.
        delta: Probability of error of the radius, between 0 and 1.

    Example:
        >>> float(FixedWindow(window=2).latest(torch.tensor([1.0, 2.0, 6.0])).value)
        4.0
    """

    window: int

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")

    @override
    def estimate_at(
        self,
        y: Float[Tensor, "*batch n"],
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        window = (times + 1).clamp_max(self.window)
        means = window_means(y, times, window)
        return self.estimate_of_window(means, window.expand(sigma.shape), times, sigma)


@dataclass(frozen=True, kw_only=True)
class ExponentialAverage(WindowEstimator):
    """The mean of all values, an older one with less weight; weights sum to one from the start.

    Args:
        decay: Weight of a value divided by that of the next, at least 0 and below 1.
        sigma: Standard deviation of the noise, for the radius; None to measure it.
        delta: Probability of error of the radius, between 0 and 1.

    Example:
        >>> round(float(ExponentialAverage(decay=0.5).latest(torch.tensor([0.0, 3.0])).value), 4)
        2.0
    """

    decay: float

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {self.decay}")

    @override
    def estimate_at(
        self,
        y: Float[Tensor, "*batch n"],
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        sums, running = [], torch.zeros_like(y[..., 0])
        for value in y.unbind(-1):
            running = self.decay * running + value
            sums.append(running)
        n = (times + 1).to(y.dtype)
        mass = (1 - self.decay**n) / (1 - self.decay)
        squares = (1 - self.decay ** (2 * n)) / (1 - self.decay**2)
        window = (mass.square() / squares).expand(sigma.shape)
        return self.estimate_of_window(
            torch.stack(sums, -1)[..., times] / mass, window, times, sigma
        )


@dataclass(frozen=True, kw_only=True)
class AdaptiveRollingWindow(WindowEstimator):
    r"""Han, Huang and Wang's window, which trades its noise against its distance to smaller ones.

    .. math:: \hat r = \operatorname{arg\,min}_r \psi_r + \max_{i \le r}
        (|m_r - m_i| - \psi_r - \psi_i)_+, \qquad
        \psi_r = c\,\sigma \sqrt{\frac{2 \log(2 / \delta)}{r}}
        + M \frac{8 \log(2 / \delta)}{3 (r - 1)}

    over all windows, in :math:`O(n)` for each time.

    Args:
        bound: Greatest difference :math:`M` of two values, in the unit of the series; a window of 1
            has :math:`\psi_1 = M` on top of its noise.
        constant: Factor :math:`c` of the noise; 1 in the paper.
        delta: Probability of error of each window's interval, between 0 and 1.
        sigma: Standard deviation of the noise, in the unit of the series; None to measure it.

    Differs from the paper: the noise is one number for all windows, not each window's own
    deviation, so that a window of one value has a width.

    Example:
        >>> y = torch.tensor([0.0, 0.0, 0.0, 5.0, 5.0])
        >>> float(AdaptiveRollingWindow(sigma=0.1).latest(y).effective_window)
        2.0
    """

    bound: float = 0.0
    constant: float = 1.0

    @override
    def __post_init__(self) -> None:
        validate_settings(sigma=self.sigma, delta=self.delta, constant=self.constant)
        if not self.bound >= 0:
            raise ValueError(f"bound must not be negative, got {self.bound}")

    @override
    def estimate_at(
        self,
        y: Float[Tensor, "*batch n"],
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        log = math.log(2 / self.delta)
        r = torch.arange(1, y.shape[-1] + 1, device=y.device).to(y.dtype)
        width = self.constant * (2 * log / r).sqrt()
        range_term = self.bound * 8 * log / (3 * (r - 1).clamp_min(1))
        range_term[:1] = self.bound
        means, windows = [], []
        for number, time in enumerate(times.tolist()):
            mean = y[..., : time + 1].flip(-1).cumsum(-1) / r[: time + 1]
            noise = sigma[..., number, None].nan_to_num(posinf=0.0)
            psi = noise * width[: time + 1] + range_term[: time + 1]
            # The greatest of |m_r - m_i| - psi_i over i <= r, from running extremes.
            above = mean - (mean + psi).cummin(-1).values
            below = (mean - psi).cummax(-1).values - mean
            cost = psi + (torch.maximum(above, below) - psi).clamp_min(0)
            best = cost.detach().argmin(-1, keepdim=True)
            means.append(mean.gather(-1, best)[..., 0])
            windows.append(best[..., 0] + 1)
        return self.estimate_of_window(
            torch.stack(means, -1), torch.stack(windows, -1), times, sigma
        )


@dataclass(frozen=True, kw_only=True)
class DoublingWindow(WindowEstimator):
    r"""Mazzetto and Upfal's window, which doubles while the mean stays.

    From :math:`r = 1` on the window doubles while
    :math:`|m_r - m_{2r}| \le c\,\sigma \sqrt{2 \log(\log_2 n / \delta) / r}`.

    Args:
        constant: Factor :math:`c` of the threshold, at least 0.
        delta: Probability of error of the comparisons, between 0 and 1.
        sigma: Standard deviation of the noise, in the unit of the series; None to measure it.

    Differs from the paper: :math:`\sigma` and :math:`c` take the place of the bounds of its
    theorem.

    Example:
        >>> y = torch.tensor([0.0, 0.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0])
        >>> float(DoublingWindow(sigma=0.1).latest(y).effective_window)
        4.0
    """

    constant: float = 1.0

    @override
    def __post_init__(self) -> None:
        validate_settings(sigma=self.sigma, delta=self.delta, constant=self.constant)

    @override
    def estimate_at(
        self,
        y: Float[Tensor, "*batch n"],
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        threshold = self.constant * sigma * noise_quantile((times + 1).to(y.dtype), self.delta)
        window = torch.ones_like(times).expand(sigma.shape)
        value = mean = y[..., times]
        grows, r = torch.ones_like(sigma, dtype=torch.bool), 1
        while 2 * r <= y.shape[-1]:
            doubled = window_means(y, times, (times + 1).clamp_max(2 * r))
            stays = (doubled - mean).abs() <= threshold / math.sqrt(r)
            grows = grows & stays & (times + 1 >= 2 * r)
            window = torch.where(grows, 2 * r, window)
            value = torch.where(grows, doubled, value)
            mean, r = doubled, 2 * r
        return self.estimate_of_window(value, window, times, sigma)


def window_means(
    y: Float[Tensor, "*batch n"], times: Int[Tensor, " times"], window: Int[Tensor, " times"]
) -> Float[Tensor, "*batch times"]:
    """Compute the means of the newest values at each time.

    Args:
        y: Series, shape ``(*batch, n)``.
        times: Indices into the series, shape ``(times,)``.
        window: Number of values of each mean, shape ``(times,)``.
    """
    # Around the mean of all, so that sums stay small.
    center = y.mean(-1, keepdim=True).detach()
    sums = torch.nn.functional.pad((y - center).cumsum(-1), (1, 0))
    return (sums[..., times + 1] - sums[..., times + 1 - window]) / window + center
