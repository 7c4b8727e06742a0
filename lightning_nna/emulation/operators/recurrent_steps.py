"""Recurrent layers of elementary instructions: 16-bit states from step to step, 8-bit weights.

What comes in is widened without loss, and the outputs go to the width of the call at the end. The
input products of all steps are one matrix product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.arithmetic.on_host import in_memory
from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.kernels.library import runs_kernel
from lightning_nna.emulation.operators.call import Call, requantize
from lightning_nna.emulation.operators.concatenation import concatenate
from lightning_nna.emulation.operators.fused_product import FusedProduct, fused_product
from lightning_nna.emulation.operators.linear import fully_connected, holding_bias, linear
from lightning_nna.emulation.operators.sequence_function import SequenceFunction, SequenceSteps
from lightning_nna.emulation.operators.sequences import Layout
from lightning_nna.emulation.operators.step_arithmetic import StateProduct
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import PENDING, QParams

States = tuple[Tensor, ...]


class Product:
    """A fully connected instruction of states and a weight.

    Args:
        call: Call of 16 bits, whose output it is.
        weight: Shape ``(out, hidden)``.
        bias: Shape ``(out,)``, or None.
    """

    def __init__(self, call: Call, weight: Tensor, bias: Tensor | None) -> None:
        self.call, self.weight, self.bias = call, weight, bias
        self.quantized, self.trained = None, weight
        if not call.observing:
            per_channel = call.state.spec.weight_granularity == "per_channel"
            rows_per_scale = 1 if per_channel else weight.shape[0]
            self.quantized = call.state.weight(weight, rows_per_scale)
            self.trained = call.state.trainable(weight, rows_per_scale)

    def prepared(self, h: QParams, layout: Layout) -> QuantizedWeight:
        """Return the weight for all steps, whose scales hold the bias.

        Args:
            h: Quantization parameters of the states.
            layout: Of the rows.
        """
        assert self.quantized is not None
        # What the graph saves must not depend on the telemetry: activation checkpointing runs
        # without it again.
        with torch.no_grad():
            quantized = holding_bias(self.call, self.quantized, self.bias, h)
            if self.call.state.modes.current.telemetry is not None:
                # It counts the biases of each step.
                for _ in layout.sizes[1:]:
                    holding_bias(self.call, self.quantized, self.bias, h)
        return quantized

    def __call__(self, h: Tensor) -> Tensor:
        """Return the product of states, shape ``(batch, hidden)``."""
        if self.quantized is None:
            return self.call.observed(F.linear(h, self.weight, self.bias))
        x = self.call.operand(h, "input")
        y = self.call.output(lambda: F.linear(h, self.weight, self.bias))
        return fully_connected(self.call, x, self.trained, self.bias, self.quantized, y)


class WholeSequence(NamedTuple):
    """Describe all steps of a layer as one function.

    Args:
        recurrent: Quantization parameters of the state product.
        steps: Function from the instruction of the states to the steps.
        fused: The same of steps that are one kernel each; None if there is none.
    """

    recurrent: QParams
    steps: Callable[[StateProduct], SequenceSteps]
    fused: Callable[[FusedProduct], SequenceSteps] | None = None


class Step(ABC):
    """The instructions of one step, with a product of the state and a weight.

    Args:
        call: Call of 16 bits.
        w_hh: Recurrent weight, shape ``(gates * hidden, hidden)``.
        b_hh: Its bias, shape ``(gates * hidden,)``, or None.
    """

    def __init__(self, call: Call, w_hh: Tensor, b_hh: Tensor | None) -> None:
        self.call, self.next = call, call.child("next")
        self.product = Product(call.child("recurrent"), w_hh, b_hh)

    def start(self, states: States) -> States:
        """Return the initial states on the grids of the later ones.

        Args:
            states: The hidden state and perhaps others, shape ``(batch, hidden)`` each.
        """
        return (self.started(states[0], self.next, "initial_h"),)

    def started(self, state: Tensor, later: Call, name: str) -> Tensor:
        """Return an initial state on the grid of the later ones.

        Args:
            state: Shape ``(batch, hidden)``.
            later: Call whose results are the later ones.
            name: Name of the initial state.
        """
        if self.call.observing:
            self.observe(state, later)
            return self.call.with_qparams(state.float().clone(), PENDING)
        y = self.grid(state, later)
        return self.call.with_qparams(self.call.initial_state(state, y, name), y)

    def observe(self, state: Tensor, later: Call) -> None:
        """Note the range of an initial state, shape ``(batch, hidden)``, with the later ones'."""
        self.call.state.ranges.observe(f"{later.site}/output", state)

    def grid(self, state: Tensor, later: Call) -> QParams:
        """Return the quantization parameters of states, shape ``(batch, hidden)``."""
        return later.output(lambda: state)

    def at_once(self, x: Tensor, states: States, layout: Layout) -> Tensor | None:
        """Run all steps as one function, equal to the steps one by one in every bit.

        Args:
            x: Products of inputs and weight, shape ``(rows, gates * hidden)``.
            states: Initial states, shape ``(batch, hidden)`` each.
            layout: Of the rows.

        Returns:
            Hidden states after each step, ``(rows, hidden)``; None if they must run one by one.
        """
        state, trained = self.call.state, (self.product.trained, self.product.bias)
        q_x, q_h = (state.qparams_of(each) for each in (x, states[0]))
        assert q_x is not None
        assert q_h is not None
        sequence = self.sequence(q_x, q_h)
        if sequence is None:
            return None
        inputs, start = Activation(x, q_x), Activation(states[0], q_h)
        with float32_arithmetic(x):
            steps = self._steps(x, sequence, q_h, layout)
            result = SequenceFunction.apply(x, states[0], *trained, inputs, start, steps, layout)
        return self.call.with_qparams(result, q_h)

    def _steps(
        self, x: Tensor, sequence: WholeSequence, h: QParams, layout: Layout
    ) -> SequenceSteps:
        call, bias, y = self.product.call, self.product.bias, sequence.recurrent
        weight = self.product.prepared(h, layout)
        # On a device a telemetry sees each step.
        is_seen = not in_memory(x) and call.state.modes.current.telemetry is not None
        if sequence.fused is not None and runs_kernel("gru_step", x) and not is_seen:
            product = fused_product(call, h, weight, bias, y)
            if product is not None:
                return sequence.fused(product)
        with torch.no_grad():
            return sequence.steps(StateProduct(call, h, weight, bias, y, layout.batch))

    def sequence(self, x: QParams, h: QParams) -> WholeSequence | None:
        """Return what runs all steps as one function; None if they must run one by one.

        Args:
            x: Quantization parameters of the products of inputs and weight.
            h: Of the initial hidden states.
        """
        return None

    @abstractmethod
    def __call__(self, x: Tensor, states: States) -> States:
        """Return the next states from the input's share of the gates and the states.

        Args:
            x: Product of input and weight, shape ``(batch, gates * hidden)``.
            states: The hidden state and perhaps others, shape ``(batch, hidden)`` each.
        """


