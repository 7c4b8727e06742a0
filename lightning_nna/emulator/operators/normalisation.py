r"""Layer and RMS normalisation as the sequence of instructions that they become.

In 16 bits between two requantisations, with :math:`\epsilon` a constant of the program:

.. math:: d = x - \mathrm{mean}(x), \quad v = \mathrm{mean}(d \cdot d) + \epsilon, \quad
          y = (d \cdot v^{-1/2}) \cdot \gamma + \beta

The inverse square root is an interpolated table over the range of :math:`v`; below 1/128 of the
largest variance a table cannot follow it, so the output's grid ends there. Where calibration has
seen smaller ones (quiet frames beside loud ones), the result is normalised once more: its variance
is then 1 but for those, and theirs is 128 times nearer. Forward, each step is the chip's;
backward, the whole is the float function's at the quantised input.

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

from lightning_nna.emulator.operators import elementwise, reduction
from lightning_nna.emulator.operators.call import (
    Activation,
    Call,
    float32_arithmetic,
    requantize,
)
from lightning_nna.emulator.operators.fused_normalisation import (
    fused,
    fusible,
    inverse_root,
    varies_widely,
)
from lightning_nna.emulator.ranges import PENDING, QParams


def layer_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.layer_norm`` on the chip."""

    def in_float(x: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        return F.layer_norm(x, list(normalized_shape), gain, shift, eps)

    axes = tuple(range(-len(normalized_shape), 0))
    return _normalise(call, input, weight, bias, axes, eps, in_float, centred=True)


def rms_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``F.rms_norm`` on the chip."""

    def in_float(x: Tensor, gain: Tensor | None, _: Tensor | None) -> Tensor:
        return F.rms_norm(x, list(normalized_shape), gain, eps)

    axes = tuple(range(-len(normalized_shape), 0))
    smallest = torch.finfo(torch.float32).eps if eps is None else eps
    return _normalise(call, input, weight, None, axes, smallest, in_float, centred=False)


def _normalise(
    call: Call,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: tuple[int, ...],
    eps: float,
    in_float: Callable[..., Tensor],
    *,
    centred: bool,
) -> Tensor:
    x = call.operand(input, "input")

    def steps() -> tuple[Tensor, QParams]:
        with torch.no_grad():
            return _steps(call, x, weight, bias, axes, eps, centred)

    if call.observing:
        steps()
        return call.observed(in_float(x.value, weight, bias))
    with float32_arithmetic(x.value):
        if call.recording or not fusible(call, x, weight, bias):
            compute = steps
        else:
            compute = partial(fused, call, x, weight, bias, axes, eps, centred=centred)
        result, y = _Normalise.apply(x.value, weight, bias, compute, in_float)
    return call.tagged(result, y)


def _steps(
    call: Call,
    x: Activation,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: tuple[int, ...],
    eps: float,
    centred: bool,
) -> tuple[Tensor, QParams]:
    """The instructions, one after the other; in float while observing."""
    wide = call.part("wide", bits=16)
    entered = wide.operand(_carrier(call, x), "input")
    deviation = _carrier(call, entered)
    if centred:
        mean = reduction.mean(wide.part("mean"), deviation, axes, keepdim=True)
        deviation = elementwise.sub(wide.part("deviation"), deviation, mean)
    result = _scaled(wide, deviation, axes, eps)
    if call.observing or varies_widely(wide):
        result = _scaled(wide.part("again"), result, axes, 0.0)
    if weight is not None:
        result = elementwise.mul(wide.part("gain"), result, weight)
    if bias is not None:
        result = elementwise.add(wide.part("shift"), result, bias)
    if call.observing:
        return result, PENDING
    y = call.output(lambda: result)
    tag = call.host.tag_of(result)
    assert tag is not None, "an operator's result has a grid"
    return requantize(call, Activation(result, tag), y), y


def _carrier(call: Call, x: Activation) -> Tensor:
    """A view of the operand that carries its grid; the operand itself may not be the chip's."""
    return call.tagged(x.value.view_as(x.value), x.qparams)


def _scaled(call: Call, x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """Divide by the root of the mean square and eps."""
    square = elementwise.mul(call.part("square"), x, x)
    variance = reduction.mean(call.part("variance"), square, axes, keepdim=True)
    if eps:
        variance = elementwise.add(call.part("epsilon"), variance, eps)
    factor = _inverse_square_root(call.part("inverse"), variance)
    return elementwise.mul(call.part("normalised"), x, factor)


def _inverse_square_root(call: Call, variance: Tensor) -> Tensor:
    """RSQRT of a 16-bit tensor that is not negative."""
    v = call.operand(variance, "input")
    if call.observing:
        # What has no variance stays 0, whatever the factor: padding must not stop a calibration.
        return call.tagged(v.value.rsqrt().masked_fill(v.value == 0, 0.0), PENDING)
    integers, y = inverse_root(call, v.integers(), v.qparams)
    result = integers.mul_(y.scale)
    if call.recording:
        call.record("RSQRT", [v.stored()], [Activation(result, y).stored()])
    return call.tagged(result, y)


class _Normalise(torch.autograd.Function):
    """The chip's steps forward, the float function's derivative backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        steps: Callable[[], tuple[Tensor, QParams]],
        in_float: Callable[..., Tensor],
    ) -> tuple[Tensor, QParams]:
        result, y = steps()
        ctx.in_float, ctx.has = in_float, (weight is not None, bias is not None)
        low, high = (bound * y.scale for bound in y.bounds)
        ctx.bounds = (low, high)
        ctx.save_for_backward(x, result, *(p for p in (weight, bias) if p is not None))
        return result.detach(), y

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, result, *parameters = ctx.saved_tensors
        given = iter(parameters)
        operands = [x, *(next(given) if has else None for has in ctx.has)]
        low, high = ctx.bounds
        with float32_arithmetic(grad), torch.enable_grad():
            leaves = [None if p is None else p.detach().requires_grad_() for p in operands]
            again = ctx.in_float(*leaves)
            inside = (result > low) & (result < high)
            wanted = [p for p in leaves if p is not None]
            grads = iter(torch.autograd.grad(again, wanted, grad * inside))
        return *(None if p is None else next(grads) for p in leaves), None, None
