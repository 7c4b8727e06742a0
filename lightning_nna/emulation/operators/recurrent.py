"""Recurrent layers as torch calls them: padded or packed, stacked, in one direction or two.

A step of a cell (``nn.LSTMCell``, ``nn.GRUCell``) is a sequence of one step. The second direction
runs over the reversed sequences, and a concatenation joins the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.operators.activation import dropout as dropped
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.concatenation import concatenate
from lightning_nna.emulation.operators.gru import gru_layer
from lightning_nna.emulation.operators.lstm import Weights, lstm_layer
from lightning_nna.emulation.operators.lstm_steps import elementary_lstm_layer
from lightning_nna.emulation.operators.record import (
    Arguments,
    Form,
    Kernel,
    Operator,
    register_operator,
)
from lightning_nna.emulation.operators.recurrent_steps import States
from lightning_nna.emulation.operators.rnn import relu_layer, tanh_layer
from lightning_nna.emulation.operators.sequences import Layout


def lstm(call: Call, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.lstm``: outputs, last hidden states, last cells."""
    output, (h_n, c_n) = _run(call, args, kind="lstm")
    return output, h_n, c_n


def gru(call: Call, *args: Any) -> tuple[Tensor, Tensor]:
    """``torch.gru``: outputs and last hidden states."""
    output, (h_n,) = _run(call, args, kind="gru")
    return output, h_n


