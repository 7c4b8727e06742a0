r"""Clamping: ReLU and its relatives, bounds that are numbers, and extremes of two tensors.

With bounds that are numbers the result keeps the quantization parameters of its input, and the
integers end at those nearest to the bounds:

.. math:: q_y = \min(\max(q_x, \lfloor l / s_x \rceil + o_x), \lfloor u / s_x \rceil + o_x)

A lower bound of 0 is a ReLU: the range of its input ends at 0 and at the upper bound where nothing
else reads that input (:mod:`lightning_nna.emulation.fusion`). The maximum or minimum of two tensors
first requantizes both to the parameters of the result, unless they share theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators.call import Call, quantize, requantize, with_any_integer
from lightning_nna.emulation.operators.record import (
    NO_OPTIONS,
    Form,
    Kernel,
    Operator,
    register_operator,
)
from lightning_nna.emulation.program import Activation, Stored
from lightning_nna.emulation.ranges import QParams, affine_qparams

# Kernels that clamp to fixed bounds, and the widths that they exist for.
_FIXED = {
    (0.0, math.inf): ("RELU", (8, 16)),
    (0.0, 6.0): ("RELU6", (8, 16)),
    (-1.0, 1.0): ("RELU_N1_TO_1", (8,)),
    (0.0, 1.0): ("RELU_0_TO_1", (8,)),
}

Bound = float | Tensor | None


def relu(call: Call, input: Tensor, inplace: bool = False) -> Tensor:
    """Compute ``relu`` of any shape: integers below the zero point become the zero point.

    With equal scales the reference's rescaling is by one, so nothing is rounded.
    """
    return clamped(call, input, 0.0, math.inf)


def relu6(call: Call, input: Tensor, inplace: bool = False) -> Tensor:
    """Compute ``F.relu6`` of any shape, where 6 is the value of the nearest integer."""
    return clamped(call, input, 0.0, 6.0)


def hardtanh(
    call: Call, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    """Compute ``F.hardtanh`` of any shape."""
    return clamped(call, input, min_val, max_val)


def threshold(
    call: Call, input: Tensor, threshold: float, value: float, inplace: bool = False
) -> Tensor:
    """Compute ``F.threshold`` of any shape where it is a ReLU."""
    return relu(call, input)


def supports_threshold(input: Any, threshold: float, value: float, inplace: bool = False) -> bool:
    """Tell whether it is a ReLU: what is not above 0 becomes 0."""
    return threshold == value == 0


def clamp(call: Call, input: Tensor, min: Bound = None, max: Bound = None) -> Tensor:
    """Compute ``torch.clamp`` of any shape; a tensor as a bound broadcasts."""
    if not isinstance(min, Tensor) and not isinstance(max, Tensor):
        low, high = -math.inf if min is None else min, math.inf if max is None else max
        return clamped(call, input, low, high)
    if isinstance(min, Tensor):
        input = maximum(call.child("min"), input, min)
    if isinstance(max, Tensor):
        input = minimum(call.child("max"), input, max)
    return input


def clamp_min(call: Call, input: Tensor, min: Bound) -> Tensor:
    """Compute ``torch.clamp_min`` of any shape."""
    return clamp(call, input, min)


def clamp_max(call: Call, input: Tensor, max: Bound) -> Tensor:
    """Compute ``torch.clamp_max`` of any shape."""
    return clamp(call, input, None, max)


def supports_clamp(input: Any, *args: Any, **kwargs: Any) -> bool:
    """Tell whether the accelerator has these bounds: numbers, or tensors of floats."""
    bounds = [x for x in (*args, *kwargs.values()) if x is not None]
    return all(_is_float(x) if isinstance(x, Tensor) else not math.isnan(x) for x in bounds)


def maximum(call: Call, input: Tensor, other: Tensor) -> Tensor:
    """Compute ``torch.maximum`` of shapes that broadcast."""
    return _extreme(call, "MAXIMUM", torch.maximum, input, other)


def minimum(call: Call, input: Tensor, other: Tensor) -> Tensor:
    """Compute ``torch.minimum`` of shapes that broadcast."""
    return _extreme(call, "MINIMUM", torch.minimum, input, other)


def supports_pair(input: Any, other: Any, *args: Any, **kwargs: Any) -> bool:
    """Tell whether both operands are tensors of floats."""
    return _is_float(input) and _is_float(other)


def clamped(call: Call, input: Tensor, low: float, high: float) -> Tensor:
    """Clamp on the quantization parameters of the input.

    Args:
        call: The call.
        input: Any shape.
        low: Lower bound, perhaps infinite.
        high: Upper bound, which counts where it is below the lower one.
    """
    x, low = call.operand(input, "input"), min(low, high)
    if call.observing:
        if low == 0:
            call.state.fusion.note_relu(x.value, high)
        return call.unchanged(_clamp(x.value, low, high), x)
    x = _reaching(call, x, low, high)
    first, last = _ends(low, high, x.qparams)
    with float32_arithmetic(x.value):
        result = _clamp(x.value, first, last)
    if call.recording:
        _record(call, x, Activation(result, x.qparams), (low, high), (first, last))
    return call.unchanged(result, x)


def _clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp values; those at an end have no gradient, nor have those that were clipped to it."""
    if math.isfinite(high):
        return F.hardtanh(x, low, high)
    if math.isinf(low):
        return x.clone()
    return torch.relu(x) if low == 0 else F.threshold(x, low, low)


