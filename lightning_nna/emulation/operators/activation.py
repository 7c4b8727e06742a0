r"""Functions of one activation, and dropout.

A function of 8 bits is a table of 256 entries, on the output grid that the reference fixes
(sigmoid 1/256 from -128, tanh 1/128) or that was observed; what the chip has no table for is a
sequence of instructions, which is one table all the same: silu is a sigmoid and a product, hard
sigmoid a sum, a clipping and a product. In 16 bits sigmoid and tanh are interpolated tables.
ReLU and ReLU6 keep the grid of their input, which ends at 0 where nothing else reads that input
(:mod:`lightning_nna.emulation.fusion`). The backward is the function's own derivative at the
quantized input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna import elementary
from lightning_nna.emulation.arithmetic import pointwise
from lightning_nna.emulation.arithmetic.fixed_point import INT16_MAX, INT16_MIN
from lightning_nna.emulation.arithmetic.interpolated_tables import interpolate, interpolation_table
from lightning_nna.emulation.arithmetic.rescaling import RoundingKind
from lightning_nna.emulation.clipping import clip, inside
from lightning_nna.emulation.first_order import first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators import elementwise
from lightning_nna.emulation.operators.call import Call, look_up
from lightning_nna.emulation.operators.record import (
    NO_OPTIONS,
    Form,
    Kernel,
    Operator,
    register_operator,
)
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import (
    PENDING,
    SIGMOID_OUTPUT,
    TANH_OUTPUT,
    QParams,
    no_finer,
    round_significand,
)

#: Sigmoid and tanh of 16 bits, in steps of 2^-15.
WIDE_OUTPUT = QParams(2.0**-15, 0, INT16_MIN, INT16_MAX)
# The kernels of 16 bits multiply an input with 3 * 4096 times its scale, in 32 bits.
_WIDEST_SCALE = 2**31 / (2**15 * 3 * 4096)


@dataclass(frozen=True)
class Function:
    """A function of one activation.

    Args:
        kernel: The instruction's name in the schema.
        in_float: The function on float tensors.
        integers: Integers of the output less its zero point, not clipped, for the 8-bit inputs
            ``x.low`` … ``x.high``: takes the two grids and the parameters.
        fixed: Grid of the output, where the reference fixes it.
        options: Options of the instruction, from the parameters.
        derivative: The derivative times a gradient, where one is faster than autograd.
        finest: Smallest scale of the output that the kernel can write, in scales of the input;
            None for any.
    """

    kernel: str
    in_float: Callable[..., Tensor]
    integers: Callable[..., Tensor]
    fixed: QParams | None = None
    options: Callable[..., dict[str, Any]] = lambda *parameters: {}
    derivative: Callable[..., Tensor] | None = None
    finest: float | None = None


def _from_real(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Integers of a table that is made in single precision."""

    def integers(x: QParams, y: QParams, *_: Any) -> Tensor:
        return pointwise.tabulate(function, x.bounds[0], x.scale, y.scale)

    return integers


def _inputs(x: QParams) -> Tensor:
    return torch.arange(x.bounds[0], x.bounds[0] + 256)


def _silu(x: QParams, y: QParams, rounding: RoundingKind) -> Tensor:
    """The sigmoid's table, and the product of each input with it."""
    gate = table_of("sigmoid", x, SIGMOID_OUTPUT).clamp(0, 255)
    return elementwise.pairwise("MUL", _inputs(x), gate, (x, SIGMOID_OUTPUT, y), rounding).float()


_GELU = {"none": pointwise.gelu, "tanh": pointwise.gelu_tanh}

FUNCTIONS: dict[str, Function] = {
    "sigmoid": Function("LOGISTIC", torch.sigmoid, _from_real(pointwise.logistic), SIGMOID_OUTPUT),
    "tanh": Function("TANH", torch.tanh, _from_real(pointwise.tanh), TANH_OUTPUT),
    "elu": Function("ELU", F.elu, _from_real(pointwise.elu)),
    "gelu": Function(
        "GELU",
        lambda x, approximate: F.gelu(x, approximate=approximate),
        lambda x, y, approximate: _from_real(_GELU[approximate])(x, y),
        options=lambda approximate: {"approximate": approximate == "tanh"},
    ),
    "hard_swish": Function(
        "HARD_SWISH",
        F.hardswish,
        lambda x, y: pointwise.hard_swish(_inputs(x), x.scale, y.scale).float(),
        # Its multiplier, of a 128th of the input's scale, only shifts to the right.
        finest=1 / 64,
    ),
    "silu": Function(
        "",
        lambda x, *_: F.silu(x),
        _silu,
        derivative=lambda g, x, *_: torch.ops.aten.silu_backward(g, x),
    ),
    "leaky_relu": Function(
        "LEAKY_RELU",
        F.leaky_relu,
        lambda x, y, slope: pointwise.leaky_relu(_inputs(x), slope, x.scale, y.scale).float(),
        options=lambda slope: {"alpha": slope},
    ),
}


