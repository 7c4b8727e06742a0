r"""Addition, subtraction and multiplication of activations on different grids.

Addition rescales both operands to a common grid :math:`2^{20}` finer than twice the coarser one
(:math:`2^{15}` for 16 bits), adds, and rescales to the output; each of the three factors is a
fixed-point multiplier below 1, so that no output has a grid finer than the common one.

.. math:: y = M(M(q_a 2^{20}) + M(q_b 2^{20}))

Multiplication rescales the product of the integers once, by :math:`s_a s_b / s_y`.

Two 8-bit operands have 65536 pairs of values: in exact fidelity their result is looked up in a
table that this arithmetic has filled.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.fixed_point import INT32_MAX
from lightning_nna.emulation.arithmetic.rescaling import (
    RoundingKind,
    rescale,
    rescale_fast,
    spills,
)
from lightning_nna.emulation.kernels.library import runs_kernel
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.driver import drive
from lightning_nna.emulation.operators.record import Form, Kernel, Operator, register_operator
from lightning_nna.emulation.operators.tables import LookedUp, Table
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import QParams
from lightning_nna.emulation.spec import NNASpec

Kind = Literal["ADD", "SUB", "MUL"]

#: Left shift of the operands of a sum, by the width of the output.
LEFT_SHIFT = {8: 20, 16: 15}


def add(call: Call, input: Tensor | float, other: Tensor | float, *, alpha: float = 1) -> Tensor:
    """Emulate ``input + alpha * other`` of shapes that broadcast; other factors are products."""
    if abs(alpha) != 1:
        other = mul(call.child("alpha"), other, abs(alpha))
    return drive(ADD if alpha > 0 else SUB, call, input, other)


def sub(call: Call, input: Tensor | float, other: Tensor | float, *, alpha: float = 1) -> Tensor:
    """Emulate ``input - alpha * other`` of shapes that broadcast."""
    return add(call, input, other, alpha=-alpha)


def reversed_sub(call: Call, input: Tensor, other: Tensor | float, *, alpha: float = 1) -> Tensor:
    """Emulate ``other - alpha * input``, as ``1 - x`` calls it, of shapes that broadcast."""
    return sub(call, other, input, alpha=alpha)


def mul(call: Call, input: Tensor | float, other: Tensor | float) -> Tensor:
    """Emulate ``input * other`` of shapes that broadcast."""
    return drive(MUL, call, input, other)


def neg(call: Call, input: Tensor) -> Tensor:
    """Negate a tensor of any shape: a product with -1."""
    return mul(call, input, -1.0)


def _integers(
    kind: Kind, a: Activation, b: Activation, *, y: QParams, call: Call
) -> Tensor | LookedUp:
    """Integers of a sum, difference or product with broadcasting."""
    spec = call.state.spec
    learns = call.state.scales.learns_outputs
    has_table = y.bits == 8 and not learns and _has_table(a) and _has_table(b)
    # By a kernel a look-up takes less than the arithmetic of fast fidelity.
    if has_table and (call.exact or runs_kernel("look_up_pair", a.value)):
        return _look_up(kind, a, b, y, spec)
    if not call.exact and not _spills(kind, a.qparams, b.qparams, y, spec):
        return _fast(kind, a, b, y, spec)
    grids = (a.qparams, b.qparams, y)
    return pairwise(kind, a.integers(), b.integers(), grids, spec)


def _fast(kind: Kind, a: Activation, b: Activation, y: QParams, spec: NNASpec) -> Tensor:
    """Rounded in float32, in units of the output's scale."""
    left, right = a.value.detach(), b.value.detach()
    if kind == "MUL":
        product = left * right
        product *= 1 / (a.qparams.scale * b.qparams.scale)
        factor = product_factor(a.qparams, b.qparams, y, spec)
        return rescale_fast(product, factor, rounding=spec.rounding_of("double"))
    # The operands are small before broadcasting: scale them there.
    sign = 1.0 if kind == "ADD" else -1.0
    return (left * (1 / y.scale) + right * (sign / y.scale)).round_()


