r"""A plain recurrent layer over whole sequences as one autograd function.

It equals its instructions step by step, as :mod:`.gru_sequence` does: two products, a sum and tanh
or ReLU, with one loop over the steps forward and one backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.quantized_weight import values_of
from lightning_nna.emulation.first_order import first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.operators.activation import WIDE_OUTPUT, may_wrap
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.elementwise import grid_of_sum
from lightning_nna.emulation.operators.sequences import Layout
from lightning_nna.emulation.operators.step_arithmetic import (
    Kept,
    LookUp,
    Numbers,
    StateProduct,
    States,
    Sum,
    grids_of,
    kept_in,
    real,
)
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import QParams

Nonlinearity = Literal["tanh", "relu"]

_KERNELS = {"tanh": ("ADD", "TANH"), "relu": ("ADD", "RELU")}
_tanh_backward = torch.ops.aten.tanh_backward.grad_input
_relu_backward = torch.ops.aten.threshold_backward.grad_input


class Grids(NamedTuple):
    """Quantization parameters of a step, all of 16 bits.

    Args:
        x: Of the input product.
        h: Of the states, before and after a step.
        recurrent: Of the state product.
        next: Of the sum of both products.
    """

    x: QParams
    h: QParams
    recurrent: QParams
    next: QParams


def rnn_grids(call: Call, x: QParams, h: QParams, kind: Nonlinearity) -> Grids | None:
    """Return the quantization parameters of every step, if they are the same in all steps.

    Args:
        call: Call of the steps.
        x: Of the input product.
        h: Of the initial states.
        kind: Function of the layer.

    Returns:
        None if a range is not known yet, or if the steps must be run one by one.
    """
    ranges = grids_of(call, ("recurrent", "next"), _KERNELS[kind])
    if ranges is None:
        return None
    recurrent, following = ranges
    following = grid_of_sum(x, recurrent, following)
    if kind == "tanh" and may_wrap(following, call.state.spec):
        return None
    if h != (WIDE_OUTPUT if kind == "tanh" else following):
        return None
    return Grids(x, h, recurrent, following)


class Trace(NamedTuple):
    """What the backward needs of a forward, row by row: int16, or float32 masks.

    Args:
        before: States before each step, ``(rows, hidden)``.
        after: States after each step.
        inside_recurrent: 1 where a state product was not clipped, else 0; None if none was.
        inside_next: The same of the sums.
    """

    before: Tensor
    after: Tensor
    inside_recurrent: Tensor | None
    inside_next: Tensor | None


class RNNSteps:
    """The arithmetic of one layer in one direction.

    Args:
        call: Call of the steps.
        grids: Quantization parameters of a step.
        product: Instruction of the states.
        kind: Function of the layer.
    """

    def __init__(self, call: Call, grids: Grids, product: StateProduct, kind: Nonlinearity) -> None:
        self.grids, self.product, self.kind = grids, product, kind
        self.numbers, spec = Numbers(call.exact), call.state.spec
        self.next = Sum("ADD", grids.x, grids.recurrent, grids.next, self.numbers, spec)
        self.tanh: LookUp | None = None
        if kind == "tanh":
            device = product.values.device
            self.tanh = LookUp("tanh", grids.next, self.numbers, spec, device)

    def run(
        self, x: Activation, start: Activation, layout: Layout, *, keep: bool
    ) -> tuple[Tensor, Trace | None]:
        """Run all steps.

        Args:
            x: Input products, shape ``(rows, hidden)``.
            start: Initial states, ``(batch, hidden)``.
            layout: Of the rows.
            keep: Whether a backward follows.

        Returns:
            States after each step, real values, ``(rows, hidden)``, and the trace.
        """
        sizes, device, (rows, size) = layout.sizes, x.value.device, x.value.shape
        inputs = self.numbers.of(x)
        scaled = self.next.first(inputs, torch.empty_like(inputs)).split(sizes)
        states = torch.empty((rows, size), dtype=torch.int16, device=device)
        kept, sums = (Kept(sizes, size, device, used=keep) for _ in range(2))
        state = States(start, self.numbers, self.product)
        room, rounded = (torch.empty_like(state.values) for _ in range(2))
        index = torch.empty_like(room, dtype=torch.int32)
        steps = zip(scaled, states.split(sizes), kept.steps, sums.steps, strict=True)
        for scaled_x, after, kept_recurrent, kept_next in steps:
            count = len(after)
            first, second, result = room[:count], rounded[:count], state.values[:count]
            product = self.product(state.of_product(count), first)
            product = kept_in(product, kept_recurrent)
            self.numbers.clip(product, self.grids.recurrent, second)
            self.next.second(second, first)
            total = kept_in(self.next.of_scaled(scaled_x, first, second), kept_next)
            if self.tanh is not None:
                self.tanh(total, index[:count], after, result)
                state.set(after)
            else:
                state.set(total.clamp_min_(0))
                after.copy_(state.integers(count))
        trace = None
        if keep:
            first_states = start.integers().to(torch.int16)
            before = layout.before(torch.cat([first_states, states]))
            trace = Trace(before, states, kept.inside(), sums.inside())
        return real(states, self.grids.h), trace


class RNNFunction(torch.autograd.Function):
    """One layer, all steps."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        w_hh: Tensor,
        bias: Tensor | None,
        inputs: Activation,
        start: Activation,
        steps: RNNSteps,
        layout: Layout,
    ) -> Tensor:
        """Return the states after each step, shape ``(rows, hidden)``."""
        needs_grad = any(ctx.needs_input_grad)
        states, trace = steps.run(inputs, start, layout, keep=needs_grad)
        if trace is not None:
            ctx.grids, ctx.layout, ctx.kind = steps.grids, layout, steps.kind
            weight = steps.product.weight
            ctx.save_for_backward(weight.stored, weight.scales, *trace)
        return states

    @staticmethod
    @first_order("rnn")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the first four arguments."""
        # Outside of the block: with activation checkpointing, asking for what was saved runs the
        # forward again.
        weight, scales, *tensors = ctx.saved_tensors
        with float32_arithmetic(grad):
            trace = Trace(*tensors)
            d_x, d_h = _through_time(ctx, grad, trace, values_of(weight, scales))
            d_recurrent, d_w, d_bias = d_x, None, None
            if trace.inside_recurrent is not None:
                d_recurrent = d_x * trace.inside_recurrent
            if ctx.needs_input_grad[2]:
                d_w = d_recurrent.T @ real(trace.before, ctx.grids.h)
            if ctx.needs_input_grad[3]:
                d_bias = d_recurrent.sum(0)
        return d_x, d_h, d_w, d_bias, None, None, None, None


def _through_time(ctx: Any, grad: Tensor, trace: Trace, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The loop of the backward.

    Returns:
        Gradients of both products, ``(rows, hidden)``, and of the initial states.
    """
    layout, after = ctx.layout, real(trace.after, ctx.grids.h)
    sizes: Sequence[int] = layout.sizes
    d_x = torch.empty_like(after)
    tensors = (grad, after, d_x, trace.inside_recurrent, trace.inside_next)
    steps = zip(
        *([None] * len(sizes) if x is None else x.split(list(sizes)) for x in tensors), strict=True
    )
    # A sequence that ends early gets nothing from later steps.
    carried = torch.zeros((layout.batch, after.shape[1]), device=grad.device)
    room = torch.empty_like(carried)
    for d, after_t, d_sum, in_recurrent, in_next in reversed(list(steps)):
        carry, d_h = carried[: len(d)], room[: len(d)]
        torch.add(d, carry, out=d_h)
        if ctx.kind == "tanh":
            _tanh_backward(d_h, after_t, grad_input=d_sum)
        else:
            _relu_backward(d_h, after_t, 0, grad_input=d_sum)
        if in_next is not None:
            d_sum.mul_(in_next)
        if in_recurrent is not None:
            d_sum = torch.mul(d_sum, in_recurrent, out=d_h)
        torch.mm(d_sum, weight, out=carry)
    return d_x, carried
