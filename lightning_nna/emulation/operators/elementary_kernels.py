r"""Exponential, logarithm, square root, inverse square root and absolute value in integers.

Exponential and logarithm are tables: one entry for each input in 8 bits, straight lines between 513
entries in 16. The square root is computed in single precision and truncated; its inverse is in
fixed point in 8 bits and a table of 513 entries in 16. The absolute value is rescaled.

The kernels of the roots abort at an input below 0: a ReLU precedes them where the parameters of the
input have such integers. Where a function has a pole at 0, the integer 0 stands for all that is
less than half a step, and gives the end of the output's range: the lowest integer for a logarithm,
also for inputs below 0, and the highest for an inverse root. Gradients are taken no nearer to the
pole than one step.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_nna import elementary
from lightning_nna.emulation.arithmetic.device_tables import on_device_of
from lightning_nna.emulation.arithmetic.integer_roots import inverse_roots, truncated_root
from lightning_nna.emulation.arithmetic.interpolated_tables import (
    RealFunction,
    interpolate,
    interpolation_table,
    inverse_square_root,
)
from lightning_nna.emulation.arithmetic.rescaling import rescale
from lightning_nna.emulation.operators import clamping, elementwise
from lightning_nna.emulation.operators.call import Call, requantize
from lightning_nna.emulation.operators.composition import carrier
from lightning_nna.emulation.operators.driver import drive, real, table
from lightning_nna.emulation.operators.fused_normalization import BLIND_STEPS
from lightning_nna.emulation.operators.record import (
    NO_OPTIONS,
    Form,
    Kernel,
    Operator,
    register_operator,
)
from lightning_nna.emulation.operators.tables import LookedUp, look_up
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import QParams, affine_qparams

_LN_2 = math.log(2.0)
# The exponential's kernel writes its entries by way of 32-bit integers.
_LARGEST_ENTRY = 2.0**30


def exp(call: Call, input: Tensor) -> Tensor:
    """Emulate ``torch.exp`` of any shape.

    An input whose range goes far beyond that of the result is requantized to end where the result
    does: the kernel's table would overflow.
    """
    x = call.operand(input, "input")
    if not call.observing:
        x = _within_table(call, x)
    return drive(EXP, call, carrier(call, x))


def exp2(call: Call, input: Tensor) -> Tensor:
    """Emulate ``torch.exp2`` of any shape: an exponential of a product."""
    return exp(call, elementwise.mul(call.child("argument"), input, _LN_2))


def expm1(call: Call, input: Tensor) -> Tensor:
    """Emulate ``torch.expm1`` of any shape: an exponential and a difference."""
    return elementwise.sub(call, exp(call.child("exponential"), input), 1.0)


def log(call: Call, input: Tensor) -> Tensor:
    """Emulate ``torch.log`` of any shape."""
    x = call.operand(input, "input")
    return drive(LOG, call, carrier(call, x), smallest=x.qparams.scale)


def log2(call: Call, input: Tensor) -> Tensor:
    """Emulate ``torch.log2`` of any shape: a logarithm and a product."""
    return elementwise.mul(call, log(call.child("logarithm"), input), 1 / _LN_2)


def log10(call: Call, input: Tensor) -> Tensor:
    """Emulate ``torch.log10`` of any shape: a logarithm and a product."""
    return elementwise.mul(call, log(call.child("logarithm"), input), 1 / math.log(10.0))


def log1p(call: Call, input: Tensor) -> Tensor:
    """Emulate ``torch.log1p`` of any shape: a sum and a logarithm."""
    return log(call, elementwise.add(call.child("raised"), input, 1.0))


def sqrt(call: Call, input: Tensor) -> Tensor:
    """Emulate ``torch.sqrt`` of any shape."""
    x, operand = _not_negative(call, input)
    return drive(SQRT, call, operand, smallest=x.qparams.scale)


def rsqrt(call: Call, input: Tensor) -> Tensor:
    """Emulate ``torch.rsqrt`` of any shape."""
    x, operand = _not_negative(call, input)
    return drive(RSQRT, call, operand, smallest=x.qparams.scale)


def absolute(call: Call, input: Tensor) -> Tensor:
    """Emulate ``torch.abs`` of any shape."""
    return drive(ABS, call, input)


def _within_table(call: Call, x: Activation) -> Activation:
    """The operand of an exponential; requantized where the table's entries would overflow."""
    y = call.output(lambda: torch.exp(x.value))
    low, high = (bound * x.qparams.scale for bound in x.qparams.bounds)
    if high <= math.log(_LARGEST_ENTRY * y.scale):
        return x
    power_of_two = call.state.spec.power_of_two_scales
    # From where the result is less than half a step to where it is the largest.
    first, last = math.log(y.scale / 4), math.log(y.bounds[1] * y.scale)
    first, last = max(low, min(first, 0.0)), max(last, 0.0)
    grid = affine_qparams(first, last, bits=x.qparams.bits, power_of_two=power_of_two)
    return Activation(requantize(call, x, grid), grid)