def _spills(kind: Kind, a: QParams, b: QParams, y: QParams, spec: NNASpec) -> bool:
    """Tell whether a product's result may leave 32 bits; a sum has a grid that prevents it."""
    if kind != "MUL":
        return False
    largest = float(a.largest * b.largest)
    factor = product_factor(a, b, y, spec)
    return spills(factor, rounding=spec.rounding_of("double"), largest=largest)


def _look_up(kind: Kind, a: Activation, b: Activation, y: QParams, spec: NNASpec) -> LookedUp:
    """The result of every pair, from a table of 65536."""
    return LookedUp(_table(kind, a.qparams, b.qparams, y, spec), (a, b))


def _has_table(x: Activation) -> bool:
    """Tell whether a table pays: not for a parameter, whose scale changes with every step."""
    return x.qparams.bits == 8 and (not x.constant or x.value.numel() == 1)


@lru_cache(maxsize=512)
def _table(kind: Kind, a: QParams, b: QParams, y: QParams, spec: NNASpec) -> Table:
    """Unclipped results for all pairs of 8-bit integers, the first operand's most significant."""
    with torch.inference_mode(False):  # Kept for training, whoever asks first.
        rows, columns = (torch.arange(256, dtype=torch.float32).add_(q.bounds[0]) for q in (a, b))
        return Table(pairwise(kind, rows[:, None], columns, (a, b, y), spec).flatten(), y)


def pairwise(
    kind: Kind,
    a: Tensor,
    b: Tensor,
    grids: tuple[QParams, QParams, QParams],
    spec: NNASpec,
) -> Tensor:
    """Compute integers of a sum, difference or product, rounded as the kernel does, not clipped.

    Args:
        kind: Name of the kernel.
        a: Integers of the first operand less its zero point, any shape.
        b: Integers of the second less its zero point; the shapes broadcast.
        grids: Quantization parameters of both operands and the output.
        spec: Accelerator.

    Returns:
        Integers of the output less its zero point, float64.
    """
    q_a, q_b, y = grids
    rounding: RoundingKind = spec.rounding_of("double")
    if kind == "MUL":
        factor = product_factor(q_a, q_b, y, spec)
        largest = float(q_a.largest * q_b.largest)
        product = a.double() * b.double()
        return rescale(product, factor, rounding=rounding, largest=largest, zero_point=y.zero_point)
    return _exact_sum(kind, a, b, q_a, q_b, y, rounding)


def _exact_sum(
    kind: Kind, a: Tensor, b: Tensor, q_a: QParams, q_b: QParams, y: QParams, rounding: RoundingKind
) -> Tensor:
    """The sum or difference as the reference adds.

    The subtraction kernel negates the second operand after its rescaling, not before: a doubly
    rounded multiplier is not odd.
    """
    left_shift = LEFT_SHIFT[y.bits]
    *operand_factors, last_factor = sum_factors(q_a, q_b, y)
    first, second = (
        rescale(
            x.double() * 2.0**left_shift,
            factor,
            rounding=rounding,
            largest=INT32_MAX,
        )
        for x, factor in zip((a, b), operand_factors, strict=True)
    )
    total = first + second if kind == "ADD" else first - second
    return rescale(total, last_factor, rounding=rounding, largest=INT32_MAX)


def sum_factors(a: QParams, b: QParams, y: QParams) -> tuple[float, float, float]:
    """Return the factors of both operands of a sum, after their left shift, and of its result.

    Args:
        a: Quantization parameters of the first operand.
        b: Of the second.
        y: Of the result, whose width decides about the shift.

    Example:
        >>> sum_factors(QParams(0.5, 0), QParams(0.25, 0), QParams(1.0, 0))
        (0.5, 0.25, 9.5367431640625e-07)
    """
    twice_coarser = 2 * max(a.scale, b.scale)
    last = twice_coarser / ((1 << LEFT_SHIFT[y.bits]) * y.scale)
    return a.scale / twice_coarser, b.scale / twice_coarser, last


