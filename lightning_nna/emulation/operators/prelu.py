r"""PReLU: leaky ReLU with a slope for every channel, which is a parameter.

The kernel has two fixed-point multipliers, one for each side of zero. With the slope
:math:`\alpha = s_\alpha q_\alpha` on symmetric quantization parameters of its own,

.. math:: q_y - o_y = \begin{cases}
          M(s_x / s_y;\ q_x - o_x) & q_x \ge o_x \\
          M(s_x s_\alpha / s_y;\ (q_x - o_x)\, q_\alpha) & q_x < o_x \end{cases}

where :math:`M` rounds twice, and both factors are computed in single precision. Slopes have 8 bits,
also for activations of 16. A runtime without a kernel of this width has two clamps, a product and a
sum.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.rescaling import rescale
from lightning_nna.emulation.operators import clamping, elementwise
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.composition import carrier
from lightning_nna.emulation.operators.driver import drive
from lightning_nna.emulation.operators.record import (
    NO_OPTIONS,
    Kernel,
    Operator,
    register_operator,
)
from lightning_nna.emulation.program import Activation, Stored
from lightning_nna.emulation.ranges import QParams

# Axes that the kernel broadcasts over.
_AXES = 4


def prelu(call: Call, input: Tensor, weight: Tensor) -> Tensor:
    """Emulate ``F.prelu`` of any shape."""
    if call.has("PRELU"):
        return drive(PRELU, call, input, weight)
    x = carrier(call, call.operand(input, "input"))
    slopes = call.viewed(_by_channel(weight, x), weight)
    positive = clamping.relu(call.child("positive"), x)
    negative = clamping.clamped(call.child("negative"), x, -math.inf, 0.0)
    return elementwise.add(call, positive, elementwise.mul(call.child("leaked"), negative, slopes))


def supports_prelu(input: Any, weight: Any) -> bool:
    """Tell whether the accelerator has this form.

    Args:
        input: Tensor of any shape.
        weight: Slopes, shape ``(channels,)`` or ``(1,)``.
    """
    return isinstance(input, Tensor) and 0 < input.dim() <= _AXES and weight.numel() > 0


def _integers(x: Activation, alpha: Activation, *, y: QParams, call: Call) -> Tensor:
    """Integers of the result less its zero point, float64, in the shape of ``x``."""
    rounding = call.state.spec.rounding_of("double")
    precision = call.state.spec.factor_precision
    scales = [precision(each.scale) for each in (x.qparams, alpha.qparams, y)]
    values, largest = x.integers(), float(x.qparams.largest)
    slopes = _by_channel(alpha.integers(), values)
    # With x on a scale of 0.5, a slope of 0.25 = 32 * 2^-7, and y on a scale of 0.25: x = 6 is
    # 12 as an integer and 24 on the scale of y; x = -6 is -12, its product with 32 is -384, and
    # times 0.5 * 2^-7 / 0.25 = 2^-6 that is -6 on the scale of y, which stands for -1.5.
    same = rescale(values, float(scales[0] / scales[2]), rounding=rounding, largest=largest)
    leaked = rescale(
        values * slopes,
        float(scales[0] * scales[1] / scales[2]),
        rounding=rounding,
        largest=largest * alpha.qparams.largest,
    )
    return torch.where(values >= 0, same, leaked)


def _record(
    operator: Operator, call: Call, operands: tuple[Activation, ...], y: Activation
) -> None:
    """Report the instruction, whose slopes broadcast with the input as NumPy has it."""
    x, alpha = operands
    stored = alpha.stored()
    assert stored.source is not None
    slopes = replace(
        stored,
        integers=_by_channel(stored.integers, x.value),
        source=_by_channel(stored.source, x.value),
    )
    inputs: list[Stored] = [x.stored(), slopes]
    call.record("PRELU", inputs, [y.stored()])


def _by_channel(slopes: Tensor, x: Tensor) -> Tensor:
    """Slopes of shape ``(channels,)`` along the second axis of ``x``, of any number of axes."""
    return slopes.reshape(-1, *(1 for _ in x.shape[2:]))


PRELU = register_operator(
    Operator(
        "prelu",
        torch=("prelu",),
        float=torch.prelu,
        operands=("input", "weight"),
        integers=_integers,
        instructions=_record,
        emulate=prelu,
        supports=supports_prelu,
        litert=(Kernel("PRELU", order="elements", options=NO_OPTIONS, operands={1: "slope"}),),
        operand_bits={"weight": 8},
        learns_scale=True,
        arithmetic="products of the integers with the slopes below zero, rescaled; two clamps, a "
        "product and a sum where the kernel is missing",
    )
)