def sigmoid(call: Call, input: Tensor, *_: Any, **__: Any) -> Tensor:
    """``torch.sigmoid`` on the chip."""
    return _apply(call, input, "sigmoid")


def tanh(call: Call, input: Tensor, *_: Any, **__: Any) -> Tensor:
    """``torch.tanh`` on the chip."""
    return _apply(call, input, "tanh")


def elu(call: Call, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """``F.elu`` on the chip."""
    return _apply(call, input, "elu")


def supports_elu(input: Any, alpha: float = 1.0, inplace: bool = False) -> bool:
    """Whether the chip has an ELU: its factor is 1."""
    return alpha == 1


def gelu(call: Call, input: Tensor, approximate: str = "none") -> Tensor:
    """``F.gelu`` on the chip."""
    return _apply(call, input, "gelu", approximate)


def hard_swish(call: Call, input: Tensor, inplace: bool = False) -> Tensor:
    """``F.hardswish`` on the chip."""
    return _apply(call, input, "hard_swish")


def leaky_relu(
    call: Call, input: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> Tensor:
    """``F.leaky_relu`` on the chip."""
    return _apply(call, input, "leaky_relu", negative_slope)


def relu(call: Call, input: Tensor, inplace: bool = False) -> Tensor:
    """``relu`` on the input's own grid: the integers below the zero point become the zero point.

    With equal scales the reference's rescaling is by one, so nothing is rounded.
    """
    return _clamped(call, input, None)


def relu6(call: Call, input: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu6`` on the input's own grid, where 6 is the nearest integer's value."""
    return _clamped(call, input, 6.0)


def hardtanh(
    call: Call, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    """``F.hardtanh`` of 0 and 6, as ``nn.ReLU6`` calls it."""
    return relu6(call, input)


def supports_hardtanh(
    input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> bool:
    """Whether it is ReLU6."""
    return min_val == 0 and max_val == 6


def silu(call: Call, input: Tensor, inplace: bool = False) -> Tensor:
    """``F.silu``: a sigmoid and a product, in 8 bits one table of both."""
    if call.bits == 8:
        return _apply(call, input, "silu", call.state.spec.rounding_of("double"))
    x = call.operand(input, "input")
    gate = sigmoid(call.child("gate"), _carrier(call, x))
    return elementwise.mul(call, _carrier(call, x), gate)


def hard_sigmoid(call: Call, input: Tensor, inplace: bool = False) -> Tensor:
    """``F.hardsigmoid``: relu6(x + 3) / 6."""
    raised = elementwise.add(call.child("raised"), input, 3.0)
    return elementwise.mul(call, relu6(call.child("clipped"), raised), 1 / 6)


def glu(call: Call, input: Tensor, dim: int = -1) -> Tensor:
    """``F.glu``: the first half times the sigmoid of the second."""
    x = call.operand(input, "input")
    first, second = (call.with_qparams(half, x.qparams) for half in x.value.chunk(2, dim))
    return elementwise.mul(call, first, sigmoid(call.child("gate"), second))


def dropout(
    call: Call, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Dropout as a change of grid: the integers stay, the scale grows by 1 / (1 - p).

    The new scale is rounded to the significand that every scale has: the integers stay exact. An
    activation that no operator has quantized yet stays so. The emulator writes in-place results.
    """
    return _dropped(call, input, p, training, input.shape)


def feature_dropout(
    call: Call, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """``F.dropout1d`` and the like: whole channels of a batch are dropped."""
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
            call.state.fusion.passed_on(input, result)
        return result if tag is None else call.unchanged(result, Activation(input, tag))
    kept = torch.empty(shape, dtype=input.dtype, device=input.device).bernoulli_(1 - p)
    if tag is None or tag == PENDING:
        result = input * kept.div_(1 - p)
        call.state.fusion.passed_on(input, result)
        return result if tag is None else call.with_qparams(result, tag)
    grown = replace(tag, scale=round_significand(tag.scale / (1 - p), tag.bits), rectified=False)
    with float32_arithmetic(input):
        # By a tensor: a GPU would multiply by the inverse of a number.
        integers = input / torch.full((), tag.scale, device=input.device)
        result = call.with_qparams(integers * kept.mul_(grown.scale), grown)
    call.state.fusion.passed_on(input, result)
    return result


def _carrier(call: Call, x: Activation) -> Tensor:
    """A view of an operand that carries its grid, for the parts of a sequence."""
    return call.with_qparams(x.value.view_as(x.value), x.qparams)


def _clamped(call: Call, input: Tensor, upper: float | None) -> Tensor:
    """ReLU, or ReLU up to a bound, on the grid of its input."""
    x = call.operand(input, "input")
    if call.observing:
        call.state.fusion.rectifies(x.value, math.inf if upper is None else upper)
        result = torch.relu(x.value) if upper is None else F.hardtanh(x.value, 0.0, upper)
        return call.unchanged(result, x)
    with float32_arithmetic(x.value):
        if upper is None:
            result = torch.relu(x.value)
        else:
            # What lies at an end has no gradient, nor has what was clipped to it.
            on_grid = round(upper / x.qparams.scale) * x.qparams.scale
            result = F.hardtanh(x.value, 0.0, on_grid)
    if call.recording:
        kernel = "RELU" if upper is None else "RELU6"
        call.record(kernel, [x.stored()], [Activation(result, x.qparams).stored()])
    return call.unchanged(result, x)


def _apply(call: Call, input: Tensor, name: str, *parameters: Any) -> Tensor:
    """One instruction of one operand."""
    x, function = call.operand(input, "input"), FUNCTIONS[name]
    if call.observing:
        result = function.in_float(x.value, *parameters)
        fixed = Activation(x.value, PENDING)
        return call.observed(result) if function.fixed is None else call.unchanged(result, fixed)
    if function.fixed is None:
        y = call.output(lambda: function.in_float(x.value, *parameters))
        if function.finest is not None:
            step = x.qparams.scale * function.finest
            y = no_finer(y, step, power_of_two=call.state.spec.power_of_two_scales)
    else:
        y = function.fixed if x.qparams.bits == 8 else WIDE_OUTPUT
    with float32_arithmetic(x.value):
        result = _Pointwise.apply(x.value, name, parameters, x, y, call)
    if call.recording and name == "silu":
        _record_silu(call, x, Activation(result, y))
    elif call.recording:
        stored = Activation(result, y).stored()
        call.record(function.kernel, [x.stored()], [stored], **function.options(*parameters))
    return call.with_qparams(result, y)


def _record_silu(call: Call, x: Activation, y: Activation) -> None:
    """The two instructions of one table."""
    index = (x.integers() - x.qparams.bounds[0]).long()
    gate = table_of("sigmoid", x.qparams, SIGMOID_OUTPUT).clamp(0, 255)[index]
    stored = Activation(gate * SIGMOID_OUTPUT.scale, SIGMOID_OUTPUT).stored()
    call.record("LOGISTIC", [x.stored()], [stored])
    call.record("MUL", [x.stored(), stored], [y.stored()])


class _Pointwise(torch.autograd.Function):
    """A table forward, the function's derivative at the quantized input backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        name: str,
        parameters: tuple[Any, ...],
        activation: Activation,
        y: QParams,
        call: Call,
    ) -> Tensor:
        function = FUNCTIONS[name]
        if activation.qparams.bits == 16:
            rounded = _wide(call, name, activation, y, parameters)
        elif call.exact or function.fixed is None:
            table = table_of(name, activation.qparams, y, parameters).to(x.device)
            index = (activation.integers() - activation.qparams.bounds[0]).int()
            rounded = look_up(table, index)
        else:
            # The same values but where the function falls on a tie: no gather, half the time.
            rounded = function.in_float(x.detach()).mul_(1 / y.scale).round_()
        needs_mask = function.fixed is None and ctx.needs_input_grad[0]
        centered, clipped = clip(rounded, y, needs_mask)
        result = centered.mul_(y.scale)
        ctx.name, ctx.parameters = name, parameters
        ctx.save_for_backward(*((result,) if function.fixed is not None else (x, clipped)))
        return result

    @staticmethod
    @first_order("activation function")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        # Outside of the block: with activation checkpointing, asking for what was saved runs the
        # forward again.
        saved = ctx.saved_tensors
        with float32_arithmetic(grad):
            if ctx.name == "tanh":
                return torch.ops.aten.tanh_backward(grad, *saved), *nothing
            if ctx.name == "sigmoid":
                return torch.ops.aten.sigmoid_backward(grad, *saved), *nothing
            x, clipped = saved
            derivative = FUNCTIONS[ctx.name].derivative
            if derivative is not None:
                return derivative(inside(grad, clipped), x, *ctx.parameters), *nothing
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                again = FUNCTIONS[ctx.name].in_float(leaf, *ctx.parameters)
            return torch.autograd.grad(again, leaf, inside(grad, clipped))[0], *nothing


@lru_cache(maxsize=256)
def table_of(name: str, x: QParams, y: QParams, parameters: tuple[Any, ...] = ()) -> Tensor:
    """Integers of the output less its zero point for all inputs, not clipped, float32."""
    return FUNCTIONS[name].integers(x, y, *parameters)


def _wide(call: Call, name: str, x: Activation, y: QParams, parameters: tuple[Any, ...]) -> Tensor:
    """A function of 16-bit integers."""
    integers, segments = x.integers().long(), call.state.spec.table_entries
    if name == "leaky_relu":
        return pointwise.leaky_relu(integers, parameters[0], x.qparams.scale, y.scale).double()
    if segments:
        return interpolate(_segments(name, x.qparams.scale, segments), integers).double()
    if x.qparams.scale >= _WIDEST_SCALE and call.state.watches_overflow(call.site):
        lost = (x.value.abs() >= _WIDEST_SCALE * 2**15).sum()
        call.state.count_overflow(call.site, int(lost), integers.numel())
    function = {"sigmoid": pointwise.logistic_int16, "tanh": pointwise.tanh_int16}[name]
    return function(integers, x.qparams.scale).double()


@lru_cache(maxsize=64)
def _segments(name: str, scale: float, segments: int) -> Tensor:
    """Sigmoid or tanh on a chip whose tables have a number of segments of its own."""
    function = {"sigmoid": elementary.sigmoid, "tanh": elementary.tanh}[name]

    def real(x: Any, _: Any) -> Any:
        return function(torch.from_numpy(x)).float().numpy()

    return interpolation_table(real, scale, WIDE_OUTPUT.scale, segments=segments)


LOGISTIC = Kernel("LOGISTIC", options=NO_OPTIONS, versions={"int8": 2, "int16": 3})
TANH = Kernel("TANH", options=NO_OPTIONS, versions={"int8": 2, "int16": 3})

register_operator(
    Operator(
        "sigmoid",
        torch=("sigmoid", "sigmoid_"),
        emulate=sigmoid,
        litert=(LOGISTIC,),
        arithmetic="table of 256 entries, output scale 1/256; in 16 bits interpolated",
    )
)
register_operator(
    Operator(
        "tanh",
        torch=("tanh", "tanh_"),
        emulate=tanh,
        litert=(TANH,),
        arithmetic="table of 256 entries, output scale 1/128; in 16 bits interpolated",
    )
)
register_operator(
    Operator(
        "elu",
        torch=("elu", "elu_"),
        emulate=elu,
        supports=supports_elu,
        litert=(Kernel("ELU", options=NO_OPTIONS),),
        widths=(8,),
        learns_scale=True,
        arithmetic="table, for the factor 1; LiteRT has no reference kernel of it: it is equal to "
        "the only kernel there is, and programs with it do not load where reference kernels alone "
        "are registered",
    )
)
register_operator(
    Operator(
        "gelu",
        torch=("gelu",),
        emulate=gelu,
        litert=(Kernel("GELU", versions={"int8": 2}),),
        widths=(8,),
        learns_scale=True,
        arithmetic="table",
    )
)
register_operator(
    Operator(
        "hard_swish",
        torch=("hardswish",),
        emulate=hard_swish,
        litert=(Kernel("HARD_SWISH", options=NO_OPTIONS),),
        widths=(8,),
        learns_scale=True,
        arithmetic="table",
    )
)
register_operator(
    Operator(
        "leaky_relu",
        torch=("leaky_relu", "leaky_relu_"),
        emulate=leaky_relu,
        litert=(Kernel("LEAKY_RELU", versions={"int16": 2}),),
        learns_scale=True,
        arithmetic="table; in 16 bits a product",
    )
)
register_operator(
    Operator(
        "relu",
        torch=("relu", "relu_"),
        emulate=relu,
        litert=(Kernel("RELU", options=NO_OPTIONS, versions={"int8": 2, "int16": 3}),),
        arithmetic="clipping on the quantization parameters of the input, whose range ends at 0 "
        "where nothing else reads it",
    )
)
register_operator(
    Operator(
        "relu6",
        torch=("relu6",),
        emulate=relu6,
        forms=(Form(("hardtanh", "hardtanh_"), hardtanh, supports_hardtanh),),
        litert=(Kernel("RELU6", options=NO_OPTIONS, versions={"int8": 2, "int16": 3}),),
        arithmetic="clipping on the quantization parameters of the input, whose range ends at 0 "
        "and 6 where nothing else reads it; `hardtanh` from 0 to 6",
    )
)
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
