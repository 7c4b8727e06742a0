r"""The LSTM of the chip: 8-bit input, weights and output, 16-bit cell.

For every gate, with :math:`M` the doubly rounded fixed-point multiplication and sat the saturation
to 16 bits (gate inputs in Q3.12, gate outputs in Q0.15, the cell with a power-of-two scale):

.. math::
    g &= \mathrm{sat}(\mathrm{sat}(M(W (q_x - o_x) + q_b)) + M(R (q_h - o_h))) \\
    c &\leftarrow \mathrm{sat}(\sigma(f)\, c + \sigma(i) \tanh(g)), \qquad
    h \leftarrow \mathrm{clip}(M(\sigma(o) \tanh(c)) + o_h)

The whole sequence is one autograd function: input products of all time steps in one matrix
product, one loop over time, and the weights' gradients in one matrix product at the end. The
backward is straight through every rounding, zero where a gate input, the cell or the output stands
at a bound, and uses sigma' = y (1 - y) and tanh' = 1 - y^2 at the tabulated outputs.

Reference:
    Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9(8), 1997; the
    8x8->16 LSTM kernel of LiteRT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulator.operators.activation import dropout as dropped
from lightning_nna.emulator.operators.call import Activation, Call, float32_arithmetic, quantize
from lightning_nna.emulator.operators.lstm_cell import Cell, ExactCell, FastCell, FloatCell, Grids
from lightning_nna.emulator.ranges import cell_state_exponent


@dataclass(frozen=True)
class _Layout:
    """How a flat ``(rows, features)`` sequence is cut into steps; sequences stand longest first."""

    sizes: tuple[int, ...]

    def steps(self) -> list[tuple[int, int]]:
        """First row and number of rows of each step."""
        first, result = 0, []
        for size in self.sizes:
            result.append((first, size))
            first += size
        return result


def supports_lstm(*args: Any) -> bool:
    """Whether a call of ``torch.lstm`` is one that the chip has: one direction, no projection."""
    packed = isinstance(args[1], Tensor)
    weights, has_biases, num_layers = (args[3], args[4], args[5]) if packed else args[2:5]
    bidirectional = args[8] if packed else args[7]
    per_layer = 4 if has_biases else 2
    return not bidirectional and len(weights) == per_layer * num_layers


def lstm(call: Call, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.lstm``, padded or packed: stacked layers in one direction."""
    if isinstance(args[1], Tensor):
        data, batch_sizes, hx, weights, has_biases, layers, dropout, train, _ = args
        layout = _Layout(tuple(batch_sizes.tolist()))
        rows, batched, batch_first = data, True, False
    else:
        padded, hx, weights, has_biases, layers, dropout, train, _, batch_first = args
        # A single sequence without a batch axis is a batch of one.
        batched = padded.dim() == 3
        data = padded if batched else padded.unsqueeze(1)
        data = data.transpose(0, 1) if batch_first and batched else data
        layout = _Layout((data.shape[1],) * data.shape[0])
        rows = data.reshape(-1, data.shape[-1])
        if rows is not padded:
            _keep_tag(call, padded, rows)
    output, h_n, c_n = _stack(call, rows, layout, hx, weights, has_biases, layers, dropout, train)
    if isinstance(args[1], Tensor):
        return output, h_n, c_n
    shaped = output.reshape(len(layout.sizes), layout.sizes[0], -1)
    if not batched:
        shaped = shaped.squeeze(1)
    elif batch_first:
        shaped = shaped.transpose(0, 1)
    _keep_tag(call, output, shaped)
    return shaped, h_n, c_n


def _keep_tag(call: Call, source: Tensor, result: Tensor) -> None:
    """Our own views are made outside the interception, so their parameters are carried by hand."""
    tag = call.host.tag_of(source)
    if tag is not None:
        call.host.set_tag(result, tag)


