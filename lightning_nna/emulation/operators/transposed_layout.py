r"""Form of a transposed convolution in the schema.

The kernel adds input :math:`i` to the outputs from :math:`i s - p` on, with a stride :math:`s` and
a padding :math:`p` that follows from the shapes: 0 for ``VALID``, and for ``SAME`` that of a
convolution of the outputs. Where that is not the padding asked for, the instruction computes the
outputs without padding and a slice follows.
Dilated weights have zeros between their elements, and weights of groups have zeros for the inputs
of other groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.convolution_layout import (
    SAME,
    VALID,
    Geometry,
    channels_last,
)
from lightning_nna.emulation.operators.linear import stored_bias, stored_weight
from lightning_nna.emulation.program import Activation, Stored


def record_transposed_convolution(
    call: Call,
    x: Activation,
    bias: Tensor | None,
    quantized: QuantizedWeight,
    geometry: Geometry,
    y: Activation,
    integers: Callable[[Geometry], Tensor],
) -> None:
    """Report a TRANSPOSE_CONV, and a slice of its result where its padding is not the kernel's.

    Args:
        call: The call.
        x: Input, shape ``(N, C, L)`` or ``(N, C, H, W)``.
        bias: Shape ``(out,)``, or None.
        quantized: The quantized weight, its output channels first.
        geometry: Where to look.
        y: Output.
        integers: Function that computes the integers of the output of another geometry.
    """
    scales = x.qparams.scale * quantized.scales.double()
    zeros = torch.zeros(len(scales)) if bias is None else bias
    biases = stored_bias(zeros, scales, call.state.spec, x.qparams.bits)
    operand, result = channels_last(x.stored()), channels_last(y.stored())
    sizes = (x.value.shape[2:], quantized.stored.shape[2:], y.value.shape[2:])
    kernels_own = _padding(geometry, *sizes)
    padding, written = VALID if kernels_own is None else kernels_own, result
    if kernels_own is None:
        wider = _without_padding(geometry)
        full = integers(wider)
        # The forward never holds the outputs that the slice leaves out.
        written = channels_last(replace(y.stored(), integers=full, source=torch.empty(full.shape)))
    height, width = (1, *geometry.stride)[-2:]
    shape = Stored(torch.tensor(written.integers.shape), "int32", constant=True)
    call.record(
        "TRANSPOSE_CONV",
        [shape, _weight(quantized, geometry), operand, biases],
        [written],
        padding=padding,
        strideH=height,
        strideW=width,
    )
    if kernels_own is None:
        _record_slice(call, written, result, geometry)


def _padding(
    at: Geometry, inputs: Sequence[int], kernel: Sequence[int], outputs: Sequence[int]
) -> int | None:
    """Return the kernel's padding that is the one asked for, if there is one.

    An NPU has ``SAME`` only where there are as many outputs as inputs times the stride.
    """
    if not any(at.symmetric):
        return VALID
    axes = zip(at.symmetric, inputs, kernel, outputs, at.stride, at.dilation, strict=True)
    for side, count, taps, size, stride, dilation in axes:
        # A convolution of 8 outputs with 4 taps and a stride of 2 has 4 results, the last from 6
        # to 10: 2 elements beyond, one of them before the first.
        reach = (count - 1) * stride + dilation * (taps - 1) + 1
        if size != count * stride or side != max(reach - size, 0) // 2:
            return None
    return SAME


def _without_padding(at: Geometry) -> Geometry:
    """The same without padding, and as many outputs at the end as a slice takes."""
    pairs = zip(at.output_padding, at.symmetric, strict=True)
    extra = tuple(max(beyond - side, 0) for beyond, side in pairs)
    return replace(at, padding=((0, 0),) * len(at.stride), extra=extra)


def _weight(quantized: QuantizedWeight, at: Geometry) -> Stored:
    """The weight as the kernel has it, shape ``(out, height, width, in)``."""
    stored = stored_weight(quantized)
    integers = stored.integers
    for axis, dilation in enumerate(at.dilation, start=2):
        shape = list(integers.shape)
        shape[axis] = dilation * (shape[axis] - 1) + 1
        spread = integers.new_zeros(shape)
        spread.movedim(axis, 0)[::dilation] = integers.movedim(axis, 0)
        integers = spread
    if at.groups > 1:
        outputs, inputs = integers.shape[:2]
        each = outputs // at.groups
        dense = integers.new_zeros(outputs, inputs * at.groups, *integers.shape[2:])
        for group in range(at.groups):
            rows = slice(group * each, (group + 1) * each)
            dense[rows, group * inputs : (group + 1) * inputs] = integers[rows]
        integers = dense
    image = integers.unsqueeze(2) if integers.dim() == 3 else integers
    return replace(stored, integers=image.permute(0, 2, 3, 1))


def _record_slice(call: Call, x: Stored, y: Stored, at: Geometry) -> None:
    """Report the slice that leaves the padding out."""
    top, left = (0, *at.symmetric)[-2:]
    _, height, width, _ = y.integers.shape
    batch, _, _, channels = x.integers.shape
    bounds = (0, top, left, 0), (batch, top + height, left + width, channels), (1, 1, 1, 1)
    numbers = [Stored(torch.tensor(each), "int32", constant=True) for each in bounds]
    call.record("STRIDED_SLICE", [x, *numbers], [y])
