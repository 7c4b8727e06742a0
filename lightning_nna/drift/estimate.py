r"""What is known of the newest value of a noisy series: ``Estimate`` and ``LatestEstimator``.

The model is :math:`y_i = \theta_i + \epsilon_i`, the newest value last, with independent noise of
standard deviation :math:`\sigma`; :math:`\theta_n` is wanted, and :math:`\theta` may drift. Where
:math:`\sigma` is not given it is measured,

.. math:: \hat\sigma = \operatorname{median}_i \frac{|y_i - y_{i-1}|}{\sqrt 2} \Big/ 0.6745,

the median absolute finest Haar detail, at all shifts.

Reference:
    Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 81(3), 1994.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import insort
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

#: A series along the last axis, newest value last. NumPy is computed in float64.
Series: TypeAlias = Float[Tensor, "*batch n"] | Float[np.ndarray, "*batch n"]
#: One number for each series, or for each prefix of it; of a stream a plain one.
Values: TypeAlias = Float[Tensor, "*any"] | Float[np.ndarray, "*any"] | float

#: The median absolute value of a standard normal variable.
MEDIAN_OF_NORMAL = 0.6745


@dataclass(frozen=True)
class Estimate:
    r"""The newest value, and how much is known of it.

    Args:
        value: :math:`\hat\theta`, in the unit of the series.
        radius: Half-width of an interval for the noise of ``value`` alone: a drift that is too
            small to be seen comes on top. Infinite after a single value of unknown noise.
        sigma: Standard deviation of the noise, given or measured.
        effective_window: So many values of a plain mean would be as noisy as ``value``.
        kept: Details that were not taken for noise; 0 where a method has none.
    """

    value: Values
    radius: Values
    sigma: Values
    effective_window: Values
    kept: Values


class LatestEstimator(ABC):
    """A rule that estimates the newest value of a series.

    Rules are immutable and take any series: torch or NumPy, any leading axes, one value or more.
    With torch the value can be differentiated, the noise level is taken as a constant.

    Attributes:
        sigma: Standard deviation of the noise, in the unit of the series; None to measure it.
    """

    sigma: float | None

    def latest(self, y: Series) -> Estimate:
        """Estimate the newest value.

        Raises:
            ValueError: If the series is empty.
        """
        tensor = _as_tensor(y)
        found = self._estimate(tensor, newest_only=True)
        parts = {field.name: getattr(found, field.name)[..., 0] for field in fields(found)}
        return _like(y, Estimate(**parts))

    def prefixes(self, y: Series) -> Estimate:
        """Estimate the newest value of every prefix: what would have been said at each time.

        Raises:
            ValueError: If the series is empty.
        """
        return _like(y, self._estimate(_as_tensor(y), newest_only=False))

    @abstractmethod
    def at(
        self,
        y: Float[Tensor, "*batch n"],
        times: Int[Tensor, " times"],
        sigma: Float[Tensor, "*batch times"],
    ) -> Estimate:
        """Estimates after the values at ``times``, of which none looks beyond its time.

        Args:
            y: The series.
            times: Indices into it, ascending.
            sigma: The noise as it is known at each time.
        """

    def noise_at_every_time(self, y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """The noise as given, or as every prefix tells it."""
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
        return self.at(y, times, sigma)


def noise_level(y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Standard deviation of the noise of each series, from the differences of neighbors.

    Returns:
        No gradient; infinite for a single value, of which nothing is known.

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
    """The same for every prefix."""
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


def require_settings(
    *, sigma: float | None = None, delta: float = 0.1, constant: float = 1.0, rule: str = "soft"
) -> None:
    """Check what most rules are given.

    Raises:
        ValueError: If one is out of range; the message says which.
    """
    if sigma is not None and not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be finite and at least 0, or None to measure it, got {sigma}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, got {delta}")
    if not 0 <= constant < math.inf:
        raise ValueError(f"constant must be finite and at least 0, got {constant}")
    if rule not in ("soft", "hard", "tree"):
        raise ValueError(f"rule must be 'soft', 'hard' or 'tree', got {rule!r}")


def _as_tensor(y: Series) -> Tensor:
    tensor = y if isinstance(y, Tensor) else torch.from_numpy(np.asarray(y, dtype=np.float64))
    if tensor.ndim == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"a series needs at least one value, got shape {list(tensor.shape)}")
    return tensor


def _like(y: Series, estimate: Estimate) -> Estimate:
    """The estimate as arrays of the kind that came in."""
    if isinstance(y, Tensor):
        return estimate
    parts = {field.name: getattr(estimate, field.name).numpy() for field in fields(estimate)}
    return Estimate(**parts)
