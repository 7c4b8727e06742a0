r"""Resizing as products with constant weights, for sizes that an Ethos-U cannot resize.

A resized image is a product along its rows and one along its columns. Each output has at most two
weights, :math:`1 - f` and :math:`f`, which are integers with the scale :math:`1 / q`:

    8 rows become 16 with equal corners: row 1 is 8/15 of row 0 and 7/15 of row 1: 8 and 7 of 1/15

They are exact for :math:`q \le 127`, and else the nearest such fractions; ``RESIZE_BILINEAR`` has
positions whose error grows with the number of outputs. Products of 8 bits are computed in 16, so
that the result is rounded to 8 bits once: a convolution of 8 bits rounds 5/4 up to 2, since it
rounds to 3/2 before. A weight of 1 moves an element.

A product is a ``CONV_2D`` of one channel, whose kernel has as many rows as the axis:

    (1, 8, W * C, 1) with a kernel of 8 rows and 16 outputs    becomes    (1, 1, W * C, 16)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from math import floor, prod

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.operators.call import Call, requantize
from lightning_nna.emulation.operators.convolution import convolve
from lightning_nna.emulation.operators.convolution_layout import Geometry
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import affine_qparams
from lightning_nna.emulation.spec import NNASpec

# Largest weight of 8 bits.
_LARGEST_WEIGHT = 127
# Most rows of a kernel, and most elements of an axis, on an Ethos-U.
_MOST_ROWS, _MOST_ELEMENTS = 64, 65535
# Most weights of a product that are worth their memory.
_MOST_WEIGHTS = 65536
# Factors that an Ethos-U resizes by.
_FACTORS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Weights:
    """Weights of the elements of an axis in each output.

    Args:
        integers: Integers, int8, shape ``(outputs, elements)``.
        scales: Scale of each output, float32, shape ``(outputs,)``.
        error: Largest distance of a position from the one asked for, in elements.
    """

    integers: Tensor
    scales: Tensor
    error: float

    @property
    def is_identity(self) -> bool:
        """Tell whether every output is the element in its place."""
        outputs, elements = self.integers.shape
        return outputs == elements and torch.equal(
            self.integers, torch.eye(outputs, dtype=torch.int8)
        )

    @property
    def interpolates(self) -> bool:
        """Tell whether an output is computed of two elements."""
        return bool((self.scales != 1).any())


def is_resized_by_npu(
    before: Sequence[int], after: Sequence[int], *, corners: bool, centers: bool, bilinear: bool
) -> bool:
    """Tell whether an Ethos-U resizes an image, by the conditions of Arm's compiler Vela.

    Args:
        before: Rows and columns of the input.
        after: Rows and columns of the output.
        corners: Whether the corners of input and output are in the same place.
        centers: Whether positions are those of centers of pixels.
        bilinear: Whether values are interpolated.

    Example:
        >>> settings = {"corners": True, "centers": False, "bilinear": True}
        >>> is_resized_by_npu((8, 8), (15, 15), **settings)
        True
        >>> is_resized_by_npu((8, 8), (16, 16), **settings)
        False
    """
    if tuple(before) == (1, 1):
        return True
    less = int(corners)
    factors = [
        Fraction(1) if corners and n == 1 else Fraction(m - less, n - less)
        for n, m in zip(before, after, strict=True)
    ]
    if bilinear and centers:
        return factors == [2, 2]
    if tuple(before) == tuple(after):
        return True
    if not set(factors) <= set(_FACTORS):
        return False
    if 1 in after:
        return any(factor == n == 1 for factor, n in zip(factors, before, strict=True))
    return factors[0] == factors[1]


def has_exact_weights(spec: NNASpec) -> bool:
    """Tell whether an accelerator has weights of 8 bits with any scale for every output."""
    per_channel = spec.weight_granularity == "per_channel"
    return per_channel and spec.weight_max == _LARGEST_WEIGHT and not spec.power_of_two_scales


def positions(before: int, after: int, *, corners: bool) -> list[Fraction]:
    """Return the positions of outputs between the elements of an axis, as PyTorch defines them.

    Args:
        before: Number of elements.
        after: Number of outputs.
        corners: Whether the first and the last are in the same place.

    Example:
        >>> positions(2, 4, corners=False)
        [Fraction(0, 1), Fraction(1, 4), Fraction(3, 4), Fraction(1, 1)]
    """
    if corners:
        scale = Fraction(before - 1, after - 1) if after > 1 else Fraction(0)
        return [j * scale for j in range(after)]
    centers = (Fraction((2 * j + 1) * before - after, 2 * after) for j in range(after))
    return [min(max(center, Fraction(0)), Fraction(before - 1)) for center in centers]


@lru_cache(maxsize=256)
def interpolating(before: int, after: int, corners: bool) -> Weights | None:
    """Return the weights of a linear interpolation; None if they are too many.

    Args:
        before: Number of elements.
        after: Number of outputs.
        corners: Whether the first and the last are in the same place.

    Example:
        >>> weights = interpolating(2, 4, False)
        >>> weights.integers.tolist(), weights.scales.tolist(), weights.error
        ([[1, 0], [3, 1], [1, 3], [0, 1]], [1.0, 0.25, 0.25, 1.0], 0.0)
    """
    if before * after > _MOST_WEIGHTS:
        return None
    integers = torch.zeros(after, before, dtype=torch.int8)
    scales, error = torch.ones(after), Fraction(0)
    for j, position in enumerate(positions(before, after, corners=corners)):
        lower = floor(position)
        fraction = position - lower
        nearest = fraction.limit_denominator(_LARGEST_WEIGHT)
        error = max(error, abs(nearest - fraction))
        parts = nearest.denominator - nearest.numerator, nearest.numerator
        for element, part in enumerate(parts, start=lower):
            if part:
                integers[j, element] = part
        scales[j] = 1 / nearest.denominator
    return Weights(integers, scales, float(error))


def moving(index: Tensor, before: int) -> Weights | None:
    """Return the weights of outputs that are elements; None if they are too many.

    Args:
        index: Element of each output, int64, shape ``(outputs,)``.
        before: Number of elements.

    Example:
        >>> moving(torch.tensor([0, 0, 1]), 2).integers.tolist()
        [[1, 0], [1, 0], [0, 1]]
    """
    if len(index) * before > _MOST_WEIGHTS:
        return None
    integers = torch.nn.functional.one_hot(index, before).to(torch.int8)
    return Weights(integers, torch.ones(len(index)), 0.0)


def products(call: Call, x: Activation, weights: Sequence[Weights]) -> Tensor:
    """Resize an image by a product along each axis that is resized.

    Args:
        call: The call.
        x: Image, shape ``(N, C, H, W)``, on parameters of which float32 holds any integer.
        weights: Weights of rows and of columns.

    Returns:
        Tensor of shape ``(N, C, rows, columns)`` on the quantization parameters of ``x``.
    """
    axes = [axis for axis, each in enumerate(weights, start=2) if not each.is_identity]
    y = x
    if any(each.interpolates for each in weights) and x.qparams.bits == 8:
        reach = x.qparams.largest * x.qparams.scale
        wide = affine_qparams(-reach, reach, bits=16)
        y = Activation(requantize(call, x, wide), wide)
    for axis in axes:
        y = replace(y, value=_product(call.child(("rows", "columns")[axis - 2]), y, weights, axis))
    return requantize(call, y, x.qparams)


def _product(call: Call, x: Activation, weights: Sequence[Weights], axis: int) -> Tensor:
    """One convolution, whose result has an axis resized."""
    own = weights[axis - 2]
    outputs, elements = own.integers.shape
    # The axis comes first, and behind it the rest in the order that the program has it in: after
    # the rows (W, N, C, rows), whose columns are the next that come first.
    order = (axis, 5 - axis, 0, 1) if axis == 2 else (axis, 0, 1, 5 - axis)
    moved = x.value.permute(order)
    rest = moved.shape[1:]
    integers = own.integers.to(x.value.device)
    if elements <= _MOST_ROWS and prod(rest) <= _MOST_ELEMENTS:
        image, kernel = moved.reshape(1, 1, elements, -1), integers[:, None, :, None]
    else:  # Elements are channels, for which they are transposed.
        image, kernel = moved.reshape(1, elements, rest[0], -1), integers[:, :, None, None]
    quantized = QuantizedWeight(kernel, own.scales.to(x.value.device))
    values = quantized.values
    result = convolve(
        call, replace(x, value=image), values, None, quantized, Geometry.of(values), x.qparams
    )
    resized = result.reshape(outputs, *rest)
    inverse = [order.index(k) for k in range(4)]
    return resized.permute(inverse)
