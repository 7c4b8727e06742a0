r"""Learn under drift: the estimate of the newest risk as a loss, ``WaveletRisk``.

Losses :math:`\ell_1 \dots \ell_n` of one model, in the order of time, are a noisy series whose
newest value is the risk that the model has now. One training minimizes the Haar estimate of it;
to select a window takes a training for each.

The value is the estimate. Its own derivative has two flaws. If a fine detail is above its threshold
and a coarser one is not, an old loss has a negative weight, and the model can lower the estimate
without end by raising it. And the losses that a model was fitted to are lower than the rest, which
looks like a drift and confirms itself. So by default the gradient is that of the mean over a
window, :math:`\nabla \hat L = \nabla m_w`, which begins with all losses and narrows while the model
is trained: whenever the newest part of the window does worse than all of it,

.. math:: m_{r_{k-1}} - m_{r_k} > \lambda s_k, \quad r_k \le w \quad \Rightarrow \quad w = r_{k-1}

for the largest such :math:`r_k`. Losses within the window were fitted alike: without a drift they
differ by noise alone.

Reference:
    Baby et al., "Adaptive estimation and learning under temporal distribution shift", ICML 2025,
    arXiv 2505.15803.

Differs from the paper: the narrowing window; and the noise, which is the root mean square of the
differences of neighbors, because losses are skewed and their median difference says little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Sampler

from lightning_nna.drift.estimators import noise_quantile, threshold_details, validate_settings


class WaveletRisk:
    """A reduction of losses to one, in place of their mean.

    Args:
        period: Number of losses in a row that count as one, by their mean; the oldest losses that
            fill no period are dropped. It should be long enough to average over correlated
            examples, such as a day's.
        constant: Factor of the threshold, at least 0.
        delta: Probability that noise passes the threshold, for a constant of 1.
        sigma: Standard deviation of a period's loss around its risk; None to measure it.
        gradient: Kind of gradient: ``"narrowing"``, see the module; ``"window"`` for that of the
            mean over the smallest window whose detail is above the threshold in this very call, be
            the newer part better or worse; ``"exact"`` for the estimate's own derivative.
        every: Number of calls from one test of the window to the next, with ``"narrowing"``.

    With ``"narrowing"`` it has a state, :attr:`window`, as a fraction of the losses: build a new
    one, or :meth:`reset` it, for every training. Small batches are noisy, and each test may narrow:
    take large ones, or ``"window"``.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> risk = WaveletRisk(sigma=0.1)
        >>> losses = torch.tensor([0.1, 0.0, 0.1, 0.0, 1.1, 1.0, 1.1, 1.0], requires_grad=True)
        >>> risk(losses).backward()
        >>> losses.grad, risk.window
        (tensor([0.00, 0.00, 0.00, 0.00, 0.25, 0.25, 0.25, 0.25]), 0.5)
    """

    def __init__(
        self,
        *,
        period: int = 1,
        constant: float = 0.6,
        delta: float = 0.1,
        sigma: float | None = None,
        gradient: Literal["narrowing", "window", "exact"] = "narrowing",
        every: int = 5,
    ) -> None:
        validate_settings(sigma=sigma, delta=delta, constant=constant)
        if gradient not in ("narrowing", "window", "exact"):
            raise ValueError(f"gradient must be 'narrowing', 'window' or 'exact', got {gradient!r}")
        if period < 1 or every < 1:
            raise ValueError(f"period and every must be at least 1, got {period} and {every}")
        self.period, self.constant, self.delta, self.sigma = period, constant, delta, sigma
        self.gradient, self.every = gradient, every
        self.reset()

    def reset(self) -> None:
        """Begin another training, in which every loss counts."""
        self.window = 1.0
        self._calls = 0

    def __call__(self, losses: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """Estimate the risk of the newest loss.

        Args:
            losses: Losses in the order of time, shape ``(n,)``, the newest last.

        Raises:
            ValueError: If there are not enough losses for a period.
        """
        if len(losses) < self.period:
            raise ValueError(
                f"a risk needs {self.period} losses for a period, got {len(losses)}: take a larger "
                "batch or a shorter period"
            )
        losses = losses[len(losses) % self.period :].unflatten(0, (-1, self.period)).mean(1)
        _, means, details = self._details(losses)
        value = means[-1] + details.sum()
        if self.gradient == "exact":
            return value
        if self.gradient == "window":
            active = details.detach().nonzero()
            mean = means[int(active[0])] if len(active) else means[-1]
        else:
            if self._calls % self.every == 0:
                self._narrow(losses.detach())
            self._calls += 1
            mean = losses[-self._length(losses) :].mean()
        return value.detach() + mean - mean.detach()

    def _length(self, losses: Tensor) -> int:
        return max(round(self.window * len(losses)), 1)

    def _narrow(self, losses: Tensor) -> None:
        """Leave out losses older than the newest part that does worse, if there is one."""
        length = self._length(losses)
        windows, _, details = self._details(losses[-length:])
        worse = (details > 0).nonzero()
        if len(worse):
            self.window = windows[int(worse[-1])] / len(losses)

    def _details(self, losses: Tensor) -> tuple[list[int], Tensor, Tensor]:
        """Return windows, their means, and the soft-thresholded differences of these."""
        windows = nested_windows(len(losses))
        r = torch.tensor(windows, device=losses.device).to(losses.dtype)
        means = losses.flip(0).cumsum(0)[torch.tensor(windows, device=losses.device) - 1] / r
        excess = 1 / r[:-1] - 1 / r[1:]
        threshold = self.constant * noise_quantile(r[-1:], self.delta) * self._noise(losses)
        return (
            windows,
            means,
            threshold_details(means[:-1] - means[1:], threshold * excess.sqrt(), "soft"),
        )

    def _noise(self, losses: Tensor) -> Tensor | float:
        if self.sigma is not None:
            return self.sigma
        if len(losses) < 2:
            return 0.0  # There is no detail to compare with it.
        return (losses.detach().diff().square().mean() / 2).sqrt()


def nested_windows(n: int) -> list[int]:
    """List the windows of the Haar estimate, the smallest first.

    Args:
        n: Number of values of the series.

    Example:
        >>> nested_windows(8), nested_windows(11)
        ([1, 2, 4, 8], [1, 3, 7, 11])
    """
    windows, size, left = [0], 1, n
    while left:
        count = 2 - left % 2
        windows += [windows[-1] + size * number for number in range(1, count + 1)]
        left, size = (left - count) // 2, 2 * size
    return windows[1:]


class TimeOrderedBatches(Sampler[list[int]]):
    """Batches that are random samples of all of time, each in the order of time.

    Args:
        size: Number of examples, which are in the order of time.
        batch_size: Number of examples in a batch; the last ones of an epoch that do not fill one
            are left out.
        seed: Seed of the order; each epoch has an order of its own.

    Raises:
        ValueError: If a batch does not fit into the examples.

    Example:
        >>> batches = TimeOrderedBatches(10, batch_size=5, seed=0)
        >>> [sorted(batch) == batch for batch in batches], len(batches)
        ([True, True], 2)
    """

    def __init__(self, size: int, *, batch_size: int, seed: int = 0) -> None:
        if not 1 <= batch_size <= size:
            raise ValueError(f"batch_size must lie between 1 and {size}, got {batch_size}")
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, 0

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.size, generator=generator)
        self.epoch += 1
        for number in range(len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield batch.sort().values.tolist()

    def set_epoch(self, epoch: int) -> None:
        """Continue with the order of an epoch."""
        self.epoch = epoch


@dataclass(frozen=True)
class RiskBound:
    r"""The bound of the error of an estimated risk, with probability :math:`1 - \delta`.

    Args:
        estimation: Bound for one model, in the unit of the risk.
        excess: Bound of the model with the least estimate over the best model: twice
            ``estimation``, if that holds for every model.
        oracle: Error :math:`\min_r \max(\text{bias within } r, \sigma / \sqrt r)` of the best
            window.
        window: Best window, in values.
    """

    estimation: float
    excess: float
    oracle: float
    window: int


def excess_risk_bound(
    risks: Float[Tensor, " n"], *, sigma: float, constant: float = 2.0, delta: float = 0.1
) -> RiskBound:
    r"""Bound the error of the Haar estimate for a known course of the true risk.

    On the event that no noise passes its threshold a soft-thresholded detail is off by at most
    twice the threshold and by at most itself, so that

    .. math:: |\hat\theta - \theta_n| \le \frac{\lambda}{c\sqrt n}
        + \sum_k \min(|\theta_k|, 2 \lambda s_k)

    with :math:`\theta_k` the true details. The event needs :math:`c \ge 1`.

    Args:
        risks: True risks in the order of time, shape ``(n,)``, the newest last.
        sigma: Standard deviation of an observed loss around its risk.
        constant: Factor :math:`c` of the threshold, at least 1.
        delta: Probability of failure, between 0 and 1.

    Raises:
        ValueError: If a setting is out of range.

    Differs from the paper: its constants are not known to us; these follow from the event above.

    Example:
        >>> bound = excess_risk_bound(torch.cat([torch.zeros(56), torch.ones(8)]), sigma=0.1)
        >>> bound.window, round(bound.oracle, 3)
        (8, 0.035)
    """
    validate_settings(sigma=sigma, delta=delta, constant=constant)
    if constant < 1 or not len(risks):
        raise ValueError(
            f"a bound needs a risk and a constant of at least 1, got {len(risks)} and {constant}"
        )
    risks = risks.double()
    windows = torch.tensor(nested_windows(len(risks)))
    every = torch.arange(1, len(risks) + 1)
    means = risks.flip(0).cumsum(0) / every
    bias = (means - risks[-1]).abs().cummax(0).values
    oracles = torch.maximum(bias, sigma / every.double().sqrt())
    r = windows.double()
    unit = float(noise_quantile(r[-1:], delta)) * sigma
    details = (means[windows[:-1] - 1] - means[windows[1:] - 1]).abs()
    excess = (1 / r[:-1] - 1 / r[1:]).sqrt()
    rest = torch.minimum(details, 2 * constant * unit * excess).sum()
    estimation = unit / math.sqrt(len(risks)) + float(rest)
    best = int(oracles.argmin())
    return RiskBound(estimation, 2 * estimation, float(oracles[best]), best + 1)
