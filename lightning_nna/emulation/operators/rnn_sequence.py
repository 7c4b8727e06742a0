r"""A plain recurrent layer over whole sequences as one autograd function.

It equals its instructions step by step, as :mod:`.gru_sequence` does: two products, a sum and tanh
or ReLU, with one loop over the steps forward and one backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nna.emulation.operators.activation import WIDE_OUTPUT, may_wrap
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.elementwise import grid_of_sum
from lightning_nna.emulation.operators.sequence_function import (
    Gradients,
    SequenceSteps,
    ThroughTime,
)
from lightning_nna.emulation.operators.sequences import Layout
from lightning_nna.emulation.operators.step_arithmetic import (
    LookUp,
    Numbers,
    RoundedSteps,
    StateProduct,
    States,
    Sum,
    copied_to,
    grids_of,
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
    """Hold what the backward needs of a forward, row by row: int16, or float32 masks.

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


class RNNSteps(SequenceSteps):
    """The arithmetic of one layer in one direction.

    Args:
        call: Call of the steps.
        grids: Quantization parameters of a step.
        product: Instruction of the states.
        kind: Function of the layer.
    """

    operator = "rnn"

    def __init__(self, call: Call, grids: Grids, product: StateProduct, kind: Nonlinearity) -> None:
        super().__init__(product.weight)
        self.product = product
        self.grids, self.kind = grids, kind
        self.numbers, spec = Numbers(call.exact), call.state.spec
        self.next = Sum("ADD", grids.x, grids.recurrent, grids.next, self.numbers, spec)
        self.tanh: LookUp | None = None
        if kind == "tanh":
            device = product.values.device
            self.tanh = LookUp("tanh", grids.next, self.numbers, spec, device)

    @property
    @override
    def through_time(self) -> ThroughTime:
        return partial(_through_time, self.grids, self.kind)

    @override
    def run(
        self, x: Activation, start: Activation, layout: Layout, *, keep: bool
    ) -> tuple[Tensor, Trace | None]:
        sizes, device, (rows, size) = layout.sizes, x.value.device, x.value.shape
        inputs = self.numbers.of(x)
        scaled = self.next.first(inputs, torch.empty_like(inputs)).split(sizes)
        states = torch.empty((rows, size), dtype=torch.int16, device=device)
        products, sums = (RoundedSteps(sizes, size, device, used=keep) for _ in range(2))
        state = States(start, self.numbers, self.product)
        room, rounded = (torch.empty_like(state.values) for _ in range(2))
        index = torch.empty_like(room, dtype=torch.int32)
        steps = zip(scaled, states.split(sizes), products.steps, sums.steps, strict=True)
        for scaled_x, after, recurrent_store, next_store in steps:
            count = len(after)
            first, second, result = room[:count], rounded[:count], state.values[:count]
            product = self.product(state.of_product(count), first)
            product = copied_to(product, recurrent_store)
            self.numbers.clip(product, self.grids.recurrent, second)
            self.next.second(second, first)
            total = copied_to(self.next.of_scaled(scaled_x, first, second), next_store)
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
            trace = Trace(before, states, products.inside(), sums.inside())
        return real(states, self.grids.h), trace


def _through_time(
    grids: Grids,
    kind: Nonlinearity,
    layout: Layout,
    grad: Tensor,
    tensors: Sequence[Tensor | None],
    weight: Tensor,
) -> Gradients:
    """The loop of the backward."""
    trace = Trace(*tensors)  # type: ignore[arg-type]
    after = real(trace.after, grids.h)
    sizes: Sequence[int] = layout.sizes
    d_x = torch.empty_like(after)
    of_steps = (grad, after, d_x, trace.inside_recurrent, trace.inside_next)
    steps = zip(
        *([None] * len(sizes) if x is None else x.split(list(sizes)) for x in of_steps), strict=True
    )
    # A sequence that ends early gets nothing from later steps.
    carried = torch.zeros((layout.batch, after.shape[1]), device=grad.device)
    room = torch.empty_like(carried)
    for d, after_t, d_sum, in_recurrent, in_next in reversed(list(steps)):
        carry, d_h = carried[: len(d)], room[: len(d)]
        torch.add(d, carry, out=d_h)
        if kind == "tanh":
            _tanh_backward(d_h, after_t, grad_input=d_sum)
        else:
            _relu_backward(d_h, after_t, 0, grad_input=d_sum)
        if in_next is not None:
            d_sum.mul_(in_next)
        if in_recurrent is not None:
            d_sum = torch.mul(d_sum, in_recurrent, out=d_h)
        torch.mm(d_sum, weight, out=carry)
    d_recurrent = d_x if trace.inside_recurrent is None else d_x * trace.inside_recurrent
    return Gradients(d_x, d_recurrent, carried, real(trace.before, grids.h))
