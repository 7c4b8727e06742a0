r"""Form of a transposed convolution in the schema.

The kernel adds input :math:`i` to the outputs from :math:`i s - p` on, with a stride :math:`s` and
a padding :math:`p` that follows from the shapes: 0 for ``VALID``, and for ``SAME`` that of a
convolution of the outputs. Where that is not the padding asked for, the instruction computes the
outputs without padding and a slice follows.
Dilated weights have zeros between their elements, and weights of groups have zeros for the inputs
of other groups.

Over time with a stride beyond 2, which no NPU has, the instruction is a convolution with as many
times the outputs as the stride, one after the other: what it writes for an input are the next
outputs in their order, so that a reshape is all that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.convolution_layout import (
    SAME,
    VALID,
    Geometry,
    channels_last,
    record_padding,
)
from lightning_nna.emulation.operators.linear import stored_bias, stored_weight
from lightning_nna.emulation.program import Activation, Stored

# Largest stride of a TRANSPOSE_CONV on an NPU.
_LARGEST_STRIDE = 2


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
    weight = _weight(quantized, geometry)
    if _is_in_phases(geometry, weight):
        _record_phases(call, (operand, weight, biases), (y, result), geometry, integers)
        return
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
        [shape, weight, operand, biases],
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


def _is_in_phases(at: Geometry, weight: Stored) -> bool:
    """Tell whether a convolution and a reshape stand for a transposed convolution."""
    if len(at.stride) > 1 or at.stride[0] <= _LARGEST_STRIDE:
        return False
    # They write the outputs up to a multiple of the stride.
    return at.output_padding[0] - at.symmetric[0] <= -weight.integers.shape[2] % at.stride[0]


def _record_phases(
    call: Call,
    operands: tuple[Stored, Stored, Stored],
    results: tuple[Activation, Stored],
    at: Geometry,
    integers: Callable[[Geometry], Tensor],
) -> None:
    """Report a convolution over time whose channels are successive outputs, and their reshape.

    Args:
        call: The call.
        operands: Input, weight and biases in the layout of the schema.
        results: Output, shape ``(N, C, L)``, and the same in the layout of the schema.
        at: Where to look.
        integers: Function that computes the integers of the output of another geometry.
    """
    x, weight, biases = operands
    y, result = results
    (stride,) = at.stride
    outputs, _, reach, inputs = weight.integers.shape
    # With a stride of 4 and weights 0 to 5, output 4 i + r has weight r of input i, and for r of 0
    # and 1 weight 4 + r of input i - 1. So there are two taps, and weights 6 and 7 are 0.
    taps = -(-reach // stride)
    filled = F.pad(weight.integers, (0, 0, 0, taps * stride - reach))
    phases = filled.view(outputs, taps, stride, inputs).flip(1).permute(2, 0, 1, 3)
    weight = replace(weight, integers=phases.reshape(-1, 1, taps, inputs))
    weight, biases = (_repeated_scale(each, stride) for each in (weight, biases))
    biases = replace(biases, integers=biases.integers.repeat(stride))
    if taps > 1:
        x = record_padding(call, x, [(taps - 1, taps - 1)])
    # All outputs of the padded input, whose number is a multiple of the stride.
    extra = taps * stride - reach
    full = channels_last(
        replace(y.stored(), integers=integers(replace(at, padding=((0, 0),), extra=(extra,))))
    )
    batch, _, length, _ = full.integers.shape
    shape = (batch, 1, length // stride, stride * outputs)
    written = replace(full, integers=full.integers.reshape(shape), source=torch.empty(shape))
    call.record(
        "CONV_2D",
        [x, weight, biases],
        [written],
        padding=VALID,
        strideH=1,
        strideW=1,
        dilationHFactor=1,
        dilationWFactor=1,
    )
    is_all = result.integers.shape == full.integers.shape and not any(at.symmetric)
    row = result if is_all else replace(full, source=torch.empty(full.integers.shape))
    form = Stored(torch.tensor(row.integers.shape), "int32", constant=True)
    call.record("RESHAPE", [written, form], [row], newShape=list(row.integers.shape))
    if not is_all:
        _record_slice(call, row, result, at)


def _repeated_scale(x: Stored, count: int) -> Stored:
    """The scales of all channels, so many times; one for all stays one."""
    return replace(x, scale=x.scale.repeat(count)) if isinstance(x.scale, Tensor) else x