def _stack(
    call: Call,
    rows: Tensor,
    layout: _Layout,
    hx: tuple[Tensor, Tensor],
    weights: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the layers one after the other; each has its own ranges."""
    per_layer = 4 if has_biases else 2
    h_last, c_last = [], []
    for layer in range(layers):
        group = weights[layer * per_layer : (layer + 1) * per_layer]
        h_0, c_0 = (state[layer] for state in _batched(hx))
        rows, h_n, c_n = _layer(call, f"layer{layer}", rows, layout, h_0, c_0, group)
        h_last.append(h_n)
        c_last.append(c_n)
        if dropout and train and layer < layers - 1:
            rows = dropped(call, rows, dropout)
    h_n, c_n = torch.stack(h_last), torch.stack(c_last)
    if hx[0].dim() == 2:
        h_n, c_n = h_n.squeeze(1), c_n.squeeze(1)
    return rows, h_n, c_n


def _batched(hx: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """States with a batch axis, which a single sequence leaves out."""
    return tuple(state.unsqueeze(1) if state.dim() == 2 else state for state in hx)


def _layer(
    call: Call,
    name: str,
    rows: Tensor,
    layout: _Layout,
    h_0: Tensor,
    c_0: Tensor,
    weights: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer over the whole sequence."""
    x = call.operand(rows, f"{name}/input")
    w_ih, w_hh = weights[0], weights[1]
    with float32_arithmetic(rows):
        bias = weights[2] + weights[3] if len(weights) == 4 else None
        cell, h_0, c_0 = _cell(call, name, x, w_ih, w_hh, bias, layout, h_0, c_0)
        result, h_n, c_n, _ = _LSTM.apply(x.value, h_0, c_0, w_ih, w_hh, bias, x, cell, layout)
    if call.observing:
        return call.observed(result, name), h_n, c_n
    return call.tagged(result, cell.grids.h), h_n, c_n


def _cell(
    call: Call,
    name: str,
    x: Activation,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    layout: _Layout,
    h_0: Tensor,
    c_0: Tensor,
) -> tuple[Any, Tensor, Tensor]:
    """The arithmetic of this call, and the initial state on its grid."""
    if call.observing or f"{call.site}/{name}/cell" not in call.host.ranges:
        float_cell = FloatCell(w_ih, w_hh)
        with torch.no_grad():
            *_, cells = _LSTM.apply(x.value, h_0, c_0, w_ih, w_hh, bias, x, float_cell, layout)
        call.host.ranges.observe(f"{call.site}/{name}/cell", cells)
        if call.observing:
            return float_cell, h_0, c_0

    def float_output() -> Tensor:
        with torch.no_grad():
            inputs = (x.value, h_0, c_0, w_ih, w_hh, bias)
            return _LSTM.apply(*inputs, x, FloatCell(w_ih, w_hh), layout)[0]

    exponent = cell_state_exponent(call.host.ranges[f"{call.site}/{name}/cell"].magnitude)
    grids = Grids(x.qparams, call.output(float_output, name), exponent)
    # Four gates, four kernels' weights: a scale each.
    input_weight, recurrent_weight = (call.host.weight(w, w.shape[0] // 4) for w in (w_ih, w_hh))
    kind = ExactCell if call.exact else FastCell
    return kind(input_weight, recurrent_weight, grids), quantize(h_0, grids.h), c_0


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
        activation: Activation,
        cell: Cell,
        layout: _Layout,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        biases = None if bias is None else bias.detach().float()
        pre = cell.project_input(activation, biases)
        clipped_input = (pre <= cell.gate_bounds[0]) | (pre >= cell.gate_bounds[1])
        rows, size = pre.shape[0], h_0.shape[1]
        gates = torch.empty_like(pre)
        c_all, tanh_all, h_all = (pre.new_empty(rows, size) for _ in range(3))
        h, c = cell.start(h_0, c_0)
        first_h, first_c = h.clone(), c.clone().float()
        for first, count in layout.steps():
            here = slice(first, first + count)
            step = cell.step(pre[here], h[:count], c[:count])
            gates[here], c_all[here], tanh_all[here] = step.gates, step.c, step.tanh_c
            h_all[here] = step.h
            h[:count], c[:count] = step.h, step.c
        gates.mul_(cell.unit_gate)
        tanh_all.mul_(cell.unit_gate)
        ctx.cell, ctx.layout = cell, layout
        ctx.unclipped = not bool(clipped_input.any())
        if any(ctx.needs_input_grad):
            kept = () if ctx.unclipped else (clipped_input,)
            ctx.save_for_backward(
                x, w_ih, w_hh, pre, gates, c_all, tanh_all, h_all, first_h, first_c, *kept
            )
        cells = c_all * cell.unit_c
        ctx.mark_non_differentiable(cells)
        return h_all * cell.unit_h, h * cell.unit_h, c * cell.unit_c, cells

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w_ih, w_hh, *record = ctx.saved_tensors
        pre, gates, c_all, tanh_all, h_all, first_h, first_c, *clipped = record
        cell, layout = ctx.cell, ctx.layout
        with float32_arithmetic(x):
            w_ih, w_hh = _used_weights(cell, w_ih, w_hh)
            h_before = _previous(h_all, first_h, layout).mul_(cell.unit_h)
            c_before = _previous(c_all, first_c, layout).mul_(cell.unit_c)
            coefficients, through_h, forget = _coefficients(
                cell, pre, gates, c_all, tanh_all, c_before
            )
            d_output = grads[0] * _inside(h_all, cell.hidden_bounds)
            d_pre, dh, dc = _through_time(
                layout, d_output, grads[1], grads[2], coefficients, through_h, forget, w_hh
            )
            d_w_hh = d_pre.T @ h_before
            d_input = d_pre * ~clipped[0] if clipped else d_pre
            d_x = d_input @ w_ih if ctx.needs_input_grad[0] else None
            d_w_ih = d_input.T @ x.float()
            d_bias = d_input.sum(0) if ctx.needs_input_grad[5] else None
        return d_x, dh, dc, d_w_ih, d_w_hh, d_bias, None, None, None


def _used_weights(cell: Cell, w_ih: Tensor, w_hh: Tensor) -> tuple[Tensor, Tensor]:
    """The weights that the forward multiplied with."""
    if isinstance(cell, FastCell):
        return cell.w_ih.values, cell.w_hh.values
    return w_ih, w_hh


def _inside(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """1 where a value is strictly inside its bounds, 0 where it was (or may have been) clipped."""
    return ((x > bounds[0]) & (x < bounds[1])).to(x.dtype)


def _previous(states: Tensor, first: Tensor, layout: _Layout) -> Tensor:
    """State before each step: the step before it, or the initial one."""
    result = torch.empty_like(states)
    previous = first
    for start, count in layout.steps():
        result[start : start + count] = previous[:count]
        previous = states[start : start + count]
    return result


def _coefficients(
    cell: Cell, pre: Tensor, gates: Tensor, c_all: Tensor, tanh_all: Tensor, c_before: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Everything of the backward that needs no loop, for all steps at once.

    Returns d(pre)/dc and, for the output gate, d(pre)/dh as ``(rows, 4, hidden)``; dc/dh; and the
    factor from one cell to the one before.
    """
    i, f, g, o = gates.chunk(4, 1)
    slopes = (gates - gates * gates).view(*i.shape[:1], 4, -1)
    slopes[:, 2] = 1 - g * g
    if cell.gate_bounds[0] > -float("inf"):
        slopes *= _inside(pre, cell.gate_bounds).view_as(slopes)
    inside_c = _inside(c_all, cell.cell_bounds)
    slopes[:, 0] *= g * inside_c
    slopes[:, 1] *= c_before * inside_c
    slopes[:, 2] *= i * inside_c
    slopes[:, 3] *= tanh_all
    return slopes, o * (1 - tanh_all * tanh_all), f * inside_c


def _through_time(
    layout: _Layout,
    d_output: Tensor,
    d_h_last: Tensor,
    d_c_last: Tensor,
    coefficients: Tensor,
    through_h: Tensor,
    forget: Tensor,
    w_hh: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loop of the backward: gradients of all gate inputs and of the initial state."""
    dh, dc = d_h_last.clone(), d_c_last.clone()
    d_pre = torch.empty_like(coefficients)
    for start, count in reversed(layout.steps()):
        here = slice(start, start + count)
        total_h = dh[:count] + d_output[here]
        total_c = torch.addcmul(dc[:count], total_h, through_h[here])
        torch.mul(coefficients[here, :3], total_c.unsqueeze(1), out=d_pre[here, :3])
        torch.mul(coefficients[here, 3], total_h, out=d_pre[here, 3])
        dc[:count] = total_c * forget[here]
        torch.mm(d_pre[here].flatten(1), w_hh, out=dh[:count])
    return d_pre.flatten(1), dh, dc
