r"""Functions of one activation, and dropout.

A function of 8 bits is a table of 256 entries, on the output grid that the reference fixes
(sigmoid 1/256 from -128, tanh 1/128) or that was observed; what the chip has no table for is a
sequence of instructions, which is one table all the same: silu is a sigmoid and a product, hard
sigmoid a sum, a clipping and a product. In 16 bits sigmoid and tanh are interpolated tables, hard
swish is a product with a hard sigmoid, and gelu one with the sigmoid of a polynomial. The backward
is the function's own derivative at the quantized input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna import elementary
from lightning_nna.emulation.arithmetic import pointwise
from lightning_nna.emulation.arithmetic.fixed_point import INT16_MAX, INT16_MIN
from lightning_nna.emulation.arithmetic.integer_sigmoid import logistic_int8, tanh_int8
from lightning_nna.emulation.arithmetic.interpolated_tables import interpolate, interpolation_table
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators import elementwise
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.clamping import clamped, relu6
from lightning_nna.emulation.operators.composition import carrier
from lightning_nna.emulation.operators.driver import drive, has_elements, real, table
from lightning_nna.emulation.operators.record import (
    NO_OPTIONS,
    Form,
    Kernel,
    Operator,
    register_operator,
)
from lightning_nna.emulation.operators.table_look_up import CAST
from lightning_nna.emulation.operators.tables import LookedUp
from lightning_nna.emulation.operators.tabulated import tabulated
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import (
    PENDING,
    SIGMOID_OUTPUT,
    TANH_OUTPUT,
    QParams,
    round_significand,
    with_min_scale,
)
from lightning_nna.emulation.spec import NNASpec

#: Sigmoid and tanh of 16 bits, in steps of 2^-15.
WIDE_OUTPUT = QParams(2.0**-15, 0, INT16_MIN, INT16_MAX)
# The kernels of 16 bits multiply an input with 3 * 4096 times its scale, in 32 bits.
_WIDEST_SCALE = 2**31 / (2**15 * 3 * 4096)

#: Integers of the result less its zero point, shape ``(256,)``, from both quantization parameters.
_Entries = Callable[[QParams, QParams], Tensor]


def _inputs(x: QParams) -> Tensor:
    """Integers of 8 bits less their zero point, int64, shape ``(256,)``."""
    return torch.arange(x.bounds[0], x.bounds[0] + 256)


def _with_wide(narrow: Callable[..., LookedUp], name: str) -> Callable[..., Tensor | LookedUp]:
    """Sigmoid or tanh: a table in 8 bits, an interpolated one of ``name`` in 16."""

    def integers(x: Activation, *, y: QParams, call: Call) -> Tensor | LookedUp:
        if x.qparams.bits == 8:
            return narrow(x, y=y, call=call)
        values, spec = x.integers().long(), call.state.spec
        if may_wrap(x.qparams, spec) and call.state.watches_overflow(call.site):
            lost = (x.value.abs() >= _WIDEST_SCALE * 2**15).sum()
            call.state.count_overflow(call.site, lost, values.numel())
        return wide_entries(name, values, x.qparams.scale, spec).double()

    return integers


def may_wrap(x: QParams, spec: NNASpec) -> bool:
    """Tell whether sigmoid and tanh of 16 bits may wrap around with an input on ``x``."""
    is_table = spec.table_entries or spec.runtime == "tosa"
    return not is_table and x.scale >= _WIDEST_SCALE


def wide_entries(name: str, values: Tensor, scale: float, spec: NNASpec) -> Tensor:
    """Compute sigmoid or tanh of 16-bit integers, in steps of 2^-15.

    Args:
        name: ``"sigmoid"`` or ``"tanh"``.
        values: Integers, zero point 0, int64, any shape.
        scale: Their scale.
        spec: Accelerator.
    """
    if spec.table_entries or spec.runtime == "tosa":
        return interpolate(_segments(name, scale, spec.table_entries), values)
    return _WIDE_FUNCTIONS[name](values, scale)


_WIDE_FUNCTIONS = {"sigmoid": pointwise.logistic_int16, "tanh": pointwise.tanh_int16}


def _by_runtime(others: _Entries, micro: _Entries) -> Callable[..., LookedUp]:
    """A table whose entries TFLite-Micro computes otherwise than the other runtimes."""
    tables = table(others), table(micro)

    def looked_up(x: Activation, *, y: QParams, call: Call) -> LookedUp:
        return tables[call.state.spec.runtime == "tflm"](x, y=y, call=call)

    return looked_up


_SIGMOID_ENTRIES = real(pointwise.logistic)


def _micro_sigmoid(x: QParams, y: QParams) -> Tensor:
    return logistic_int8(_inputs(x), x.scale).float()


def _micro_tanh(x: QParams, y: QParams) -> Tensor:
    return tanh_int8(_inputs(x), x.scale).float()


SIGMOID = register_operator(
    Operator(
        "sigmoid",
        torch=("sigmoid", "sigmoid_"),
        float=torch.sigmoid,
        integers=_with_wide(_by_runtime(_SIGMOID_ENTRIES, _micro_sigmoid), "sigmoid"),
        backward=torch.ops.aten.sigmoid_backward,
        saves="result",
        output={8: SIGMOID_OUTPUT, 16: WIDE_OUTPUT},
        litert=(
            Kernel(
                "LOGISTIC", order="elements", options=NO_OPTIONS, versions={"int8": 2, "int16": 3}
            ),
        ),
        arithmetic="table of 256 entries, output scale 1/256; in 16 bits interpolated; "
        "fixed point in 8 bits on TFLite-Micro",
    )
)

TANH = register_operator(
    Operator(
        "tanh",
        torch=("tanh", "tanh_"),
        float=torch.tanh,
        integers=_with_wide(_by_runtime(real(pointwise.tanh), _micro_tanh), "tanh"),
        backward=torch.ops.aten.tanh_backward,
        saves="result",
        output={8: TANH_OUTPUT, 16: WIDE_OUTPUT},
        litert=(
            Kernel("TANH", order="elements", options=NO_OPTIONS, versions={"int8": 2, "int16": 3}),
        ),
        arithmetic="table of 256 entries, output scale 1/128; in 16 bits interpolated; "
        "fixed point in 8 bits on TFLite-Micro",
    )
)


def sigmoid(call: Call, input: Tensor) -> Tensor:
    """Compute ``torch.sigmoid`` of a tensor of any shape."""
    return drive(SIGMOID, call, input)


def tanh(call: Call, input: Tensor) -> Tensor:
    """Compute ``torch.tanh`` of a tensor of any shape."""
    return drive(TANH, call, input)


def elu(call: Call, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """Compute ``F.elu`` of any shape; the kernel has 8 bits and the factor 1."""
    return drive(ELU if alpha == 1 and call.bits == 8 else _TABLED_ELU, call, input, alpha=alpha)


_TABLED_ELU = tabulated(
    "elu",
    lambda input, alpha: F.elu(input, alpha),
    lambda x, alpha: torch.where(x < 0, (alpha * elementary.expm1(x)).float(), x),
    torch=(),
)

ELU = register_operator(
    Operator(
        "elu",
        torch=("elu", "elu_"),
        float=lambda input, alpha=1.0: F.elu(input, alpha),
        integers=table(real(lambda x, **_: pointwise.elu(x))),
        emulate=elu,
        litert=(Kernel("ELU", order="elements", options=NO_OPTIONS), CAST),
        learns_scale=True,
        arithmetic="table; LiteRT has no reference kernel of it: it is equal to the only kernel "
        "there is, and programs with it do not load where reference kernels alone are registered; "
        "with another factor than 1, and in 16 bits (65,536 entries, 128 KiB), a table looked up "
        "by GATHER",
    )
)


def _output_of_hard_swish(call: Call, operands: tuple[Activation, ...], y: QParams) -> QParams:
    """Parameters that its multiplier, of a 128th of the input's scale, reaches by right shifts."""
    step = operands[0].qparams.scale / 64
    return with_min_scale(y, step, power_of_two=call.state.spec.power_of_two_scales)


