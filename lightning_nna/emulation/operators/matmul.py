r"""Products of matrices: of two activations, or of an activation and a parameter.

.. math:: y = \mathrm{clip}\Bigl(M\Bigl(\sum_i (q_{a,i} - o_a)(q_{b,i} - o_b)\Bigr) + o_y\Bigr),
          \qquad M \approx s_a s_b / s_y

Two activations make a ``BATCH_MATMUL``. It rounds twice in 8 bits, has a 16-bit mantissa in 16, and
multiplies the two scales in float32 (on TFLite-Micro and in TOSA in float64). In TOSA it has three
axes. A matrix that is a parameter makes a fully connected layer: ``x @ w.T`` is ``F.linear``, and
``x @ w`` has one scale for each column of ``w``, its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.integer_products import FLOAT32_INTEGERS
from lightning_nna.emulation.arithmetic.on_host import in_memory
from lightning_nna.emulation.arithmetic.quantized_weight import SECOND_AXIS, QuantizedWeight
from lightning_nna.emulation.arithmetic.rescaling import (
    RoundingKind,
    round_fast,
    rounding_factors,
    spills,
)
from lightning_nna.emulation.clipping import clip, inside
from lightning_nna.emulation.first_order import first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.kernels.library import runs_kernel
from lightning_nna.emulation.operators import elementwise
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.linear import (
    FULLY_CONNECTED,
    accumulator_limit,
    fully_connected,
    linear,
    requantized,
    settled,
)
from lightning_nna.emulation.operators.record import Kernel, Operator, register_operator
from lightning_nna.emulation.program import Activation, Stored
from lightning_nna.emulation.ranges import QParams


def matmul(call: Call, input: Tensor, other: Tensor) -> Tensor:
    """Emulate ``torch.matmul`` and its relatives, of shapes ``(..., n, k)`` and ``(..., k, m)``."""
    rows = call.viewed(input.unsqueeze(0), input) if input.dim() == 1 else input
    columns = call.viewed(other.unsqueeze(1), other) if other.dim() == 1 else other
    parameter = _transposed_parameter(call, other)
    if parameter is not None:
        result = linear(call, rows, parameter)
    elif call.state.constants.is_constant(other) and other.dim() <= 2:
        shape = columns.shape
        result = by_parameter(call, rows, other, lambda weight: weight.reshape(shape), (1,))
    else:
        result = _by_activation(call, rows, columns)
    axes = tuple(axis for axis, x in ((-2, input), (-1, other)) if x.dim() == 1)
    return call.viewed(result.squeeze(axes), result) if axes else result


def linear_layer(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Emulate ``F.linear``; a weight that an operator has computed is a matrix of activations.

    Args:
        call: The call.
        input: Tensor of shape ``(..., in)``.
        weight: Shape ``(out, in)``.
        bias: Shape ``(out,)``, or None.
    """
    if call.state.qparams_of(weight) is None:
        return linear(call, input, weight, bias)
    turned = call.viewed(weight.mT if weight.dim() > 1 else weight, weight)
    if bias is None:
        return matmul(call, input, turned)
    return elementwise.add(call, matmul(call.child("product"), input, turned), bias)


def supports_matmul(input: Any, other: Any, **kwargs: Any) -> bool:
    """Tell whether the accelerator has the product: of tensors of at most five axes."""
    return not kwargs and all(isinstance(x, Tensor) and x.dim() <= 5 for x in (input, other))


def batch_matmul(call: Call, a: Activation, b: Activation, y: QParams) -> Tensor:
    """One BATCH_MATMUL instruction.

    Args:
        call: The call.
        a: Shape ``(*batch, n, k)``.
        b: Shape ``(*batch, k, m)``; the batch axes broadcast.
        y: Grid of the output.

    Returns:
        Tensor of shape ``(*batch, n, m)`` on ``y``.
    """
    with float32_arithmetic(a.value):
        result = _BatchMatmul.apply(a.value, b.value, a, b, y, call)
    if call.recording:
        tensors = [a.stored(), b.stored(), Activation(result, y).stored()]
        if call.state.spec.runtime == "tosa":
            tensors = [_of_three_axes(x, result.shape[:-2]) for x in tensors]
        call.record("BATCH_MATMUL", tensors[:2], tensors[2:])
    return call.with_qparams(result, y)


def _of_three_axes(x: Stored, batch: Sequence[int]) -> Stored:
    """Broadcast matrices ``(..., n, k)`` to ``(-1, n, k)``, the only form that TOSA has."""

    def spread(values: Tensor) -> Tensor:
        matrix = values.shape[-2:]
        return values.expand(*batch, *matrix).reshape(-1, *matrix)

    source = None if x.source is None else spread(x.source)
    return replace(x, integers=spread(x.integers), source=source)


def _by_activation(call: Call, input: Tensor, other: Tensor) -> Tensor:
    a, b = call.operand(input, "input"), call.operand(other, "other")
    if call.observing:
        return call.observed(torch.matmul(input, other))
    return batch_matmul(call, a, b, call.output(lambda: torch.matmul(input, other)))


