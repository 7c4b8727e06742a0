r"""Resizing of images and sequences: nearest, linear and bilinear interpolation, and areas.

The result has the quantization parameters of the input. ``RESIZE_BILINEAR`` takes positions in the
input as multiples of :math:`2^{-10}`, with :math:`n` elements for :math:`m`:

.. math:: p_j = j \sigma + \lfloor \sigma / 2 \rfloor - 2^9,
          \qquad \sigma = \Bigl\lfloor \frac{2^{10} n + \lfloor m / 2 \rfloor}{m} \Bigr\rfloor

for centers of pixels, and :math:`j \sigma` with :math:`n - 1` and :math:`m - 1` for corners. The
sum of the stored integers with weights in units of :math:`2^{-20}` is rounded away from zero. In
TOSA positions are fractions of :math:`m`, and the sum of products is rescaled with ties up.
``RESIZE_NEAREST_NEIGHBOR`` moves data. Sizes that an Ethos-U does not resize are products with
constant weights (:mod:`.resizing_products`) where their positions are at least as exact; elements
that are repeated are broadcast. Areas are adaptive average pooling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.arithmetic.rescaling import RoundingKind, rescale
from lightning_nna.emulation.first_order import first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators.adaptive_pooling import (
    adaptive_average_pool,
    supports_adaptive_pool,
)
from lightning_nna.emulation.operators.call import Call, with_any_integer
from lightning_nna.emulation.operators.convolution_layout import channels_last
from lightning_nna.emulation.operators.pooling import is_image
from lightning_nna.emulation.operators.pooling_layout import image, without_image
from lightning_nna.emulation.operators.record import Kernel, Operator, register_operator
from lightning_nna.emulation.operators.resizing_positions import (
    Positions,
    nearest_of_litert,
    nearest_of_tosa,
    positions_of_litert,
    positions_of_tosa,
)
from lightning_nna.emulation.operators.resizing_products import (
    Weights,
    has_exact_weights,
    interpolating,
    is_resized_by_npu,
    moving,
    positions,
    products,
)
from lightning_nna.emulation.program import Activation, Stored

_LINEAR = {1: "linear", 2: "bilinear"}
_NEAREST = ("nearest", "nearest-exact")

PositionsOf = Callable[[int, int, bool], Positions]
Size = int | Sequence[int] | None
Scale = float | Sequence[float] | None


@dataclass(frozen=True)
class _Request:
    """A resizing, by PyTorch's arguments.

    Args:
        size: Numbers of outputs.
        scale_factor: Factors that give the numbers, and that PyTorch may compute positions with.
        mode: Name of the interpolation.
        align_corners: Whether the corners of input and output are in the same place.
        recompute: Whether positions follow from the numbers alone.
    """

    size: Size
    scale_factor: Scale
    mode: str
    align_corners: bool | None
    recompute: bool | None

    def of(self, x: Tensor) -> Tensor:
        """Resize a tensor, shape ``(N, C, L)`` or ``(N, C, H, W)``, in float."""
        return F.interpolate(
            x, self.size, self.scale_factor, self.mode, self.align_corners, self.recompute
        )

    def outputs(self, x: Tensor) -> tuple[int, ...]:
        """Return the numbers of outputs along the axes of a tensor."""
        with torch.no_grad():
            return tuple(self.of(torch.empty(x.shape, device="meta")).shape[2:])

    def has_own_positions(self, x: Tensor) -> bool:
        """Tell whether positions differ from those that follow from the numbers of elements."""
        if self.scale_factor is None or self.recompute or self.align_corners:
            return False
        axes = x.dim() - 2
        factors = self.scale_factor
        scales = factors if isinstance(factors, Sequence) else [factors] * axes
        sizes = zip(scales, x.shape[2:], self.outputs(x), strict=True)
        return any(scale * before != after for scale, before, after in sizes)


def interpolate(
    call: Call,
    input: Tensor,
    size: Size = None,
    scale_factor: Scale = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """Emulate ``F.interpolate`` of shapes ``(N, C, L)`` or ``(N, C, H, W)``."""
    request = _Request(size, scale_factor, mode, align_corners, recompute_scale_factor)
    axes = input.dim() - 2
    if mode == "area":
        return adaptive_average_pool(call, input, request.outputs(input), axes=axes)
    before = (1, *input.shape[2:])[-2:]
    height, width = (1, *request.outputs(input))[-2:]
    corners = bool(align_corners)
    # An NPU doubles both axes or none: the second row is equal to the first.
    twice = axes == 1 and not corners and width == 2 * before[1]
    height = 2 if twice else height
    weights = None
    if mode not in _NEAREST:
        weights = _interpolating(call, before, (height, width), corners)
        if weights is None:
            call.require("RESIZE_BILINEAR")
    operand = call.operand(input, "input")
    if call.observing:
        return call.unchanged(request.of(operand.value), operand)
    if mode in _NEAREST:
        return _nearest(call, operand, request)
    operand = with_any_integer(call, operand)
    x = replace(operand, value=image(operand.value, axes))
    if weights is not None:
        return call.unchanged(without_image(products(call, x, weights), input, axes), x)
    with float32_arithmetic(x.value):
        result = _Bilinear.apply(x.value, x, (height, width), corners, call)
    if call.recording:
        _record(call, "RESIZE_BILINEAR", x, Activation(result, x.qparams), corners, not corners)
    rows = result[:, :, :1] if twice else result
    return call.unchanged(without_image(rows, input, axes), x)


def supports_interpolate(
    input: Any,
    size: Size = None,
    scale_factor: Scale = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> bool | str:
    """Tell whether the accelerator has an interpolation, with positions as PyTorch has them."""
    axes = input.dim() - 2
    if axes not in _LINEAR:
        return "accelerators resize one or two axes: write it with F.interpolate of these"
    if not is_image(input, axes):
        return False
    if antialias or mode not in (*_NEAREST, "area", _LINEAR[axes]):
        return f"kernels have nearest and {_LINEAR[axes]} interpolation, without antialias"
    request = _Request(size, scale_factor, mode, align_corners, recompute_scale_factor)
    if mode == "area":
        return supports_adaptive_pool(input, request.outputs(input), axes=axes)
    if mode in _NEAREST:
        return True
    if request.has_own_positions(input):
        return (
            "kernels have positions by the sizes of input and output, and not by scale_factor: "
            "write recompute_scale_factor=True, or size"
        )
    return True


def _nearest(call: Call, x: Activation, request: _Request) -> Tensor:
    """Each output is an element of the input: one instruction, or slices where it has others."""
    exact, outputs = request.mode == "nearest-exact", request.outputs(x.value)
    indices, sizes = _indices(request, x.value), x.value.shape[2:]
    centers = _centers(call, exact, list(zip(indices, sizes, outputs, strict=True)))
    images = tuple((1, *numbers)[-2:] for numbers in (sizes, outputs))
    by_npu = centers is not None and is_resized_by_npu(
        *images, corners=False, centers=centers, bilinear=False
    )
    repeated = not by_npu and all(map(_is_repetition, indices, sizes))
    weights = None if by_npu or repeated else _moving(call, indices, images[0])
    if call.recording and weights is not None:
        widened = replace(x, value=image(x.value, len(outputs)))
        return call.unchanged(
            without_image(products(call, widened, weights), x.value, len(outputs)), x
        )
    with float32_arithmetic(x.value):
        if centers is not None and not repeated:
            result = request.of(x.value)
        else:
            result = x.value
            for axis, index in enumerate(indices, start=2):
                result = result.index_select(axis, index.to(result.device))
    if call.recording and centers is not None and not repeated:
        before, after = (replace(x, value=image(v, len(outputs))) for v in (x.value, result))
        _record(call, "RESIZE_NEAREST_NEIGHBOR", before, after, corners=False, centers=centers)
    return call.unchanged(result, x)


def _centers(call: Call, exact: bool, axes: list[tuple[Tensor, int, int]]) -> bool | None:
    """Tell whether the kernel takes these elements by positions of centers; None if it does not."""
    of_tosa = call.state.spec.runtime == "tosa"
    elements = nearest_of_tosa if of_tosa else nearest_of_litert
    for centers in (exact, not exact) if of_tosa else (exact,):
        taken = (elements(before, after, half_pixel=centers) for _, before, after in axes)
        if all(torch.equal(asked, own) for (asked, *_), own in zip(axes, taken, strict=True)):
            return centers
    return None


def _is_repetition(index: Tensor, before: int) -> bool:
    """Tell whether all elements of an axis are repeated equally often, as data movement does."""
    return torch.equal(index, torch.arange(len(index)) * before // len(index)) and (
        len(index) % before == 0
    )


def _moving(
    call: Call, indices: Sequence[Tensor], before: Sequence[int]
) -> tuple[Weights, Weights] | None:
    """Return weights that move elements of rows and columns; None where there are none."""
    if not has_exact_weights(call.state.spec):
        return None
    both = (torch.zeros(1, dtype=torch.int64), *indices)[-2:]
    rows, columns = (moving(index, n) for index, n in zip(both, before, strict=True))
    return None if rows is None or columns is None else (rows, columns)


def _interpolating(
    call: Call, before: Sequence[int], after: Sequence[int], corners: bool
) -> tuple[Weights, Weights] | None:
    """Return weights of products; None where RESIZE_BILINEAR is on the NPU, or more exact."""
    has_kernel = call.has("RESIZE_BILINEAR")
    if has_kernel and is_resized_by_npu(
        before, after, corners=corners, centers=not corners, bilinear=True
    ):
        return None
    if not has_exact_weights(call.state.spec):
        return None
    rows, columns = (interpolating(n, m, corners) for n, m in zip(before, after, strict=True))
    if rows is None or columns is None:
        return None
    if not has_kernel:
        return rows, columns
    own = rows.error, columns.error
    kernel = _positions_of(call)
    errors = [_error(kernel, n, m, corners) for n, m in zip(before, after, strict=True)]
    # Products along both axes of 16 bits round twice, which is less exact than exact positions.
    rounds_twice = call.bits == 16 and rows.interpolates and columns.interpolates
    if rounds_twice and not any(errors):
        return None
    are_exact = all(one <= other for one, other in zip(own, errors, strict=True))
    return (rows, columns) if are_exact else None


def _positions_of(call: Call) -> PositionsOf:
    """Function that gives the positions of the runtime's kernel."""
    return positions_of_tosa if call.state.spec.runtime == "tosa" else positions_of_litert


