r"""Bounds of the wavelet estimate and of what is learned from it.

The model is :math:`y_i = \theta_i + \epsilon_i` with independent :math:`\sigma`-sub-Gaussian noise.
:math:`\beta = W \theta` are the coefficients of an orthonormal wavelet transform, and
:math:`\mathcal I` are those that reach the newest value. Every coefficient of :math:`y` is
soft-thresholded at

.. math:: \lambda = 2 \sigma \sqrt{2 \log(\log n / \delta)}

with natural logarithms. With probability :math:`1 - \delta`:

.. math::
    |\hat\theta - \theta_n| &\le \sum_{i \in \mathcal I} 6 |W_{i,n}| (|\beta_i| \wedge \lambda)
        && \text{(Lemma 1)} \\
    |\hat\theta - \theta_n| &\le \kappa \min_r U(r), \quad
    U(r) = \max_{t \le r} |\bar\theta_t - \theta_n| \vee \frac{\sigma}{\sqrt r}
        && \text{(Theorem 2, Haar)} \\
    \kappa &= \Bigl(4 \sqrt{2 \log(\log n / \delta)} \vee 2 \sqrt 2\Bigr) (\log_2 n + 1) \\
    L(\hat f) - L(f^*) &\le 8 \sqrt{\frac{2 d \log(2 n)}{n}}
        + 2 \sqrt{\frac{2 \log(3 / \delta)}{n}}
        + \sqrt 3 \sup_f \sum_{i \in \mathcal I} 6 |W_{i,n}| (|\beta_i^f| \wedge \lambda')
        && \text{(Theorem 9)}

with :math:`\bar\theta_t` the mean of the newest :math:`t` values, :math:`d` the Vapnik-Chervonenkis
dimension of the classifiers and :math:`\beta^f` the coefficients of the risks of one of them.
Theorem 11: an estimator with such a bound, asked at every time, denoises a series of total
variation :math:`C` at the best rates, :math:`n^{1/3} C^{2/3} \sigma^{4/3}` for the summed squared
error and :math:`n^{2/3} C^{1/3} \sigma^{2/3}` for the summed absolute one, up to logarithms.

Reference:
    Baby et al., "Adaptive estimation and learning under temporal distribution shift", ICML 2025,
    arXiv 2505.15803. The constants are second hand, from public notes on the paper, and were not
    compared with its text.

Differs from the paper, as far as the notes say: coefficients for an :math:`n` that is not a power
of two are those of the nested windows of :mod:`~lightning_nna.drift.wavelets`; the maximum in
:math:`U` is over all :math:`t \le r`, which never makes it smaller; :math:`\log n` is at least 1;
and :math:`\lambda'`, of which the notes say nothing, is :math:`\lambda` for :math:`\delta / 3`.
A plain union over :math:`\log_2 n + 1` coefficients gives :math:`2 \delta (\log_2 n + 1) / \log n`
in place of :math:`\delta`; Gaussian tails make up for it (the tests measure how often each bound
holds).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_nna.drift.estimators import noise_quantile, validate_settings


def theory_threshold(n: int, *, sigma: float = 1.0, delta: float = 0.1) -> float:
    r"""Return the threshold of the theory, :math:`2 \sigma \sqrt{2 \log(\log n / \delta)}`.

    Args:
        n: Number of values, at least 1; :math:`\log n` counts as at least 1.
        sigma: Standard deviation of the noise, in the unit of the series.
        delta: Probability of failure, between 0 and 1.

    Returns:
        The threshold, in the unit of the series.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> round(theory_threshold(1024, sigma=0.5), 4)
        2.9116
    """
    validate_settings(sigma=sigma, delta=delta)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return 2 * sigma * math.sqrt(2 * math.log(max(math.log(n), 1.0) / delta))


def sparsity_bound(
    weights: Float[Tensor, " coefficients"],
    coefficients: Float[Tensor, "*batch coefficients"],
    threshold: float,
) -> Float[Tensor, "*batch"]:
    r"""Compute the bound of Lemma 1, :math:`\sum_i 6 |W_{i,n}| (|\beta_i| \wedge \lambda)`.

    Args:
        weights: Weights :math:`W_{i,n}` of the coefficients in the newest value, shape
            ``(coefficients,)``.
        coefficients: True coefficients :math:`\beta_i`, shape ``(*batch, coefficients)``.
        threshold: Threshold :math:`\lambda`, see :func:`theory_threshold`.

    Example:
        >>> sparsity_bound(torch.tensor([0.5, 0.5]), torch.tensor([-0.1, 9.0]), 2.0)
        tensor(6.3000)
    """
    return (6 * weights.abs() * coefficients.abs().clamp_max(threshold)).sum(-1)


def haar_coefficients(
    theta: Float[Tensor, "*batch n"],
) -> tuple[Float[Tensor, " coefficients"], Float[Tensor, "*batch coefficients"]]:
    r"""Compute the Haar coefficients that reach the newest value, and their weights in it.

    The first is that of the mean, the others those of the nested windows from the smallest on;
    ``theta[..., -1] == (coefficients * weights).sum(-1)``.

    Args:
        theta: Series, shape ``(*batch, n)``, the newest value last.

    Returns:
        Weights, shape ``(coefficients,)``, and coefficients, shape ``(*batch, coefficients)``.

    Raises:
        ValueError: If the series is empty.

    Example:
        >>> weights, coefficients = haar_coefficients(torch.tensor([1.0, 1.0, 2.0, 4.0]))
        >>> coefficients
        tensor([4.0000, 1.4142, 2.0000])
        >>> float(weights @ coefficients)
        4.0
    """
    n = theta.shape[-1]
    if not n:
        raise ValueError(f"a series needs at least one value, got shape {list(theta.shape)}")
    windows = torch.tensor(nested_windows(n), device=theta.device)
    r = windows.to(theta.dtype)
    means = theta.flip(-1).cumsum(-1)[..., windows - 1] / r
    spread = (1 / r[:-1] - 1 / r[1:]).sqrt()
    details = (means[..., :-1] - means[..., 1:]) / spread
    weights = torch.cat([r[-1:].rsqrt(), spread])
    return weights, torch.cat([means[..., -1:] * r[-1:].sqrt(), details], -1)


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


@dataclass(frozen=True)
class Oracle:
    r"""The window that is best for a known course, :math:`\min_r U(r)`.

    Args:
        error: Error :math:`\min_r \max(\text{bias within } r, \sigma / \sqrt r)`, in the unit of
            the series.
        window: Best window :math:`r^*`, in values.
    """

    error: float
    window: int


def window_oracle(theta: Float[Tensor, " n"], *, sigma: float) -> Oracle:
    """Find the window with the least of the greater one of its bias and its noise.

    Args:
        theta: True values in the order of time, shape ``(n,)``, the newest last.
        sigma: Standard deviation of the noise, in the unit of the series.

    Raises:
        ValueError: If the series is empty, or ``sigma`` is out of range.

    Example:
        >>> window_oracle(torch.cat([torch.zeros(56), torch.ones(8)]), sigma=0.1)
        Oracle(error=0.0353..., window=8)
    """
    validate_settings(sigma=sigma)
    if not len(theta):
        raise ValueError("a series needs at least one value, got none")
    theta = theta.double()
    every = torch.arange(1, len(theta) + 1, dtype=torch.float64)
    bias = (theta.flip(0).cumsum(0) / every - theta[-1]).abs().cummax(0).values
    errors = torch.maximum(bias, sigma / every.sqrt())
    best = int(errors.argmin())
    return Oracle(float(errors[best]), best + 1)


def window_factor(n: int, *, delta: float = 0.1) -> float:
    r"""Return :math:`\kappa` of Theorem 2: the estimate's error over that of the best window.

    Args:
        n: Number of values, at least 1.
        delta: Probability of failure, between 0 and 1.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> round(window_factor(1024), 2)
        128.11
    """
    return max(2 * theory_threshold(n, delta=delta), 2 * math.sqrt(2)) * (math.log2(n) + 1)


def haar_error_bound(
    theta: Float[Tensor, " n"], *, sigma: float, constant: float = 1.0, delta: float = 0.1
) -> float:
    r"""Bound the error of :class:`~lightning_nna.drift.wavelets.HaarEstimator` for a known course.

    On the event that no noise passes its threshold a soft-thresholded detail is off by at most
    twice the threshold and by at most itself, so that

    .. math:: |\hat\theta - \theta_n| \le \frac{\lambda}{c\sqrt n}
        + \sum_k \min(|\theta_k|, 2 \lambda s_k), \qquad
        \lambda = c\,\sigma\sqrt{2\log(\log_2 n/\delta)},

    with :math:`\theta_k` the true differences of nested means. The event needs :math:`c \ge 1`.
    This bound is ours. It is for the thresholds that the estimator uses, and far below Lemma 1,
    whose constants serve every wavelet.

    Args:
        theta: True values in the order of time, shape ``(n,)``, the newest last.
        sigma: Standard deviation of the noise, in the unit of the series.
        constant: Factor :math:`c` of the threshold, at least 1.
        delta: Probability of failure, between 0 and 1.

    Raises:
        ValueError: If a setting is out of range, or the series is empty.

    Example:
        >>> course = torch.cat([torch.zeros(56), torch.ones(8)])
        >>> round(haar_error_bound(course, sigma=0.1), 3)
        0.352
    """
    validate_settings(sigma=sigma, delta=delta, constant=constant)
    if constant < 1:
        raise ValueError(f"a bound needs a constant of at least 1, got {constant}")
    weights, coefficients = haar_coefficients(theta.double())
    n = torch.tensor(float(len(theta)), dtype=torch.float64)
    unit = float(noise_quantile(n, delta)) * sigma
    details = (weights * coefficients).abs()[1:]
    rest = torch.minimum(details, 2 * constant * unit * weights[1:]).sum()
    return unit / math.sqrt(len(theta)) + float(rest)


@dataclass(frozen=True)
class RiskBound:
    r"""The bound of Theorem 9 and its parts, each with probability :math:`1 - \delta`.

    Args:
        excess: Bound of the risk, now, of the classifier with the least estimate over that of the
            best one: the sum of the three parts below.
        capacity: Part of the number of classifiers, :math:`8 \sqrt{2 d \log(2 n) / n}`.
        confidence: Part of the probability of failure, :math:`2 \sqrt{2 \log(3 / \delta) / n}`.
        drift: Part of the estimates, :math:`\sqrt 3` times the greatest bound of Lemma 1.
        estimation: Greatest bound of Lemma 1 of the estimate of one risk, at :math:`\lambda`.
    """

    excess: float
    capacity: float
    confidence: float
    drift: float
    estimation: float


def excess_risk_bound(
    risks: Float[Tensor, "classifiers n"],
    *,
    dimension: int,
    sigma: float = 0.5,
    delta: float = 0.1,
) -> RiskBound:
    r"""Bound the excess risk of one empirical risk minimization on the Haar estimate, Theorem 9.

    Args:
        risks: True risks of the classifiers in the order of time, shape ``(classifiers, n)``, the
            newest last; the supremum is over the classifiers that are given.
        dimension: Vapnik-Chervonenkis dimension :math:`d` of all classifiers, at least 1; of a
            linear one the number of features and one for the bias.
        sigma: Deviation of an observed loss around its risk; 0.5 holds for every loss between 0
            and 1.
        delta: Probability of failure, between 0 and 1.

    Raises:
        ValueError: If a setting is out of range, or there is no risk.

    Example:
        >>> falls = torch.cat([torch.full((60,), 0.5), torch.full((4,), 0.1)])
        >>> bound = excess_risk_bound(falls[None], dimension=3)
        >>> round(bound.capacity, 2), round(bound.confidence, 2), round(bound.drift, 2)
        (5.4, 0.65, 7.93)
    """
    validate_settings(sigma=sigma, delta=delta)
    if dimension < 1:
        raise ValueError(f"dimension must be at least 1, got {dimension}")
    if not risks.numel():
        raise ValueError(f"a bound needs at least one risk, got shape {list(risks.shape)}")
    n = risks.shape[-1]
    weights, coefficients = haar_coefficients(risks.double())

    def greatest(probability: float) -> float:
        threshold = theory_threshold(n, sigma=sigma, delta=probability)
        return float(sparsity_bound(weights, coefficients, threshold).max())

    capacity = 8 * math.sqrt(2 * dimension * math.log(2 * n) / n)
    confidence = 2 * math.sqrt(2 * math.log(3 / delta) / n)
    drift = math.sqrt(3) * greatest(delta / 3)
    return RiskBound(capacity + confidence + drift, capacity, confidence, drift, greatest(delta))


@dataclass(frozen=True)
class DenoisingRates:
    """The best possible growth of denoising errors, without constants and logarithms.

    Args:
        squared: Rate of the summed squared error, in the squared unit of the series.
        absolute: Rate of the summed absolute error, in the unit of the series.
    """

    squared: float
    absolute: float


def denoising_rates(n: int, *, variation: float, sigma: float) -> DenoisingRates:
    r"""Return the rates of Theorem 11 for a series of bounded variation.

    Args:
        n: Number of values, at least 1.
        variation: Total variation :math:`C` of the true series, at least 0, in its unit.
        sigma: Standard deviation of the noise, in the unit of the series.

    Returns:
        :math:`n^{1/3} C^{2/3} \sigma^{4/3}` and :math:`n^{2/3} C^{1/3} \sigma^{2/3}`.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> denoising_rates(1000, variation=8.0, sigma=1.0)
        DenoisingRates(squared=40.0..., absolute=200.0...)
    """
    validate_settings(sigma=sigma)
    if n < 1 or not variation >= 0:
        raise ValueError(f"n must be at least 1 and variation at least 0, got {n} and {variation}")
    return DenoisingRates(
        n ** (1 / 3) * variation ** (2 / 3) * sigma ** (4 / 3),
        n ** (2 / 3) * variation ** (1 / 3) * sigma ** (2 / 3),
    )