def by_parameter(
    call: Call,
    input: Tensor,
    parameter: Tensor,
    arrange: Callable[[Tensor], Tensor],
    outputs: Collection[int],
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply by a parameter: a fully connected layer.

    Where the accelerator has a scale for each output, each index of the first axis has one if that
    is an axis of outputs, else each index of the second axis; otherwise the tensor has one.

    Args:
        call: The call.
        input: Tensor of shape ``(..., k)``.
        parameter: Tensor of any shape.
        arrange: Function that moves the elements of the parameter to shape ``(k, m)``.
        outputs: Axes of the parameter that become the second axis.
        bias: Shape ``(m,)``, or None.
    """
    x = call.operand(input, "input")

    def in_float() -> Tensor:
        product = torch.matmul(x.value, arrange(parameter))
        return product if bias is None else product + bias

    if call.observing:
        return call.observed(in_float())
    rows = _rows_per_scale(call, parameter, outputs)
    weight = call.state.weight(parameter, rows)
    # Every element of an output has the same scale.
    form = [-1 if axis == weight.axis else 1 for axis in range(parameter.dim())]
    scales = arrange(weight.scales.reshape(form).expand(parameter.shape))[0]
    quantized = QuantizedWeight(arrange(weight.stored).T.contiguous(), scales.contiguous())
    trained = arrange(call.state.trainable(parameter, rows))
    return fully_connected(call, x, trained.T, bias, quantized, call.output(in_float))


def _rows_per_scale(call: Call, parameter: Tensor, outputs: Collection[int]) -> int:
    """Rows of a parameter, of any shape, that share a scale; some axes become the outputs."""
    if call.state.spec.weight_granularity == "per_channel":
        if 0 in outputs:
            return 1
        if 1 in outputs and parameter.dim() > 1:
            return SECOND_AXIS
    return len(parameter)


def _transposed_parameter(call: Call, matrix: Tensor) -> Tensor | None:
    """The parameter that a matrix is the transpose of, if it is one."""
    base = matrix._base
    if base is None or base.dim() != 2 or not call.state.constants.is_constant(base):
        return None
    same = matrix.shape == base.T.shape and matrix.stride() == base.T.stride()
    return base if same else None


class _BatchMatmul(torch.autograd.Function):
    """Integer forward, straight-through backward with the values of the chip."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        left: Activation,
        right: Activation,
        y: QParams,
        call: Call,
    ) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        largest = float(a.shape[-1] * left.qparams.largest * right.qparams.largest)
        precision = call.state.spec.factor_precision
        factor = float(precision(left.qparams.scale) * precision(right.qparams.scale)) / y.scale
        rounding = call.state.spec.rounding_of("double" if y.bits == 8 else "reduced")
        limit = accumulator_limit(call, y.bits)
        bound = min(largest, limit)
        fits = call.exact or largest < FLOAT32_INTEGERS or not in_memory(a)
        if fits and runs_kernel("requantize", a):
            sums = _accumulate(left, right, largest)
            result, mask = requantized(
                call,
                sums,
                y,
                bits=y.bits,
                scale_before=factor,
                scale_after=1.0,
                largest=largest,
                rounding=rounding,
            )
            if needs_grad:
                ctx.save_for_backward(a, b, mask)
            return result
        if call.exact or largest >= limit or spills(factor, rounding=rounding, largest=bound):
            sums = _accumulate(left, right, largest)
            rounded = settled(
                call, sums, factor, y, largest=largest, limit=limit, rounding=rounding
            )
        else:
            rounded = _fast(left, right, factor, rounding)
        centered, clipped = clip(rounded, y, needs_grad)
        if needs_grad:
            ctx.save_for_backward(a, b, clipped)
        return centered.mul_(y.scale)

    @staticmethod
    @first_order("matmul")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, clipped = ctx.saved_tensors
        grad_a = grad_b = None
        with float32_arithmetic(grad):
            passed = inside(grad, clipped)
            if ctx.needs_input_grad[0]:
                grad_a = torch.matmul(passed, b.mT).sum_to_size(a.shape)
            if ctx.needs_input_grad[1]:
                grad_b = torch.matmul(a.mT, passed).sum_to_size(b.shape)
        return grad_a, grad_b, None, None, None, None


def _accumulate(a: Activation, b: Activation, largest: float) -> Tensor:
    """Sums of products of integers, exact: float64 where one could pass 2^24."""
    left, right = a.integers(), b.integers()
    if largest < FLOAT32_INTEGERS:
        return torch.matmul(left, right)
    return torch.matmul(left.double(), right.double())


def _fast(a: Activation, b: Activation, factor: float, rounding: RoundingKind) -> Tensor:
    """Rounded in float32, in units of the output's scale; the smaller operand takes the factor."""
    first, second = rounding_factors(factor, rounding=rounding)
    to_units = float(first) / (a.qparams.scale * b.qparams.scale)
    left, right = a.value.detach(), b.value.detach()
    if left.numel() < right.numel():
        left = left * to_units
    else:
        right = right * to_units
    return round_fast(torch.matmul(left, right), second)


register_operator(
    Operator(
        "batch_matmul",
        torch=("matmul", "__matmul__", "bmm", "mm", "mv"),
        emulate=matmul,
        supports=supports_matmul,
        litert=(
            Kernel("BATCH_MATMUL", options="BatchMatMulOptions", versions={"int8": 2, "int16": 3}),
        ),
        learns_scale=True,
        arithmetic="integer sum, rescaled; a parameter makes a fully connected layer",
    )
)
register_operator(
    Operator(
        "fully_connected",
        torch=("linear",),
        emulate=linear_layer,
        litert=(FULLY_CONNECTED,),
        learns_scale=True,
        has_weights=True,
        arithmetic="integer sum, rescaled in double precision",
    )
)
