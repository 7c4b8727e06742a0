"""Emulated operators are differentiable once: their gradient must not be differentiated again.

The gradient of an emulated operator takes the quantized weights and the clipping as constants.
PyTorch would differentiate it all the same, without what was taken as constant: the penalty of a
WGAN-GP or a Hessian would be zero or wrong, without a message.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order(operator: str) -> Callable[[Backward], Backward]:
    """Make a gradient that is to be differentiated again an error.

    The error comes where the gradient is asked for with ``create_graph=True``. Later would be too
    late, as with ``torch.autograd.function.once_differentiable``: its error is no part of the graph
    where the incoming gradient is a constant, as that of a sum is, or where PyTorch computes the
    gradients of some tensors only, and then a Hessian is zero.

    Args:
        operator: What the error calls the operator.

    Returns:
        A decorator of the ``backward`` of a ``torch.autograd.Function``.

    Example:
        >>> class Square(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return x * x
        ...
        ...     @staticmethod
        ...     @first_order("square")
        ...     def backward(ctx, grad):
        ...         return (2 * ctx.saved_tensors[0] * grad,)
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> torch.autograd.grad(Square.apply(x), x)
        (tensor(6.),)
        >>> torch.autograd.grad(Square.apply(x), x, create_graph=True)
        Traceback (most recent call last):
        ...
        RuntimeError: an emulated operator (square) has no second derivative, ...
    """

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def once(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            # A backward runs with gradients enabled if, and only if, create_graph is set.
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"an emulated operator ({operator}) has no second derivative, which "
                    "create_graph=True asks for: take a gradient penalty or a Hessian outside of "
                    "the emulation (of the module's float forward, outside of emulate, or with "
                    "targets that leave the critic out)"
                )
            return backward(ctx, *grads)

        return once

    return decorate
