r"""Estimates of the newest value by the mean of a window: what the wavelets are compared with.

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

from lightning_nna.drift.estimate import Estimate, LatestEstimator, require_settings
from lightning_nna.drift.thresholds import noise_quantile


@dataclass(frozen=True, kw_only=True)
class WholeAverage(LatestEstimator):
    """The mean of all values.

    Args:
        sigma: Standard deviation of the noise, for the radius; None to measure it.
        delta: Of the radius.

    Example:
        >>> float(WholeAverage().latest(torch.tensor([1.0, 2.0, 6.0])).value)
        3.0
    """

    sigma: float | None = None
    delta: float = 0.1

    def __post_init__(self) -> None:
        require_settings(sigma=self.sigma, delta=self.delta)

    @override
    def at(
        self,
        y: Float[Tensor, "*batch n"],
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        window = (times + 1).expand(sigma.shape)
        return estimate_of_window(window_means(y, times, times + 1), window, times, sigma, self)


@dataclass(frozen=True, kw_only=True)
class FixedWindow(LatestEstimator):
    """The mean of the newest values, always as many.

    Args:
        window: How many.
        sigma: Standard deviation of the noise, for the radius; None to measure it.
        delta: Of the radius.

    Example:
        >>> float(FixedWindow(window=2).latest(torch.tensor([1.0, 2.0, 6.0])).value)
        4.0
    """

    window: int
    sigma: float | None = None
    delta: float = 0.1

    def __post_init__(self) -> None:
        require_settings(sigma=self.sigma, delta=self.delta)
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")

    @override
    def at(
        self,
        y: Float[Tensor, "*batch n"],
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        window = (times + 1).clamp_max(self.window)
        means = window_means(y, times, window)
        return estimate_of_window(means, window.expand(sigma.shape), times, sigma, self)


@dataclass(frozen=True, kw_only=True)
class ExponentialAverage(LatestEstimator):
    """The mean of all values, an older one weighing less; weights sum to one from the start.

    Args:
        decay: Weight of a value over that of the next.
        sigma: Standard deviation of the noise, for the radius; None to measure it.
        delta: Of the radius.

    Example:
        >>> round(float(ExponentialAverage(decay=0.5).latest(torch.tensor([0.0, 3.0])).value), 4)
        2.0
    """

    decay: float
    sigma: float | None = None
    delta: float = 0.1

    def __post_init__(self) -> None:
        require_settings(sigma=self.sigma, delta=self.delta)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {self.decay}")

    @override
    def at(
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
        return estimate_of_window(
            torch.stack(sums, -1)[..., times] / mass, window, times, sigma, self
        )


@dataclass(frozen=True, kw_only=True)
class AdaptiveRollingWindow(LatestEstimator):
    r"""Han, Huang and Wang's window, which trades the noise against what smaller windows say.

    .. math:: \hat r = \operatorname{arg\,min}_r \psi_r + \max_{i \le r}
        (|m_r - m_i| - \psi_r - \psi_i)_+, \qquad
        \psi_r = c\,\sigma \sqrt{\frac{2 \log(2 / \delta)}{r}}
        + M \frac{8 \log(2 / \delta)}{3 (r - 1)}

    over all windows, in :math:`O(n)` for each time.

    Args:
        bound: :math:`M`, for values that differ by so much at most; a window of 1 has
            :math:`\psi_1 = M` on top of its noise.
        constant: :math:`c`; 1 in the paper.
        delta: Of each window's interval.
        sigma: Standard deviation of the noise; None to measure it.

    Differs from the paper: the noise is one number for all windows, not each window's own
    deviation, so that a window of one value has a width.

    Example:
        >>> y = torch.tensor([0.0, 0.0, 0.0, 5.0, 5.0])
        >>> float(AdaptiveRollingWindow(sigma=0.1).latest(y).effective_window)
        2.0
    """

    bound: float = 0.0
    constant: float = 1.0
    delta: float = 0.1
    sigma: float | None = None

    def __post_init__(self) -> None:
        require_settings(sigma=self.sigma, delta=self.delta, constant=self.constant)
        if not self.bound >= 0:
            raise ValueError(f"bound must not be negative, got {self.bound}")

    @override
    def at(
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
            chosen = cost.detach().argmin(-1, keepdim=True)
            means.append(mean.gather(-1, chosen)[..., 0])
            windows.append(chosen[..., 0] + 1)
        return estimate_of_window(
            torch.stack(means, -1), torch.stack(windows, -1), times, sigma, self
        )


@dataclass(frozen=True, kw_only=True)
class DoublingWindow(LatestEstimator):
    r"""Mazzetto and Upfal's window, which doubles while the mean stays.

    From :math:`r = 1` on the window doubles while
    :math:`|m_r - m_{2r}| \le c\,\sigma \sqrt{2 \log(\log_2 n / \delta) / r}`.

    Args:
        constant: :math:`c`.
        delta: Of the comparisons.
        sigma: Standard deviation of the noise; None to measure it.

    Differs from the paper: :math:`\sigma` and :math:`c` take the place of the bounds of its
    theorem.

    Example:
        >>> y = torch.tensor([0.0, 0.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0])
        >>> float(DoublingWindow(sigma=0.1).latest(y).effective_window)
        4.0
    """

    constant: float = 1.0
    delta: float = 0.1
    sigma: float | None = None

    def __post_init__(self) -> None:
        require_settings(sigma=self.sigma, delta=self.delta, constant=self.constant)

    @override
    def at(
        self,
        y: Float[Tensor, "*batch n"],
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        threshold = self.constant * sigma * noise_quantile((times + 1).to(y.dtype), self.delta)
        window = torch.ones_like(times).expand(sigma.shape)
        chosen = mean = y[..., times]
        grows, r = torch.ones_like(sigma, dtype=torch.bool), 1
        while 2 * r <= y.shape[-1]:
            doubled = window_means(y, times, (times + 1).clamp_max(2 * r))
            stays = (doubled - mean).abs() <= threshold / math.sqrt(r)
            grows = grows & stays & (times + 1 >= 2 * r)
            window = torch.where(grows, 2 * r, window)
            chosen = torch.where(grows, doubled, chosen)
            mean, r = doubled, 2 * r
        return estimate_of_window(chosen, window, times, sigma, self)


def window_means(
    y: Float[Tensor, "*batch n"], times: Int[Tensor, " times"], window: Int[Tensor, " times"]
) -> Float[Tensor, "*batch times"]:
    """Means of the newest ``window`` values at each time."""
    # Around the mean of all, so that sums stay small.
    center = y.mean(-1, keepdim=True).detach()
    sums = torch.nn.functional.pad((y - center).cumsum(-1), (1, 0))
    return (sums[..., times + 1] - sums[..., times + 1 - window]) / window + center


def estimate_of_window(
    value: Float[Tensor, "*batch times"],
    window: Tensor,
    times: Int[Tensor, " times"],
    sigma: Float[Tensor, "*batch times"],
    rule: WholeAverage | FixedWindow | ExponentialAverage | AdaptiveRollingWindow | DoublingWindow,
) -> Estimate:
    """A mean of so many values, with the radius of its noise."""
    window = window.to(value.dtype)
    quantile = noise_quantile((times + 1).to(value.dtype), rule.delta)
    return Estimate(value, quantile * sigma / window.sqrt(), sigma, window, torch.zeros_like(value))
