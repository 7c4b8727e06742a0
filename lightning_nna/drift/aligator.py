r"""Aligator: means over a geometric cover of time, weighted by the errors of their forecasts.

At each level :math:`k` time is cut at the multiples of :math:`2^k`; an expert lives from one cut to
the next and forecasts the mean of the values since its start. The living experts are weighted by
:math:`\exp(-\eta \sum (\text{mean before} - y)^2 / \sigma^2)`; a new one begins with the forecast
of the mixture, and with a weight of 1.

Reference:
    Baby, Zhao and Wang, "An optimal reduction of TV-denoising to adaptive online learning", AISTATS
    2021, arXiv 2101.09438; Hazan and Seshadhri, "Adaptive algorithms for online decision problems",
    ECCC TR07-088, 2007.

Differs from the paper: the estimate of a value is the mixture after it was seen, not the forecast
before; the rate is free and in units of the noise; an expert's first forecast is the mixture's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from lightning_nna.drift.estimators import Estimate, LatestEstimator, noise_quantile


@dataclass(frozen=True, kw_only=True)
class Aligator(LatestEstimator):
    r"""Aligator's mixture of experts; see the module.

    Args:
        rate: Learning rate :math:`\eta` of the weights, at least 0.
        sigma: Standard deviation of the noise, in the unit of the series; None to measure it.
        delta: Probability of error of the radius, between 0 and 1.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> y = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0, 5.0, 5.0, 5.0])
        >>> round(float(Aligator(sigma=0.5).latest(y).value), 2)
        5.0
    """

    rate: float = 0.2

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rate >= 0:
            raise ValueError(f"rate must not be negative, got {self.rate}")

    @override
    def estimate_at(
        self,
        y: Float[Tensor, "*batch n"],
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        noise = self.noise_at_every_time(y)
        levels = y.shape[-1].bit_length()
        sums = y.new_zeros((*y.shape[:-1], levels))
        counts = y.new_ones(levels)
        logs = torch.zeros_like(sums)
        mixture = torch.zeros_like(y[..., 0])
        values, windows = [], []
        for time in range(y.shape[-1]):
            number = time + 1
            alive = number.bit_length()
            # At a multiple of 2^k the experts of levels up to k are born.
            born = min((number & -number).bit_length(), alive)
            newest, level = y[..., time, None], noise[..., time, None].clamp_min(1e-12)
            means = torch.cat(
                [
                    mixture[..., None].expand(*mixture.shape, born),
                    _means(sums, counts, born, alive),
                ],
                -1,
            )
            weights = torch.cat([torch.zeros_like(logs[..., :born]), logs[..., born:alive]], -1)
            mass = weights.logsumexp(-1, keepdim=True)
            weights = weights - self.rate * (means - newest).square() / level.square()
            weights = (weights + mass - weights.logsumexp(-1, keepdim=True)).detach()
            fresh = torch.arange(levels, device=y.device) < born
            sums = torch.where(fresh, newest, sums + newest)
            counts = torch.where(fresh, 1.0, counts + 1)
            logs = torch.cat([weights, logs[..., alive:]], -1)
            fractions = weights.softmax(-1)
            mixture = (fractions * _means(sums, counts, 0, alive)).sum(-1)
            values.append(mixture)
            windows.append((fractions * counts[:alive].rsqrt()).sum(-1).pow(-2))
        quantile = noise_quantile((times + 1).to(y.dtype), self.delta)
        window = torch.stack(windows, -1)[..., times]
        return Estimate(
            torch.stack(values, -1)[..., times],
            quantile * noise[..., times] / window.sqrt(),
            noise[..., times],
            window,
            torch.zeros_like(window),
        )


def _means(sums: Tensor, counts: Tensor, first: int, last: int) -> Tensor:
    return sums[..., first:last] / counts[first:last]
