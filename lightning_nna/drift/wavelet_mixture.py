r"""A mixture of wavelet estimators: ``WaveletMixture``.

No order and no constant is best for every series: Haar with the rule ``"tree"`` fits jumps, higher
orders fit slopes and curves. Each estimator :math:`e` forecasts every value by its estimate of the
value before; the mixture weights them by their errors,

.. math:: \hat\theta_t = \sum_e w_e \hat\theta_{t, e}, \qquad
    w_e \propto \exp\Big(-\eta \sum_{i \le t} \gamma^{t - i}
    (\hat\theta_{i - 1, e} - y_i)^2 / \hat\sigma_t^2\Big).

Differs from the paper: all of it is ours, except the estimators that it mixes.

Reference:
    Cesa-Bianchi and Lugosi, "Prediction, learning, and games", 2006, chapter 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from lightning_nna.drift.estimators import Estimate, LatestEstimator, Rule, noise_quantile
from lightning_nna.drift.interval_estimator import IntervalWaveletEstimator


@dataclass(frozen=True, kw_only=True)
class WaveletMixture(LatestEstimator):
    r"""Interval wavelets of several orders, soft ones and trees; see the module.

    The estimate of one time needs those of all times before it: :math:`O(n \log n)`.

    Args:
        orders: Numbers of vanishing moments, 1 to 8.
        soft: Constants of the estimators with the rule ``"soft"``.
        tree: Constants of the estimators with the rule ``"tree"``.
        rate: Learning rate :math:`\eta` of the weights; 0 is the plain mean of all.
        memory: Fraction :math:`\gamma` of an old error that is left after one value, 0 to 1.
        sigma: Standard deviation of the noise, in the unit of the series; None to measure it.
        delta: Probability that noise passes a threshold, for a constant of 1.

    Raises:
        ValueError: If a setting is out of range, or there is no estimator.

    Example:
        >>> y = torch.tensor([0.0, 0.1, 0.0, -0.1, 2.0, 2.1, 1.9, 2.0])
        >>> round(float(WaveletMixture(sigma=0.1).latest(y).value), 1)
        2.0
    """

    orders: tuple[int, ...] = (1, 2, 3, 4)
    soft: tuple[float, ...] = (0.4, 0.8)
    tree: tuple[float, ...] = (0.9, 1.2)
    rate: float = 0.1
    memory: float = 0.97

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rate >= 0 or not 0 <= self.memory <= 1:
            raise ValueError(
                "rate must not be negative and memory must lie between 0 and 1, got "
                f"{self.rate} and {self.memory}"
            )
        if not self.experts:
            raise ValueError("a mixture needs an order and a constant, got none")

    @property
    def experts(self) -> list[IntervalWaveletEstimator]:
        """Return the estimators that are mixed."""
        rules: tuple[tuple[Rule, tuple[float, ...]], ...]
        rules = (("soft", self.soft), ("tree", self.tree))
        return [
            IntervalWaveletEstimator(order=order, constant=constant, delta=self.delta, rule=rule)
            for order in self.orders
            for rule, constants in rules
            for constant in constants
        ]

    @override
    def estimate_at(
        self,
        y: Float[Tensor, "*batch n"],
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        every = torch.arange(y.shape[-1], device=y.device)
        noise = self.noise_at_every_time(y)
        estimates = [expert.estimate_at(y, every, noise) for expert in self.experts]
        values = _stacked(estimates, "value")
        errors = (values.detach()[..., :-1, :] - y.detach()[..., 1:, None]).square()
        past = torch.cat([torch.zeros_like(values[..., :1, :]), errors], -2)
        past = _discounted(past.transpose(-1, -2), self.memory).transpose(-1, -2)
        # Without noise the best takes all; before a difference was seen the noise is infinite.
        scaled = past / noise.square().clamp_min(torch.finfo(y.dtype).tiny)[..., None]
        weights = torch.softmax(-self.rate * (scaled - scaled.amin(-1, keepdim=True)), -1)
        deviation = _stacked(estimates, "effective_window").rsqrt()
        variance = (weights * deviation).sum(-1).square()[..., times]
        details = (weights * _stacked(estimates, "details")).sum(-1)
        quantile = noise_quantile((times + 1).to(y.dtype), self.delta)
        return Estimate(
            (weights * values).sum(-1)[..., times],
            quantile * noise[..., times] * variance.sqrt(),
            noise[..., times],
            1 / variance,
            details[..., times],
        )


def _stacked(estimates: Sequence[Estimate], name: str) -> Tensor:
    return torch.stack([getattr(each, name) for each in estimates], -1)


def _discounted(x: Float[Tensor, "*batch n"], memory: float) -> Float[Tensor, "*batch n"]:
    """Sum all entries so far, with less weight for an older one; in log n passes."""
    shift = 1
    while shift < x.shape[-1]:
        older = torch.nn.functional.pad(x[..., :-shift], (shift, 0))
        x, shift = x + memory**shift * older, 2 * shift
    return x