def _not_negative(call: Call, input: Tensor) -> tuple[Activation, Tensor]:
    """The operand of a root, after a ReLU where it may have integers below 0."""
    x = call.operand(input, "input")
    operand = carrier(call, x)
    if call.observing or x.qparams.bounds[0] >= 0:
        return x, operand
    return x, clamping.relu(call.child("rectified"), operand)


def _exp_entries(x: NDArray[Any], _: Any) -> NDArray[Any]:
    return elementary.exp(torch.from_numpy(x)).float().numpy()


def _natural_log(x: Tensor, lowest: float) -> Tensor:
    """Logarithms in single precision; ``lowest`` where x is not positive."""
    positive = (elementary.log2(x.clamp_min(torch.finfo(x.dtype).tiny)) * _LN_2).float()
    return torch.where(x > 0, positive, torch.full((), lowest))


def _log_entries(x: NDArray[Any], largest: Any) -> NDArray[Any]:
    # The largest output is 32767 steps, and the lowest 32768.
    lowest = np.float32(largest / np.float32(32767)) * np.float32(-32768)
    return _natural_log(torch.from_numpy(x), float(lowest)).numpy()


@lru_cache(maxsize=256)
def _wide_table(function: RealFunction, x: float, y: float, segments: int) -> Tensor:
    return interpolation_table(function, x, y, segments=segments)


def _interpolated(call: Call, function: RealFunction, x: Activation, y: QParams) -> Tensor:
    """A function of 16-bit integers."""
    segments = call.state.spec.table_entries or 512
    entries = _wide_table(function, x.qparams.scale, y.scale, segments)
    return interpolate(entries, x.integers().long()).double()


_EXP_TABLE = table(real(lambda x: elementary.exp(x).float()))


def _exp_integers(x: Activation, *, y: QParams, call: Call) -> Tensor | LookedUp:
    if x.qparams.bits == 8:
        return _EXP_TABLE(x, y=y, call=call)
    return _interpolated(call, _exp_entries, x, y)


_LOG_TABLE = table(
    lambda x, y: real(
        lambda reals: _natural_log(reals, float(np.float32(y.bounds[0]) * np.float32(y.scale)))
    )(x, y)
)


def _log_integers(x: Activation, *, y: QParams, call: Call, smallest: float) -> Tensor | LookedUp:
    if x.qparams.bits == 8:
        return _LOG_TABLE(x, y=y, call=call)
    return _interpolated(call, _log_entries, x, y)


def _root_integers(x: Activation, *, y: QParams, call: Call, smallest: float) -> Tensor:
    return truncated_root(x.integers().float(), x.qparams.scale, y.scale)


def _inverse_integers(x: Activation, *, y: QParams, call: Call, smallest: float) -> Tensor:
    if x.qparams.bits == 8 or call.state.spec.runtime == "tflm":
        entries = inverse_roots(x.qparams.bounds[1], x.qparams.scale, y.scale)
        return look_up(on_device_of(x.value, entries), x.integers().int())
    return _interpolated(call, inverse_square_root, x, y)


def _output_of_inverse(call: Call, operands: tuple[Activation, ...], y: QParams) -> QParams:
    """Parameters that end at what the smallest input gives that the kernel can tell from 0."""
    (x,) = operands
    steps = 1 if x.qparams.bits == 8 else BLIND_STEPS
    power_of_two = call.state.spec.power_of_two_scales
    last = 1 / math.sqrt(steps * x.qparams.scale)
    limit = affine_qparams(0.0, last, bits=x.qparams.bits, power_of_two=power_of_two)
    return min(y, limit, key=lambda qparams: qparams.scale)


