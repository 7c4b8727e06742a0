r"""The µ-law, and soft assignment to centroids in its domain.

The µ-law spends resolution where weights are dense, near zero: for :math:`x \in [-1, 1]`

.. math::
    F_\mu(x) = \operatorname{sgn}(x) \frac{\ln(1 + \mu |x|)}{\ln(1 + \mu)}, \qquad
    F_\mu^{-1}(v) = \operatorname{sgn}(v) \frac{(1 + \mu)^{|v|} - 1}{\mu}.

In its domain a point :math:`v` is assigned softly to centroids :math:`z`,

.. math::
    g(v) = \sum_j A_j z_j, \qquad A_j = \operatorname{softmax}_j(-\alpha |v - z_j|^p),

which hardens to the nearest centroid as :math:`\alpha` grows. The
dimensionless sharpness :math:`S = \alpha \Delta^p`, with :math:`\Delta` the mean spacing of the
centroids: about 1 is soft, from 32 on nearly hard.

Written for every weight, the softmax takes the memory of as many copies of the weights. But
:math:`g` is a function of one variable: :class:`SoftAssignment` cuts [-1, 1] into some thousand
cells and has value and gradients in the middle of each, exactly. A weight needs its cell and a
look-up, for 256 centroids as for two. In a cell only the few centroids count that are near the one
nearest to it; the table is of cells and such neighbors, never of cells and centroids.

Reference:
    Zhen et al., "Sub-8-bit quantization for on-device speech recognition: a regularization-free
    approach", SLT 2022, arXiv 2210.09188. ITU-T G.711 for the µ-law.

Differs from the paper: the sharpness without a dimension, and the cells, are ours.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_nna import elementary

# Terms of the softmax below e^-12 of the greatest may be left out; below e^-24 they are.
_NEGLIGIBLE = 12.0


def mu_law(x: Float[Tensor, "*shape"], mu: float) -> Float[Tensor, "*shape"]:
    """Compress values in [-1, 1], to the same bits on every processor.

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
    grown = elementary.log1p(mu * x.double().abs()) / _log1p(mu)
    return torch.copysign(grown, x.double()).to(x.dtype)