def _reaching(call: Call, x: Activation, low: float, high: float) -> Activation:
    """The operand; requantized where its range lies on the other side of a bound altogether."""
    qparams = x.qparams
    lowest, highest = qparams.bounds[0] * qparams.scale, qparams.bounds[1] * qparams.scale
    if low <= highest and high >= lowest:
        has_new = (low and lowest < low < highest) or (high and lowest < high < highest)
        return with_any_integer(call, x) if has_new else x
    bound = low if low > highest else high
    power_of_two = call.state.spec.power_of_two_scales
    y = affine_qparams(min(bound, 0.0), max(bound, 0.0), bits=call.bits, power_of_two=power_of_two)
    return Activation(requantize(call, x, y), y)


@lru_cache(maxsize=1024)
def _ends(low: float, high: float, x: QParams) -> tuple[float, float]:
    """Bounds rounded to values that integers stand for."""
    return _nearest(low, x) * x.scale, _nearest(high, x) * x.scale


def _nearest(bound: float, x: QParams) -> float:
    """Integer of a bound, less the zero point; infinite for one that no integer reaches."""
    if math.isinf(bound):
        return bound
    # As the kernels round: single precision, ties away from zero.
    quotient = float(np.float32(bound) / np.float32(x.scale))
    nearest = math.copysign(math.floor(abs(quotient) + 0.5), bound)
    low, high = x.bounds
    return nearest if low <= nearest <= high else math.copysign(math.inf, bound)


def _record(
    call: Call,
    x: Activation,
    y: Activation,
    bounds: tuple[float, float],
    ends: tuple[float, float],
) -> None:
    """Report one kernel with fixed bounds, or one for each bound that an integer reaches."""
    kernel, widths = _FIXED.get(bounds, ("", ()))
    if x.qparams.bits in widths and call.has(kernel, f"int{x.qparams.bits}"):
        call.record(kernel, [x.stored()], [y.stored()])
        return
    raised, lowered = (math.isfinite(end) for end in ends)
    between = x
    if raised:
        between = Activation(_clamp(x.value.detach(), ends[0], math.inf), x.qparams)
        between = between if lowered else y
        if ends[0] == 0:
            call.record("RELU", [x.stored()], [between.stored()])
        else:
            call.record("MAXIMUM", [x.stored(), _number(ends[0], x)], [between.stored()])
    if lowered:
        call.record("MINIMUM", [between.stored(), _number(ends[1], x)], [y.stored()])


def _number(value: float, like: Activation) -> Stored:
    """A constant of one element with the quantization parameters of an activation."""
    return Activation(torch.tensor(value), like.qparams, constant=True).stored()


