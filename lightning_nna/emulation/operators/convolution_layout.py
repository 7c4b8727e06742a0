"""Geometry of a convolution, and its form in the schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.linear import stored_bias, stored_weight
from lightning_nna.emulation.program import Activation, Stored

#: The schema's numbers for the two kinds of padding.
SAME, VALID = 0, 1


@dataclass(frozen=True)
class Geometry:
    """Geometry of a convolution, with one entry for every axis that it goes along.

    Args:
        stride: Steps between outputs.
        padding: Zeros before and after.
        dilation: Steps between the weight's elements.
        groups: Groups of channels.
        transposed: Whether every input is spread over the outputs, and not gathered from them.
        extra: Outputs beyond the end of a transposed convolution; empty for none.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    extra: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        weight: Tensor,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Geometry:
        """Take the arguments of a convolution with a weight of shape ``(out, in, ...)``.

        Example:
            >>> Geometry.of(torch.zeros(8, 8, 4), padding="same").padding
            ((1, 2),)
        """
        axes = weight.dim() - 2
        steps = each_axis(dilation, axes)
        if padding == "same":
            # What is odd of them goes to the end.
            reaches = [d * (k - 1) for d, k in zip(steps, weight.shape[2:], strict=True)]
            pads = tuple((reach // 2, reach - reach // 2) for reach in reaches)
        else:
            sides = each_axis(0 if isinstance(padding, str) else padding, axes)
            pads = tuple((side, side) for side in sides)
        return cls(each_axis(stride, axes), pads, steps, groups)

    @property
    def output_padding(self) -> list[int]:
        """Outputs beyond the end, as PyTorch takes them."""
        return list(self.extra or (0,) * len(self.stride))

    def outputs_first(self, weight: Tensor) -> Tensor:
        """Return the weight with its output channels as the first axis.

        Args:
            weight: Weight as PyTorch has it, shape ``(out, in / groups, ...)``, or for a transposed
                convolution ``(in, out / groups, ...)``.
        """
        return self._turned(weight) if self.transposed else weight

    def as_torch_has(self, weight: Tensor) -> Tensor:
        """Invert :meth:`outputs_first`.

        Args:
            weight: Weight with its output channels first, shape ``(out, in / groups, ...)``.
        """
        return self._turned(weight) if self.transposed else weight

    def _turned(self, weight: Tensor) -> Tensor:
        """Swap inputs and outputs, in each group apart."""
        grouped = weight.unflatten(0, (self.groups, -1))
        return grouped.transpose(1, 2).flatten(0, 1)

    @property
    def symmetric(self) -> list[int]:
        """Zeros that both ends of each axis have."""
        return [min(pair) for pair in self.padding]

    @property
    def rest(self) -> list[int]:
        """Zeros beyond these, as ``F.pad`` takes them: the last axis first."""
        return [side - min(pair) for pair in reversed(self.padding) for side in pair]


def record_convolution(
    call: Call,
    x: Activation,
    bias: Tensor | None,
    quantized: QuantizedWeight,
    geometry: Geometry,
    y: Activation,
) -> None:
    """Report a convolution: zeros around the input are ``SAME``, or an instruction before it.

    Args:
        call: The call.
        x: Input, shape ``(N, C, L)`` or ``(N, C, H, W)``.
        bias: Shape ``(out,)``, or None.
        quantized: The quantized weight.
        geometry: Where to look.
        y: Output.
    """
    scales = x.qparams.scale * quantized.scales.double()
    # CONV_2D has no form without a bias.
    zeros = torch.zeros(len(scales)) if bias is None else bias
    biases = stored_bias(zeros, scales, call.state.spec, x.qparams.bits)
    operand, result = channels_last(x.stored()), channels_last(y.stored())
    padding = VALID
    if any(side for pair in geometry.padding for side in pair):
        if _is_same(geometry, x.value.shape[2:], quantized.stored.shape[2:], y.value.shape[2:]):
            padding = SAME
        else:
            operand = record_padding(call, operand, geometry.padding)
    operator, weight, options = _kernel(quantized, geometry, x.value.shape[1])
    options |= _by_axis("stride{}", geometry.stride)
    options |= _by_axis("dilation{}Factor", geometry.dilation)
    call.record(operator, [operand, weight, biases], [result], padding=padding, **options)


def _kernel(
    quantized: QuantizedWeight, geometry: Geometry, channels: int
) -> tuple[str, Stored, dict[str, Any]]:
    """The instruction, its weight, and options of its own."""
    stored = stored_weight(quantized)
    integers = stored.integers
    if integers.dim() == 3:
        integers = integers.unsqueeze(2)
    if geometry.groups == channels > 1:
        weight = replace(stored, integers=integers.permute(1, 2, 3, 0), channel_axis=3)
        return "DEPTHWISE_CONV_2D", weight, {"depthMultiplier": integers.shape[0] // channels}
    return "CONV_2D", replace(stored, integers=integers.permute(0, 2, 3, 1)), {}


def _is_same(
    at: Geometry, inputs: Sequence[int], kernel: Sequence[int], outputs: Sequence[int]
) -> bool:
    """Tell whether the reference's ``SAME``, ceil(inputs / stride) outputs, pads as asked."""
    axes = zip(inputs, kernel, outputs, at.stride, at.dilation, at.padding, strict=True)
    for size, taps, result, stride, dilation, (before, _) in axes:
        total = max((result - 1) * stride + dilation * (taps - 1) + 1 - size, 0)
        if result != -(-size // stride) or before != total // 2:
            return False
    return True


def record_padding(call: Call, x: Stored, padding: Sequence[tuple[int, int]]) -> Stored:
    """Report zeros around the height and width of a tensor, or around its width alone.

    Args:
        call: The call.
        x: Tensor, shape ``(N, H, W, C)``.
        padding: Zeros before and after, for height and width, or for width.

    Returns:
        The padded tensor, which only the program has.
    """
    pairs = [(0, 0)] * (3 - len(padding)) + [*padding, (0, 0)]
    sides = [side for pair in reversed(pairs) for side in pair]
    integers = F.pad(x.integers, sides, value=x.zero_point)
    # The result has a place of its own, though the forward never holds it.
    source = torch.empty(integers.shape)
    padded = replace(x, integers=integers, constant=False, source=source)
    call.record("PAD", [x, Stored(torch.tensor(pairs), "int32", constant=True)], [padded])
    return padded


def channels_last(x: Stored) -> Stored:
    """Return a tensor as batch, height, width, channels: the layout of the schema.

    Args:
        x: Tensor, shape ``(N, C, H, W)`` or ``(N, C, L)``, whose height is then 1.
    """
    source = None if x.source is None else _last(x.source)
    return replace(x, integers=_last(x.integers), source=source)


def _last(x: Tensor) -> Tensor:
    image = x.unsqueeze(2) if x.dim() == 3 else x
    return image.permute(0, 2, 3, 1)


def _by_axis(name: str, values: Sequence[int]) -> dict[str, Any]:
    """Options for height and width."""
    height, width = values if len(values) == 2 else (1, *values)
    return {name.format("H"): height, name.format("W"): width}


def each_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Return one entry for every axis.

    Example:
        >>> each_axis(3, 2)
        (3, 3)
    """
    entries = (value,) if isinstance(value, int) else tuple(value)
    return entries * axes if len(entries) == 1 else entries
