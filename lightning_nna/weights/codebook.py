r"""Codebooks: integer centroids times a scale, in place of a weight's values.

A weight of :math:`b` bits takes one of :math:`2^b` centroids,

.. math:: \hat w = s_g\, n_k, \qquad n_1 \le \dots \le n_K,\quad |n_k| \le n_{max},

with one set of centroids :math:`n_k` for the tensor or for each of its channels, and a scale
:math:`s_g` for the tensor or for each group of its rows. Integer centroids are deployed unchanged:
the accelerator reads :math:`b` bits a weight and multiplies in 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_nna.emulation.arithmetic.quantized_weight import (
    largest_scales,
    powers_of_two,
    round_significands,
)
from lightning_nna.quantization.entropy_constrained import entropy_constrained
from lightning_nna.quantization.lloyd_max import lloyd_max, lloyd_max_groups, snap_to_grid
from lightning_nna.weights.pipeline import WeightGrid, WeightTransform
from lightning_nna.weights.read_packed import width_of
from lightning_nna.weights.selection import Granularity, groups_of

# 8 bits of an index are as many as a weight without a codebook has.
_MOST_BITS_OF_A_CHANNEL = 7


@dataclass(frozen=True)
class CodebookSettings:
    """Settings of the codebooks that a method fits.

    Args:
        granularity: Scales: ``"per_tensor"``, or ``"per_channel"`` as far as the operators of the
            accelerator have them.
        grid_bits: Width of integer centroids in bits, 2 to 8; None for float centroids.
        power_of_two_scales: Whether scales are powers of two.
        pin_zero: Whether one centroid is zero.
        max_entropy_bits: Greatest entropy of a tensor's indices, in bits a weight; None for any.
        codebook: Centroids: ``"per_tensor"``, or ``"per_channel"`` for those tensors that can have
            several scales.

    Raises:
        ValueError: If a setting is out of range.
    """

    granularity: Granularity = "per_tensor"
    grid_bits: int | None = 8
    power_of_two_scales: bool = False
    pin_zero: bool = False
    max_entropy_bits: float | None = None
    codebook: Granularity = "per_tensor"

    def __post_init__(self) -> None:
        for name in ("granularity", "codebook"):
            if getattr(self, name) not in get_args(Granularity):
                raise ValueError(
                    f"{name} must be 'per_tensor' or 'per_channel', got {getattr(self, name)!r}"
                )
        if self.codebook == "per_channel" and self.max_entropy_bits is not None:
            raise ValueError(
                f"max_entropy_bits={self.max_entropy_bits} is an entropy of the integers of a "
                f"whole tensor, as accelerators code them, and centroids of each channel do not "
                f"keep it: set codebook='per_tensor', or max_entropy_bits=None"
            )
        if self.grid_bits is not None and not 2 <= self.grid_bits <= 8:
            raise ValueError(f"grid_bits must be 2 to 8, or None, got {self.grid_bits}")


@dataclass(frozen=True)
class Codebook:
    """Centroids, decision thresholds between neighbors, and scales.

    Args:
        centroids: Codebook entries in units of the scale, ascending, float32, shape
            ``(centroids,)``, or ``(channels, centroids)`` with those of each channel, an equal
            number of rows; equal ones count once.
        thresholds: Decision thresholds in units of the scale, shape ``(…, centroids - 1)``; a
            weight on a threshold takes the lower centroid.
        scales: Scales in the unit of the weights, float32, shape ``(groups,)``, positive.
        grid_bits: Width of integer centroids in bits; None for float centroids.
    """

    centroids: Float[Tensor, "*channels centroids"]
    thresholds: Float[Tensor, "*channels thresholds"]
    scales: Float[Tensor, " groups"]
    grid_bits: int | None = 8

    @classmethod
    def fit(
        cls,
        weight: Float[Tensor, "rows *rest"],
        bits: int,
        *,
        groups: int = 1,
        grid_bits: int | None = 8,
        power_of_two_scales: bool = False,
        pin_zero: bool = False,
        max_entropy_bits: float | None = None,
        channels: int | None = None,
    ) -> Codebook:
        """Fit the Lloyd-Max codebook of a trained weight, or the best one of a given entropy.

        Args:
            weight: Trained weight, finite, shape ``(rows, …)``.
            bits: Bits of an index, 1 to 8.
            groups: Number of scales, a divisor of the rows.
            grid_bits: See :class:`Codebook`.
            power_of_two_scales: Whether scales are rounded up to powers of two.
            pin_zero: Whether one centroid is exactly zero.
            max_entropy_bits: Greatest entropy of the indices, in bits a weight, before centroids
                are rounded to integers; None for Lloyd-Max centroids.
            channels: Number of channels with centroids of their own, a divisor of the rows; None
                for one set of centroids.

        Example:
            >>> book = Codebook.fit(torch.tensor([[-1.0, -0.9, 0.5, 0.6]]), bits=1)
            >>> book.project(torch.tensor([[-2.0, 0.1]])).round(decimals=3)
            tensor([[-0.9530,  0.5510]])
        """
        scales = scales_of(weight, groups, grid_bits=grid_bits, power_of_two=power_of_two_scales)
        scaled = to_grid_units(weight, scales)
        centroids = best_centroids(
            scaled, bits, pin_zero=pin_zero, max_entropy_bits=max_entropy_bits, channels=channels
        )
        if grid_bits is not None:
            rows = centroids.reshape(-1, centroids.shape[-1])
            snapped = [snap_to_grid(row, 1.0, maximum=maximum_of(grid_bits)) for row in rows]
            centroids = torch.stack(snapped).view_as(centroids)
        return cls(centroids, midpoints(centroids), scales, grid_bits)

    @property
    def grid(self) -> WeightGrid | None:
        """Quantization parameters of the quantized weight; None for float centroids."""
        if self.grid_bits is None:
            return None
        return WeightGrid(self.scales, maximum_of(self.grid_bits))

    @property
    def channels(self) -> int:
        """Number of channels with centroids of their own; 1 for one set."""
        return self.centroids.numel() // self.centroids.shape[-1]

    @property
    def scaled_centroids(self) -> Float[Tensor, "rows centroids"]:
        """Centroids of each group or channel in the unit of the weights, ``(…, centroids)``."""
        return self.scales[:, None] * self.centroids

    def indices(self, weight: Float[Tensor, "rows *rest"]) -> Int[Tensor, "rows *rest"]:
        """Look up the centroid of every weight.

        Args:
            weight: Weights in the unit of the scales, shape ``(rows, …)``.

        Returns:
            Indices of the centroids, int64, in the shape of ``weight``.
        """
        units = to_grid_units(weight, self.scales)
        if self.thresholds.ndim == 1:
            return torch.bucketize(units, self.thresholds)
        rows = units.reshape(len(self.thresholds), -1)
        return torch.searchsorted(self.thresholds.contiguous(), rows).view(weight.shape)

    def project(self, weight: Float[Tensor, "rows *rest"]) -> Float[Tensor, "rows *rest"]:
        """Move every weight to its centroid. Twice is the same as once.

        Args:
            weight: Weights in the unit of the scales, shape ``(rows, …)``.
        """
        indices = self.indices(weight)
        if self.centroids.ndim == 1:
            integers = self.centroids[indices]
        else:
            rows = indices.reshape(len(self.centroids), -1)
            integers = self.centroids.gather(1, rows).view(weight.shape)
        return from_grid_units(integers, self.scales).to(weight.dtype)

    def packed_bytes(self, weight: Tensor, bits: int) -> int:
        """Size of indices, centroids (a byte each) and scales (four bytes each), in bytes.

        Args:
            weight: Weight whose indices are stored.
            bits: Bits of an index.
        """
        indices = -(-weight.numel() * bits // 8)
        return indices + self.channels * 2**bits + 4 * len(self.scales)


@runtime_checkable
class CodebookTransform(WeightTransform, Protocol):
    """A transform whose hard weights are those of a codebook."""

    #: Bits of an index.
    bits: int

    @property
    def codebook(self) -> Codebook:
        """Codebook of the deployed weights."""

    def soft_hard_gap(self, weight: Tensor) -> float:
        """Distance of the weight in training and the deployed one, relative to the weight.

        Args:
            weight: Latent weight.

        Returns:
            Root of the mean square of the difference over that of the weight.
        """


def index_bits(integers: Tensor, transforms: Sequence[WeightTransform]) -> int:
    """Count the bits that the index of a weight needs, in the channel with the most values.

    Args:
        integers: Deployed weight, shape ``(rows, …)``.
        transforms: Its transforms; the last one may have a codebook of each channel.

    Example:
        >>> index_bits(torch.tensor([[3, 0], [0, 7]]), [])
        2
    """
    last = transforms[-1] if transforms else None
    channels = last.codebook.channels if isinstance(last, CodebookTransform) else 1
    return width_of(max(len(row.unique()) for row in integers.reshape(channels, -1)))


def best_centroids(
    weight: Float[Tensor, "..."],
    bits: int,
    *,
    pin_zero: bool,
    max_entropy_bits: float | None,
    channels: int | None = None,
) -> Float[Tensor, "*channels centroids"]:
    """Compute the centroids of the least squared error, of a given entropy if there is one.

    Args:
        weight: Values to quantize, any shape.
        bits: Bits of an index.
        pin_zero: Whether one centroid is exactly zero.
        max_entropy_bits: Greatest entropy of the indices, in bits a weight; None for any.
        channels: Number of channels with centroids of their own, without ``max_entropy_bits``;
            None for one set of centroids.

    Example:
        >>> weight = torch.linspace(-1, 1, 1001).pow(3)
        >>> best_centroids(weight, 2, pin_zero=False, max_entropy_bits=None)
        tensor([-0.7450, -0.2980,  0.0335,  0.6258])
    """
    if channels is not None:
        assert max_entropy_bits is None, "CodebookSettings rejects both"
        return lloyd_max_groups(weight.reshape(channels, -1), 2**bits, pin_zero=pin_zero)
    if max_entropy_bits is None:
        return lloyd_max(weight, 2**bits, pin_zero=pin_zero).centroids
    return entropy_constrained(
        weight, 2**bits, max_entropy_bits=max_entropy_bits, pin_zero=pin_zero
    ).centroids


def channels_of(
    module: nn.Module, name: str, weight: Tensor, bits: int, codebook: Granularity
) -> int | None:
    """Count the channels of a parameter that have centroids of their own; None for one set.

    They are those of :func:`.groups_of`: rows of a linear layer or convolution, gates of an LSTM.

    Args:
        module: Module that the parameter belongs to.
        name: Name of the parameter.
        weight: Parameter, shape ``(rows, …)``.
        bits: Bits of an index.
        codebook: ``"per_tensor"`` or ``"per_channel"``.

    Raises:
        ValueError: If the centroids of a channel are all integers of a weight, or more than the
            weights of the channel; names the parameter, both numbers, and what to change.

    Example:
        >>> channels_of(nn.Linear(8, 3), "weight", torch.ones(3, 8), 2, "per_channel")
        3
    """
    channels = groups_of(module, name, weight, codebook)
    if channels == 1:
        return None
    size = weight.numel() // channels
    if bits > _MOST_BITS_OF_A_CHANNEL or 2**bits > size:
        reason = (
            f"{2**bits} are all the integers that a weight can have"
            if bits > _MOST_BITS_OF_A_CHANNEL
            else f"a channel has {size} weights"
        )
        raise ValueError(
            f"{name} cannot have {2**bits} centroids ({bits} bits) for each of its {channels} "
            f"channels, since {reason}: give it fewer bits, or leave it out of targets and give "
            f"it a callback of its own with codebook='per_tensor'"
        )
    return channels


def relative_gap(weight: Tensor, difference: Tensor) -> float:
    """Divide the root of the mean square of a difference by that of a weight.

    Args:
        weight: Weight, any shape.
        difference: Difference of two weights, in the same unit and shape.

    Returns:
        0 for a weight of zeros.

    Example:
        >>> relative_gap(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0]))
        0.2
    """
    power = float(weight.detach().float().square().mean())
    return (float(difference.detach().float().square().mean()) / power) ** 0.5 if power > 0 else 0.0


def scales_of(
    weight: Tensor, groups: int, *, grid_bits: int | None, power_of_two: bool = False
) -> Float[Tensor, " groups"]:
    """Compute scales with which the largest weight of each group is the largest integer.

    Args:
        weight: Weight, shape ``(rows, …)``.
        groups: Number of scales, a divisor of the rows.
        grid_bits: Width of the integers in bits; None for 8.
        power_of_two: Whether scales are rounded up to powers of two.

    Example:
        >>> scales_of(torch.tensor([[1.27, -0.3]]), 1, grid_bits=8)
        tensor([0.0100])
    """
    flat = weight.detach().float().reshape(groups, -1)
    return largest_scales(flat, maximum=maximum_of(grid_bits or 8), power_of_two=power_of_two)


def narrowed_scales(
    scales: Tensor, fraction: float | Tensor, power_of_two: bool
) -> Float[Tensor, " groups"]:
    """Compute scales with which a fraction of the range is the largest integer, or a little more.

    Args:
        scales: Scales of the whole range, shape ``(groups,)``, positive.
        fraction: Fraction of the range, above 0 and at most 1, or one of each scale.
        power_of_two: Whether scales are rounded up to powers of two.

    Example:
        >>> narrowed_scales(torch.tensor([1.0]), 0.3, True)
        tensor([0.5000])
    """
    wanted = scales.double() * fraction
    if power_of_two:
        return powers_of_two(wanted).float()
    return round_significands(wanted).float()


def to_grid_units(weight: Tensor, scales: Tensor) -> Tensor:
    """Divide a weight by its scales.

    Args:
        weight: Weight, shape ``(rows, …)``.
        scales: Scales of groups of rows, shape ``(groups,)``.

    Returns:
        Weight in grid units, float32.

    Example:
        >>> to_grid_units(torch.tensor([[1.0], [1.0]]), torch.tensor([0.5, 0.25]))
        tensor([[2.],
                [4.]])
    """
    return (weight.detach().float().reshape(len(scales), -1) / scales[:, None]).reshape(
        weight.shape
    )


def from_grid_units(scaled: Tensor, scales: Tensor) -> Tensor:
    """Multiply grid units by their scales: the inverse of :func:`to_grid_units`.

    Args:
        scaled: Weight in grid units, shape ``(rows, …)``.
        scales: Scales of groups of rows, shape ``(groups,)``.
    """
    return (scaled.reshape(len(scales), -1) * scales[:, None]).reshape(scaled.shape)


def maximum_of(grid_bits: int) -> int:
    """Return the largest integer of a symmetric grid.

    Args:
        grid_bits: Width of the integers in bits.

    Example:
        >>> maximum_of(8)
        127
    """
    return int(2 ** (grid_bits - 1) - 1)


def midpoints(centroids: Tensor) -> Tensor:
    """Compute the decision thresholds half-way between neighbors.

    Args:
        centroids: Centroids, ascending, shape ``(…, centroids)``.
    """
    return (centroids[..., 1:] + centroids[..., :-1]) / 2
