"""Powers: whole ones are products, by squaring; others are roots, reciprocals and exponentials."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lightning_nna.emulation.operators import division, elementary_kernels, elementwise
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.record import Form, Operator, register_operator

# Largest whole exponent: four squarings in a row.
_LARGEST = 16


def power(call: Call, input: Tensor | float, exponent: Tensor | float) -> Tensor:
    """Emulate ``input ** exponent`` of any shape, where one of both is a number."""
    if isinstance(exponent, Tensor):
        assert not isinstance(input, Tensor)
        product = elementwise.mul(call.child("argument"), exponent, math.log(input))
        return elementary_kernels.exp(call, product)
    assert isinstance(input, Tensor)
    if exponent < 0 and exponent not in (-1, -0.5):
        return power(call, division.reciprocal(call.child("inverse"), input), -exponent)
    if exponent == -1:
        return division.reciprocal(call, input)
    if exponent in (0.5, -0.5):
        root = elementary_kernels.sqrt if exponent > 0 else elementary_kernels.rsqrt
        return root(call, input)
    return _product(call, input, exponent)


def square(call: Call, input: Tensor) -> Tensor:
    """Emulate ``torch.square`` of any shape: a product."""
    return elementwise.mul(call, input, input)


def reversed_power(call: Call, input: Tensor, other: Tensor | float) -> Tensor:
    """Emulate ``other ** input``, as ``2 ** x`` calls it, of any shape."""
    return power(call, other, input)


def supports_power(input: Any, exponent: Any, **_: Any) -> bool:
    """Tell whether the accelerator has this power.

    Args:
        input: Tensor of any shape, or a positive number.
        exponent: Whole number or half of one, not 0; a tensor for a number.
    """
    if isinstance(exponent, Tensor):
        return not isinstance(input, Tensor) and input > 0 and input != 1
    size = abs(exponent)
    return size == 0.5 or (2 * size == int(2 * size) and 1 < size <= _LARGEST) or exponent == -1


def supports_reversed_power(input: Any, other: Any, **_: Any) -> bool:
    """Tell whether the accelerator has this power, see :func:`supports_power`."""
    return supports_power(other, input)


def _product(call: Call, x: Tensor, exponent: float) -> Tensor:
    """A power of more than 1: x^5 = x (x^2)^2, and x^1.5 = x x^0.5."""
    if exponent % 1:
        root = elementary_kernels.sqrt(call.child("root"), x)
        others = x if exponent == 1.5 else _product(call.child("others"), x, exponent - 0.5)
        return elementwise.mul(call, others, root)
    if exponent == 2:
        return elementwise.mul(call, x, x)
    if exponent % 2:
        return elementwise.mul(call, x, _product(call.child("even"), x, exponent - 1))
    half = _product(call.child("half"), x, exponent / 2)
    return elementwise.mul(call, half, half)


register_operator(
    Operator(
        "square",
        torch=("square", "square_"),
        emulate=square,
        learns_scale=True,
        arithmetic="a product",
    )
)
register_operator(
    Operator(
        "pow",
        torch=("pow", "pow_", "__pow__"),
        emulate=power,
        supports=supports_power,
        forms=(Form(("__rpow__",), reversed_power, supports_reversed_power),),
        arithmetic="products of whole powers up to 16; square root, inverse square root and "
        "reciprocal for 0.5, -0.5 and -1; an exponential where the base is a number",
    )
)
