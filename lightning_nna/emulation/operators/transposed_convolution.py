"""Transposed convolutions over one or two axes: the arithmetic is that of :mod:`.convolution`.

The channels of an output are the second axis of PyTorch's weight, and each has a scale. With groups
one scale is for all of the weight: an index of that axis is a channel of every group. A batch norm
after it gives every channel a scale of its own, as after a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.convolution import layer, supports_convolution
from lightning_nna.emulation.operators.convolution_layout import Geometry, each_axis
from lightning_nna.emulation.operators.record import Kernel, Operator, register_operator


def transposed_convolution(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Emulate ``F.conv_transpose1d`` and ``F.conv_transpose2d`` of ``(batch, channels, ...)``."""
    geometry = Geometry.of(weight, stride, padding, dilation, groups)
    extra = each_axis(output_padding, weight.dim() - 2)
    return layer(call, input, weight, bias, replace(geometry, transposed=True, extra=extra))


register_operator(
    Operator(
        "transposed_convolution",
        torch=("conv_transpose1d", "conv_transpose2d"),
        emulate=transposed_convolution,
        supports=supports_convolution,
        litert=(
            Kernel(
                "TRANSPOSE_CONV",
                # Version 3 has a bias.
                versions={"int32": 3},
                operands={0: "shape", 1: "weight", 2: "input", 3: "bias"},
            ),
        ),
        learns_scale=True,
        has_weights=True,
        arithmetic="integer sum, one multiplier a channel; groups and dilation are zeros in the "
        "weight; over time with a stride beyond 2 a convolution and a reshape",
    )
)