def run_steps(
    call: Call,
    rows: Tensor,
    layout: Layout,
    start: States,
    group: Sequence[Tensor],
    kind: Callable[[Call, Tensor, Tensor | None], Step],
) -> tuple[Tensor, States]:
    """Run one layer in one direction over whole sequences.

    Args:
        call: The layer's part of the call.
        rows: Inputs, shape ``(rows, in)``.
        layout: Of the rows.
        start: Initial states, ``(batch, hidden)`` each, the hidden one first.
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
    states, trace = step.start(start), []
    # An export follows the instructions one by one.
    if not call.observing and not call.recording and projected.numel():
        at_once = step.at_once(projected, states, layout)
        if at_once is not None:
            last_states = call.viewed(layout.last(at_once), at_once)
            return _narrowed(call, at_once), (last_states,)
    for number, part in enumerate(projected.split(layout.sizes)):
        size = layout.sizes[number]
        before = tuple(call.viewed(state[:size], state) for state in states)
        states = step(call.viewed(part, projected), before)
        trace.append(states)
    hidden, *others = zip(*trace, strict=True)
    outputs = concatenate(wide.child("join"), list(hidden))
    last = [call.viewed(layout.last(outputs), outputs)]
    for index, each in enumerate(others):
        # Nobody reads the others of earlier steps, unless a sequence ended there.
        joined = each[-1]
        if not layout.one_length:
            joined = concatenate(wide.child(f"join_others/{index}"), list(each))
        last.append(call.viewed(layout.last(joined), joined))
    return _narrowed(call, outputs), tuple(last)


def _narrowed(call: Call, outputs: Tensor) -> Tensor:
    """Outputs on the grid of the call's own width."""
    if call.observing:
        return call.observed(outputs)
    if call.bits == 16:
        return outputs
    x = call.child("output", bits=16).operand(outputs, "input")
    return requantize(call, x, call.output(lambda: outputs))