@lru_cache(maxsize=256)
def _error(kernel: PositionsOf, before: int, after: int, corners: bool) -> float:
    """Largest distance of a position of the kernel from that asked for, in elements."""
    own = kernel(before, after, corners)
    taken = (own.lower + own.fraction.double() / own.one).clamp(0, before - 1)
    exact = positions(before, after, corners=corners)
    asked = torch.tensor(list(map(float, exact)), dtype=torch.float64)
    return float((taken - asked).abs().max())


def _indices(request: _Request, x: Tensor) -> list[Tensor]:
    """Elements of each axis that PyTorch takes, int64."""
    indices = []
    for axis in range(2, x.dim()):
        form = [1] * x.dim()
        form[axis] = x.shape[axis]
        # Along the other axes the same element is taken.
        counted = torch.arange(float(x.shape[axis])).view(form).expand(1, 1, *x.shape[2:])
        resized = request.of(counted.contiguous()).movedim(axis, 0)
        indices.append(resized.flatten(1)[:, 0].long())
    return indices


class _Bilinear(torch.autograd.Function):
    """The kernel's interpolation forward, PyTorch's backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        activation: Activation,
        sizes: tuple[int, int],
        corners: bool,
        call: Call,
    ) -> Tensor:
        ctx.shape, ctx.sizes, ctx.corners = x.shape, sizes, corners
        return _interpolated(call, activation, sizes, corners).mul_(activation.qparams.scale)

    @staticmethod
    @first_order("interpolate")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with float32_arithmetic(grad):
            passed: Tensor = torch.ops.aten.upsample_bilinear2d_backward(
                grad.contiguous(), ctx.sizes, ctx.shape, ctx.corners, None, None
            )
        return passed, None, None, None, None


def _interpolated(call: Call, x: Activation, sizes: tuple[int, int], corners: bool) -> Tensor:
    """Integers of the output less the zero point, float32."""
    # A row of -7 and 10 with a zero point of 0 has -7 * 768 + 10 * 256 = -2816 a fourth of the
    # way, which is -2.75 and rounds to -3.
    mixed, one, zero_point = x.integers().double(), 1.0, x.qparams.zero_point
    for axis, size in zip((2, 3), sizes, strict=True):
        positions = _positions_of(call)(mixed.shape[axis], size, corners)
        lower, upper, fraction = _taken(mixed, positions, axis)
        mixed = lower * (positions.one - fraction) + upper * fraction
        one *= positions.one
    if call.state.spec.runtime == "tosa":
        rounding: RoundingKind = "single" if x.qparams.bits == 8 else "reduced"
        largest = 2 * x.qparams.largest * one
        total = rescale(mixed + zero_point * one, 1 / one, rounding=rounding, largest=largest)
        return (total - zero_point).float()
    total = mixed / one + zero_point
    rounded = (total.abs() + 0.5).floor().copysign(total)
    return (rounded - zero_point).float()


def _taken(x: Tensor, positions: Positions, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Elements of an axis below and above the positions, and the fractions, which broadcast."""
    device = x.device
    lower = x.index_select(axis, positions.lower.to(device))
    upper = x.index_select(axis, positions.upper.to(device))
    fraction = positions.fraction.to(x)
    return lower, upper, fraction[:, None] if axis == 2 else fraction


