"""Recurrent layers of elementary instructions: 16-bit states from step to step, 8-bit weights.

What comes in is widened without loss, and the outputs go to the width of the call at the end. The
input products of all steps are one matrix product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.operators.call import Call, requantize
from lightning_nna.emulation.operators.concatenation import concatenate
from lightning_nna.emulation.operators.linear import fully_connected, linear
from lightning_nna.emulation.operators.sequences import Layout
from lightning_nna.emulation.ranges import PENDING, QParams


class Step(ABC):
    """The instructions of one step, with a product of the state and a weight.

    Args:
        call: Call of 16 bits.
        w_hh: Recurrent weight, shape ``(gates * hidden, hidden)``.
        b_hh: Its bias, shape ``(gates * hidden,)``, or None.
    """

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
        """Return the initial state, shape ``(batch, hidden)``, on the grid of the later ones."""
        if self.call.observing:
            self.observe(h_0)
            return self.call.with_qparams(h_0.float().clone(), PENDING)
        y = self.grid(h_0)
        return self.call.with_qparams(self.call.initial_state(h_0, y, "initial_h"), y)

    def observe(self, h_0: Tensor) -> None:
        """Note the range of an initial state, shape ``(batch, hidden)``, with the later ones'."""
        self.call.state.ranges.observe(f"{self.next.site}/output", h_0)

    def grid(self, h_0: Tensor) -> QParams:
        """Return the quantization parameters of states, shape ``(batch, hidden)``."""
        return self.next.output(lambda: h_0)

    @abstractmethod
    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        """Return the next state from the input's share of the gates and the state.

        Args:
            x: Product of input and weight, shape ``(batch, gates * hidden)``.
            h: State, shape ``(batch, hidden)``.
        """

    def product(self, h: Tensor) -> Tensor:
        """Return the recurrent product of a state ``(batch, hidden)``."""
        if self.quantized is None:
            return self.recurrent.observed(F.linear(h, self.w_hh, self.b_hh))
        x = self.recurrent.operand(h, "input")
        y = self.recurrent.output(lambda: F.linear(h, self.w_hh, self.b_hh))
        return fully_connected(self.recurrent, x, self.trained, self.b_hh, self.quantized, y)


def run_steps(
    call: Call,
    rows: Tensor,
    layout: Layout,
    h_0: Tensor,
    group: Sequence[Tensor],
    kind: Callable[[Call, Tensor, Tensor | None], Step],
) -> tuple[Tensor, Tensor]:
    """Run one layer in one direction over whole sequences.

    Args:
        call: The layer's part of the call.
        rows: Inputs, shape ``(rows, in)``.
        layout: Of the rows.
        h_0: Initial states, ``(batch, hidden)``.
        group: ``w_ih`` and ``w_hh`` of shape ``(gates * hidden, ...)``, and perhaps their biases.
        kind: Class of the steps.

    Returns:
        Outputs ``(rows, hidden)`` and last states, the states in 16 bits.
    """
    w_ih, w_hh = group[:2]
    b_ih, b_hh = group[2:] if len(group) == 4 else (None, None)
    wide = call.child("steps", bits=16)
    step = kind(wide, w_hh, b_hh)
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
