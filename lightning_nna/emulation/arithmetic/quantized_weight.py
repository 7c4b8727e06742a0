r"""Weights on their way into an operator.

The last stage of the weight pipeline is the chip's grid: symmetric integers without a zero point,

.. math:: q_w = \mathrm{round}(w / s), \qquad s = \max |w| / q_{max}

with one scale for a group of rows (one output channel, one LSTM gate, or all rows). The scale
follows the weights in training, so nothing is ever clipped and the gradient passes unchanged; where
it is learned, :mod:`.learned_scales` has the gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int8
from numpy.typing import NDArray
from torch import Tensor

from lightning_nna.elementary import power_of_two
from lightning_nna.emulation.arithmetic.deferred_checks import DEFERRED
from lightning_nna.emulation.arithmetic.integer_products import ByteProduct, WideProduct
from lightning_nna.emulation.arithmetic.on_host import in_memory, on_host
from lightning_nna.emulation.kernels import definitions as kernels
from lightning_nna.emulation.kernels.library import compiled_for, runs_kernel
from lightning_nna.emulation.kernels.reference import CENTROIDS, SMALLEST_SCALE

#: Instead of a number of rows that share a scale: each index of the second axis has a scale, as the
#: outputs of a transposed convolution have.
SECOND_AXIS = 0
#: One number for each channel, and the like.
Numbers = TypeVar("Numbers", Tensor, NDArray[np.float64])


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as the chip holds it, a quarter of the float weight's size.

    Args:
        stored: Integers, int8, in the shape of the weight.
        scales: One positive scale per row (first axis), float32.
        axis: Axis that the scales belong to instead, 1 for :data:`SECOND_AXIS`.
    """

    stored: Int8[Tensor, "*shape"]
    scales: Float[Tensor, " channels"]
    axis: int = 0

    def turned(self) -> QuantizedWeight:
        """Return the weight with its first two axes swapped, and the scales of the other one."""
        return QuantizedWeight(
            self.stored.transpose(0, 1).contiguous(), self.scales, axis=1 - self.axis
        )

    @property
    def integers(self) -> Float[Tensor, "*shape"]:
        """The integers in float32, computed at every call."""
        kernel = compiled_for("row_values", self.stored)
        return self.stored.float() if kernel is None else kernel(self.stored, None)

    @property
    def values(self) -> Float[Tensor, "*shape"]:
        """The weight that the integers stand for; exact in float32, computed at every call."""
        if self.axis:
            return self.turned().values.transpose(0, 1).contiguous()
        return values_of(self.stored, self.scales)

    @cached_property
    def row_sums(self) -> Float[Tensor, " rows"]:
        """Sum of the integers of each row, float64: what an input's zero point counts."""
        sums = self._row_sums
        return self.stored.flatten(1).sum(1).double() if sums is None else sums[0]

    @cached_property
    def byte_product(self) -> ByteProduct:
        """Products of bytes with the rows of a matrix."""
        return ByteProduct(self.stored)

    @cached_property
    def wide_product(self) -> WideProduct:
        """Products of 16-bit integers with the rows of a matrix."""
        return WideProduct(self.byte_product, self.row_sums, self._largest_sum)

    @cached_property
    def layers(self) -> dict[Any, Any]:
        """Preparations of layers that have the weight, see :func:`.linear.fully_connected`."""
        return {}

    @property
    def bound(self) -> float:
        """Bound on :meth:`largest_sum` from the shape alone."""
        return 128.0 * math.prod(self.stored.shape[1:])

    def largest_sum(self) -> float:
        """Largest sum of absolute integers over a row, which bounds every accumulator.

        On a device it is the bound that the shape gives.
        """
        return self._largest_sum

    def exceeds(self, limit: float) -> bool:
        """Tell whether the largest sum reaches a limit; most often the shape alone denies it."""
        return self.bound >= limit and self._largest_sum >= limit

    @cached_property
    def _row_sums(self) -> tuple[Tensor, float] | None:
        """Both sums of rows in one pass; None where no compiled kernel forms them."""
        kernel = compiled_for("row_sums", self.stored)
        return None if kernel is None else kernel(self.stored)

    @cached_property
    def _largest_sum(self) -> float:
        if not in_memory(self.stored):
            return self.bound
        if self._row_sums is not None:
            return self._row_sums[1]
        return float(self.stored.abs().flatten(1).sum(1).max())


