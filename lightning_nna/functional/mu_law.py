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
:math:`g` is a function of one variable: :class:`SoftAssignment` cuts [-1, 1] into some thousand
cells and has value and gradients in the middle of each, exactly. A weight needs its cell and a
look-up, for 256 levels as for two.

Reference:
    Zhen et al., "Sub-8-bit quantization for on-device speech recognition: a regularization-free
    approach", SLT 2022, arXiv 2210.09188. ITU-T G.711 for the µ-law.

Differs from the paper: the sharpness without a dimension, and the cells, are ours.
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
    spread = float(centroids.detach().max() - centroids.detach().min())
    return spread / (len(centroids) - 1) if spread > 0 else 1.0


class SoftAssignment:
    r"""Soft assignment to centroids and the expansion, in cells of equal width.

    Cell 0 takes what lies below -1, the last one what lies above 1 or at it; there slopes are zero.

    Args:
        centroids: In the µ-law's domain, [-1, 1], ascending.
        sharpness: :math:`S`, positive.
        mu: Of the µ-law.
        power: :math:`p`, 1 or 2.

    Attributes:
        values: :math:`F_\mu^{-1}(g(F_\mu(x)))` in each cell, shape ``(cells + 2,)``.
        slopes: Its derivative by :math:`x`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> soft = SoftAssignment(torch.tensor([-0.5, 0.5]), sharpness=8.0, mu=0.0)
        >>> soft.values[cell_of(torch.tensor([-1.0, 0.4]), len(soft.values) - 2)]
        tensor([-0.5000,  0.4983])
    """

    def __init__(
        self, centroids: Float[Tensor, " levels"], *, sharpness: float, mu: float, power: int = 2
    ) -> None:
        require_mu(mu)
        if not sharpness > 0:
            raise ValueError(f"sharpness must be positive, got {sharpness}")
        if power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {power}")
        # In double precision: sharp scores are large, and their differences small.
        z = centroids.detach().double()
        self._levels = len(z)
        v = mu_law(cell_middles(cells_for(self._levels), z.device).double(), mu)
        alpha = sharpness / mean_spacing(z) ** power
        self._first, self._width = _near(v, z, alpha, power)
        near = z[self._places]
        distance = v[:, None] - near
        away = distance.abs() if power == 1 else distance.square()
        shares = torch.softmax(-alpha * away, dim=1)
        means = (shares * near).sum(1)
        # How fast a centroid's score grows with the centroid, and falls with the point.
        pull = alpha * torch.sgn(distance) if power == 1 else 2 * alpha * distance
        spread = shares * (near - means[:, None]) * pull
        self.values = inverse_mu_law(means, mu).float()
        expansion = inverse_mu_law_slope(means, mu)
        self._per_centroid = ((shares + spread) * expansion[:, None]).float()
        slopes = -spread.sum(1) * expansion / inverse_mu_law_slope(v, mu)
        slopes[0] = slopes[-1] = 0
        self.slopes = slopes.float()

    def centroid_gradient(self, sums: Float[Tensor, " cells"]) -> Float[Tensor, " levels"]:
        """Gradient of the centroids.

        Args:
            sums: Sum, over the weights in each cell, of the gradient of what came of them.
        """
        shares = self._per_centroid * sums[:, None]
        found = sums.new_zeros(self._levels)
        return found.index_add_(0, self._places.flatten(), shares.flatten())

    @property
    def _places(self) -> Tensor:
        """Centroids that count in each cell; made anew, since it is the largest table of all."""
        reach = torch.arange(self._width, device=self._first.device)
        return self._first[:, None] + reach


def cells_for(levels: int) -> int:
    """Cells between -1 and 1 in which so many levels are told apart well.

    Example:
        >>> cells_for(4), cells_for(256)
        (1024, 8192)
    """
    return max(1024, 32 * levels)


def cell_middles(cells: int, device: torch.device | None = None) -> Float[Tensor, " cells_and_two"]:
    """The middle of each cell; -1 and 1 for what lies outside.

    Example:
        >>> cell_middles(2)
        tensor([-1.0000, -0.5000,  0.5000,  1.0000])
    """
    inner = torch.arange(cells, device=device, dtype=torch.float32)
    middles = (inner + 0.5) * (2 / cells) - 1
    return (
        torch.nn.functional.pad(middles, (1, 1))
        .index_fill_(0, torch.tensor([0], device=device), -1.0)
        .index_fill_(0, torch.tensor([cells + 1], device=device), 1.0)
    )


def cell_of(
    weight: Float[Tensor, "*shape"], cells: int, scales: Float[Tensor, " groups"] | None = None
) -> Int[Tensor, "*shape"]:
    """The cell of every weight, int32.

    Args:
        weight: Any weights.
        cells: Between -1 and 1.
        scales: What is 1, for each group of rows; none for 1.

    Example:
        >>> cell_of(torch.tensor([-1.5, -0.1, 0.1, 1.0]), 2)
        tensor([0, 1, 2, 3], dtype=torch.int32)
    """
    half = cells / 2
    if scales is None:
        at = weight * half
    elif len(scales) == 1:
        at = weight.float() * (half / scales)
    else:
        at = (weight.float().reshape(len(scales), -1) * (half / scales)[:, None]).view(weight.shape)
    return at.add_(half + 1).clamp_(0, cells + 1).int()


def require_mu(mu: float) -> None:
    """Raise unless µ is a strength of compression.

    Raises:
        ValueError: Shows the value.
    """
    if not 0 <= mu < math.inf:
        raise ValueError(f"mu must be at least 0 (0 is no compression), got {mu}")


def _near(v: Tensor, z: Tensor, alpha: float, power: int) -> tuple[Tensor, int]:
    """First of the centroids that count at each point, and how many: as many for every point."""
    above = torch.searchsorted(z, v).clamp_(max=len(z) - 1)
    nearest = torch.minimum((v - z[above]).abs(), (v - z[(above - 1).clamp_(min=0)]).abs())
    reach = (nearest**power + _NEGLIGIBLE / alpha) ** (1 / power)
    first = torch.searchsorted(z, v - reach)
    width = int((torch.searchsorted(z, v + reach, right=True) - first).max())
    first = first.clamp_(max=len(z) - width)
    return first, width