def _abs_integers(x: Activation, *, y: QParams, call: Call) -> Tensor:
    precision = call.state.spec.factor_precision
    factor = float(precision(x.qparams.scale) / precision(y.scale))
    rounding = call.state.spec.rounding_of("double")
    largest = float(x.qparams.largest)
    return rescale(x.integers().abs(), factor, rounding=rounding, largest=largest)


_WIDE = {"int8": 2, "int16": 2}

EXP = register_operator(
    Operator(
        "exp",
        torch=("exp", "exp_"),
        float=torch.exp,
        integers=_exp_integers,
        backward=lambda grad, y: grad * y,
        saves="result",
        emulate=exp,
        forms=(
            Form(("exp2", "exp2_", "special_exp2"), exp2),
            Form(("expm1", "expm1_", "special_expm1"), expm1),
        ),
        litert=(Kernel("EXP", order="elements", versions=_WIDE, computes_in_float=("exp",)),),
        learns_scale=True,
        arithmetic="table; in 16 bits interpolated; `exp2` of a product, `expm1` less 1",
    )
)
LOG = register_operator(
    Operator(
        "log",
        torch=("log", "log_"),
        float=lambda input, smallest: torch.log(input),
        integers=_log_integers,
        backward=lambda grad, x, smallest: grad * (x >= 0) / x.clamp_min(smallest),
        emulate=log,
        forms=(
            Form(("log2", "log2_"), log2),
            Form(("log10", "log10_"), log10),
            Form(("log1p", "log1p_", "special_log1p"), log1p),
        ),
        litert=(
            Kernel(
                "LOG",
                order="elements",
                options=NO_OPTIONS,
                versions=_WIDE,
                computes_in_float=("log",),
            ),
        ),
        arithmetic="table, whose lowest integer stands for 0 and below; in 16 bits interpolated, a "
        "straight line below 1/256 of the input's range; `log1p` of a sum, `log2` and `log10` "
        "times a number",
    )
)
SQRT = register_operator(
    Operator(
        "sqrt",
        torch=("sqrt", "sqrt_"),
        float=lambda input, smallest: torch.sqrt(input),
        integers=_root_integers,
        backward=lambda grad, x, smallest: grad * 0.5 * x.clamp_min(smallest).rsqrt(),
        emulate=sqrt,
        litert=(
            Kernel(
                "SQRT",
                order="elements",
                options=NO_OPTIONS,
                versions=_WIDE,
                computes_in_float=("sqrt",),
            ),
        ),
        arithmetic="single precision, truncated; a ReLU before it where the input may be below 0; "
        "an NPU leaves it to the CPU",
    )
)
RSQRT = register_operator(
    Operator(
        "rsqrt",
        torch=("rsqrt", "rsqrt_"),
        float=lambda input, smallest: torch.rsqrt(input),
        integers=_inverse_integers,
        backward=lambda grad, x, smallest: grad * -0.5 * x.clamp_min(smallest).pow(-1.5),
        output_of=_output_of_inverse,
        emulate=rsqrt,
        litert=(
            Kernel(
                "RSQRT",
                order="elements",
                options=NO_OPTIONS,
                versions={"int8": 2, "int16": 3},
                computes_in_float=("rsqrt",),
            ),
        ),
        arithmetic="five Newton steps in fixed point; in 16 bits interpolated, down to 1/128 of "
        "the input's range; a ReLU before it where the input may be below 0",
    )
)
ABS = register_operator(
    Operator(
        "abs",
        torch=("abs", "abs_", "absolute", "absolute_"),
        float=torch.abs,
        integers=_abs_integers,
        backward=lambda grad, x: grad * x.sign(),
        litert=(
            Kernel(
                "ABS",
                order="elements",
                versions={"int8": 2, "int16": 3},
                computes_in_float=("abs", "absolute"),
            ),
        ),
        learns_scale=True,
        arithmetic="integers without their sign, rescaled",
    )
)