_hard_swish_table = table(
    lambda x, y, precision: pointwise.hard_swish(
        _inputs(x), x.scale, y.scale, precision=precision
    ).float()
)


def _hard_swish(x: Activation, *, y: QParams, call: Call) -> LookedUp:
    return _hard_swish_table(x, y=y, call=call, precision=call.state.spec.factor_precision)


def gelu(call: Call, input: Tensor, approximate: str = "none") -> Tensor:
    r"""Compute ``F.gelu`` of any shape: a table in 8 bits.

    In 16 bits it is a product with the sigmoid of an odd polynomial of the input,

    .. math:: y = x \, \sigma(x \, (a + u \, (b + u \, c))), \qquad u = x^2

    which is the definition of the form with tanh (c = 0). That of the exact form was fitted to the
    smallest largest error of y, 2.6e-5 in :math:`|x| \le 4.5`. Beyond, the sigmoid is 0 or 1.
    """
    if call.bits == 8:
        return drive(GELU, call, input, approximate=approximate)
    x = call.operand(input, "input")
    clipped = clamped(call.child("clipped"), carrier(call, x), -_GELU_BOUND, _GELU_BOUND)
    square = elementwise.mul(call.child("square"), clipped, clipped)
    first, *others = _GELU_POLYNOMIALS[approximate]
    factor: Tensor | float = first
    for degree, coefficient in enumerate(others, 1):
        product = elementwise.mul(call.child(f"product{degree}"), square, factor)
        factor = elementwise.add(call.child(f"sum{degree}"), product, coefficient)
    gate = elementwise.mul(call.child("polynomial"), clipped, factor)
    return elementwise.mul(call, carrier(call, x), sigmoid(call.child("gate"), gate))


