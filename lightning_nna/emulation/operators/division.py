r"""Reciprocals and quotients.

No kernel divides integers without faults: LiteRT's ``DIV`` shifts by more than 31 bits where a
small number is divided by a large one. A reciprocal is a table of 256 entries instead, also where
activations have 16 bits, and a quotient is a product with a reciprocal of 16 bits,

.. math:: \frac{a}{b} = a \cdot \frac{1}{b}

The integer 0 stands for all divisors of less than half a step. Its reciprocal is the end of the
output's range, which reaches no further than the reciprocal of one step. Division by a number or
another constant is a product with its inverse.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.operators import elementwise
from lightning_nna.emulation.operators.call import Call, requantize
from lightning_nna.emulation.operators.driver import drive, real, table
from lightning_nna.emulation.operators.record import Form, Operator, register_operator
from lightning_nna.emulation.operators.table_look_up import record_table
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import QParams, affine_qparams

# Beyond every range, and below what single precision holds.
_POLE = 1e30


def div(
    call: Call, input: Tensor | float, other: Tensor | float, *, rounding_mode: str | None = None
) -> Tensor:
    """Emulate ``input / other`` of shapes that broadcast."""
    if not isinstance(other, Tensor):
        return elementwise.mul(call, input, 1.0 / other)
    constants = call.state.constants
    if constants.in_program(other):
        inverse = other.reciprocal()
        constants.mark(inverse, constants.kind_of(other))
        return elementwise.mul(call, input, inverse)
    wide = call.child("quotient", bits=16)
    product = elementwise.mul(wide, input, reciprocal(wide.child("reciprocal"), other))
    if call.bits == 16:
        return product
    if call.observing:
        return call.observed(product, "narrowed")
    y = call.output(lambda: product, "narrowed")
    tag = call.state.qparams_of(product)
    assert tag is not None, "an operator's result has quantization parameters"
    return requantize(call, Activation(product, tag), y)


def reversed_div(call: Call, input: Tensor, other: Tensor | float) -> Tensor:
    """Emulate ``other / input``, as ``1 / x`` calls it, of shapes that broadcast."""
    if not isinstance(other, Tensor) and other == 1 and not call.state.constants.in_program(input):
        return reciprocal(call, input)
    return div(call, other, input)


def supports_div(
    input: Any, other: Any, *args: Any, rounding_mode: str | None = None, **kwargs: Any
) -> bool | str:
    """Tell whether the accelerator has a quotient: one that is not rounded, and not by 0."""
    if rounding_mode is not None:
        return "no kernel rounds a quotient: write a division, and torch.floor or torch.trunc of it"
    return isinstance(other, Tensor) or other != 0


def reciprocal(call: Call, input: Tensor) -> Tensor:
    """Emulate ``torch.reciprocal`` of any shape."""
    return drive(RECIPROCAL, call, input)


def addcdiv(
    call: Call, input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1
) -> Tensor:
    """Emulate ``input + value * tensor1 / tensor2`` of shapes that broadcast."""
    return elementwise.add(call, input, div(call.child("ratio"), tensor1, tensor2), alpha=value)


def addcmul(
    call: Call, input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1
) -> Tensor:
    """Emulate ``input + value * tensor1 * tensor2`` of shapes that broadcast."""
    product = elementwise.mul(call.child("product"), tensor1, tensor2)
    return elementwise.add(call, input, product, alpha=value)


def lerp(call: Call, input: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    """Emulate ``input + weight * (end - input)`` of shapes that broadcast."""
    difference = elementwise.sub(call.child("difference"), end, input)
    return elementwise.add(call, input, elementwise.mul(call.child("part"), difference, weight))


def _reals(x: Tensor) -> Tensor:
    """Reciprocals; of 0 what lies beyond every range, above where there is something above."""
    pole = _POLE if bool(x[-1] > 0) else -_POLE
    return torch.where(x == 0, torch.full((), pole), x.reciprocal())


def _output_of(call: Call, operands: tuple[Activation, ...], y: QParams) -> QParams:
    """Parameters that end at the reciprocals of one step."""
    (x,) = operands
    low, high = (bound * y.scale for bound in y.bounds)
    last = 1 / x.qparams.scale
    if -last <= low and high <= last:
        return y
    power_of_two = call.state.spec.power_of_two_scales
    first, last = max(low, -last), min(high, last)
    return affine_qparams(first, last, bits=y.bits, power_of_two=power_of_two)


_TABLE = table(real(_reals))

RECIPROCAL = register_operator(
    Operator(
        "reciprocal",
        torch=("reciprocal", "reciprocal_"),
        float=torch.reciprocal,
        integers=_TABLE,
        backward=lambda grad, y: -grad * y * y,
        saves="result",
        operand_bits={"input": 8},
        output_of=_output_of,
        instructions=partial(record_table, _TABLE),
        arithmetic="table of 256 entries, looked up by GATHER, also for activations of 16 bits; "
        "that of 0 is the end of the output's range",
    )
)
register_operator(
    replace(
        elementwise.MUL,
        forms=(
            *elementwise.MUL.forms,
            Form(("div", "div_", "divide", "divide_", "true_divide"), div, supports_div),
            Form(("__rdiv__", "__rtruediv__"), reversed_div),
        ),
        arithmetic="product of the integers, rescaled; a division by a number or a constant is "
        "one, and by an activation a reciprocal and a product in 16 bits",
    )
)
register_operator(
    Operator(
        "addcmul",
        torch=("addcmul", "addcmul_"),
        emulate=addcmul,
        forms=(Form(("addcdiv", "addcdiv_"), addcdiv),),
        learns_scale=True,
        arithmetic="a product or quotient, and a sum",
    )
)
register_operator(
    Operator(
        "lerp",
        torch=("lerp", "lerp_"),
        emulate=lerp,
        learns_scale=True,
        arithmetic="a difference, a product and a sum",
    )
)
