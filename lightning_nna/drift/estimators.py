r"""Estimators of the newest value of a noisy series: their base, their noise and their thresholds.

The model is :math:`y_i = \theta_i + \epsilon_i`, the newest value last, with independent noise of
standard deviation :math:`\sigma`; :math:`\theta_n` is wanted, and :math:`\theta` may drift. Where
:math:`\sigma` is not given it is measured,

.. math:: \hat\sigma = \operatorname{median}_i \frac{|y_i - y_{i-1}|}{\sqrt 2} \Big/ 0.6745,

the median absolute finest Haar detail, at all shifts.

Reference:
    Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 81(3), 1994;
    Donoho, "De-noising by soft-thresholding", IEEE Trans. Inf. Theory 41(3), 1995.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import insort
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, TypedDict

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

#: A series along the last axis, newest value last. NumPy is computed in float64.
Series: TypeAlias = Float[Tensor, "*batch n"] | Float[np.ndarray, "*batch n"]
#: One number for each series, or for each prefix of it; of a stream a plain one.
Values: TypeAlias = Float[Tensor, "*any"] | Float[np.ndarray, "*any"] | float
#: Treatment of the details above the threshold.
Rule: TypeAlias = Literal["soft", "hard", "tree"]

#: The median absolute value of a standard normal variable.
MEDIAN_OF_NORMAL = 0.6745


@dataclass(frozen=True)
class Estimate:
    r"""The newest value, and how much is known of it.

    Args:
        value: Estimate :math:`\hat\theta`, in the unit of the series.
        radius: Half-width of an interval for the noise of ``value`` alone, in the unit of the
            series: a drift that is too small to be seen comes on top. Infinite after a single
            value of unknown noise.
        sigma: Standard deviation of the noise, in the unit of the series, given or measured.
        effective_window: Number of values whose plain mean would be as noisy as ``value``.
        details: Number of details above the threshold; 0 where a method has none.
    """

    value: Values
    radius: Values
    sigma: Values
    effective_window: Values
    details: Values


@dataclass(frozen=True, kw_only=True)
class LatestEstimator(ABC):
    """An estimator of the newest value of a series.

    Estimators are immutable and take any series: torch or NumPy, any leading axes, one value or
    more. With torch the value can be differentiated, the noise level is taken as a constant.

    Args:
        sigma: Standard deviation of the noise, in the unit of the series; None to measure it.
        delta: Probability of error of the thresholds and the radius, between 0 and 1.

    Raises:
        ValueError: If a setting is out of range; the message has its name and value.
    """

    sigma: float | None = None
    delta: float = 0.1

    def __post_init__(self) -> None:
        validate_settings(sigma=self.sigma, delta=self.delta)

    def latest(self, y: Series) -> Estimate:
        """Estimate the newest value.

        Args:
            y: Series, shape ``(*batch, n)``, the newest value last.

        Returns:
            The estimate, each field of shape ``(*batch,)``.

        Raises:
            ValueError: If the series is empty.
        """
        tensor = _as_tensor(y)
        estimate = self._estimate(tensor, newest_only=True)
        parts = {field.name: getattr(estimate, field.name)[..., 0] for field in fields(estimate)}
        return _like(y, Estimate(**parts))

    def prefixes(self, y: Series) -> Estimate:
        """Estimate the newest value of every prefix, from the values up to its time alone.

        Args:
            y: Series, shape ``(*batch, n)``, the newest value last.

        Returns:
            The estimates, each field of shape ``(*batch, n)``.

        Raises:
            ValueError: If the series is empty.
        """
        return _like(y, self._estimate(_as_tensor(y), newest_only=False))

    @abstractmethod
    def estimate_at(
        self,
        y: Float[Tensor, "*batch n"],
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        """Estimate the values at some times; no estimate looks beyond its time.

        Args:
            y: Series, shape ``(*batch, n)``.
            times: Indices into the series, shape ``(times,)``, ascending.
            sigma: Noise as it is known at each time, shape ``(*batch, times)``, in the unit of the
                series.
        """

    def noise_at_every_time(self, y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return the noise of every prefix, as given or as measured.

        Args:
            y: Series, shape ``(*batch, n)``.
        """
        if self.sigma is None:
            return running_noise_level(y)
        return torch.full_like(y, self.sigma, requires_grad=False)

    def _estimate(self, y: Tensor, *, newest_only: bool) -> Estimate:
        n = y.shape[-1]
        times = torch.arange(n - 1 if newest_only else 0, n, device=y.device)
        if newest_only and self.sigma is None:
            sigma = noise_level(y)[..., None]
        else:
            sigma = self.noise_at_every_time(y)[..., times]
        return self.estimate_at(y, times, sigma)


class ThresholdSettings(TypedDict, total=False):
    """Settings that all estimators with a threshold take, see :class:`ThresholdEstimator`."""

    sigma: float | None
    constant: float
    delta: float
    rule: Rule