def hard_swish(call: Call, input: Tensor, inplace: bool = False) -> Tensor:
    """Compute ``F.hardswish`` of any shape: a table; in 16 bits a product with a hard sigmoid."""
    if call.bits == 8:
        return drive(HARD_SWISH, call, input)
    x = call.operand(input, "input")
    gate = hard_sigmoid(call.child("gate"), carrier(call, x))
    return elementwise.mul(call, carrier(call, x), gate)


_GELU = {"none": pointwise.gelu, "tanh": pointwise.gelu_tanh}
# From the highest degree, in x^2, down.
_GELU_POLYNOMIALS = {
    "none": (-7.03033749e-4, 7.40112932e-2, 1.59501577),
    "tanh": (0.044715 * 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi)),
}
_GELU_BOUND = 4.5

GELU = register_operator(
    Operator(
        "gelu",
        torch=("gelu",),
        float=lambda input, approximate="none": F.gelu(input, approximate=approximate),
        integers=table(real(lambda x, approximate="none": _GELU[approximate](x))),
        options=lambda approximate="none": {"approximate": approximate == "tanh"},
        emulate=gelu,
        litert=(Kernel("GELU", order="elements", versions={"int8": 2}), *SIGMOID.litert),
        learns_scale=True,
        arithmetic="table; in 16 bits the product with a sigmoid of a polynomial",
    )
)

HARD_SWISH = register_operator(
    Operator(
        "hard_swish",
        torch=("hardswish",),
        float=lambda input: F.hardswish(input),
        integers=_hard_swish,
        output_of=_output_of_hard_swish,
        emulate=hard_swish,
        litert=(
            Kernel("HARD_SWISH", order="elements", options=NO_OPTIONS),
            *elementwise.MUL.litert,
        ),
        learns_scale=True,
        arithmetic="table; in 16 bits the product with a hard sigmoid",
    )
)


