r"""The µ-law, and soft assignment to centroids in its domain.

The µ-law spends resolution where weights are dense, near zero: for :math:`x \in [-1, 1]`

.. math::
    F_\mu(x) = \operatorname{sgn}(x) \frac{\ln(1 + \mu |x|)}{\ln(1 + \mu)}, \qquad
    F_\mu^{-1}(v) = \operatorname{sgn}(v) \frac{(1 + \mu)^{|v|} - 1}{\mu}.

In its domain a point :math:`v` is assigned softly to centroids :math:`z`,

.. math::
    g(v) = \sum_j A_j z_j, \qquad A_j = \operatorname{softmax}_j(-\alpha |v - z_j|^p),

which hardens to the nearest centroid as :math:`\alpha` grows. How far it has hardened says the
dimensionless sharpness :math:`S = \alpha \Delta^p`, with :math:`\Delta` the mean spacing of the
centroids: about 1 is soft, from 32 on nearly hard.

Written for every weight, the softmax takes the memory of ``levels`` copies of the weights. But
:math:`g` is a function of one variable: :class:`SoftAssignment` has it, exactly, at some thousand
knots, and between them it is linear. Its gradients are those of this broken line, to the last
digit, and cost the same for two levels as for 256.

Reference:
    Zhen et al., "Sub-8-bit quantization for on-device speech recognition: a regularization-free
    approach", SLT 2022, arXiv 2210.09188. ITU-T G.711 for the µ-law.

Differs from the paper: the sharpness without a dimension, and the knots, are ours.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Terms of the softmax below e^-12 of the greatest are left out.
_NEGLIGIBLE = 12.0


def mu_law(x: Float[Tensor, "*shape"], mu: float) -> Float[Tensor, "*shape"]:
    """Compress values in [-1, 1].

    Args:
        x: Values in [-1, 1].
        mu: Strength of the compression; 0 is none.

    Raises:
        ValueError: If ``mu`` is negative.

    Example:
        >>> mu_law(torch.tensor([-1.0, 0.0, 1 / 15]), mu=15.0)
        tensor([-1.0000,  0.0000,  0.2500])
    """
    require_mu(mu)
    if mu == 0:
        return x
    return torch.sgn(x) * torch.log1p(mu * x.abs()) / math.log1p(mu)


def inverse_mu_law(v: Float[Tensor, "*shape"], mu: float) -> Float[Tensor, "*shape"]:
    """Expand what :func:`mu_law` compressed.

    Args:
        v: Values in [-1, 1].
        mu: Strength of the compression; 0 is none.

    Raises:
        ValueError: If ``mu`` is negative.

    Example:
        >>> inverse_mu_law(torch.tensor([-1.0, 0.0, 0.25]), mu=15.0)
        tensor([-1.0000,  0.0000,  0.0667])
    """
    require_mu(mu)
    if mu == 0:
        return v
    return torch.sgn(v) * torch.expm1(v.abs() * math.log1p(mu)) / mu


def inverse_mu_law_slope(v: Float[Tensor, "*shape"], mu: float) -> Float[Tensor, "*shape"]:
    """Derivative of :func:`inverse_mu_law`.

    Example:
        >>> inverse_mu_law_slope(torch.zeros(1), mu=1.0)
        tensor([0.6931])
    """
    require_mu(mu)
    if mu == 0:
        return torch.ones_like(v)
    rate = math.log1p(mu)
    return torch.exp(v.abs() * rate) * (rate / mu)


def mean_spacing(centroids: Float[Tensor, " levels"]) -> float:
    """Mean distance of neighbouring centroids; 1 where they are all the same.

    Example:
        >>> mean_spacing(torch.tensor([-1.0, 0.0, 0.5, 1.0])).__round__(4)
        0.6667
    """
    if len(centroids) < 2:
        return 1.0
    spread = float(centroids.max() - centroids.min())
    return spread / (len(centroids) - 1) if spread > 0 else 1.0


class SoftAssignment:
    r"""Soft assignment to centroids, followed by the expansion, as a broken line.

    Args:
        centroids: In [-1, 1], ascending.
        sharpness: :math:`S`, positive.
        mu: Of the µ-law.
        power: :math:`p`, 1 or 2.

    Attributes:
        knots: Points in [-1, 1] at equal distances, shape ``(cells + 1,)``.
        values: :math:`F_\mu^{-1}(g)` at the knots.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> soft = SoftAssignment(torch.tensor([-0.5, 0.5]), sharpness=8.0, mu=0.0)
        >>> soft(torch.tensor([-1.0, 0.0, 0.4]))
        tensor([-0.5000,  0.0000,  0.4983])
    """

    def __init__(
        self, centroids: Float[Tensor, " levels"], *, sharpness: float, mu: float, power: int = 2
    ) -> None:
        require_mu(mu)
        if not sharpness > 0:
            raise ValueError(f"sharpness must be positive, got {sharpness}")
        if power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {power}")
        levels = len(centroids)
        self.cells = min(max(2048, 128 * levels), 16384)
        device = centroids.device
        self.knots = torch.linspace(-1, 1, self.cells + 1, device=device)
        self._levels, self._mu = levels, mu
        alpha = sharpness / mean_spacing(centroids) ** power
        self._assign(centroids.detach().float(), alpha, power, _reach(sharpness, power))
        self.values = inverse_mu_law(self._means, mu)

    def _assign(self, z: Tensor, alpha: float, power: int, reach: int) -> None:
        """Softmax over the nearest centroids of each knot."""
        width = min(self._levels, 2 * reach)
        above = torch.searchsorted(z, self.knots)
        first = (above - width // 2).clamp_(0, self._levels - width)
        self._near = first[:, None] + torch.arange(width, device=z.device)
        near = z[self._near]
        distance = self.knots[:, None] - near
        away = distance.abs() if power == 1 else distance.square()
        self._shares = torch.softmax(-alpha * away, dim=1)
        self._means = (self._shares * near).sum(1)
        # d(-alpha |v - z|^p)/dz
        pull = alpha * torch.sgn(distance) if power == 1 else 2 * alpha * distance
        self._per_centroid = self._shares * (1 + (near - self._means[:, None]) * pull)

    def cell_of(
        self, v: Float[Tensor, "*shape"]
    ) -> tuple[Int[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """The cell of each point, and the share of the cell that lies before it."""
        at = (v + 1) * (self.cells / 2)
        cell = at.long().clamp_(0, self.cells - 1)
        return cell, at - cell

    def __call__(self, v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Expanded soft assignment of points in [-1, 1]."""
        cell, share = self.cell_of(v)
        steps = self.values.diff()
        return torch.addcmul(self.values[cell], steps[cell], share)

    def slopes(self) -> Float[Tensor, " cells"]:
        """Derivative by the point, constant in each cell."""
        return self.values.diff() * (self.cells / 2)

    def centroid_gradient(self, v: Tensor, grad: Tensor) -> Float[Tensor, " levels"]:
        """Gradient of the centroids.

        Args:
            v: Points in [-1, 1].
            grad: Gradient of what came of each.
        """
        cell, share = self.cell_of(v.flatten())
        grad = grad.flatten()
        at_knots = grad.new_zeros(self.cells + 1)
        before = grad * (1 - share)
        at_knots.index_add_(0, cell, before)
        at_knots.index_add_(0, cell + 1, grad - before)
        at_knots *= inverse_mu_law_slope(self._means, self._mu)
        result = grad.new_zeros(self._levels)
        shares = self._per_centroid * at_knots[:, None]
        return result.index_add_(0, self._near.flatten(), shares.flatten())


def require_mu(mu: float) -> None:
    """Raise unless µ is a strength of compression.

    Raises:
        ValueError: Shows the value.
    """
    if not 0 <= mu < math.inf:
        raise ValueError(f"mu must be at least 0 (0 is no compression), got {mu}")


def _reach(sharpness: float, power: int) -> int:
    """Centroids on either side of a point that count."""
    # Spacings vary: one more than what a regular spacing needs.
    return math.ceil((_NEGLIGIBLE / sharpness) ** (1 / power)) + 2