def _extreme(
    call: Call, kernel: str, function: Callable[..., Tensor], input: Tensor, other: Tensor
) -> Tensor:
    """The maximum or minimum of two tensors, whose integers are on the same parameters."""
    pairs = [(x, call.operand(x, name)) for x, name in ((input, "input"), (other, "other"))]
    if any(operand.constant for _, operand in pairs):
        pairs = [(x, with_any_integer(call, operand)) for x, operand in pairs]
    first, second = (operand for _, operand in pairs)

    def in_float() -> Tensor:
        return function(first.value, second.value)

    if call.observing:
        return call.observed(in_float())
    y = _shared(first, second) or call.output(in_float)
    moved = [_moved(call, x, operand, y) for x, operand in pairs]
    with float32_arithmetic(first.value):
        result = function(*(operand.value for operand in moved))
    if call.recording:
        stored = [operand.stored() for operand in moved]
        call.record(kernel, stored, [Activation(result, y).stored()])
    return call.with_qparams(result, y)


def _shared(a: Activation, b: Activation) -> QParams | None:
    """Parameters of both operands, where they are equal, or hold the values of a constant."""
    if a.qparams == b.qparams and not (a.constant or b.constant):
        return a.qparams
    if a.constant == b.constant:
        return None
    x, constant = (b, a) if a.constant else (a, b)
    low, high = (bound * x.qparams.scale for bound in x.qparams.bounds)
    values = constant.value.detach()
    return x.qparams if bool(((values >= low) & (values <= high)).all()) else None


def _moved(call: Call, x: Tensor, operand: Activation, y: QParams) -> Activation:
    """An operand on the parameters of the result; a constant is quantized to them at once."""
    if operand.constant:
        return Activation(quantize(x, y), y, constant=True)
    return Activation(requantize(call, operand, y), y)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


_WIDE = {"int8": 2, "int16": 3}

register_operator(
    Operator(
        "relu",
        torch=("relu", "relu_"),
        emulate=relu,
        forms=(Form(("threshold", "threshold_", "_threshold"), threshold, supports_threshold),),
        litert=(Kernel("RELU", order="elements", options=NO_OPTIONS, versions=_WIDE),),
        arithmetic="clipping on the quantization parameters of the input, whose range ends at 0 "
        "where nothing else reads it; `threshold` of 0",
    )
)
register_operator(
    Operator(
        "relu6",
        torch=("relu6",),
        emulate=relu6,
        litert=(Kernel("RELU6", order="elements", options=NO_OPTIONS, versions=_WIDE),),
        arithmetic="clipping on the quantization parameters of the input, whose range ends at 0 "
        "and 6 where nothing else reads it",
    )
)
register_operator(
    Operator(
        "hardtanh",
        torch=("hardtanh", "hardtanh_"),
        emulate=hardtanh,
        supports=supports_clamp,
        litert=(
            Kernel("RELU_N1_TO_1", order="elements", options=NO_OPTIONS),
            Kernel("RELU_0_TO_1", order="elements", options=NO_OPTIONS),
        ),
        arithmetic="clipping on the quantization parameters of the input, of any bounds",
    )
)
register_operator(
    Operator(
        "clamp",
        torch=("clamp", "clamp_", "clip", "clip_"),
        emulate=clamp,
        supports=supports_clamp,
        forms=(
            Form(("clamp_min", "clamp_min_"), clamp_min, supports_clamp),
            Form(("clamp_max", "clamp_max_"), clamp_max, supports_clamp),
        ),
        arithmetic="clipping on the quantization parameters of the input, at the integers nearest "
        "to the bounds; tensors as bounds are a maximum and a minimum",
    )
)
register_operator(
    Operator(
        "maximum",
        torch=("maximum",),
        emulate=maximum,
        supports=supports_pair,
        learns_scale=True,
        arithmetic="operands requantized to the quantization parameters of the output, unless they "
        "share theirs, then compared; `max` of two tensors",
    )
)
register_operator(
    Operator(
        "minimum",
        torch=("minimum",),
        emulate=minimum,
        supports=supports_pair,
        learns_scale=True,
        arithmetic="operands requantized to the quantization parameters of the output, unless they "
        "share theirs, then compared; `min` of two tensors",
    )
)