def quantize_weight(
    weight: Float[Tensor, "rows *rest"],
    *,
    rows_per_scale: int,
    maximum: int,
    power_of_two: bool = False,
) -> QuantizedWeight:
    """Quantize a weight to the accelerator's integers.

    Args:
        weight: Any float weight; the output channel is the first axis.
        rows_per_scale: Rows that share a scale: 1 per channel, ``rows / 4`` for LSTM gates,
            ``rows`` per tensor. Must divide ``rows``.
        maximum: Largest integer, 127 for 8 bits.
        power_of_two: Round scales up to powers of two.

    Raises:
        FloatingPointError: If a weight is not finite.

    Example:
        >>> quantize_weight(torch.tensor([[127.0, -63.6]]), rows_per_scale=1, maximum=127).integers
        tensor([[127., -64.]])
    """
    weight = weight.detach().float()
    if weight.numel() and runs_kernel("quantize_rows", weight):
        stored, scales, is_finite = kernels.quantize_rows(
            weight, rows_per_scale=rows_per_scale, maximum=maximum, power_of_two=power_of_two
        )
        DEFERRED.require(is_finite, _not_finite())
        return QuantizedWeight(stored, scales)
    groups = weight.reshape(weight.shape[0] // rows_per_scale, -1)
    scale = largest_scales(groups, maximum=maximum, power_of_two=power_of_two)
    scales = scale if rows_per_scale == 1 else scale.repeat_interleave(rows_per_scale)
    # No scale is so small that rounding could leave the bounds.
    integers = (weight / per_row(scales, weight)).round_()
    return QuantizedWeight(integers.to(torch.int8), scales)


def values_of(
    stored: Int8[Tensor, "rows *rest"], scales: Float[Tensor, " rows"]
) -> Float[Tensor, "rows *rest"]:
    """The weight that integers with a scale a row stand for.

    Example:
        >>> values_of(torch.tensor([[2, -3]], dtype=torch.int8), torch.tensor([0.5]))
        tensor([[ 1.0000, -1.5000]])
    """
    if not in_memory(stored):
        return stored * per_row(scales, stored)  # One launch in place of two.
    kernel = compiled_for("row_values", stored)
    if kernel is not None:
        values: Tensor = kernel(stored, scales)
        return values
    return stored.float().mul_(per_row(scales, stored))


def quantize_onto(
    weight: Float[Tensor, "rows *rest"], scales: Float[Tensor, " rows"], *, maximum: int
) -> QuantizedWeight:
    """Put a weight on a given grid, and clip what lies outside.

    Args:
        weight: See :func:`quantize_weight`.
        scales: One per row, as the chip holds them.
        maximum: Largest integer.

    Raises:
        FloatingPointError: If a weight is not finite.

    Example:
        >>> quantize_onto(torch.tensor([[9.0, -1.6]]), torch.ones(1), maximum=7).integers
        tensor([[ 7., -2.]])
    """
    integers = (weight.detach().float() / per_row(scales, weight)).round_()
    _require_finite(integers)
    return QuantizedWeight(integers.clamp_(-maximum, maximum).to(torch.int8), scales)


def with_scales_of_at_least(
    weight: QuantizedWeight,
    smallest: Float[Tensor, " rows"],
    *,
    rows_per_scale: int = 1,
    power_of_two: bool = False,
) -> QuantizedWeight:
    """Raise the scales of rows whose scale is too small, and round their integers again.

    A bias has the scale of input times weight: a row of tiny weights has so fine a scale that no
    integer of the bias's width can hold its bias. What is lost of the weights is nothing compared
    with that bias. Where the tensor has so few integers that it is compressed by them (centroids),
    the row takes the nearest of them, or 0.

    Args:
        weight: A quantized weight.
        smallest: Smallest scale of each row, float64, at least 0.
        rows_per_scale: Rows that share a scale.
        power_of_two: Round scales up to powers of two.

    Returns:
        ``weight`` itself where every scale is large enough.

    Example:
        >>> stored = torch.arange(-50, 50, dtype=torch.int8).view(2, 50)
        >>> weight = QuantizedWeight(stored, torch.ones(2))
        >>> raised = with_scales_of_at_least(weight, torch.tensor([0.5, 4.0]).double())
        >>> raised.scales, raised.integers[:, -1]
        (tensor([1., 4.]), tensor([-1., 12.]))
    """
    needed = smallest.reshape(-1, rows_per_scale).amax(1).repeat_interleave(rows_per_scale)
    raised = needed > weight.scales
    if not bool(raised.any()):
        return weight
    # A scale in float32 must not fall below what is needed.
    upper = powers_of_two(needed) if power_of_two else _significands_above(needed)
    scales = torch.where(raised, upper.float(), weight.scales)
    ratio = per_row(weight.scales.double() / scales.double(), weight.stored)
    integers = (weight.stored.double() * ratio).round_()
    integers = _nearest_centroids(weight.stored, integers)
    stored = torch.where(per_row(raised, weight.stored), integers.to(torch.int8), weight.stored)
    return QuantizedWeight(stored, scales)


def with_scales_for(
    weight: QuantizedWeight,
    bias: Float[Tensor, " rows"],
    *,
    unit: float,
    rows_per_scale: int,
    power_of_two: bool,
) -> tuple[QuantizedWeight, Tensor]:
    """Raise the scales that cannot hold a bias, on a device, in one launch.

    Args:
        weight: A quantized weight.
        bias: Any float dtype; what is not finite counts as 0.
        unit: Divisor of the bias that gives the smallest scale of a row.
        rows_per_scale: See :func:`with_scales_of_at_least`.
        power_of_two: See there.

    Returns:
        A weight, equal to the given one where every scale is large enough, and whether all biases
        are finite, bool, shape ``()``.
    """
    stored, scales, is_finite = kernels.raise_scales(
        weight.stored,
        weight.scales,
        bias.detach(),
        unit=unit,
        rows_per_scale=rows_per_scale,
        power_of_two=power_of_two,
    )
    return QuantizedWeight(stored, scales), is_finite


def _nearest_centroids(stored: Tensor, integers: Tensor) -> Tensor:
    """The nearest of a tensor's few integers, or 0, for each integer of any shape; else these.

    Between two that are as near it is the smaller.
    """
    centroids = stored.unique()
    if len(centroids) > CENTROIDS:
        return integers
    own = torch.cat([centroids, centroids.new_zeros(1)]).double().unique()
    borders = (own[1:] + own[:-1]) / 2
    return own[torch.bucketize(integers, borders)]


def largest_scales(
    groups: Float[Tensor, "groups weights"], *, maximum: int, power_of_two: bool = False
) -> Float[Tensor, " groups"]:
    """Scales with which the largest weight of each group is the largest integer, float32.

    Raises:
        FloatingPointError: If a weight is not finite.
    """
    magnitude = groups.detach().abs().amax(1).double()
    _require_finite(magnitude)
    rounded = powers_of_two if power_of_two else round_significands
    if on_host(magnitude):
        scales = rounded(np.maximum(magnitude.numpy() / maximum, SMALLEST_SCALE))
        return torch.from_numpy(scales).float()
    # By a tensor: a GPU would multiply by the inverse of a number.
    exact = magnitude / magnitude.new_full((), maximum)
    return rounded(exact.clamp_min(SMALLEST_SCALE)).float()


def _require_finite(values: Tensor) -> None:
    if not in_memory(values):
        DEFERRED.require(torch.isfinite(values.sum(dtype=torch.float64)), _not_finite())
    elif not math.isfinite(float(values.sum(dtype=torch.float64))):
        raise _not_finite()


def _not_finite() -> FloatingPointError:
    return FloatingPointError("a weight is not finite: it cannot be quantized")


def per_row(scales: Tensor, weight: Tensor) -> Tensor:
    """One number a row, shaped to broadcast over the row."""
    return scales.reshape(-1, *([1] * (weight.ndim - 1)))


def round_significands(scale: Numbers) -> Numbers:
    """Round to 16-bit significands: scale * integer is exact, and quantizing twice changes nothing.

    To nearest here and not up: the largest integer may then fall 2^-17 outside, which rounding
    absorbs.

    Args:
        scale: Positive numbers, any shape, a tensor or a float64 array, as is the result.
    """
    if isinstance(scale, Tensor):
        mantissa, exponent = torch.frexp(scale)
        return ((mantissa * 2**16).round() * power_of_two(exponent - 16)).to(scale.dtype)
    mantissas, exponents = np.frexp(scale)
    return (mantissas * 2**16).round() * power_of_two(exponents - 16)


def _significands_above(scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round up to 16-bit significands, float64."""
    mantissa, exponent = torch.frexp(scale)
    return (mantissa * 2**16).ceil() * power_of_two(exponent - 16)


def powers_of_two(scale: Numbers) -> Numbers:
    """Round up to powers of two.

    Args:
        scale: Positive numbers, any shape, a tensor or a float64 array, as is the result.

    Example:
        >>> powers_of_two(torch.tensor([0.3, 2.0]))
        tensor([0.5000, 2.0000])
    """
    if isinstance(scale, Tensor):
        mantissa, exponent = torch.frexp(scale)
        return power_of_two(exponent - (mantissa == 0.5).to(exponent.dtype)).to(scale.dtype)
    mantissas, exponents = np.frexp(scale)
    return power_of_two(exponents - (mantissas == 0.5))