@dataclass(frozen=True, kw_only=True)
class ThresholdEstimator(LatestEstimator):
    r"""An estimator that thresholds wavelet details.

    Args:
        sigma: Standard deviation of the noise, in the unit of the series; None to measure it.
        constant: Factor :math:`c` of the threshold, at least 0: 2 in theory, near 1 in practice.
        delta: Probability that noise passes the threshold, for a constant of 1.
        rule: Treatment of the details above the threshold: ``"soft"`` shrinks them by it,
            ``"hard"`` leaves them unchanged, ``"tree"`` leaves them and all coarser ones.

    Raises:
        ValueError: If a setting is out of range; the message has its name and value.
    """

    constant: float = 1.0
    rule: Rule = "soft"

    @override
    def __post_init__(self) -> None:
        validate_settings(
            sigma=self.sigma, delta=self.delta, constant=self.constant, rule=self.rule
        )


def validate_settings(
    *, sigma: float | None = None, delta: float = 0.1, constant: float = 1.0, rule: str = "soft"
) -> None:
    """Validate the settings that all estimators of this package share.

    Args:
        sigma: Standard deviation of the noise, finite and at least 0, or None.
        delta: Probability, between 0 and 1.
        constant: Factor of the threshold, finite and at least 0.
        rule: Name of a :data:`Rule`.

    Raises:
        ValueError: If one is out of range; the message has its name and value.
    """
    if sigma is not None and not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be finite and at least 0, or None to measure it, got {sigma}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, got {delta}")
    if not 0 <= constant < math.inf:
        raise ValueError(f"constant must be finite and at least 0, got {constant}")
    if rule not in ("soft", "hard", "tree"):
        raise ValueError(f"rule must be 'soft', 'hard' or 'tree', got {rule!r}")


def noise_quantile(n: Float[Tensor, "*any"], delta: float) -> Float[Tensor, "*any"]:
    r"""Return the bound of all noise details of ``n`` values, in standard deviations.

    .. math:: \sqrt{2 \log(\max(\log_2 n, 1) / \delta)}

    Args:
        n: Number of values, at least 1, any shape.
        delta: Probability that a detail of pure noise exceeds the bound.

    Example:
        >>> noise_quantile(torch.tensor([1024.0]), 0.1)
        tensor([3.0349])
    """
    return (2 * (n.log2().clamp_min(1.0) / delta).log()).sqrt()


def threshold_details(
    x: Float[Tensor, "*any"], threshold: Float[Tensor, "*#any"], rule: Rule
) -> Float[Tensor, "*any"]:
    """Shrink every detail toward zero by its threshold, or drop those not above it.

    The rule ``"tree"`` looks at all levels and is their caller's; here it is the hard one.

    Args:
        x: Details, any shape.
        threshold: Threshold of each detail, a shape that broadcasts to that of ``x``, in its unit.
        rule: Name of the rule.

    Example:
        >>> threshold_details(torch.tensor([-3.0, 0.5, 2.0]), torch.ones(3), "soft")
        tensor([-2., 0., 1.])
    """
    if rule != "soft":
        return torch.where(x.abs() > threshold, x, 0.0)
    return torch.where(x.abs() > threshold, x - x.sign() * threshold, 0.0)


def noise_level(y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Measure the standard deviation of the noise by the differences of neighbors.

    Args:
        y: Series, shape ``(*batch, n)``.

    Returns:
        The noise of each series, shape ``(*batch,)``, without a gradient; infinite for a single
        value, of which nothing is known.

    Example:
        >>> noise_level(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]))
        tensor(1.0484)
    """
    details = y.detach().diff().abs().sort(-1).values
    count = details.shape[-1]
    if count == 0:
        return torch.full_like(y[..., 0], math.inf)
    middle = (details[..., (count - 1) // 2] + details[..., count // 2]) / 2
    return middle / (math.sqrt(2) * MEDIAN_OF_NORMAL)


def running_noise_level(y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """Measure the noise of every prefix, as :func:`noise_level` does.

    Args:
        y: Series, shape ``(*batch, n)``.
    """
    rows = math.prod(y.shape[:-1])
    details = y.detach().diff().abs().cpu().double().numpy().reshape(rows, y.shape[-1] - 1)
    levels = np.full((rows, y.shape[-1]), math.inf)
    for row, level in zip(details, levels, strict=True):
        ordered: list[float] = []
        for count, detail in enumerate(row.tolist(), start=1):
            insort(ordered, detail)
            level[count] = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    levels[:, 1:] /= math.sqrt(2) * MEDIAN_OF_NORMAL
    return torch.from_numpy(levels).reshape(y.shape).to(y)


def _as_tensor(y: Series) -> Tensor:
    tensor = y if isinstance(y, Tensor) else torch.from_numpy(np.asarray(y, dtype=np.float64))
    if tensor.ndim == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"a series needs at least one value, got shape {list(tensor.shape)}")
    return tensor


def _like(y: Series, estimate: Estimate) -> Estimate:
    """Convert an estimate to arrays of the kind of the series."""
    if isinstance(y, Tensor):
        return estimate
    parts = {field.name: getattr(estimate, field.name).numpy() for field in fields(estimate)}
    return Estimate(**parts)