_leaky_table = table(
    lambda x, y, slope, precision: pointwise.leaky_relu(
        _inputs(x), slope, x.scale, y.scale, precision=precision
    ).float()
)


def _leaky_relu(
    x: Activation, *, y: QParams, call: Call, negative_slope: float = 0.01
) -> Tensor | LookedUp:
    precision = call.state.spec.factor_precision
    if x.qparams.bits == 8:
        return _leaky_table(x, y=y, call=call, slope=negative_slope, precision=precision)
    integers, scale = x.integers().long(), x.qparams.scale
    if call.state.spec.runtime == "tosa":
        return pointwise.leaky_relu_of_tosa(integers, negative_slope, scale, y.scale).double()
    return pointwise.leaky_relu(
        integers, negative_slope, scale, y.scale, precision=precision
    ).double()


register_operator(
    Operator(
        "leaky_relu",
        torch=("leaky_relu", "leaky_relu_"),
        float=lambda input, negative_slope=0.01: F.leaky_relu(input, negative_slope),
        integers=_leaky_relu,
        options=lambda negative_slope=0.01: {"alpha": negative_slope},
        litert=(Kernel("LEAKY_RELU", order="elements", versions={"int16": 2}),),
        learns_scale=True,
        arithmetic="table; in 16 bits a product",
    )
)


def silu(call: Call, input: Tensor, inplace: bool = False) -> Tensor:
    """Compute ``F.silu`` of any shape: a sigmoid and a product, in 8 bits one table of both."""
    if call.bits == 8:
        return drive(_SILU, call, input, spec=call.state.spec)
    x = call.operand(input, "input")
    gate = sigmoid(call.child("gate"), carrier(call, x))
    return elementwise.mul(call, carrier(call, x), gate)


def _gate_entries(x: QParams, spec: NNASpec) -> Tensor:
    """The sigmoid's table."""
    entries = _micro_sigmoid if spec.runtime == "tflm" else _SIGMOID_ENTRIES
    return entries(x, SIGMOID_OUTPUT).clamp(0, 255)


def _silu_entries(x: QParams, y: QParams, spec: NNASpec) -> Tensor:
    """The product of each input with its sigmoid."""
    grids = x, SIGMOID_OUTPUT, y
    return elementwise.pairwise("MUL", _inputs(x), _gate_entries(x, spec), grids, spec).float()


def _record_silu(
    operator: Operator, call: Call, operands: tuple[Activation, ...], y: Activation, **_: Any
) -> None:
    """The two instructions of one table."""
    (x,) = operands
    index = (x.integers() - x.qparams.bounds[0]).long()
    gate = _gate_entries(x.qparams, call.state.spec)[index]
    stored = Activation(gate * SIGMOID_OUTPUT.scale, SIGMOID_OUTPUT).stored()
    call.record("LOGISTIC", [x.stored()], [stored])
    call.record("MUL", [x.stored(), stored], [y.stored()])


#: In 8 bits; ``emulate`` of the operator decides by the width.
_SILU = Operator(
    "silu",
    torch=(),
    float=lambda input, spec: F.silu(input),
    integers=table(_silu_entries),
    backward=lambda grad, x, spec: torch.ops.aten.silu_backward(grad, x),
    instructions=_record_silu,
)


def hard_sigmoid(call: Call, input: Tensor, inplace: bool = False) -> Tensor:
    """Compute ``F.hardsigmoid`` of any shape: relu6(x + 3) / 6."""
    raised = elementwise.add(call.child("raised"), input, 3.0)
    return elementwise.mul(call, relu6(call.child("clipped"), raised), 1 / 6)


