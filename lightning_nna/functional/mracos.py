r"""MRACos: a multi-regional absolute cosine regulariser.

Between neighbouring centroids the penalty is one arch, zero at both:

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


def mracos(
    weight: Float[Tensor, "*shape"], centroids: Float[Tensor, " levels"], *, scaled: bool = True
) -> Float[Tensor, "*shape"]:
    """Penalty of every weight.

    Args:
        weight: Any weights.
        centroids: Ascending, in the unit of the weights; equal ones count once.
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
    distinct = _distinct(centroids)
    if len(distinct) == 1:
        return (weight - distinct).abs()
    lower, width, inside = _region(weight, distinct)
    arch = torch.sin(math.pi * (weight - lower) / width).abs()
    beyond = torch.where(weight < distinct[0], distinct[0] - weight, weight - distinct[-1])
    return torch.where(inside, arch * (width / math.pi) if scaled else arch, beyond)


def mracos_gradient(
    weight: Float[Tensor, "*shape"], centroids: Float[Tensor, " levels"], *, scaled: bool = True
) -> Float[Tensor, "*shape"]:
    r"""Derivative of :func:`mracos`, in closed form.

    .. math::
        R'(w) = c \cos \frac{\pi (w - z_k)}{\Delta_k}, \qquad
        c = 1 \text{ (scaled)},\ \pi / \Delta_k \text{ (not scaled)};

    :math:`\pm 1` outside of the centroids, and 0 at a centroid, where the penalty has a kink.

    Args:
        weight: Any weights.
        centroids: Ascending, in the unit of the weights.
        scaled: As of the penalty.

    Raises:
        ValueError: If there is no centroid, or they are not ascending.

    Example:
        >>> mracos_gradient(torch.tensor([0.25, 0.5, 1.0, 2.0]), torch.tensor([0.0, 1.0]))
        tensor([ 0.7071, -0.0000,  0.0000,  1.0000])
    """
    distinct = _distinct(centroids)
    if len(distinct) == 1:
        return torch.sgn(weight - distinct)
    lower, width, inside = _region(weight, distinct)
    slope = torch.cos(math.pi * (weight - lower) / width)
    if not scaled:
        slope = slope * (math.pi / width)
    slope = torch.where(inside, slope, torch.sgn(weight - lower))
    return slope.masked_fill_((weight == lower) | (weight == lower + width), 0.0)


def _distinct(centroids: Tensor) -> Tensor:
    if centroids.ndim != 1 or len(centroids) == 0:
        raise ValueError(f"centroids need one axis and an entry, got shape {centroids.shape}")
    if bool((centroids.diff() < 0).any()):
        raise ValueError(f"centroids must be ascending, got {centroids.tolist()}")
    return torch.unique_consecutive(centroids)


def _region(weight: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lower end and width of each weight's region, and whether it lies within the centroids."""
    above = torch.bucketize(weight.detach(), centroids).clamp_(1, len(centroids) - 1)
    lower = centroids[above - 1]
    inside = (weight >= centroids[0]) & (weight <= centroids[-1])
    return lower, centroids[above] - lower, inside