def inverse_mu_law(v: Float[Tensor, "*shape"], mu: float) -> Float[Tensor, "*shape"]:
    """Expand what :func:`mu_law` compressed, to the same bits on every processor.

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
    grown = elementary.expm1(v.double().abs() * _log1p(mu)) / mu
    return torch.copysign(grown, v.double()).to(v.dtype)


def _expanded(v: Tensor, mu: float) -> Tensor:
    """:func:`inverse_mu_law` in the precision of ``v``, where its last bit decides nothing."""
    return v if mu == 0 else torch.sgn(v) * torch.expm1(v.abs() * _log1p(mu)) / mu


@lru_cache(maxsize=64)
def _log1p(mu: float) -> float:
    return float(elementary.log1p(torch.tensor(mu, dtype=torch.float64)))


def inverse_mu_law_slope(v: Float[Tensor, "*shape"], mu: float) -> Float[Tensor, "*shape"]:
    """Derivative of :func:`inverse_mu_law`.

    Example:
        >>> inverse_mu_law_slope(torch.zeros(1), mu=1.0)
        tensor([0.6931])
    """
    require_mu(mu)
    if mu == 0:
        return torch.ones_like(v)
    rate = _log1p(mu)
    return torch.exp(v.abs() * rate) * (rate / mu)


def mean_spacing(centroids: Float[Tensor, "*channels centroids"]) -> Float[Tensor, "*channels"]:
    """Mean distance of neighboring centroids, float64; 1 where they are all the same.

    Args:
        centroids: One set of centroids, or one of each channel.

    Example:
        >>> mean_spacing(torch.tensor([[-1.0, 0.0, 0.5, 1.0], [0.2, 0.2, 0.2, 0.2]]))
        tensor([0.6667, 1.0000], dtype=torch.float64)
    """
    z = centroids.detach()
    spread = (z.amax(-1) - z.amin(-1)).double()
    return torch.where(spread > 0, spread / max(z.shape[-1] - 1, 1), 1.0)


class SoftAssignment:
    r"""Soft assignment to centroids and the expansion, in cells of equal width.

    Cell 0 takes what lies below -1, the last one what lies above 1 or at it; there slopes are zero.

    Args:
        centroids: In the µ-law's domain, [-1, 1], ascending: one set, or one of each channel, whose
            cells follow one another.
        sharpness: :math:`S`, positive.
        mu: Of the µ-law.
        power: :math:`p`, 1 or 2.
        learns_sharpness: Whether the derivative by the sharpness is computed, too.

    Attributes:
        values: :math:`F_\mu^{-1}(g(F_\mu(x)))` in each cell, shape ``(channels * (cells + 2),)``.
        sharpness_slopes: Its derivative by :math:`\ln S`, in that shape, with ``learns_sharpness``.
        slopes: Its derivative by :math:`x`, in that shape.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> soft = SoftAssignment(torch.tensor([-0.5, 0.5]), sharpness=8.0, mu=0.0)
        >>> soft.values[cell_of(torch.tensor([-1.0, 0.4]), len(soft.values) - 2)]
        tensor([-0.5000,  0.4983])
    """

    def __init__(
        self,
        centroids: Float[Tensor, "*channels centroids"],
        *,
        sharpness: float,
        mu: float,
        power: int = 2,
        learns_sharpness: bool = False,
    ) -> None:
        require_mu(mu)
        if not sharpness > 0:
            raise ValueError(f"sharpness must be positive, got {sharpness}")
        if power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {power}")
        z, size = centroids.detach().flatten(), centroids.shape[-1]
        channels = len(z) // size
        v, slope = (
            x.repeat(channels) for x in _law_of_cells(cells_for(size), mu, centroids.device)
        )
        self._shape = centroids.shape
        self._nearest = nearest_by_cell(centroids.detach(), mu)
        # Coordinates in which the score is -|v - z|^p, with the nearest centroid as origin. Sharp
        # scores are large and their differences small: coordinates are subtracted in double
        # precision, where they are few; what is left, of a cell and a centroid, is in single.
        roots = sharpness ** (1 / power) / mean_spacing(centroids).reshape(channels, 1)
        scaled = (z.double().view(channels, size) * roots).flatten()
        self._neighbor_indices = _neighbors(scaled.view(channels, size), roots, power)
        near = (
            scaled.index_select(0, self._neighbor_indices.flatten()).view_as(self._neighbor_indices)
            - scaled
        )
        near = near.float().index_select(1, self._nearest)
        own = z.index_select(0, self._nearest)
        root = roots.expand(channels, len(v) // channels).flatten()
        point = ((v - own) * root).float()
        away = point - near
        if power == 1:
            scores, pull = point.abs() - away.abs(), away.sgn_()
        else:
            scores, pull = (away + point).mul_(near), away
        # An exponential too small for a normal number takes a processor a hundred times as long.
        terms = scores.clamp_(min=-3 * _NEGLIGIBLE).exp_()
        torch.threshold_(terms, math.exp(-2 * _NEGLIGIBLE), 0.0)
        total = terms.sum(0)
        mean = (terms * near).sum(0).div_(total)
        means = torch.addcmul(own, mean, (1 / root).float())
        self.values = _expanded(means, mu)
        if learns_sharpness:
            # A score is ln S times a constant, so that the mean of the centroids rises with ln S by
            # their covariance with the scores. Terms are exponentials of scores; 0 stays 0.
            scored = terms.clamp_min(math.exp(-2 * _NEGLIGIBLE)).log_().mul_(terms)
            rise = ((scored * near).sum(0) - scored.sum(0) * mean) / (total * root)
            self.sharpness_slopes = rise.float() * inverse_mu_law_slope(means, mu)
        # How fast a centroid's score grows with the centroid, and falls with the point: p times it.
        spread = near.sub_(mean).mul_(pull).mul_(terms)
        self._expansion = inverse_mu_law_slope(means, mu).div_(total)
        self.slopes = spread.sum(0).mul_(-power).mul_(self._expansion).div_(slope)
        by_channel = self.slopes.view(channels, -1)
        by_channel[:, 0] = by_channel[:, -1] = 0
        self._per_centroid = terms.add_(spread, alpha=power)

    def centroid_gradient(
        self, sums: Float[Tensor, " cells"]
    ) -> Float[Tensor, "*channels centroids"]:
        """Gradient of the centroids, in their shape.

        Args:
            sums: Sum, over the weights in each cell, of the gradient of what came of them.
        """
        terms = self._per_centroid * (sums * self._expansion)
        regions = terms.new_zeros(self._neighbor_indices.shape).index_add_(1, self._nearest, terms)
        gradient = terms.new_zeros(self._neighbor_indices.shape[1])
        gradient.index_add_(0, self._neighbor_indices.flatten(), regions.flatten())
        return gradient.view(self._shape)


def nearest_by_cell(
    centroids: Float[Tensor, "*channels centroids"], mu: float
) -> Int[Tensor, " cells"]:
    """The nearest centroid of every cell, from its middle; the lower one half-way between two.

    Args:
        centroids: In the µ-law's domain, [-1, 1], ascending: one set, or one of each channel.
        mu: Of the µ-law.

    Returns:
        Indices of the flattened centroids, of the cells of one channel after the other.

    Example:
        >>> nearest_by_cell(torch.tensor([-0.5, 0.5]), mu=0.0)[[0, 512, 513, -1]]
        tensor([0, 0, 1, 1])
    """
    z = centroids.reshape(-1, centroids.shape[-1])
    v, _ = _law_of_cells(cells_for(z.shape[1]), mu, z.device)
    thresholds = (z[:, 1:] + z[:, :-1]).double() / 2
    # The few thresholds are looked for among the many cells, not the other way round.
    first = torch.nn.functional.pad(torch.searchsorted(v, thresholds, right=True), (1, 1))
    first[:, -1] = len(v)
    indices = torch.arange(z.numel(), device=v.device)
    return torch.repeat_interleave(
        indices, first.diff(dim=1).flatten(), output_size=len(z) * len(v)
    )


def cells_for(size: int) -> int:
    """Cells between -1 and 1 in which so many centroids are told apart well.

    Example:
        >>> cells_for(4), cells_for(256)
        (1024, 8192)
    """
    return max(1024, 32 * size)


@lru_cache(maxsize=16)
def _law_of_cells(cells: int, mu: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """The middles of cells in the µ-law's domain, double, and the slope of its inverse there."""
    v = mu_law(cell_middles(cells, device).double(), mu)
    return v, inverse_mu_law_slope(v, mu).float()


