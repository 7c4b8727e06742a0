"""Forbid second derivatives of emulated operators.

The gradient of an emulated operator treats the quantized weights and the clipping as constants.
PyTorch would differentiate that gradient without the terms of these constants: the gradient penalty
of a WGAN-GP or a Hessian would be zero or wrong, without a message.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order(operator: str) -> Callable[[Backward], Backward]:
    """Decorate a backward so that it raises if its gradient is to be differentiated again.

    It raises as soon as a gradient is computed with ``create_graph=True``. The error of
    ``torch.autograd.function.once_differentiable`` comes later and can be missed: it is not part of
    the graph if the incoming gradient is a constant, as that of a sum is, or if PyTorch computes
    the gradients of some tensors only; a Hessian is zero then.

    Args:
        operator: Name of the operator in the error.

    Returns:
        A decorator of the ``backward`` of a ``torch.autograd.Function``. Gradients have the shapes
        of their tensors.

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
            require_first_order(operator)
            return backward(ctx, *grads)

        return once

    return decorate


def require_first_order(operator: str) -> None:
    """Raise in a backward whose gradient is to be differentiated again.

    Args:
        operator: Name of the operator in the error.

    Raises:
        RuntimeError: If gradients are enabled, as they are only with ``create_graph=True``.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"an emulated operator ({operator}) has no second derivative, which "
            "create_graph=True asks for: take a gradient penalty or a Hessian outside of "
            "the emulation (of the module's float forward, outside of emulate, or with "
            "targets that leave the critic out)"
        )
