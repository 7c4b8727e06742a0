r"""The LSTM as elementary instructions on 16-bit activations, with 8-bit weights.

.. math::
    i, f, o &= \sigma(W_{i,f,o} x + b + R_{i,f,o} h + b'), \qquad
    g = \tanh(W_g x + b_g + R_g h + b'_g) \\
    c &\leftarrow f \odot c + i \odot g, \qquad h \leftarrow o \odot \tanh(c)

It is for accelerators without an LSTM of their own, and for projections where the kernel has none.
Both states have 16 bits (see :mod:`.recurrent_steps`), the hidden one, too, which has 8 in the
kernels. With a projection the hidden state is a further product.

Reference:
    Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9(8), 1997.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from lightning_nna.emulation.operators.activation import sigmoid, tanh
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.elementwise import add, mul
from lightning_nna.emulation.operators.recurrent_steps import Product, States, Step, run_steps
from lightning_nna.emulation.operators.sequences import Layout


def elementary_lstm_layer(
    call: Call,
    rows: Tensor,
    layout: Layout,
    start: States,
    group: Sequence[Tensor],
    projection: Tensor | None,
) -> tuple[Tensor, States]:
    """Run one layer in one direction over whole sequences.

    Args:
        call: The layer's part of the call.
        rows: Inputs, shape ``(rows, in)``.
        layout: Of the rows.
        start: Initial hidden states, ``(batch, out)``, and cells, ``(batch, hidden)``.
        group: ``w_ih`` and ``w_hh`` of shape ``(4 * hidden, ...)``, gates i, f, g, o, and perhaps
            their biases.
        projection: Shape ``(out, hidden)``, or None.

    Returns:
        Outputs ``(rows, out)`` and last states, the states in 16 bits.
    """
    return run_steps(call, rows, layout, start, group, partial(_Step, projection=projection))


class _Step(Step):
    """The instructions of one step."""

    def __init__(
        self, call: Call, w_hh: Tensor, b_hh: Tensor | None, *, projection: Tensor | None
    ) -> None:
        super().__init__(call, w_hh, b_hh)
        self.cell = call.child("cell")
        self.project = None if projection is None else Product(self.next, projection, None)

    def start(self, states: States) -> States:
        h, c = states
        return (*super().start((h,)), self.started(c, self.cell, "initial_c"))

    def __call__(self, x: Tensor, states: States) -> States:
        call, (h, c) = self.call, states
        gates = add(call.child("gates"), x, self.product(h))
        size = c.shape[1]
        first, cell, last = (
            call.viewed(part, gates) for part in gates.split([2 * size, size, size], 1)
        )
        first = sigmoid(call.child("gates/sigmoid"), first)
        i, f = (call.viewed(part, first) for part in first.chunk(2, 1))
        new = mul(call.child("new"), i, tanh(call.child("new/tanh"), cell))
        c = add(self.cell, mul(call.child("retained"), f, c), new)
        o = sigmoid(call.child("output/sigmoid"), last)
        hidden = tanh(call.child("cell/tanh"), c)
        if self.project is None:
            return mul(self.next, o, hidden), c
        return self.project(mul(call.child("hidden"), o, hidden)), c
