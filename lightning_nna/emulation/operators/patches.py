"""Patches of images: ``F.unfold`` moves data, and ``F.fold`` adds up what moves to one place.

``unfold`` is a slice of the padded image for every element of a patch, and their concatenation.
``fold`` without overlaps moves data. Else the elements of a patch are divided into sets within
which no two patches meet: each set moves, and the sets are added.

    patches of 4 elements with a stride of 2: elements 0 and 1 of all patches, and elements 2 and 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.convolution_layout import (
    channels_last,
    each_axis,
    record_padding,
)
from lightning_nna.emulation.operators.driver import drive
from lightning_nna.emulation.operators.elementwise import ADD
from lightning_nna.emulation.operators.pooling import is_image
from lightning_nna.emulation.operators.pooling_layout import image
from lightning_nna.emulation.operators.record import Operator, register_operator
from lightning_nna.emulation.program import Activation, Stored

# More sums than this are no program that anybody wants.
_MOST_SETS = 16

Sizes = int | Sequence[int]


@dataclass(frozen=True)
class _Patches:
    """Patches along one axis of an image.

    Args:
        taps: Number of elements of a patch.
        dilation: Distance between elements of a patch.
        padding: Zeros at both ends.
        stride: Distance from patch to patch.
    """

    taps: int
    dilation: int
    padding: int
    stride: int

    def count(self, size: int) -> int:
        """Return the number of patches of an axis with so many elements."""
        reach = self.dilation * (self.taps - 1) + 1
        return (size + 2 * self.padding - reach) // self.stride + 1

    def slice_of(self, tap: int, count: int) -> slice:
        """Return the place of an element of every patch in the padded axis."""
        first = tap * self.dilation
        return slice(first, first + (count - 1) * self.stride + 1, self.stride)

    def sets(self) -> list[list[int]]:
        """Divide the elements of a patch into sets within which no two patches meet.

        Example:
            >>> _Patches(5, 1, 0, 2).sets()
            [[0, 1], [2, 3], [4]]
        """
        numbers: dict[int, int] = {}
        sets: list[list[int]] = []
        for tap in range(self.taps):
            phase = tap * self.dilation % self.stride
            number = numbers.get(phase, 0)
            numbers[phase] = number + 1
            sets.extend([] for _ in range(number + 1 - len(sets)))
            sets[number].append(tap)
        return sets


def _patches(kernel: Sizes, dilation: Sizes, padding: Sizes, stride: Sizes) -> list[_Patches]:
    """Patches along height and width."""
    values = (each_axis(each, 2) for each in (kernel, dilation, padding, stride))
    return [_Patches(*each) for each in zip(*values, strict=True)]


def unfold(
    call: Call,
    input: Tensor,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    padding: Sizes = 0,
    stride: Sizes = 1,
) -> Tensor:
    """Emulate ``F.unfold`` of shapes ``(N, C, H, W)``, or without the first axis."""
    x = call.operand(input, "input")
    with float32_arithmetic(x.value):
        sizes = (each_axis(each, 2) for each in (kernel_size, dilation, padding, stride))
        result = F.unfold(x.value, *sizes)
    if call.recording:
        patches = _patches(kernel_size, dilation, padding, stride)
        _record_unfolding(call, replace(x, value=image(x.value, 2)), result, patches)
    return call.unchanged(result, x)


def supports_unfold(input: Any, *args: Any, **kwargs: Any) -> bool:
    """Tell whether patches are those of an image."""
    return is_image(input, 2)


def _record_unfolding(
    call: Call, x: Activation, result: Tensor, patches: Sequence[_Patches]
) -> None:
    """Report the padding, and the concatenation of slices along a new axis."""
    padded = channels_last(x.stored())
    if any(each.padding for each in patches):
        padded = record_padding(call, padded, [(each.padding, each.padding) for each in patches])
    assert padded.source is not None
    height, width = patches
    rows, columns = (each.count(n) for each, n in zip(patches, x.value.shape[2:], strict=True))
    parts = []
    for top in range(height.taps):
        for left in range(width.taps):
            index = (slice(None), height.slice_of(top, rows), width.slice_of(left, columns))
            integers, source = (
                value[index].permute(0, 3, 1, 2).unsqueeze(2)
                for value in (padded.integers, padded.source)
            )
            parts.append(replace(padded, integers=integers, source=source))
    shape = (*x.value.shape[:2], len(parts), rows, columns)
    joined = Activation(result.view(shape), x.qparams).stored()
    if len(parts) == 1:  # A patch of one element.
        form = Stored(torch.tensor(shape), "int32", constant=True)
        call.record("RESHAPE", [parts[0], form], [joined], newShape=list(shape))
    else:
        call.record("CONCATENATION", parts, [joined], axis=2)


def fold(
    call: Call,
    input: Tensor,
    output_size: Sizes,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    padding: Sizes = 0,
    stride: Sizes = 1,
) -> Tensor:
    """Emulate ``F.fold`` of shapes ``(N, C * taps, patches)``, or without the first axis."""
    x = call.operand(input, "input")
    patches = _patches(kernel_size, dilation, padding, stride)
    sizes = each_axis(output_size, 2)
    heights, widths = (each.sets() for each in patches)
    total: Tensor | None = None
    for row, tops in enumerate(heights):
        for column, lefts in enumerate(widths):
            with float32_arithmetic(x.value):
                part = _put(x.value, sizes, patches, (tops, lefts))
            call.unchanged(part, x)
            if total is None:
                total = part
            else:
                total = drive(ADD, call.child(f"sum{row * len(widths) + column}"), total, part)
    assert total is not None
    return total


def supports_fold(
    input: Any,
    output_size: Sizes,
    kernel_size: Sizes,
    dilation: Sizes = 1,
    padding: Sizes = 0,
    stride: Sizes = 1,
) -> bool | str:
    """Tell whether patches overlap so little that a few sums add them up."""
    heights, widths = (each.sets() for each in _patches(kernel_size, dilation, padding, stride))
    if len(heights) * len(widths) > _MOST_SETS:
        return (
            f"{len(heights) * len(widths)} patches overlap at one place: write a transposed "
            "convolution with a kernel of zeros and ones"
        )
    return isinstance(input, Tensor) and input.dim() in (2, 3) and input.numel() > 0


def _put(
    x: Tensor,
    sizes: Sequence[int],
    patches: Sequence[_Patches],
    taps: tuple[Sequence[int], Sequence[int]],
) -> Tensor:
    """Put elements of the patches to their places in an image of zeros.

    Args:
        x: Patches, shape ``(N, C * taps, patches)``, or without the first axis.
        sizes: Height and width of the image.
        patches: Patches along height and width.
        taps: Elements of a patch, by height and by width.
    """
    height, width = patches
    counts = [each.count(size) for each, size in zip(patches, sizes, strict=True)]
    columns = x.unflatten(-1, counts).unflatten(-3, (-1, height.taps, width.taps))
    padded = [size + 2 * each.padding for each, size in zip(patches, sizes, strict=True)]
    full = x.new_zeros(*columns.shape[:-4], *padded)
    for top in taps[0]:
        for left in taps[1]:
            rows, across = height.slice_of(top, counts[0]), width.slice_of(left, counts[1])
            full[..., rows, across] = columns[..., top, left, :, :]
    first = [each.padding for each in patches]
    (top, left), (bottom, right) = first, [f + n for f, n in zip(first, sizes, strict=True)]
    return full[..., top:bottom, left:right].contiguous()


register_operator(
    Operator(
        "unfold",
        torch=("unfold",),
        emulate=unfold,
        supports=supports_unfold,
        arithmetic="`F.unfold`: a slice of the padded image for every element of a patch",
    )
)
register_operator(
    Operator(
        "fold",
        torch=("fold",),
        emulate=fold,
        supports=supports_fold,
        arithmetic="`F.fold`: patches that do not overlap move; else sums of sets that do not",
    )
)
