r"""The LSTM of the chip: 8-bit input, weights and output, 16-bit cell.

For every gate, with :math:`M` the doubly rounded fixed-point multiplication and sat the saturation
to 16 bits (gate inputs in Q3.12, gate outputs in Q0.15, the cell with a power-of-two scale):

.. math::
    g &= \mathrm{sat}(\mathrm{sat}(M(W (q_x - o_x) + q_b)) + M(R (q_h - o_h))) \\
    c &\leftarrow \mathrm{sat}(\sigma(f)\, c + \sigma(i) \tanh(g)), \qquad
    h \leftarrow \mathrm{clip}(M(\sigma(o) \tanh(c)) + o_h)

With a projection, :math:`h` has a grid of its own before it and is
:math:`\mathrm{clip}(M(P (q_m - o_m)) + o_h)`. The whole sequence is one autograd function: input
products of all time steps in one matrix product, one loop over time, and the weights' gradients in
one matrix product at the end. The backward is straight through every rounding, zero where a gate
input, the cell or the output was clipped, and uses sigma' = y (1 - y) and tanh' = 1 - y^2 at the
tabulated outputs.

Reference:
    Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9(8), 1997; the
    8x8->16 LSTM kernel of LiteRT.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna.emulation.arithmetic.on_host import in_memory, on_host
from lightning_nna.emulation.first_order import first_order
from lightning_nna.emulation.float32_arithmetic import float32_arithmetic
from lightning_nna.emulation.kernels.library import runs_kernel
from lightning_nna.emulation.operators.call import Call, stored_bytes
from lightning_nna.emulation.operators.fused_lstm import FusedCell, FusedLSTM
from lightning_nna.emulation.operators.linear import (
    accumulator_limit,
    holding_bias,
    overflowed,
)
from lightning_nna.emulation.operators.lstm_cell import Grids, LSTMCell, Record
from lightning_nna.emulation.operators.lstm_instruction import Places, record_layer
from lightning_nna.emulation.operators.lstm_kernels import GATE_OUTPUT_SCALE, kernel_of
from lightning_nna.emulation.operators.sequences import Layout
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import QParams, cell_state_exponent

# Elements that the backward prepares at a time, so that they stay in the cache.
_BLOCK = 2**16


class Weights(NamedTuple):
    """Parameters of one layer and direction, as PyTorch orders them.

    Args:
        w_ih: Shape ``(4 * hidden, in)``; gates i, f, g, o.
        w_hh: Shape ``(4 * hidden, out)``.
        bias: Sum of both biases, ``(4 * hidden,)``, or None.
        projection: Shape ``(out, hidden)``, or None.
    """

    w_ih: Tensor
    w_hh: Tensor
    bias: Tensor | None
    projection: Tensor | None


def lstm_layer(
    call: Call, rows: Tensor, layout: Layout, h_0: Tensor, c_0: Tensor, weights: Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in one direction over whole sequences.

    Args:
        call: The layer's part of the call.
        rows: Inputs, shape ``(rows, in)``.
        layout: Of the rows.
        h_0: Initial hidden states, ``(batch, out)``.
        c_0: Initial cells, ``(batch, hidden)``.
        weights: Of the layer.

    Returns:
        Outputs ``(rows, out)``, last hidden states and last cells.
    """
    x = call.operand(rows, "input")
    if call.observing or f"{call.site}/cell" not in call.state.ranges:
        with float32_arithmetic(rows):
            outputs, hidden, cells = _float_layer(rows.float(), layout, h_0, c_0, weights)
        call.state.ranges.observe(f"{call.site}/cell", _with_start(cells, c_0))
        if weights.projection is not None:
            call.state.ranges.observe(f"{call.site}/hidden", hidden)
        if call.observing:
            result = call.observed(outputs, seen=_with_start(outputs, h_0))
            # The layer reads its output itself, as the state of the next step.
            call.state.fusion.note_consumer(result, f"{call.site}/state")
            return result, call.viewed(layout.last(outputs), result), layout.last(cells)
    cell, y = _cell(call, x, layout, h_0, c_0, weights)
    with float32_arithmetic(rows):
        h_0 = call.initial_state(h_0, y, "initial_h")
        if isinstance(cell, FusedCell):
            w_ih, w_hh, bias, _ = _trainable(call, weights)
            result, h_n, c_n = FusedLSTM.apply(x.value, h_0, c_0, w_ih, w_hh, bias, cell, layout)
        elif torch.is_grad_enabled():
            trained = _trainable(call, weights)
            result, h_n, c_n = _LSTM.apply(x.value, h_0, c_0, *trained, x, cell, layout, call)
        else:
            _, result, h_n, c_n = _states(call, x, h_0, c_0, weights.bias, cell, layout, keep=False)
    return call.with_qparams(result, y), call.with_qparams(h_n, y), c_n


