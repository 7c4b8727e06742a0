r"""The GRU of the chip: a sequence of instructions on 16-bit activations, with 8-bit weights.

.. math::
    r, z &= \sigma(W_{r,z} x + b + R_{r,z} h + b'), \qquad
    n = \tanh(W_n x + b_n + r \odot (R_n h + b'_n)) \\
    h &\leftarrow n + z \odot (h - n)

The chip has no GRU of its own. Its state and gates keep 16 bits from step to step, as the LSTM's
cell does; what comes in is widened without loss, and the outputs go to 8 bits at the end. The input
products of all steps are one matrix product.

Reference:
    Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014, in
    PyTorch's form, with the reset gate behind the recurrent product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.operators.activation import sigmoid, tanh
from lightning_nna.emulation.operators.call import Call, requantize
from lightning_nna.emulation.operators.concatenation import concatenate
from lightning_nna.emulation.operators.elementwise import add, mul, sub
from lightning_nna.emulation.operators.linear import fully_connected, linear
from lightning_nna.emulation.operators.sequences import Layout
from lightning_nna.emulation.ranges import PENDING


def gru_layer(
    call: Call, rows: Tensor, layout: Layout, h_0: Tensor, group: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """One layer in one direction over whole sequences.

    Args:
        call: The layer's part of the call.
        rows: Inputs, shape ``(rows, in)``.
        layout: Of the rows.
        h_0: Initial states, ``(batch, hidden)``.
        group: ``w_ih`` and ``w_hh`` of shape ``(3 * hidden, ...)``, gates r, z, n, and perhaps
            their biases.

    Returns:
        Outputs ``(rows, hidden)`` and last states, the states in 16 bits.
    """
    w_ih, w_hh = group[:2]
    b_ih, b_hh = group[2:] if len(group) == 4 else (None, None)
    wide = call.child("steps", bits=16)
    step = _Step(wide, w_hh, b_hh)
    projected = linear(wide.child("input"), rows, w_ih, b_ih)
    h, states = step.start(h_0), []
    for number, part in enumerate(projected.split(layout.sizes)):
        size = layout.sizes[number]
        h = step(call.viewed(part, projected), call.viewed(h[:size], h))
        states.append(h)
    outputs = concatenate(wide.child("join"), states)
    last = call.viewed(layout.last(outputs), outputs)
    return _narrowed(call, outputs), last


def _narrowed(call: Call, outputs: Tensor) -> Tensor:
    """Outputs on the grid of the call's own width."""
    if call.observing:
        return call.observed(outputs)
    if call.bits == 16:
        return outputs
    x = call.child("output", bits=16).operand(outputs, "input")
    return requantize(call, x, call.output(lambda: outputs))


class _Step:
    """The instructions of one step."""

    def __init__(self, call: Call, w_hh: Tensor, b_hh: Tensor | None) -> None:
        self.call, self.w_hh, self.b_hh = call, w_hh, b_hh
        self.recurrent, self.next = call.child("recurrent"), call.child("next")
        self.quantized, self.trained = None, w_hh
        if not call.observing:
            per_channel = call.state.spec.weight_granularity == "per_channel"
            rows_per_scale = 1 if per_channel else w_hh.shape[0]
            self.quantized = call.state.weight(w_hh, rows_per_scale)
            self.trained = call.state.trainable(w_hh, rows_per_scale)

    def start(self, h_0: Tensor) -> Tensor:
        """The initial state on the grid of the later ones."""
        if self.call.observing:
            self.call.state.ranges.observe(f"{self.next.site}/output", h_0)
            return self.call.with_qparams(h_0.float().clone(), PENDING)
        y = self.next.output(lambda: h_0)
        return self.call.with_qparams(self.call.initial_state(h_0, y, "initial_h"), y)

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        """The next state, from the input's share of the gates and the state."""
        call, recurrent = self.call, self._product(h)
        size = h.shape[1]
        gates_x, new_x = (call.viewed(part, x) for part in x.split([2 * size, size], 1))
        gates_h, new_h = (
            call.viewed(part, recurrent) for part in recurrent.split([2 * size, size], 1)
        )
        gates = sigmoid(call.child("gates/sigmoid"), add(call.child("gates"), gates_x, gates_h))
        r, z = (call.viewed(part, gates) for part in gates.chunk(2, 1))
        reset = mul(call.child("reset"), r, new_h)
        n = tanh(call.child("new/tanh"), add(call.child("new"), new_x, reset))
        return add(self.next, n, mul(call.child("update"), z, sub(call.child("change"), h, n)))

    def _product(self, h: Tensor) -> Tensor:
        if self.quantized is None:
            return self.recurrent.observed(F.linear(h, self.w_hh, self.b_hh))
        x = self.recurrent.operand(h, "input")
        y = self.recurrent.output(lambda: F.linear(h, self.w_hh, self.b_hh))
        return fully_connected(self.recurrent, x, self.trained, self.b_hh, self.quantized, y)
