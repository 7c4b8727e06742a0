r"""A GRU over whole sequences as one autograd function, equal to its instructions step by step.

What does not depend on the state is computed for all steps at once: the input product, its scaling
for the sums of the gates, and the gradients of the weights. Forward and backward are one loop over
the steps each. The backward is the one that the instructions have: straight through every rounding,
zero where a result was clipped, with sigma' = y (1 - y) and tanh' = 1 - y^2 at the tabulated
outputs. With :math:`d` the gradient of the next state,

.. math::
    d_z &= d \odot (h - n), \qquad d_h = d \odot z + R^\top d_g, \qquad d_n = d - d \odot z, \\
    d_g &= (d_{a} \odot \hat n,\; d_z,\; d_a \odot r)\ \text{behind the sigmoids}, \qquad
    d_a = d_n \odot (1 - n^2)

where :math:`\hat n = R_n h + b'_n`. Gradients of the weights are one product over all steps, and
equal to the sum of those of the steps but for float32's rounding; all others are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

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
    Product,
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

#: Kernels of a step, in 16 bits.
KERNELS = ("ADD", "SUB", "MUL", "LOGISTIC", "TANH")

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class Grids(NamedTuple):
    """Quantization parameters of a step, all of 16 bits.

    Args:
        x: Of the input product.
        h: Of the states, before and after a step.
        recurrent: Of the state product.
        gates: Of the inputs of the sigmoids.
        reset: Of the reset gate's product.
        new: Of the input of the tanh.
        change: Of the difference of state and new state.
        update: Of the update gate's product.
    """

    x: QParams
    h: QParams
    recurrent: QParams
    gates: QParams
    reset: QParams
    new: QParams
    change: QParams
    update: QParams


def gru_grids(call: Call, x: QParams, h: QParams) -> Grids | None:
    """Return the quantization parameters of every step, if they are the same in all steps.

    Args:
        call: Call of the steps.
        x: Of the input product.
        h: Of the initial states.

    Returns:
        None if a range is not known yet, or if the steps must be run one by one.
    """
    names = ("recurrent", "gates", "reset", "new", "change", "update", "next")
    ranges = grids_of(call, names, KERNELS)
    if ranges is None:
        return None
    recurrent, gates, reset, new, change, update, following = ranges
    gates = grid_of_sum(x, recurrent, gates)
    new = grid_of_sum(x, reset, new)
    change = grid_of_sum(h, WIDE_OUTPUT, change)
    spec = call.state.spec
    if grid_of_sum(WIDE_OUTPUT, update, following) != h or any(
        may_wrap(q, spec) for q in (gates, new)
    ):
        return None
    return Grids(x, h, recurrent, gates, reset, new, change, update)


class Trace(NamedTuple):
    """Hold what the backward needs of a forward, row by row: int16, or float32 masks.

    Args:
        gates: Outputs of the gates r and z, ``(rows, 2 * hidden)``.
        n: New states, ``(rows, hidden)``.
        new_h: State products of the new states, ``(rows, hidden)``.
        change: Differences of states and new states, ``(rows, hidden)``.
        h: States before each step, ``(rows, hidden)``.
        inside_recurrent: 1 where a state product was not clipped, else 0; None if none was.
        inside_gates: The same of the inputs of the sigmoids.
        inside_reset: Of the reset gate's products.
        inside_new: Of the inputs of the tanh.
        inside_change: Of the differences.
        inside_update: Of the update gate's products.
        inside_next: Of the states.
    """

    gates: Tensor
    n: Tensor
    new_h: Tensor
    change: Tensor
    h: Tensor
    inside_recurrent: Tensor | None
    inside_gates: Tensor | None
    inside_reset: Tensor | None
    inside_new: Tensor | None
    inside_change: Tensor | None
    inside_update: Tensor | None
    inside_next: Tensor | None


class GRUSteps(SequenceSteps):
    """The arithmetic of one layer in one direction.

    Args:
        call: Call of the steps.
        grids: Quantization parameters of a step.
        product: Instruction of the states.
    """

    operator = "gru"

    def __init__(self, call: Call, grids: Grids, product: StateProduct) -> None:
        super().__init__(product.weight)
        self.product = product
        self.grids, spec = grids, call.state.spec
        self.numbers = numbers = Numbers(call.exact)
        g, n = grids, WIDE_OUTPUT
        self.gates = Sum("ADD", g.x, g.recurrent, g.gates, numbers, spec)
        self.reset = Product(n, g.recurrent, g.reset, numbers, spec)
        self.new = Sum("ADD", g.x, g.reset, g.new, numbers, spec)
        self.change = Sum("SUB", g.h, n, g.change, numbers, spec)
        self.update = Product(n, g.change, g.update, numbers, spec)
        self.next = Sum("ADD", n, g.update, g.h, numbers, spec)
        device = product.values.device
        self.sigmoid = LookUp("sigmoid", g.gates, numbers, spec, device)
        self.tanh = LookUp("tanh", g.new, numbers, spec, device)

    @property
    @override
    def through_time(self) -> ThroughTime:
        return partial(_through_time, self.grids)

    @override
    def run(
        self, x: Activation, start: Activation, layout: Layout, *, keep: bool
    ) -> tuple[Tensor, Trace | None]:
        numbers, sizes, device = self.numbers, layout.sizes, x.value.device
        (rows, _), size = x.value.shape, start.value.shape[1]
        inputs = numbers.of(x)
        new_x, gates_x = inputs[:, 2 * size :], inputs[:, : 2 * size]
        # The gates' share of the input and the new state's, scaled for their sums.
        scaled_gates = self.gates.first(gates_x, torch.empty_like(gates_x)).split(sizes)
        scaled_new = self.new.first(new_x, torch.empty_like(new_x)).split(sizes)
        gates_out = torch.empty((rows, 2 * size), dtype=torch.int16, device=device)
        new_out = torch.empty((rows, size), dtype=torch.int16, device=device)
        columns = {"recurrent": 3, "gates": 2, "reset": 1, "new": 1, "change": 1, "update": 1}
        stores = {
            name: RoundedSteps(sizes, count * size, device, used=keep)
            for name, count in columns.items()
        }
        following = RoundedSteps(sizes, size, device, used=True)
        state = States(start, numbers, self.product)
        buffers = _Buffers(layout.batch, size, numbers.dtype, device)
        every = zip(
            scaled_gates,
            scaled_new,
            gates_out.split(sizes),
            new_out.split(sizes),
            *(stores[name].steps for name in columns),
            following.steps,
            strict=True,
        )
        for step in every:
            buffers = buffers.for_rows(len(step[0]))
            self._step(buffers, state, *step)
        after = following.clipped()
        trace = None
        if keep:
            before = layout.before(torch.cat([start.integers(), after]))
            new_h, change = stores["recurrent"].clipped(2 * size), stores["change"].clipped()
            integers = (x.to(torch.int16) for x in (new_h, change, before))
            masks = (each.inside() for each in (*stores.values(), following))
            trace = Trace(gates_out, new_out, *integers, *masks)
        return after.mul_(self.grids.h.scale), trace

    def _step(
        self,
        b: _Buffers,
        state: States,
        scaled_gates: Tensor,
        scaled_new: Tensor,
        gates_out: Tensor,
        new_out: Tensor,
        recurrent_store: Tensor | None,
        gates_store: Tensor | None,
        reset_store: Tensor | None,
        new_store: Tensor | None,
        change_store: Tensor | None,
        update_store: Tensor | None,
        next_store: Tensor | None,
    ) -> None:
        clip, grids = self.numbers.clip, self.grids
        h = state.values[: b.rows]
        rounded = copied_to(self.product(state.of_product(b.rows), b.recurrent), recurrent_store)
        clip(rounded, grids.recurrent, b.recurrent)
        self.gates.second(b.gates_h, b.wide)
        rounded = self.gates.of_scaled(scaled_gates, b.wide, b.wide_rounded)
        self.sigmoid(copied_to(rounded, gates_store), b.wide_index, gates_out, b.gates)
        rounded = copied_to(self.reset(b.r, b.new_h, b.room, b.rounded), reset_store)
        clip(rounded, grids.reset, b.result)
        self.new.second(b.result, b.room)
        rounded = self.new.of_scaled(scaled_new, b.room, b.rounded)
        self.tanh(copied_to(rounded, new_store), b.index, new_out, b.n)
        self.change.first(h, b.result)
        self.change.second(b.n, b.room)
        rounded = self.change.of_scaled(b.result, b.room, b.rounded)
        clip(copied_to(rounded, change_store), grids.change, b.result)
        rounded = copied_to(self.update(b.z, b.result, b.room, b.rounded), update_store)
        clip(rounded, grids.update, b.result)
        self.next.first(b.n, b.rounded)
        self.next.second(b.result, b.room)
        state.set(copied_to(self.next.of_scaled(b.rounded, b.room, b.result), next_store))


class _Buffers:
    """Buffers of one step of a number of rows."""

    def __init__(self, rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self._form = rows, (size, dtype, device)

        def empty(columns: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty((rows, columns), dtype=dtype, device=device)

        self.recurrent, self.gates = empty(3 * size), empty(2 * size)
        self.gates_h, self.new_h = self.recurrent.split([2 * size, size], 1)
        self.r, self.z = self.gates.chunk(2, 1)
        self.wide, self.wide_rounded = empty(2 * size), empty(2 * size)
        self.room, self.rounded, self.result, self.n = (empty(size) for _ in range(4))
        self.wide_index, self.index = empty(2 * size, torch.int32), empty(size, torch.int32)

    def for_rows(self, rows: int) -> _Buffers:
        """Return the buffers for the sequences that go on."""
        return self if rows == self.rows else _Buffers(rows, *self._form)


def _through_time(
    grids: Grids, layout: Layout, grad: Tensor, tensors: Sequence[Tensor | None], weight: Tensor
) -> Gradients:
    """The loop of the backward."""
    trace, size = Trace(*tensors), weight.shape[1]  # type: ignore[arg-type]
    sizes: Sequence[int] = layout.sizes
    gates, n = real(trace.gates, WIDE_OUTPUT), real(trace.n, WIDE_OUTPUT)
    r, z = gates.chunk(2, 1)
    new_h, change = real(trace.new_h, grids.recurrent), real(trace.change, grids.change)
    rows, empty = len(n), n.new_empty
    d_x, d_recurrent = empty((rows, 3 * size)), empty((rows, 3 * size))
    grad = grad if grad.is_contiguous() else grad.contiguous()
    of_steps = (
        *(grad, gates, n, r, z, new_h, change),
        *(d_x[:, 2 * size :], d_recurrent, d_recurrent[:, : 2 * size], d_recurrent[:, 2 * size :]),
        *(trace.inside_recurrent, trace.inside_gates, trace.inside_reset, trace.inside_new),
        *(trace.inside_change, trace.inside_update, trace.inside_next),
    )
    steps = zip(
        *([None] * len(sizes) if x is None else x.split(list(sizes)) for x in of_steps), strict=True
    )
    passed, masked = empty((layout.batch, size)), empty((layout.batch, 3 * size))
    # A sequence that ends early gets nothing from later steps.
    carried = torch.zeros((layout.batch, size), device=grad.device)
    rooms = empty((3, layout.batch, size)), empty((layout.batch, 2 * size))
    for step in reversed(list(steps)):
        d, gates_t, n_t, r_t, z_t, new_h_t, change_t, d_new, d_rec, d_gates, d_new_h = step[:11]
        in_recurrent, in_gates, in_reset, in_new, in_change, in_update, in_next = step[11:]
        count = len(d)
        d_h, d_change, d_product = rooms[0][:, :count]
        d_both = rooms[1][:count]
        carry = carried[:count]
        torch.add(d, carry, out=d_h)
        if in_next is not None:
            d_h.mul_(in_next)
        d_update = d_h if in_update is None else torch.mul(d_h, in_update, out=passed[:count])
        torch.mul(d_update, change_t, out=d_both[:, size:])
        torch.mul(d_update, z_t, out=d_change)
        if in_change is not None:
            d_change.mul_(in_change)
        _tanh_backward(d_h.sub_(d_change), n_t, grad_input=d_new)
        if in_new is not None:
            d_new.mul_(in_new)
        d_reset = d_new if in_reset is None else torch.mul(d_new, in_reset, out=passed[:count])
        torch.mul(d_reset, new_h_t, out=d_both[:, :size])
        torch.mul(d_reset, r_t, out=d_new_h)
        _sigmoid_backward(d_both, gates_t, grad_input=d_gates)
        if in_gates is not None:
            d_gates.mul_(in_gates)
        if in_recurrent is not None:
            d_rec = torch.mul(d_rec, in_recurrent, out=masked[:count])
        torch.mm(d_rec, weight, out=d_product)
        torch.add(d_change, d_product, out=carry)
    d_x[:, : 2 * size] = d_recurrent[:, : 2 * size]
    if trace.inside_recurrent is not None:
        d_recurrent *= trace.inside_recurrent
    return Gradients(d_x, d_recurrent, carried, real(trace.h, grids.h))