def _record(
    call: Call, kernel: str, x: Activation, y: Activation, corners: bool, centers: bool
) -> None:
    """Report an instruction of images, shape ``(N, C, H, W)``."""
    operand, result = channels_last(x.stored()), channels_last(y.stored())
    sizes = Stored(torch.tensor(result.integers.shape[1:3]), "int32", constant=True)
    call.record(kernel, [operand, sizes], [result], alignCorners=corners, halfPixelCenters=centers)


def _version(version: int, operator: Any, tensors: Any) -> int:
    """Version 3 at least where centers or corners of pixels are asked for."""
    options = operator.options
    asked = options.halfPixelCenters or options.alignCorners
    return max(version, 3) if asked else version


_VERSIONS = {"int8": 2, "int16": 4}
register_operator(
    Operator(
        "interpolate",
        torch=("interpolate",),
        emulate=interpolate,
        supports=supports_interpolate,
        litert=(
            Kernel("RESIZE_NEAREST_NEIGHBOR", versions=_VERSIONS, version=_version),
            Kernel("RESIZE_BILINEAR", versions=_VERSIONS, version=_version),
        ),
        arithmetic="nearest moves; bilinear has positions of 10 fraction bits and rounds "
        "away from zero, or is a product along each axis; an area is adaptive average pooling",
    )
)
