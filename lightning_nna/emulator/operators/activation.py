r"""Sigmoid, tanh, ReLU and dropout.

Sigmoid and tanh of 8-bit activations are tables of 256 entries: the float function at every
dequantised input, on the output grid that the reference fixes (1/256 from -128, and 1/128).
The backward is the function's own derivative, from the tabulated output.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulator.operators.call import Activation, Call, float32_arithmetic
from lightning_nna.emulator.ranges import (
    PENDING,
    SIGMOID_OUTPUT,
    TANH_OUTPUT,
    QParams,
    round_significand,
)
from lightning_nna.functional.fixed_point import round_half_away

_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], QParams]] = {
    "sigmoid": (torch.sigmoid, SIGMOID_OUTPUT),
    "tanh": (torch.tanh, TANH_OUTPUT),
}


def sigmoid(call: Call, input: Tensor) -> Tensor:
    """``torch.sigmoid`` as a table."""
    return _tabulated(call, input, "sigmoid")


def tanh(call: Call, input: Tensor) -> Tensor:
    """``torch.tanh`` as a table."""
    return _tabulated(call, input, "tanh")


def relu(call: Call, input: Tensor, inplace: bool = False) -> Tensor:
    """``relu`` on the input's own grid: the integers below the zero point become the zero point.

    With equal scales the reference's rescaling is by one, so nothing is rounded.
    """
    x = call.operand(input, "input")
    result = call.unchanged(torch.relu(x.value), x)
    if call.recording:
        call.record("RELU", [x.stored()], [Activation(result, x.qparams).stored()])
    return result


def dropout(
    call: Call, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Dropout as a change of grid: the integers stay, the scale grows by 1 / (1 - p).

    The new scale is rounded to the significand that every scale has: the integers stay exact. An
    activation that no operator has quantised yet stays so. The emulator writes in-place results.
    """
    tag = call.host.tag_of(input)
    if tag is None:
        return F.dropout(input, p, training)
    if tag == PENDING or not training or not 0 < p < 1:
        return call.tagged(F.dropout(input, p, training), tag)
    grown = replace(tag, scale=round_significand(tag.scale / (1 - p), tag.bits))
    with float32_arithmetic(input):
        kept = torch.empty_like(input).bernoulli_(1 - p).mul_(grown.scale)
        # By a tensor: a GPU would multiply by the inverse of a number.
        result = (input / torch.full((), tag.scale, device=input.device)) * kept
    return call.tagged(result, grown)


def _tabulated(call: Call, input: Tensor, name: str) -> Tensor:
    x = call.operand(input, "input")
    function, y = _FUNCTIONS[name]
    if call.observing:
        return call.unchanged(function(x.value), Activation(x.value, PENDING))
    with float32_arithmetic(input):
        result = _Table.apply(x.value, name, x, call.exact)
    if call.recording:
        kernel = {"sigmoid": "LOGISTIC", "tanh": "TANH"}[name]
        call.record(kernel, [x.stored()], [Activation(result, y).stored()])
    return call.tagged(result, y)


@lru_cache(maxsize=256)
def activation_table(name: str, x: QParams) -> Tensor:
    """Integers of the output less its zero point, for the inputs ``x.low`` … ``x.high``, float32.

    Computed in float32 by the C library and multiplied by the inverse of the output's scale, as
    the reference does. PyTorch's own functions differ in the last bit here and there, which
    moves an entry of a table in a hundred thousand.
    """
    _, y = _FUNCTIONS[name]
    inputs = torch.arange(x.low, x.high + 1, dtype=torch.float32)
    reals = (inputs - x.zero_point) * x.scale
    c_function = _c_library().tanhf if name == "tanh" else _c_library().expf
    if name == "tanh":
        outputs = torch.tensor([c_function(value) for value in reals.tolist()])
    else:
        outputs = 1 / (1 + torch.tensor([c_function(-value) for value in reals.tolist()]))
    low, high = y.bounds
    return round_half_away(outputs * (1 / y.scale)).clamp_(low, high)


@lru_cache(maxsize=1)
def _c_library() -> ctypes.CDLL:
    """Single-precision functions of the C library that this process runs on."""
    library = ctypes.CDLL(ctypes.util.find_library("m") or "ucrtbase")
    for function in (library.tanhf, library.expf):
        function.argtypes, function.restype = [ctypes.c_float], ctypes.c_float
    return library


class _Table(torch.autograd.Function):
    """A table forward, the derivative at its output backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, activation: Activation, exact: bool) -> Tensor:
        function, y = _FUNCTIONS[name]
        low, high = y.bounds
        if exact:
            table = activation_table(name, activation.qparams).to(x.device)
            first = activation.qparams.bounds[0]
            centred = table[(activation.integers() - first).long()]
        else:
            # The same values but where the function falls on a tie: no gather, half the time.
            centred = function(x.detach()).mul_(1 / y.scale).round_().clamp_(low, high)
        result = centred.mul_(y.scale)
        ctx.name = name
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        with float32_arithmetic(grad):
            if ctx.name == "tanh":
                slope = torch.ops.aten.tanh_backward(grad, y)
            else:
                slope = torch.ops.aten.sigmoid_backward(grad, y)
        return slope, None, None, None
