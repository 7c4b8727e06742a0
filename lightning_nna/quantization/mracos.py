r"""MRACos: a multi-regional absolute cosine regularizer.

Between neighboring centroids the penalty is one arch, zero at both:

.. math::
    R(w) = \frac{\Delta_k}{\pi} \left| \sin \frac{\pi (w - z_k)}{\Delta_k} \right|,
    \qquad z_k \le w \le z_{k+1},\ \Delta_k = z_{k+1} - z_k,

which is :math:`|\cos|` shifted by half a period, with the region's own period. Outside of the
centroids it grows linearly with slope 1. The factor :math:`\Delta_k / \pi` gives every arch the
slope :math:`\pm 1` at its ends, so that narrow regions pull no harder than wide ones; without it
an arch is 1 high whatever its width.

Reference:
    Zhen et al., "Sub-8-bit quantization aware training for 8-bit neural network accelerator with
    on-device speech recognition", Interspeech 2022, arXiv 2206.15408.

Differs from the paper: its equation is not known to us. The sine's form, the factor and what
happens outside of the centroids are ours.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

_LARGEST_INTEGER = 2047
# A weight outside counts as one that is so far out: there the slope is 1 except for rounding.
_BEYOND = 2.0**-12


def mracos(
    weight: Float[Tensor, "*shape"],
    centroids: Float[Tensor, "*channels centroids"],
    *,
    scaled: bool = True,
) -> Float[Tensor, "*shape"]:
    """Penalty of every weight.

    Args:
        weight: Any weights.
        centroids: Ascending, in the unit of the weights; equal ones count once. With a first axis,
            those of each channel, an equal number of rows of ``weight``.
        scaled: Arches of slope 1 (in the unit of the weights); else of height 1.

    Returns:
        Penalties, in the shape of ``weight``. Differentiable but at centroids, where autograd's
        slope is zero, as :func:`mracos_gradient` has it.

    Raises:
        ValueError: If there is no centroid, or they are not ascending.

    Example:
        >>> mracos(torch.tensor([0.0, 0.5, 2.0]), torch.tensor([0.0, 1.0]), scaled=False)
        tensor([0., 1., 1.])
    """
    w, z = _by_channel(weight, centroids)
    lower, upper, inside = _regions(w, z)
    # A region between equal centroids has only the weights beyond them, and no arch.
    width = torch.where(upper > lower, upper - lower, 1.0)
    arch = torch.sin(math.pi * (w - lower) / width).abs()
    beyond = torch.where(w < lower, lower - w, w - upper)
    penalty = torch.where(inside, arch * (width / math.pi) if scaled else arch, beyond)
    return penalty.view(weight.shape)


def mracos_gradient(
    weight: Float[Tensor, "*shape"],
    centroids: Float[Tensor, "*channels centroids"],
    *,
    scaled: bool = True,
) -> Float[Tensor, "*shape"]:
    r"""Derivative of :func:`mracos`, in closed form.

    .. math::
        R'(w) = c \cos \frac{\pi (w - z_k)}{\Delta_k}, \qquad
        c = 1 \text{ (scaled)},\ \pi / \Delta_k \text{ (not scaled)};

    :math:`\pm 1` outside of the centroids, and 0 at a centroid, where the penalty has a kink.

    Args:
        weight: Any weights; what is not a number stays so.
        centroids: As of the penalty.
        scaled: As of the penalty.

    Raises:
        ValueError: If there is no centroid, or they are not ascending.

    Example:
        >>> mracos_gradient(torch.tensor([0.25, 0.5, 1.0, 2.0]), torch.tensor([0.0, 1.0]))
        tensor([ 0.7071, -0.0000,  0.0000,  1.0000])
    """
    w, z = _by_channel(weight, centroids)
    if len(z) == 1 and z[0, 0] < z[0, -1] and _is_on_integers(z):
        return _gradient_on_integers(weight, torch.unique_consecutive(z), scaled)
    lower, upper, inside = _regions(w, z)
    width = torch.where(upper > lower, upper - lower, 1.0)
    slope = torch.cos(math.pi * (w - lower) / width)
    if not scaled:
        slope = slope * (math.pi / width)
    slope = torch.where(inside, slope, torch.sgn(w - lower))
    slope.masked_fill_(w.isnan(), math.nan)  # Its sign would be 0.
    return slope.masked_fill_((w == lower) | (w == upper), 0.0).view(weight.shape)


def _by_channel(weight: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of each channel in a row, and its centroids."""
    if centroids.ndim not in (1, 2) or centroids.numel() == 0:
        raise ValueError(
            f"centroids need one axis, or two for channels, and an entry, got shape "
            f"{list(centroids.shape)}"
        )
    if bool((centroids.diff() < 0).any()):
        raise ValueError(f"centroids must be ascending, got {centroids.tolist()}")
    z = centroids.reshape(-1, centroids.shape[-1]).contiguous()
    return weight.reshape(len(z), -1), z


def _is_on_integers(centroids: Tensor) -> bool:
    few = float(centroids.abs().max()) <= _LARGEST_INTEGER
    return few and bool((centroids == centroids.round()).all())


def _gradient_on_integers(weight: Tensor, centroids: Tensor, scaled: bool) -> Tensor:
    """As :func:`mracos_gradient`; the integer below a weight tells its region, by a table."""
    first, last = int(centroids[0]), int(centroids[-1])
    # Cells of width 1; the first ends at the first centroid, the last begins at the last one.
    cells = torch.arange(first - 1, last + 1, device=weight.device, dtype=weight.dtype)
    below = torch.searchsorted(centroids, cells, right=True) - 1
    lower = centroids[below.clamp(min=0)]
    rate = math.pi / (centroids[(below + 1).clamp(max=len(centroids) - 1)] - lower)
    lower[0], rate[0], rate[-1] = first - 1, math.pi, 0.0
    w = weight.detach().clamp(first - _BEYOND, last + _BEYOND)
    # A weight that is not a number is in some cell, and its distance is not a number either.
    cell = w.floor().sub_(first - 1).int().clamp_(0, len(rate) - 1).flatten()
    factor = rate.index_select(0, cell).view_as(w)
    distance = w.sub_(lower.index_select(0, cell).view_as(w))
    at_centroid = distance == 0
    slope = distance.mul_(factor).cos_()
    if not scaled:
        # Outside, the slope is 1.
        factor = rate.index_fill(0, torch.tensor([0, len(rate) - 1], device=rate.device), 1.0)
        slope.mul_(factor.index_select(0, cell).view_as(w))
    return slope.masked_fill_(at_centroid, 0.0)


def _regions(weight: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both ends of each weight's region, and whether it lies within the centroids."""
    above = torch.searchsorted(centroids, weight.detach()).clamp_(max=centroids.shape[1] - 1)
    lower = centroids.gather(1, (above - 1).clamp_(min=0))
    inside = (weight >= centroids[:, :1]) & (weight <= centroids[:, -1:])
    return lower, centroids.gather(1, above), inside
