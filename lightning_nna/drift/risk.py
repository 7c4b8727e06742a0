r"""Learn under drift: the estimate of the newest risk as a loss, ``WaveletRisk``.

Losses :math:`\ell_1 \dots \ell_n` of one model, in the order of time, are a noisy series whose
newest value is the risk that the model has now. One training minimizes the wavelet estimate of it;
to select a window takes a training for each.

**The paper's objective**, ``objective="paper"``, is that estimate itself: details of the losses are
soft-thresholded at :math:`\lambda = c\,\sigma \sqrt{2 \log(\log n / \delta)}` with :math:`c = 2`
and natural logarithms, and the newest value of the inverse transform is minimized by its own
derivative, which soft thresholding has almost everywhere.

**Ours.** That derivative has two flaws. If a fine detail is above its threshold and a coarser one
is not, an old loss has a negative weight, and the model can lower the estimate without end by
raising it. And the losses that a model was fitted to are lower than the rest, which looks like a
drift and confirms itself. So by default, ``objective="narrowing"``, the value is the Haar estimate
and the gradient is that of the mean over a window, :math:`\nabla \hat L = \nabla m_w`, which begins
with all losses and narrows while the model is trained: whenever the newest part of the window does
worse than all of it,

.. math:: m_{r_{k-1}} - m_{r_k} > \lambda s_k, \quad r_k \le w \quad \Rightarrow \quad w = r_{k-1}

for the largest such :math:`r_k`. Losses within the window were fitted alike: without a drift they
differ by noise alone.

Reference:
    Baby et al., "Adaptive estimation and learning under temporal distribution shift", ICML 2025,
    arXiv 2505.15803; its threshold second hand, see :mod:`~lightning_nna.drift.bounds`.

Differs from the paper: the narrowing window; and the noise, where it is measured, which is the root
mean square of the differences of neighbors, because losses are skewed and their median difference
says little. Of ``objective="paper"``: averages of the coarsest level are not thresholded, which
would change the value of Haar by a constant and leave its derivative; Haar windows for an :math:`n`
that is not a power of two are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Sampler

from lightning_nna.drift.bounds import nested_windows, theory_threshold
from lightning_nna.drift.estimators import noise_quantile, threshold_details, validate_settings
from lightning_nna.drift.wavelets import Boundary, wavelet_estimator

#: What is minimized, see the module.
Objective: TypeAlias = Literal["narrowing", "window", "paper"]

#: Factor of the threshold where none is given: as published, and for the other objectives.
_PUBLISHED_CONSTANT, _CONSTANT = 2.0, 0.6


class WaveletRisk:
    """A reduction of losses to one, in place of their mean.

    Args:
        objective: What is minimized: ``"narrowing"``, see the module; ``"window"``, of which the
            gradient is that of the mean over the smallest window whose detail is above the
            threshold in this very call, be the newer part better or worse; ``"paper"`` for the
            estimate with its own derivative.
        period: Number of losses in a row that count as one, by their mean; the oldest losses that
            fill no period are dropped. It should be long enough to average over correlated
            examples, such as a day's.
        constant: Factor of the threshold, at least 0; None for 2 with ``"paper"``, else 0.6.
        delta: Probability that noise passes the threshold, for a constant of 1.
        sigma: Standard deviation of a period's loss around its risk; None to measure it. A loss
            between 0 and 1 has at most 0.5, and a mean of ``period`` independent ones at most
            ``0.5 / period ** 0.5``.
        every: Number of calls from one test of the window to the next, with ``"narrowing"``.
        wavelet: Wavelet of ``"paper"``, see
            :func:`~lightning_nna.drift.wavelets.wavelet_estimator`.
        boundary: Treatment of the newest end by ``wavelet``, ``"symmetric"`` or ``"interval"``.

    With ``"narrowing"`` it has a state, :attr:`window`, as a fraction of the losses: build a new
    one, or :meth:`reset` it, for every training. Small batches are noisy, and each test may narrow:
    take large ones, or ``"window"``.

    Raises:
        ValueError: If a setting is out of range, or a wavelet other than Haar is given to an
            objective that has none.

    Example:
        >>> risk = WaveletRisk(sigma=0.1)
        >>> losses = torch.tensor([0.1, 0.0, 0.1, 0.0, 1.1, 1.0, 1.1, 1.0], requires_grad=True)
        >>> risk(losses).backward()
        >>> losses.grad, risk.window
        (tensor([0.00, 0.00, 0.00, 0.00, 0.25, 0.25, 0.25, 0.25]), 0.5)
        >>> (gradient,) = torch.autograd.grad(
        ...     WaveletRisk(objective="paper", sigma=0.1)(losses), losses
        ... )
        >>> gradient
        tensor([0.00, 0.00, 0.00, 0.00, 0.25, 0.25, 0.25, 0.25])
    """

    def __init__(
        self,
        *,
        objective: Objective = "narrowing",
        period: int = 1,
        constant: float | None = None,
        delta: float = 0.1,
        sigma: float | None = None,
        every: int = 5,
        wavelet: str = "haar",
        boundary: Boundary = "symmetric",
    ) -> None:
        if objective not in ("narrowing", "window", "paper"):
            raise ValueError(
                f"objective must be 'narrowing', 'window' or 'paper', got {objective!r}"
            )
        if constant is None:
            constant = _PUBLISHED_CONSTANT if objective == "paper" else _CONSTANT
        validate_settings(sigma=sigma, delta=delta, constant=constant)
        if period < 1 or every < 1:
            raise ValueError(f"period and every must be at least 1, got {period} and {every}")
        if wavelet not in ("haar", "db1") and objective != "paper":
            raise ValueError(
                f"objective {objective!r} is of Haar windows and has no wavelet {wavelet!r}: take "
                "objective='paper'"
            )
        wavelet_estimator(wavelet, boundary=boundary)
        self.objective: Objective = objective
        self.period, self.constant, self.delta, self.sigma = period, constant, delta, sigma
        self.every, self.wavelet, self.boundary = every, wavelet, boundary
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
        if self.objective == "paper":
            return self._published(losses)
        _, means, details = self._details(losses)
        value = means[-1] + details.sum()
        if self.objective == "window":
            active = details.detach().nonzero()
            mean = means[int(active[0])] if len(active) else means[-1]
        else:
            if self._calls % self.every == 0:
                self._narrow(losses.detach())
            self._calls += 1
            mean = losses[-self._length(losses) :].mean()
        return value.detach() + mean - mean.detach()

    def _published(self, losses: Tensor) -> Tensor:
        """Return the wavelet estimate at the threshold of the theory, with its own derivative."""
        n = len(losses)
        published = theory_threshold(n, delta=self.delta) * self.constant / _PUBLISHED_CONSTANT
        # The estimator's threshold has a logarithm to base 2.
        ours = float(noise_quantile(torch.tensor(float(n), dtype=torch.float64), self.delta))
        estimator = wavelet_estimator(
            self.wavelet,
            boundary=self.boundary,
            sigma=float(self._noise(losses)),
            constant=published / ours,
            delta=self.delta,
        )
        return torch.as_tensor(estimator.latest(losses).value)

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
