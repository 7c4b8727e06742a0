r"""Adaptive pooling: means over all of an image, or poolings of parts of it.

Output :math:`i` of :math:`m` is over the elements from :math:`\lfloor i n / m \rfloor` to
:math:`\lceil (i + 1) n / m \rceil` of :math:`n`. One output is a ``MEAN``. Where windows have one
size and one distance they are those of a pooling; else an axis is cut into runs for which that
holds, which are pooled apart and concatenated.

    n = 10, m = 4: windows 0-3, 2-5, 5-8 and 7-10, which are the runs 0-5 and 5-10 with stride 2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.operators.call import Call, with_any_integer
from lightning_nna.emulation.operators.concatenation import concatenate
from lightning_nna.emulation.operators.pooling import (
    WITH_INDICES,
    averaged,
    is_image,
    largest,
)
from lightning_nna.emulation.operators.pooling_layout import Windows, image, without_image
from lightning_nna.emulation.operators.record import Form, Operator, register_operator
from lightning_nna.emulation.operators.reduction import mean_grid, mean_onto
from lightning_nna.emulation.program import Activation

# More parts than this are no program that anybody wants.
_MOST_PARTS = 64

Size = int | Sequence[int | None]
Pool = Callable[[Call, Activation, tuple[Windows, Windows]], Tensor]


def adaptive_average_pool(call: Call, input: Tensor, output_size: Size, *, axes: int = 2) -> Tensor:
    """Emulate ``F.adaptive_avg_pool2d`` of shapes ``(N, C, H, W)``, or ``F.adaptive_avg_pool1d``.

    A mean over all of the image has a range of its own; else the result has its input's.
    """
    operand = with_any_integer(call, call.operand(input, "input"))
    x = Activation(image(operand.value, axes), operand.qparams)
    sizes = _sizes(x.value, output_size, axes)
    result = _mean(call, x) if sizes == (1, 1) else _pooled(call, x, sizes, averaged)
    return call.viewed(without_image(result, input, axes), result)


def adaptive_max_pool(
    call: Call, input: Tensor, output_size: Size, return_indices: bool = False, *, axes: int = 2
) -> Tensor:
    """Emulate ``F.adaptive_max_pool2d`` of shapes ``(N, C, H, W)``, or of one axis."""
    operand = call.operand(input, "input")
    x = Activation(image(operand.value, axes), operand.qparams)
    result = _pooled(call, x, _sizes(x.value, output_size, axes), largest)
    return call.viewed(without_image(result, input, axes), result)


def supports_adaptive_pool(
    input: Any,
    output_size: Size,
    return_indices: bool = False,
    *,
    axes: int = 2,
) -> bool | str:
    """Tell whether windows are over an image, without indices, and in a few parts."""
    if return_indices:
        return WITH_INDICES
    if not is_image(input, axes):
        return False
    full = image(input, axes)
    sizes = _sizes(full, output_size, axes)
    rows, columns = (len(_runs(n, m)) for n, m in zip(full.shape[2:], sizes, strict=True))
    if rows * columns > _MOST_PARTS:
        return (
            f"its windows have sizes and distances of {rows * columns} kinds: choose sizes that "
            "divide those of the input, or pool with a kernel size and a stride"
        )
    return rows * columns > 0


def _sizes(x: Tensor, output_size: Size, axes: int) -> tuple[int, int]:
    """Numbers of windows along height and width; None stands for the size of the input."""
    asked: list[int | None] = (
        [output_size] * axes if isinstance(output_size, int) else [*output_size]
    )
    numbers = zip([None] * (2 - axes) + asked, x.shape[2:], strict=True)
    height, width = (size if number is None else number for number, size in numbers)
    return height, width


def _mean(call: Call, x: Activation) -> Tensor:
    """The mean over height and width, shape ``(N, C, 1, 1)``, as one instruction."""

    def in_float() -> Tensor:
        return x.value.mean((2, 3), keepdim=True)

    if call.observing:
        return call.observed(in_float())
    y = mean_grid(call, x.qparams, call.output(in_float))
    return mean_onto(call, x, (2, 3), True, y, channels_last=True)


def _pooled(call: Call, x: Activation, sizes: tuple[int, int], pool: Pool) -> Tensor:
    """Poolings of parts, put together along the width and then along the height."""
    heights, widths = (_runs(n, m) for n, m in zip(x.value.shape[2:], sizes, strict=True))
    rows = []
    for top, height in heights:
        row = []
        for left, width in widths:
            part = x.value[:, :, top : top + height.size, left : left + width.size]
            row.append(pool(call, replace(x, value=part), (height, width)))
        rows.append(_joined(call, row, 3))
    return _joined(call, rows, 2)


def _joined(call: Call, parts: list[Tensor], axis: int) -> Tensor:
    """Parts with the same parameters put together along an axis of an image."""
    if len(parts) == 1:
        return parts[0]
    if call.observing:
        joined = torch.cat(parts, axis)
        return call.viewed(joined, parts[0])
    return concatenate(call, parts, axis)


def _runs(size: int, outputs: int) -> list[tuple[int, Windows]]:
    """First elements and windows of the runs whose windows have one size and one distance."""
    starts = [index * size // outputs for index in range(outputs)]
    ends = [-(-(index + 1) * size // outputs) for index in range(outputs)]
    runs, first = [], 0
    while first < outputs:
        taps, last = ends[first] - starts[first], first
        stride = starts[first + 1] - starts[first] if first + 1 < outputs else taps
        while last + 1 < outputs and _follows(starts, ends, last, taps, stride):
            last += 1
        count = last - first + 1
        length = ends[last] - starts[first]
        runs.append((starts[first], Windows(length, taps, max(stride, 1), outputs=count)))
        first = last + 1
    return runs


def _follows(starts: list[int], ends: list[int], last: int, taps: int, stride: int) -> bool:
    """Tell whether the next window has the size and the distance of those of a run."""
    distance, size = starts[last + 1] - starts[last], ends[last + 1] - starts[last + 1]
    return distance == stride > 0 and size == taps


register_operator(
    Operator(
        "adaptive_average_pool",
        torch=("adaptive_avg_pool2d",),
        emulate=adaptive_average_pool,
        supports=supports_adaptive_pool,
        forms=(
            Form(
                ("adaptive_avg_pool1d",),
                partial(adaptive_average_pool, axes=1),
                partial(supports_adaptive_pool, axes=1),
            ),
        ),
        learns_scale=True,
        arithmetic="a mean of all elements; else average poolings of parts of the image",
    )
)
register_operator(
    Operator(
        "adaptive_max_pool",
        torch=("adaptive_max_pool2d",),
        emulate=adaptive_max_pool,
        supports=supports_adaptive_pool,
        forms=(
            Form(
                ("adaptive_max_pool1d",),
                partial(adaptive_max_pool, axes=1),
                partial(supports_adaptive_pool, axes=1),
            ),
        ),
        arithmetic="maximum poolings of parts of the image",
    )
)