def lstm_cell(
    call: Call,
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch.lstm_cell``: one step; the next hidden state and cell."""
    group = [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    _, (h, c) = _layer(call.child("step"), "lstm", input, Layout((len(input),)), tuple(hx), group)
    return h, c


def gru_cell(
    call: Call,
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """Emulate ``torch.gru_cell``, one step: the next hidden state, shape ``(batch, hidden)``."""
    return _step(call, "gru", input, hx, w_ih, w_hh, b_ih, b_hh)


def rnn_tanh(call: Call, *args: Any) -> tuple[Tensor, Tensor]:
    """Emulate ``torch.rnn_tanh``: outputs and last hidden states, shapes as of ``torch.gru``."""
    output, (h_n,) = _run(call, args, kind="rnn_tanh")
    return output, h_n


def rnn_relu(call: Call, *args: Any) -> tuple[Tensor, Tensor]:
    """Emulate ``torch.rnn_relu``: outputs and last hidden states, shapes as of ``torch.gru``."""
    output, (h_n,) = _run(call, args, kind="rnn_relu")
    return output, h_n


def rnn_tanh_cell(call: Call, input: Tensor, hx: Tensor, *weights: Tensor | None) -> Tensor:
    """Emulate ``torch.rnn_tanh_cell``: the next hidden state, shape ``(batch, hidden)``."""
    return _step(call, "rnn_tanh", input, hx, *weights)


def rnn_relu_cell(call: Call, input: Tensor, hx: Tensor, *weights: Tensor | None) -> Tensor:
    """Emulate ``torch.rnn_relu_cell``: the next hidden state, shape ``(batch, hidden)``."""
    return _step(call, "rnn_relu", input, hx, *weights)


def _step(call: Call, kind: str, input: Tensor, hx: Tensor, *weights: Tensor | None) -> Tensor:
    """One step of a layer of elementary instructions."""
    group = [weight for weight in weights if weight is not None]
    _, (h,) = _layer(call.child("step"), kind, input, Layout((len(input),)), (hx,), group)
    return h


def _run(call: Call, args: tuple[Any, ...], *, kind: str) -> tuple[Tensor, States]:
    """Bring the sequences into rows, run the stack, and bring its output into their form."""
    if not isinstance(args[3], bool):  # Packed: the sizes of the steps come second.
        rows, sizes, hx, weights, has_biases, layers, dropout, train, two_ways = args
        layout = Layout(tuple(sizes.tolist()))
        settings = (weights, has_biases, layers, dropout if train else 0.0, two_ways)
        return _stack(call, kind, rows, layout, _states(hx), *settings)
    padded, hx, weights, has_biases, layers, dropout, train, two_ways, batch_first = args
    # A single sequence without a batch axis is a batch of one.
    batched = padded.dim() == 3
    data = padded if batched else padded.unsqueeze(1)
    turned = batch_first and batched
    data = data.transpose(0, 1) if turned else data
    layout = Layout((data.shape[1],) * data.shape[0])
    rows = call.viewed(data.reshape(-1, data.shape[-1]), padded)
    states = _states(hx)
    if not batched:
        states = tuple(call.viewed(state.unsqueeze(1), state) for state in states)
    settings = (weights, has_biases, layers, dropout if train else 0.0, two_ways)
    output, last = _stack(call, kind, rows, layout, states, *settings, batched=batched)
    shaped = output.reshape(len(layout.sizes), layout.batch, -1)
    if not batched:
        shaped = shaped.squeeze(1)
    elif turned:
        shaped = shaped.transpose(0, 1)
    return call.viewed(shaped, output), last


def undropped_recurrence(*args: Any, **kwargs: Any) -> Arguments | None:
    """Return the arguments of ``torch.lstm``, ``gru`` or ``rnn_*`` without dropout, if it has any.

    It follows the number of layers, one place earlier where sequences are padded.
    """
    place = 6 if isinstance(args[4], bool) else 5
    layers, dropout, training = args[place - 1 : place + 2]
    if not dropout or not training or layers < 2:
        return None
    return (*args[:place], 0.0, *args[place + 1 :]), kwargs


def _states(hx: Tensor | Sequence[Tensor]) -> States:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def _stack(
    call: Call,
    kind: str,
    rows: Tensor,
    layout: Layout,
    states: States,
    weights: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    two_ways: bool,
    batched: bool = True,
) -> tuple[Tensor, States]:
    """Run the layers one after the other; each and each direction has its own ranges."""
    directions = 2 if two_ways else 1
    count = len(weights) // (layers * directions)
    groups = [weights[first : first + count] for first in range(0, len(weights), count)]
    last: list[States] = []
    for layer in range(layers):
        ways = []
        for direction in range(directions):
            number = layer * directions + direction
            name = f"layer{layer}" + ("/reverse" if direction else "")
            ordered = call.viewed(layout.reversed(rows), rows) if direction else rows
            start = tuple(call.selected(state, number) for state in states)
            part = call.child(name)
            result, end = _layer(part, kind, ordered, layout, start, groups[number], has_biases)
            ways.append(call.viewed(layout.reversed(result), result) if direction else result)
            last.append(end)
        rows = concatenate(call.child(f"layer{layer}/join"), ways, 1) if two_ways else ways[0]
        if dropout and layer < layers - 1:
            rows = dropped(call, rows, dropout)
    return rows, tuple(_together(call, each, batched) for each in zip(*last, strict=True))


def _together(call: Call, states: States, batched: bool) -> Tensor:
    """Last states of all layers; where there are several, each is on a grid of its own."""
    result = torch.stack(states)
    result = result if batched else result.squeeze(1)
    if len(states) == 1:
        return call.viewed(result, states[0])
    call.state.set_row_qparams(result, [call.state.qparams_of(state) for state in states])
    return result


def _layer(
    call: Call,
    kind: str,
    rows: Tensor,
    layout: Layout,
    start: States,
    group: Sequence[Tensor],
    has_biases: bool | None = None,
) -> tuple[Tensor, States]:
    """One layer in one direction; its parameters are w_ih, w_hh, biases and a projection."""
    biased = len(group) == 4 if has_biases is None else has_biases
    if kind in _ELEMENTARY:
        return _ELEMENTARY[kind](call, rows, layout, start, group)
    projection = group[-1] if len(group) in (3, 5) else None
    if call.state.spec.lstm_form(projected=projection is not None) == "elementary":
        group = group[:4] if biased else group[:2]
        return elementary_lstm_layer(call, rows, layout, start, group, projection)
    bias = group[2] + group[3] if biased else None
    weights = Weights(group[0], group[1], bias, projection)
    # The kernel has 8 bits in and out on any accelerator.
    h_0, c_0 = start
    output, h_n, c_n = lstm_layer(replace(call, bits=8), rows, layout, h_0, c_0, weights)
    return output, (h_n, c_n)


_ELEMENTARY = {"gru": gru_layer, "rnn_tanh": tanh_layer, "rnn_relu": relu_layer}
_GATES = tuple(enumerate("ifgo"))
register_operator(
    Operator(
        "lstm",
        torch=("lstm",),
        emulate=lstm,
        without_dropout=undropped_recurrence,
        forms=(Form(("lstm_cell",), lstm_cell),),
        litert=(
            Kernel(
                "UNIDIRECTIONAL_SEQUENCE_LSTM",
                options="UnidirectionalSequenceLSTMOptions",
                operands={
                    **{1 + k: f"weight_ih/{gate}" for k, gate in _GATES},
                    **{5 + k: f"weight_hh/{gate}" for k, gate in _GATES},
                    **{12 + k: f"bias/{gate}" for k, gate in _GATES},
                    **{16: "weight_hr", 18: "h", 19: "c"},
                },
            ),
        ),
        has_weights=True,
        arithmetic="gates in Q3.12, a 16-bit cell state; 8 bits in and out on any accelerator; or, "
        "`elementary`, fully connected layers, sums, products, sigmoids and tanh in 16 bits",
    )
)
register_operator(
    Operator(
        "gru",
        torch=("gru",),
        emulate=gru,
        without_dropout=undropped_recurrence,
        forms=(Form(("gru_cell",), gru_cell),),
        has_weights=True,
        arithmetic="fully connected layers, sums, products, sigmoids and a tanh in 16 bits",
    )
)
register_operator(
    Operator(
        "rnn",
        torch=("rnn_tanh",),
        emulate=rnn_tanh,
        without_dropout=undropped_recurrence,
        forms=(
            Form(("rnn_relu",), rnn_relu, without_dropout=undropped_recurrence),
            Form(("rnn_tanh_cell",), rnn_tanh_cell),
            Form(("rnn_relu_cell",), rnn_relu_cell),
        ),
        has_weights=True,
        arithmetic="fully connected layers, a sum and tanh or ReLU in 16 bits",
    )
)