def grid_of_sum(a: QParams, b: QParams, y: QParams) -> QParams:
    """The grid of a sum or difference, coarser where the kernels could not write it.

    With a last multiplier of 1 or more LiteRT's ADD aborts and its SUB gives other integers. So the
    steps must be longer than those in which the operands are added; where these nearly cancel,
    the range that was observed may ask for shorter ones, which could hold nothing more.

    Args:
        a: Grid of the first operand.
        b: Of the second.
        y: What the observed range asks for.

    Example:
        >>> grid = QParams(1.0, 0, -32768, 32767)
        >>> grid_of_sum(grid, grid, QParams(1e-9, 0, -32768, 32767)).scale == 2**-13
        True
    """
    finest = 2 * max(a.scale, b.scale) / 2 ** LEFT_SHIFT[y.bits]
    if y.scale > finest:
        return y
    # A power of two, which every chip has as a scale.
    return replace(y, scale=math.ldexp(1.0, math.frexp(finest)[1]))


def product_factor(a: QParams, b: QParams, y: QParams, spec: NNASpec) -> float:
    """Factor of a product, in the precision of the kernel."""
    # The one factor that the converter to TOSA forms in single precision.
    precision = np.float32 if spec.runtime == "tosa" else spec.factor_precision
    return float(precision(a.scale) * precision(b.scale) / precision(y.scale))


def _version_of_mul(version: int, operator: Any, tensors: Any) -> int:
    """Version 3 where the product of two 8-bit scales is no smaller than that of the result."""
    if tensors[operator.inputs[0]].dtype != "int8":
        return version
    a, b, y = (float(tensors[name].scales[0]) for name in (*operator.inputs, *operator.outputs))
    return 3 if a * b >= y else version


def _output_of_sum(call: Call, operands: tuple[Activation, ...], y: QParams) -> QParams:
    a, b = operands
    return grid_of_sum(a.qparams, b.qparams, y)


def _options_of_sum() -> dict[str, Any]:
    """Without this the kernel takes another path where all scales are powers of two."""
    return {"potScaleInt16": False}


#: The sum alone: the operator of :mod:`.masking` knows masks from other terms.
ADD = Operator(
    "add",
    torch=("add", "add_"),
    float=lambda input, other: input + other,
    operands=("input", "other"),
    integers=partial(_integers, "ADD"),
    backward=(lambda grad: grad, lambda grad: grad),
    saves="nothing",
    output_of=_output_of_sum,
    options=_options_of_sum,
    litert=(
        Kernel("ADD", fuses_activation=True, order="elements", versions={"int8": 2, "int16": 3}),
    ),
    learns_scale=True,
    arithmetic="both sides at a scale $2^{20}$ ($2^{15}$ in 16 bits) times finer than twice the "
    "coarser, added, rescaled",
)

SUB = register_operator(
    Operator(
        "sub",
        torch=("sub", "sub_", "subtract", "subtract_"),
        float=lambda input, other: input - other,
        operands=("input", "other"),
        integers=partial(_integers, "SUB"),
        backward=(lambda grad: grad, lambda grad: -grad),
        saves="nothing",
        output_of=_output_of_sum,
        options=_options_of_sum,
        emulate=sub,
        forms=(Form(("rsub", "__rsub__"), reversed_sub),),
        litert=(
            Kernel(
                "SUB",
                fuses_activation=True,
                order="elements",
                versions={"int8": 2, "int16": 5},
                versions_by_rank=((4, 3),),
            ),
        ),
        learns_scale=True,
        arithmetic="both sides at a scale $2^{20}$ ($2^{15}$ in 16 bits) times finer than twice "
        "the coarser, subtracted, rescaled",
    )
)
#: The product alone: :mod:`.division` knows quotients that are products.
MUL = Operator(
    "mul",
    torch=("mul", "mul_", "multiply", "multiply_"),
    float=lambda input, other: input * other,
    operands=("input", "other"),
    integers=partial(_integers, "MUL"),
    backward=(lambda grad, a, b: grad * b, lambda grad, a, b: grad * a),
    saves="factors",
    emulate=mul,
    forms=(Form(("neg", "neg_", "negative", "negative_"), neg),),
    litert=(
        Kernel(
            "MUL",
            fuses_activation=True,
            order="elements",
            versions={"int8": 2, "int16": 4},
            version=_version_of_mul,
        ),
    ),
    learns_scale=True,
    arithmetic="product of the integers, rescaled",
)