def _with_start(states: Tensor, start: Tensor) -> Tensor:
    """States of all steps and the one before, unless that is zero, which every grid has."""
    return torch.cat([states, start.float()]) if bool(start.any()) else states


def _cell(
    call: Call, x: Activation, layout: Layout, h_0: Tensor, c_0: Tensor, weights: Weights
) -> tuple[LSTMCell | FusedCell, QParams]:
    """The arithmetic of this call, and the grid of its output."""

    def float_output() -> Tensor:
        with torch.no_grad(), float32_arithmetic(x.value):
            return _float_layer(x.value, layout, h_0, c_0, weights)[0]

    exponent = cell_state_exponent(call.state.ranges[f"{call.site}/cell"].magnitude)
    y = call.output(float_output)
    # Four gates, four kernels' weights: a scale each.
    w_ih, w_hh = (call.state.weight(w, w.shape[0] // 4) for w in weights[:2])
    projection, hidden = None, y
    if weights.projection is not None:
        projection = call.state.weight(weights.projection, weights.projection.shape[0])
        hidden = call.output(float_output, "hidden")
    bias = None if weights.bias is None else weights.bias.detach().float()
    # Prepared once while nothing changes; one that may overflow counts for its own site.
    fuses = _may_fuse(call, x, weights)
    layers, key = w_ih.layers, (x.qparams, y, hidden, exponent, fuses)
    on_cpu = on_host(x.value)
    known = layers.get(key) if on_cpu and call.telemetry is None else None
    if known is not None and known[0] is w_hh and known[1] is projection:
        prepared: LSTMCell | FusedCell = known[3]
        if _are_equal(known[2], bias):
            return prepared, y
    w_ih = holding_bias(call, w_ih, bias, x.qparams, len(w_ih.stored) // 4)
    spec = call.state.spec
    if fuses:
        fused = FusedCell(
            w_ih,
            w_hh,
            bias,
            x.qparams,
            y,
            exponent,
            kernel=kernel_of(spec.runtime),
            rounding=spec.rounding_of("double"),
            bias_bits=spec.bias_width(8),
            accumulator_bits=spec.accumulator_width(8),
            saturates=spec.accumulator_overflow == "saturate",
        )
        # On a processor nothing that the graph saves may depend on what the site has warned of:
        # activation checkpointing runs it again.
        counts = on_cpu or call.state.watches_overflow(call.site)
        if not counts or not fused.may_overflow(spec.largest_bias(8)):
            if on_cpu and call.telemetry is None:
                layers[key] = w_hh, projection, bias, fused
            return fused, y
    cell = LSTMCell(
        w_ih,
        w_hh,
        bias,
        Grids(x.qparams, y, hidden, exponent),
        kernel=kernel_of(spec.runtime),
        projection=projection,
        rounding=spec.rounding_of("double"),
        bias_bits=spec.bias_width(8),
        accumulator_limit=accumulator_limit(call, 8),
        overflowed=partial(overflowed, call),
    )
    if on_cpu and call.telemetry is None and not cell.may_overflow:
        layers[key] = w_hh, projection, bias, cell
    return cell, y


def _may_fuse(call: Call, x: Activation, weights: Weights) -> bool:
    """Tell whether a kernel may run each step: a recorder sees the instructions.

    On a device a telemetry sees them, too. Sums of more than 32 bits have multipliers of their own.
    """
    is_seen = call.recording or (call.telemetry is not None and not in_memory(x.value))
    if weights.projection is not None or is_seen:
        return False
    return call.state.spec.accumulator_width(8) <= 32 and runs_kernel("lstm_step", x.value)


def _are_equal(first: Tensor | None, second: Tensor | None) -> bool:
    """Tell whether two biases, shape ``(4 * hidden,)``, have the same values, or both are None."""
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def _trainable(call: Call, weights: Weights) -> Weights:
    """Tensors that the gradients go to."""
    w_ih, w_hh = (call.state.trainable(w, w.shape[0] // 4) for w in weights[:2])
    projection = weights.projection
    if projection is not None:
        projection = call.state.trainable(projection, projection.shape[0])
    return Weights(w_ih, w_hh, weights.bias, projection)


def _float_layer(
    x: Tensor, layout: Layout, h_0: Tensor, c_0: Tensor, weights: Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, hidden states before a projection and cells of all steps, in float."""
    projected = F.linear(x, weights.w_ih, weights.bias)
    h, c = h_0.float(), c_0.float()
    outputs, hiddens, cells = [], [], []
    for step in projected.split(layout.sizes):
        size = step.shape[0]
        i, f, g, o = (step + F.linear(h[:size], weights.w_hh)).chunk(4, 1)
        c = torch.sigmoid(f) * c[:size] + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(c)
        h = hidden if weights.projection is None else F.linear(hidden, weights.projection)
        outputs.append(h)
        hiddens.append(hidden)
        cells.append(c)
    return torch.cat(outputs), torch.cat(hiddens), torch.cat(cells)


def _states(
    call: Call,
    x: Activation,
    h_0: Tensor,
    c_0: Tensor,
    bias: Tensor | None,
    cell: LSTMCell,
    layout: Layout,
    *,
    keep: bool,
) -> tuple[Record, Tensor, Tensor, Tensor]:
    """The trace of the layer, its outputs ``(rows, out)``, last hidden states and last cells."""
    first_h, first_c = stored_bytes(h_0, cell.grids.h), cell.start(c_0)
    record = cell.run(cell.project(x), first_h, first_c, layout, keep=keep)
    batch, grids = layout.batch, cell.grids
    states = record.h[batch:].float().sub_(grids.h.zero_point).mul_(grids.h.scale)
    cells = layout.last(record.c[batch:]).float().mul_(cell.cell_scale)
    if call.recording:
        places = Places(h_0, c_0, states, cells)
        record_layer(call, x, cell, bias, record, layout, places)
    # A copy: what works in place on the states must leave the last ones alone.
    return record, states, layout.last(states).clone(), cells


class _LSTM(torch.autograd.Function):
    """One layer, all steps; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        bias: Tensor | None,
        projection: Tensor | None,
        activation: Activation,
        cell: LSTMCell,
        layout: Layout,
        call: Call,
    ) -> tuple[Tensor, Tensor, Tensor]:
        record, states, h_n, c_n = _states(
            call, activation, h_0, c_0, bias, cell, layout, keep=True
        )
        if any(ctx.needs_input_grad):
            tensors = [getattr(record, name) for name in _SAVED]
            ctx.names = [
                name for name, tensor in zip(_SAVED, tensors, strict=True) if tensor is not None
            ]
            ctx.cell, ctx.layout = cell, layout
            ctx.save_for_backward(x, *(tensor for tensor in tensors if tensor is not None))
        return states, h_n, c_n

    @staticmethod
    @first_order("lstm")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        cell, layout = ctx.cell, ctx.layout
        record = Record(**dict(zip(ctx.names, tensors, strict=True)))
        with float32_arithmetic(x):
            factors = _Factors(cell, record, layout)
            d_pre, d_out, dh, dc = _through_time(cell, layout, grads, factors)
            h_before = _real(layout.before(record.h), cell.grids.h)
            d_recurrent = d_pre
            if record.inside_recurrent is not None:
                d_recurrent = d_pre * record.inside_recurrent
            d_w_hh = d_recurrent.T @ h_before
            d_input = d_pre if record.inside_input is None else d_pre * record.inside_input
            d_x = d_input @ cell.w_ih.values if ctx.needs_input_grad[0] else None
            d_w_ih = d_input.T @ x.float()
            d_bias = d_input.sum(0) if ctx.needs_input_grad[5] else None
            d_projection = None
            if d_out is not None and record.hidden is not None:
                d_projection = d_out.T @ _real(record.hidden, cell.grids.hidden)
        return d_x, dh, dc, d_w_ih, d_w_hh, d_bias, d_projection, None, None, None, None


_SAVED = (
    *("gates", "c", "tanh_c", "h", "hidden"),
    *("inside_input", "inside_recurrent", "inside_gates", "inside_c", "inside_hidden", "inside_h"),
)


def _real(stored: Tensor, grid: QParams) -> Tensor:
    """Values of bytes with their zero point."""
    return stored.float().sub_(grid.zero_point).mul_(grid.scale)


class _Factors:
    """Everything of the backward that needs no loop.

    Attributes:
        gates: d(gate inputs)/d(cell) and, for the output gate, d/d(hidden): ``(rows, 4, hidden)``.
        through_h: d(cell)/d(hidden), ``(rows, hidden)``.
        forget: From one cell to the one before, ``(rows, hidden)``.
        inside_h: Where a projected output was not clipped, float; None if everywhere.
        inside_recurrent: The same of recurrent parts of gates' inputs, ``(rows, 4 * hidden)``.
    """

    def __init__(self, cell: LSTMCell, record: Record, layout: Layout) -> None:
        rows, size = record.tanh_c.shape
        empty = record.gates.new_empty
        self.gates = empty((rows, 4, size), dtype=torch.float32)
        self.through_h, self.forget = (empty((rows, size), dtype=torch.float32) for _ in range(2))
        c_before = layout.before(record.c)
        block = max(1, _BLOCK // (4 * size))
        for first in range(0, rows, block):
            here = slice(first, first + block)
            self._prepare(here, record, c_before[here], cell.cell_scale)
        masks = (record.inside_h, record.inside_recurrent)
        self.inside_h, self.inside_recurrent = (x if x is None else x.float() for x in masks)

    def _prepare(self, here: slice, record: Record, c_before: Tensor, cell_scale: float) -> None:
        size = c_before.shape[1]
        outputs = record.gates[here].float().mul_(GATE_OUTPUT_SCALE).view(-1, 4, size)
        # One cell with i = 0.5, f = 0.75, g = -0.5, o = 0.8, c = 0.4 before and
        # c = 0.75 * 0.4 + 0.5 * -0.5 = 0.05 after, tanh(c) = 0.05:
        #   slopes of the gates   i (1 - i) = 0.25   f: 0.1875   1 - g^2 = 0.75   o: 0.16
        #   times what they meet  * g = -0.125   * c before = 0.075   * i = 0.375
        #                         and * tanh(c) = 0.008 for the output gate
        #   from h to c           o (1 - tanh(c)^2) = 0.798
        #   from c to c before    f = 0.75
        i, f, g, o = outputs.unbind(1)
        tanh_c = record.tanh_c[here].float().mul_(GATE_OUTPUT_SCALE)
        slopes = torch.addcmul(outputs, outputs, outputs, value=-1.0, out=self.gates[here])
        torch.addcmul(slopes.new_ones(()), g, g, value=-1.0, out=slopes[:, 2])
        if record.inside_gates is not None:
            slopes *= record.inside_gates[here].view_as(slopes)
        slopes[:, 0] *= g
        slopes[:, 1] *= c_before.float().mul_(cell_scale)
        slopes[:, 2] *= i
        slopes[:, 3] *= tanh_c
        through_h, forget = self.through_h[here], self.forget[here]
        torch.mul(o, 1 - tanh_c.square_(), out=through_h)
        forget.copy_(f)
        if record.inside_hidden is not None:
            slopes[:, 3] *= record.inside_hidden[here]
            through_h *= record.inside_hidden[here]
        if record.inside_c is not None:
            slopes[:, :3] *= record.inside_c[here].unsqueeze(1)
            forget *= record.inside_c[here]


def _through_time(
    cell: LSTMCell, layout: Layout, grads: tuple[Tensor, ...], factors: _Factors
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The loop of the backward.

    Returns:
        Gradients of all gates' inputs, of all projected outputs before clipping (None without a
        projection), of the initial hidden states and of the initial cells.
    """
    d_output, d_h_last, d_c_last = grads
    dh, dc = d_h_last.float().clone(), d_c_last.float().clone()
    total_h, total_c = torch.empty_like(dh), torch.empty_like(dc)
    w_hh = cell.w_hh.values
    projection = None if cell.projection is None else cell.projection.values
    d_outs = None if projection is None else torch.empty_like(d_output, dtype=torch.float32)
    sizes = list(layout.sizes)
    parts = [x.split(sizes) for x in (factors.gates, factors.through_h, factors.forget)]
    gates, flat = parts[0], factors.gates.flatten(1).split(sizes)
    for step, d_out in reversed(list(enumerate(d_output.split(sizes)))):
        size = sizes[step]
        h, c, before = total_h[:size], total_c[:size], dc[:size]
        torch.add(dh[:size], d_out, out=h)
        hidden = h
        if d_outs is not None and projection is not None:
            if factors.inside_h is not None:
                h.mul_(factors.inside_h.split(sizes)[step])
            d_outs.split(sizes)[step].copy_(h)
            hidden = h @ projection
        # With dh = 1 and dc = 0.2 from later steps, that cell gets 0.2 + 1 * 0.798 = 0.998. Its
        # gates get 0.998 * (-0.125, 0.075, 0.375) and 1 * 0.008, its predecessor 0.998 * 0.75.
        torch.addcmul(before, hidden, parts[1][step], out=c)
        gates[step][:, :3].mul_(c.unsqueeze(1))
        gates[step][:, 3].mul_(hidden)
        torch.mul(c, parts[2][step], out=before)
        recurrent = flat[step]
        if factors.inside_recurrent is not None:
            recurrent = recurrent * factors.inside_recurrent.split(sizes)[step]
        torch.mm(recurrent, w_hh, out=dh[:size])
    return factors.gates.flatten(1), d_outs, dh, dc