def glu(call: Call, input: Tensor, dim: int = -1) -> Tensor:
    """Compute ``F.glu`` of shape ``(..., 2 n, ...)``: one half times the sigmoid of the other."""
    x = call.operand(input, "input")
    first, second = (call.with_qparams(half, x.qparams) for half in x.value.chunk(2, dim))
    return elementwise.mul(call, first, sigmoid(call.child("gate"), second))


def dropout(
    call: Call, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Drop values of any shape: the integers stay, the scale grows by 1 / (1 - p).

    The new scale is rounded to the significand that every scale has: the integers stay exact. An
    activation that no operator has quantized yet stays so. The emulator writes in-place results.
    """
    return _dropped(call, input, p, training, input.shape)


def feature_dropout(
    call: Call, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Drop whole channels, as ``F.dropout1d``, of shape ``(batch, channels, ...)``."""
    shape = (*input.shape[:2], *(1 for _ in input.shape[2:]))
    return _dropped(call, input, p, training, shape)


def has_batch(*dims: int) -> Callable[..., bool]:
    """Tells whether an input has a batch axis before its channels, by its number of axes."""
    return lambda input, *_, **__: input.dim() in dims


def _dropped(call: Call, input: Tensor, p: float, training: bool, shape: tuple[int, ...]) -> Tensor:
    """Keep with probability 1 - p what one entry of ``shape`` stands for."""
    tag = call.state.qparams_of(input)
    if not training or not 0 < p < 1:
        result = F.dropout(input, p, training)
        if result is not input:
            call.state.fusion.note_alias(input, result)
        return result if tag is None else call.unchanged(result, Activation(input, tag))
    mask = torch.empty(shape, dtype=input.dtype, device=input.device).bernoulli_(1 - p)
    if tag is None or tag == PENDING:
        result = input * mask.div_(1 - p)
        call.state.fusion.note_alias(input, result)
        return result if tag is None else call.with_qparams(result, tag)
    grown = replace(tag, scale=round_significand(tag.scale / (1 - p), tag.bits), fused_relu=False)
    with float32_arithmetic(input):
        # By a tensor: a GPU would multiply by the inverse of a number.
        integers = input / torch.full((), tag.scale, device=input.device)
        result = call.with_qparams(integers * mask.mul_(grown.scale), grown)
    call.state.fusion.note_alias(input, result)
    return result


@lru_cache(maxsize=64)
def _segments(name: str, scale: float, segments: int) -> Tensor:
    """Sigmoid or tanh on a chip whose tables have a number of segments of its own; 0 for TOSA's."""
    function = {"sigmoid": elementary.sigmoid, "tanh": elementary.tanh}[name]

    def real(x: Any, _: Any) -> Any:
        return function(torch.from_numpy(x)).numpy()

    if segments:
        return interpolation_table(real, scale, WIDE_OUTPUT.scale, segments=segments)
    # With this scale 1 is 2^15, as there.
    return interpolation_table(real, scale, 2 / (2**16 - 1), precision=np.float64)


register_operator(
    Operator(
        "silu",
        torch=("silu",),
        emulate=silu,
        learns_scale=True,
        arithmetic="a sigmoid and a product: one table in 8 bits",
    )
)
register_operator(
    Operator(
        "hard_sigmoid",
        torch=("hardsigmoid",),
        emulate=hard_sigmoid,
        supports=has_elements,
        arithmetic="a sum, a clipping and a product",
    )
)
register_operator(
    Operator(
        "glu",
        torch=("glu",),
        emulate=glu,
        arithmetic="sigmoid of one half, times the other",
    )
)
register_operator(
    Operator(
        "",
        torch=("dropout",),
        emulate=dropout,
        forms=(
            Form(("dropout1d",), feature_dropout, has_batch(3)),
            Form(("dropout2d",), feature_dropout, has_batch(3, 4)),
            Form(("dropout3d",), feature_dropout, has_batch(5)),
            Form(("feature_dropout",), feature_dropout),
        ),
        arithmetic="none: the scale changes",
    )
)
