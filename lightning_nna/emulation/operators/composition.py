"""Operators that consist of several instructions and have the gradient of one float function.

Forward, each instruction is the accelerator's; backward, the whole is the derivative of the float
function at the quantized operands. Inside of it activations have 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.clipping import inside
from lightning_nna.emulation.first_order import require_first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators.call import Call, requantize
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import QParams

#: Result, its quantization parameters, and what was clipped to them (see :func:`.inside`).
Result = tuple[Tensor, QParams, Tensor | None]


def compose(
    call: Call,
    operands: Sequence[Activation],
    function: Callable[..., Tensor],
    steps: Callable[..., Tensor],
    *,
    gradient: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Run the instructions of a function in 16 bits, and requantize to the width of the call.

    Args:
        call: The call.
        operands: Quantized operands, any shapes.
        function: The float function; takes the values of the operands.
        steps: Function that runs the instructions: takes a call of 16 bits and the operands as
            tensors of 16 bits, and returns the result with its quantization parameters.
        gradient: Function whose derivative the result has; None for ``function``.

    Returns:
        The result, float32, of the shape that ``function`` gives, with its quantization parameters.
    """
    values = [operand.value for operand in operands]
    wide = call.child("wide", bits=16)

    def run() -> Tensor:
        entered = [
            carrier(call, wide.operand(carrier(call, operand), f"input{position}"))
            for position, operand in enumerate(operands)
        ]
        return steps(wide, *entered)

    if call.observing:
        with torch.no_grad():
            run()
        return call.observed(function(*values))

    def compute() -> Result:
        with torch.no_grad():
            return narrowed(call, run())

    with float32_arithmetic(values[0]):
        result, y = with_gradient(call, compute, derivative(gradient or function), *values)
    return call.with_qparams(result, y)


def narrowed(call: Call, result: Tensor) -> Result:
    """Requantize a result of any shape to the width of the call.

    What lies further beyond the range than half a scale counts as clipped.
    """
    y = call.output(lambda: result)
    tag = call.state.qparams_of(result)
    assert tag is not None, "an operator's result has quantization parameters"
    moved = requantize(call, Activation(result, tag), y)
    low, high = y.bounds
    return moved, y, (result <= (low - 0.5) * y.scale) | (result >= (high + 0.5) * y.scale)


def carrier(call: Call, x: Activation) -> Tensor:
    """Return a view of the operand, of its shape, that carries its quantization parameters.

    The operand itself may be a tensor that comes from float.
    """
    return call.with_qparams(x.value.view_as(x.value), x.qparams)


def with_gradient(
    call: Call,
    compute: Callable[[], Result],
    backward: Callable[..., Sequence[Tensor | None]],
    *tensors: Tensor | None,
) -> tuple[Tensor, QParams]:
    """Compute a result that has a gradient of its own.

    Args:
        call: The call, whose operator the error of a second derivative names.
        compute: Function that runs the instructions.
        backward: Gradients of the tensors: takes that of the result where it was not clipped, and
            the tensors.
        tensors: What the gradients go to, any shapes.

    Returns:
        Result and its quantization parameters.
    """
    name = call.site.rsplit("/", 1)[-1].partition("#")[0]
    result: tuple[Tensor, QParams] = _Composed.apply(name, compute, backward, *tensors)
    return result


def derivative(function: Callable[..., Tensor]) -> Callable[..., list[Tensor | None]]:
    """Return the gradients of a float function, for :func:`with_gradient`.

    Args:
        function: Takes the tensors, of any shapes, of which some may be None.
    """

    def backward(grad: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
        with torch.enable_grad():
            leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
            result = function(*leaves)
        present = [x for x in leaves if x is not None]
        gradients = iter(torch.autograd.grad(result, present, grad))
        return [None if x is None else next(gradients) for x in leaves]

    return backward


class _Composed(torch.autograd.Function):
    """The accelerator's instructions forward, the float function's derivative backward."""

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        compute: Callable[[], Result],
        backward: Callable[..., Sequence[Tensor | None]],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, QParams]:
        result, y, clipped = compute()
        ctx.name, ctx.backward_of = name, backward
        ctx.save_for_backward(clipped, *tensors)
        return result.detach(), y

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        require_first_order(ctx.name)
        clipped, *tensors = ctx.saved_tensors
        with float32_arithmetic(grad):
            return None, None, None, *ctx.backward_of(inside(grad, clipped), *tensors)
