r"""The GRU of the chip: a sequence of instructions on 16-bit activations, with 8-bit weights.

.. math::
    r, z &= \sigma(W_{r,z} x + b + R_{r,z} h + b'), \qquad
    n = \tanh(W_n x + b_n + r \odot (R_n h + b'_n)) \\
    h &\leftarrow n + z \odot (h - n)

The chip has no GRU of its own. Its state and gates keep 16 bits from step to step, as the LSTM's
cell does (see :mod:`.recurrent_steps`).

Reference:
    Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014, in
    PyTorch's form, with the reset gate behind the recurrent product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from typing_extensions import override

from lightning_nna.emulation.operators.activation import sigmoid, tanh
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.elementwise import add, mul, sub
from lightning_nna.emulation.operators.fused_gru import FusedGRUSteps
from lightning_nna.emulation.operators.gru_sequence import GRUSteps, gru_grids
from lightning_nna.emulation.operators.recurrent_steps import States, Step, WholeSequence, run_steps
from lightning_nna.emulation.operators.sequences import Layout
from lightning_nna.emulation.ranges import QParams


def gru_layer(
    call: Call, rows: Tensor, layout: Layout, start: States, group: Sequence[Tensor]
) -> tuple[Tensor, States]:
    """One layer in one direction over whole sequences.

    Args:
        call: The layer's part of the call.
        rows: Inputs, shape ``(rows, in)``.
        layout: Of the rows.
        start: Initial states, ``(batch, hidden)``.
        group: ``w_ih`` and ``w_hh`` of shape ``(3 * hidden, ...)``, gates r, z, n, and perhaps
            their biases.

    Returns:
        Outputs ``(rows, hidden)`` and last states, the states in 16 bits.
    """
    return run_steps(call, rows, layout, start, group, _GatedStep)


class _GatedStep(Step):
    """The instructions of one step."""

    @override
    def sequence(self, x: QParams, h: QParams) -> WholeSequence | None:
        grids = gru_grids(self.call, x, h)
        if grids is None:
            return None
        steps, fused = (partial(kind, self.call, grids) for kind in (GRUSteps, FusedGRUSteps))
        return WholeSequence(grids.recurrent, steps, fused)

    def __call__(self, x: Tensor, states: States) -> States:
        (h,) = states
        call, recurrent = self.call, self.product(h)
        size = h.shape[1]
        gates_x, new_x = (call.viewed(part, x) for part in x.split([2 * size, size], 1))
        gates_h, new_h = (
            call.viewed(part, recurrent) for part in recurrent.split([2 * size, size], 1)
        )
        gates = sigmoid(call.child("gates/sigmoid"), add(call.child("gates"), gates_x, gates_h))
        r, z = (call.viewed(part, gates) for part in gates.chunk(2, 1))
        reset = mul(call.child("reset"), r, new_h)
        n = tanh(call.child("new/tanh"), add(call.child("new"), new_x, reset))
        change = mul(call.child("update"), z, sub(call.child("change"), h, n))
        return (add(self.next, n, change),)
