"""The instruction of an LSTM layer, in the form that every runtime with such a kernel reads.

It has 24 operands, of which some are absent, and five intermediates, which have quantization
parameters alone. LiteRT's kernel takes the parameters of the output from the last intermediate,
TFLite-Micro's from the hidden state: here they are the same. TFLite-Micro rejects intermediates
that have elements, and applies the fused activation to the cell gate; LiteRT reads neither.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.fixed_point import INT16_MAX, INT16_MIN
from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.linear import stored_bias
from lightning_nna.emulation.operators.lstm_cell import LSTMCell, Record
from lightning_nna.emulation.operators.sequences import Layout
from lightning_nna.emulation.program import Activation, Stored
from lightning_nna.emulation.ranges import QParams

# The schema's number of the function of the cell gate.
_TANH = 4


class Places(NamedTuple):
    """Tensors of the forward that a layer starts from and that it returns.

    Args:
        h_0: Initial hidden states, shape ``(batch, out)``.
        c_0: Initial cells, shape ``(batch, hidden)``.
        outputs: Outputs, shape ``(rows, out)``.
        c_n: Last cells, shape ``(batch, hidden)``.
    """

    h_0: Tensor
    c_0: Tensor
    outputs: Tensor
    c_n: Tensor


def record_layer(
    call: Call,
    x: Activation,
    cell: LSTMCell,
    bias: Tensor | None,
    record: Record,
    layout: Layout,
    at: Places,
) -> None:
    """Report a layer sequence by sequence of equal length, as the kernel takes them.

    Args:
        call: The layer's part of the call.
        x: Inputs, shape ``(rows, in)``.
        cell: Arithmetic of the layer.
        bias: Sum of both biases, shape ``(4 * hidden,)``, or None.
        record: Trace of the sequences.
        layout: Of the rows.
        at: Tensors of the forward.
    """
    grids, batch = cell.grids, layout.batch
    for length in sorted(set(layout.lengths)):
        members = [k for k, other in enumerate(layout.lengths) if other == length]
        starts = [sum(layout.sizes[:step]) for step in range(length)]
        rows = torch.tensor([[start + k for start in starts] for k in members])
        source = x.stored()
        last = rows[:, -1]
        inputs: list[Stored | None] = [None] * 24
        inputs[0] = _grid_like(source.integers[rows], x.qparams, source=x.value[rows])
        inputs[1:5], inputs[5:9] = _by_gate(cell.w_ih), _by_gate(cell.w_hh)
        scales = cell.w_ih.scales.double() * x.qparams.scale
        zero = torch.zeros(4 * cell.size)
        biases = stored_bias(zero if bias is None else bias, scales, call.state.spec, 8)
        each = zip(biases.integers.chunk(4), scales.chunk(4), strict=True)
        inputs[12:16] = [Stored(q, "int32", float(s[0]), constant=True) for q, s in each]
        if cell.projection is not None:
            weight = cell.projection
            scale = float(weight.scales[0])
            inputs[16] = Stored(weight.stored.long(), "int8", scale, constant=True)
        cell_grid = QParams(cell.cell_scale, 0, INT16_MIN, INT16_MAX)
        first_h, first_c = record.h[:batch][members], record.c[:batch][members]
        inputs[18] = _grid_like(first_h, grids.h, variable=True, source=at.h_0[members])
        inputs[19] = _grid_like(first_c, cell_grid, variable=True, source=at.c_0[members])
        hidden, cells = record.h[batch:], record.c[batch:]
        call.record(
            "UNIDIRECTIONAL_SEQUENCE_LSTM",
            inputs,
            [_grid_like(hidden[rows], grids.h, source=at.outputs[rows])],
            _intermediates(cell),
            new_state=[
                _grid_like(hidden[last], grids.h, source=at.outputs[last]),
                _grid_like(cells[last], cell_grid, source=at.c_n[members]),
            ],
            fusedActivationFunction=_TANH,
        )


def _by_gate(weight: QuantizedWeight) -> list[Stored | None]:
    parts = zip(weight.stored.long().chunk(4), weight.scales.chunk(4), strict=True)
    return [Stored(integers, "int8", float(scales[0]), constant=True) for integers, scales in parts]


def _grid_like(integers: Tensor, grid: QParams, **rest: Any) -> Stored:
    dtype = "int8" if grid.bits == 8 else "int16"
    return Stored(integers.long(), dtype, grid.scale, grid.zero_point, **rest)


def _intermediates(cell: LSTMCell) -> list[Stored]:
    """Five are demanded; LiteRT's kernel reads the last alone, the grid of the hidden state.

    Before a projection it takes its zero point with the opposite sign. They have no elements:
    TFLite-Micro takes no others.
    """
    none, hidden = torch.zeros(0, dtype=torch.int64), cell.grids.hidden
    zero_point = hidden.zero_point if cell.projection is None else -hidden.zero_point
    unread = [Stored(none, "int16", 2.0**-12) for _ in range(4)]
    return [*unread, Stored(none, "int8", hidden.scale, zero_point)]