def cell_middles(cells: int, device: torch.device | None = None) -> Float[Tensor, " cells_and_two"]:
    """The middle of each cell; -1 and 1 for what lies outside.

    Example:
        >>> cell_middles(2)
        tensor([-1.0000, -0.5000,  0.5000,  1.0000])
    """
    indices = torch.arange(cells + 2, device=device, dtype=torch.float32)
    return (indices - 0.5).mul_(2 / cells).sub_(1).clamp_(-1, 1)


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
        position = weight * half
    elif len(scales) == 1:
        position = weight.float() * (half / scales)
    else:
        position = (weight.float().reshape(len(scales), -1) * (half / scales)[:, None]).view(
            weight.shape
        )
    return position.add_(half + 1).clamp_(0, cells + 1).int()


def require_mu(mu: float) -> None:
    """Raise unless µ is a strength of compression.

    Raises:
        ValueError: Shows the value.
    """
    if not 0 <= mu < math.inf:
        raise ValueError(f"mu must be at least 0 (0 is no compression), got {mu}")


def _neighbors(z: Tensor, roots: Tensor, power: int) -> Tensor:
    """Centroids that count somewhere in the region of each, shape ``(neighbors, centroids)``.

    Those that count at a point lie between two limits that ascend with the point, so the region's
    ends say which do. As many for all: what is more is negligible.

    Args:
        z: Scaled centroids of each channel, shape ``(channels, centroids)``.
        roots: Scale of each channel, shape ``(channels, 1)``.
        power: Power of the distance, 1 or 2.

    Returns:
        Indices of the flattened centroids, shape ``(neighbors, channels * centroids)``.
    """
    edges = torch.cat([-roots, (z[:, 1:] + z[:, :-1]) / 2, roots], 1)
    left, right = edges[:, :-1], edges[:, 1:]
    low = left - ((z - left) ** power + _NEGLIGIBLE) ** (1 / power)
    high = right + ((right - z) ** power + _NEGLIGIBLE) ** (1 / power)
    first = torch.searchsorted(z, low)
    width = int((torch.searchsorted(z, high, right=True) - first).max())
    channels, size = z.shape
    start = first.clamp_(max=size - width) + size * torch.arange(channels, device=z.device)[:, None]
    return start.flatten() + torch.arange(width, device=z.device)[:, None]
