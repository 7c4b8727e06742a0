r"""Layer and RMS normalization as the sequence of instructions that they become.

In 16 bits between two requantizations, with :math:`\epsilon` a constant of the program:

.. math:: d = x - \mathrm{mean}(x), \quad v = \mathrm{mean}(d \cdot d) + \epsilon, \quad
          y = (d \cdot v^{-1/2}) \cdot \gamma + \beta

The inverse square root is an interpolated table over the range of :math:`v`; below 1/128 of the
largest variance a table cannot follow it, so the output's grid ends there. Where calibration has
seen smaller ones (quiet frames next to loud ones), the result is normalized once more: its variance
is then 1 except for those, and theirs is 128 times nearer. A runtime without the kernel looks all
results of the table up. Forward, each step is the accelerator's;
backward, the whole is the float function's at the quantized input.

Reference:
    Ba, Kiros and Hinton, "Layer normalization", arXiv 1607.06450, 2016; Zhang and Sennrich, "Root
    mean square layer normalization", NeurIPS 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators import elementwise, reduction
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.composition import (
    Result,
    carrier,
    derivative,
    narrowed,
    with_gradient,
)
from lightning_nna.emulation.operators.driver import has_elements
from lightning_nna.emulation.operators.fused_normalization import (
    ELEMENTWISE,
    Gains,
    fused,
    fusible,
    inverse_root,
    varies_widely,
)
from lightning_nna.emulation.operators.record import Operator, register_operator
from lightning_nna.emulation.operators.table_look_up import record_look_up
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import PENDING

Grads = Sequence[Tensor | None]


def layer_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Emulate ``F.layer_norm`` of shape ``(..., *normalized_shape)``."""

    def in_float(x: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        return F.layer_norm(x, shape, gain, shift, eps)

    def backward(grad: Tensor, x: Tensor, gain: Tensor | None, shift: Tensor | None) -> Grads:
        _, mean, inverse = torch.native_layer_norm(x, shape, gain, shift, eps)
        wanted = [True, gain is not None, shift is not None]
        return torch.ops.aten.native_layer_norm_backward(
            grad, x, shape, mean, inverse, gain, shift, wanted
        )

    shape = list(normalized_shape)
    axes = tuple(range(-len(normalized_shape), 0))
    return normalize(call, input, weight, bias, axes, eps, in_float, backward, centered=True)


def rms_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Emulate ``F.rms_norm`` of shape ``(..., *normalized_shape)``."""

    def in_float(x: Tensor, gain: Tensor | None, _: Tensor | None) -> Tensor:
        return F.rms_norm(x, list(normalized_shape), gain, eps)

    axes = tuple(range(-len(normalized_shape), 0))
    smallest = torch.finfo(torch.float32).eps if eps is None else eps
    return normalize(
        call, input, weight, None, axes, smallest, in_float, derivative(in_float), centered=False
    )


def normalize(
    call: Call,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: tuple[int, ...],
    eps: float,
    in_float: Callable[..., Tensor],
    backward: Callable[..., Grads],
    *,
    centered: bool,
    gains: Gains = ELEMENTWISE,
) -> Tensor:
    """Normalize over the last axes of a tensor of any shape.

    Args:
        call: The call.
        input: Tensor of any shape.
        weight: Gain, or None; see ``gains``.
        bias: Shift, likewise.
        axes: The last axes, which are normalized together, below 0.
        eps: Added to the variance.
        in_float: The float function of input, gain and shift.
        backward: Gradients of input, gain and shift; takes that of the result and the three.
        centered: Whether the mean is taken off.
        gains: How gain and shift lie in the input.
    """
    x = call.operand(input, "input")
    arguments = (call, x, weight, bias, axes, eps, gains)
    if call.observing:
        with torch.no_grad():
            _steps(*arguments, centered=centered)
        return call.observed(in_float(x.value, weight, bias))
    with float32_arithmetic(x.value):
        alone = not call.recording and fusible(call, x, weight, bias)
        compute = partial(fused if alone else _one_by_one, *arguments, centered=centered)
        result, y = with_gradient(call, compute, backward, x.value, weight, bias)
    return call.with_qparams(result, y)


def _one_by_one(call: Call, *arguments: Any, centered: bool) -> Result:
    """Compute what :func:`fused` does, an instruction after the other."""
    with torch.no_grad():
        return narrowed(call, _steps(call, *arguments, centered=centered))


def _steps(
    call: Call,
    x: Activation,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: tuple[int, ...],
    eps: float,
    gains: Gains,
    *,
    centered: bool,
) -> Tensor:
    """The instructions, one after the other; in float while observing. The result has 16 bits."""
    wide = call.child("wide", bits=16)
    entered = wide.operand(carrier(call, x), "input")
    deviation = carrier(call, entered)
    if centered:
        mean = reduction.mean(wide.child("mean"), deviation, axes, keepdim=True)
        deviation = elementwise.sub(wide.child("deviation"), deviation, mean)
    result = _scaled(wide, deviation, axes, eps)
    if call.observing or varies_widely(wide):
        result = _scaled(wide.child("again"), result, axes, 0.0)
    channels = wide.viewed(gains.by_channel(result), result)
    if weight is not None:
        channels = elementwise.mul(wide.child("gain"), channels, _parameter(wide, gains, weight))
    if bias is not None:
        channels = elementwise.add(wide.child("shift"), channels, _parameter(wide, gains, bias))
    return wide.viewed(channels.view(result.shape), channels)


def _parameter(call: Call, gains: Gains, parameter: Tensor) -> Tensor:
    """A view that broadcasts against channels, and is as constant as the parameter."""
    return call.viewed(gains.parameter(parameter), parameter)


def _scaled(call: Call, x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """Divide by the root of the mean square and eps."""
    square = elementwise.mul(call.child("square"), x, x)
    variance = reduction.mean(call.child("variance"), square, axes, keepdim=True)
    if eps:
        variance = elementwise.add(call.child("epsilon"), variance, eps)
    factor = inverse_square_root(call.child("inverse"), variance)
    return elementwise.mul(call.child("normalized"), x, factor)


def inverse_square_root(call: Call, variance: Tensor) -> Tensor:
    """Compute RSQRT of a 16-bit tensor of any shape that is not negative."""
    v = call.operand(variance, "input")
    if call.observing:
        # What has no variance stays 0, whatever the factor: padding must not stop a calibration.
        return call.with_qparams(v.value.rsqrt().masked_fill(v.value == 0, 0.0), PENDING)
    integers, y = inverse_root(call, v.integers(), v.qparams)
    result = integers.mul_(y.scale)
    if call.recording:
        _record_inverse(call, v, Activation(result, y))
    return call.with_qparams(result, y)


def _record_inverse(call: Call, v: Activation, y: Activation) -> None:
    """Record RSQRT, or the table of its 32,768 results where the runtime has none of 16 bits."""
    if call.has("RSQRT"):
        call.record("RSQRT", [v.stored()], [y.stored()])
        return
    integers = torch.arange(v.qparams.bounds[1] + 1.0)
    entries, _ = inverse_root(call, integers, v.qparams)
    record_look_up(call, v, entries.double() * y.qparams.scale, y)


register_operator(
    Operator(
        "layer_norm",
        torch=("layer_norm",),
        emulate=layer_norm,
        supports=has_elements,
        arithmetic="means, products and an interpolated inverse square root in 16 bits, between "
        "two requantizations",
    )
)
register_operator(
    Operator(
        "rms_norm",
        torch=("rms_norm",),
        emulate=rms_norm,
        supports=has_elements,
        arithmetic="a mean, products and an interpolated inverse square root in 16 bits, between "
        "two requantizations",
    )
)
