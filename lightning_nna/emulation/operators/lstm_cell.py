r"""The integers of an LSTM layer, step after step, as the kernel of the runtime has them.

Whatever can be is done for all steps at once or before the first. The saturation of the gates'
inputs lies in their table, which goes on beyond 16 bits with its outermost values: the input part
comes as indices of that table, to which each step adds the recurrent part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.fixed_point import INT16_MAX, INT16_MIN
from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.arithmetic.rescaling import (
    Rescaler,
    RoundingKind,
    round_half_away,
    spills,
    wrap,
)
from lightning_nna.emulation.operators.call import stored_bytes
from lightning_nna.emulation.operators.linear import integer_bias
from lightning_nna.emulation.operators.lstm_kernels import (
    GATE_OUTPUT_SCALE,
    GATE_SCALE,
    LSTMKernel,
    cell_table,
    gate_table,
)
from lightning_nna.emulation.operators.sequences import Layout
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import QParams

# How far the table of a gate goes on beyond 16 bits on either side, and its length.
_MARGIN = 2**16
_TABLE = 2**16 + 2 * _MARGIN
# Index of a gate's input of zero, in the order i, f, g, o.
_SIGMOID_ZERO = _MARGIN + 2**15
_ZEROS = (_SIGMOID_ZERO, _SIGMOID_ZERO, _TABLE + _SIGMOID_ZERO, _SIGMOID_ZERO)
# Accumulators that are requantized at a time, so that they stay in the cache.
_BLOCK = 2**16


@dataclass(frozen=True)
class Grids:
    """Grids of one layer.

    Args:
        x: Input.
        h: Output and recurrent state.
        hidden: The state before a projection; ``h`` without one.
        cell_exponent: Exponent e of the cell's scale 2^e.
    """

    x: QParams
    h: QParams
    hidden: QParams
    cell_exponent: int


@dataclass
class Record:
    """Trace of a sequence, row by row; states have the initial ones in front.

    Args:
        gates: Outputs of the gates i, f, g, o in Q0.15: int16, ``(rows, 4 * hidden)``.
        c: Cells: int16, ``(batch + rows, hidden)``.
        tanh_c: Their tanh in Q0.15: int16, ``(rows, hidden)``.
        h: Outputs with their zero point: int8, ``(batch + rows, out)``.
        hidden: States before a projection with their zero point: int8, ``(rows, hidden)``.
        inside_input: Where the input part of a gate was not clipped; None if nowhere it was.
        inside_recurrent: The same of the recurrent part, which some kernels clip by itself.
        inside_gates: The same of the gates' whole inputs.
        inside_c: The same of the cells.
        inside_hidden: The same of the products of output gate and cell.
        inside_h: The same of projected outputs.
    """

    gates: Tensor
    c: Tensor
    tanh_c: Tensor
    h: Tensor
    hidden: Tensor | None = None
    inside_input: Tensor | None = None
    inside_recurrent: Tensor | None = None
    inside_gates: Tensor | None = None
    inside_c: Tensor | None = None
    inside_hidden: Tensor | None = None
    inside_h: Tensor | None = None


class LSTMCell:
    """The arithmetic of one layer.

    Args:
        w_ih: Input weights of the four gates, a scale each.
        w_hh: Recurrent weights.
        bias: Sum of both biases, shape ``(4 * hidden,)``, or None.
        grids: Grids of the layer.
        kernel: Kernel of the runtime.
        projection: Weights of the projection, one scale, or None.
        rounding: Of every requantization.
        bias_bits: Width of a bias.
        accumulator_limit: What the accumulator holds, 2^(bits - 1).
        overflowed: See :func:`.linear.overflowed`, without the call.
    """

    def __init__(
        self,
        w_ih: QuantizedWeight,
        w_hh: QuantizedWeight,
        bias: Tensor | None,
        grids: Grids,
        *,
        kernel: LSTMKernel,
        projection: QuantizedWeight | None,
        rounding: RoundingKind,
        bias_bits: int,
        accumulator_limit: float,
        overflowed: Callable[..., Tensor],
    ) -> None:
        self.w_ih, self.w_hh, self.projection, self.grids = w_ih, w_hh, projection, grids
        self.kernel = kernel
        self.size = w_hh.stored.shape[0] // 4
        self.cell_scale = 2.0**grids.cell_exponent
        biases = None
        if bias is not None:
            biases = integer_bias(bias, w_ih.scales.double() * grids.x.scale, bias_bits)
        self.input_product, self.product = w_ih.byte_product, w_hh.byte_product
        form = partial(
            _rescaler,
            kernel=kernel,
            rounding=rounding,
            limit=accumulator_limit,
            overflowed=overflowed,
        )
        self.of_input = form(w_ih, grids.x, GATE_SCALE, biases)
        self.of_recurrent = form(w_hh, grids.h, GATE_SCALE, None)
        # Whether a recurrent part may be saturated, or lead beyond the table; at its end nothing
        # changes any more, except for sums that do not fit into 32 bits.
        largest = float(self.of_recurrent.factors.max()) * self.of_recurrent.largest
        self.saturates = kernel.saturates_recurrent and largest >= INT16_MAX - 1
        self.far = largest >= _MARGIN - 1 and not kernel.saturates_recurrent
        if projection is not None:
            self.projection_product = projection.byte_product
            out = grids.h
            self.of_projection = form(
                projection, grids.hidden, out.scale, None, zero_point=out.zero_point
            )
        like = w_ih.scales.new_tensor
        gate, output = (
            like(scale, dtype=torch.float64) for scale in (GATE_OUTPUT_SCALE, grids.hidden.scale)
        )
        self.of_hidden = Rescaler(
            kernel.factor(gate, gate, output),
            rounding=rounding,
            largest=2.0**30,
            zero_point=grids.hidden.zero_point,
        )
        # Products of two gates: i g is in Q0.30, f c has the cell's scale. None leaves 16 bits.
        exponents = like([[-30 - grids.cell_exponent], [-15]], dtype=torch.int64)
        self.of_products = kernel.products(exponents, rounding)
        self.zeros = like(_ZEROS, dtype=torch.float64).repeat_interleave(self.size)

    @property
    def may_overflow(self) -> bool:
        """Tell whether sums may leave the accumulator, which is counted for a call's site."""
        of_projection = self.of_projection if self.projection is not None else None
        rescalers = (self.of_input, self.of_recurrent, of_projection)
        return any(each is not None and each.settle is not None for each in rescalers)

    def start(self, c: Tensor) -> Tensor:
        """Round cells, shape ``(rows, cells)``, to units of their scale as QUANTIZE does."""
        scaled = c.detach().float() / self.cell_scale
        return round_half_away(scaled).clamp_(INT16_MIN, INT16_MAX)

    def project(self, x: Activation) -> Tensor:
        """Input part of the gates' inputs for all steps, saturated, as indices of their table.

        Args:
            x: Shape ``(rows, in)``.

        Returns:
            int32, shape ``(rows, 4 * hidden)``.
        """
        sums = self.input_product(stored_bytes(x.value, x.qparams))
        index = sums if sums.dtype == torch.int32 else torch.empty_like(sums, dtype=torch.int32)
        rows = max(1, _BLOCK // sums.shape[1])
        for source, target in zip(sums.split(rows), index.split(rows), strict=True):
            gates = self.of_input(source.double())
            target.copy_(gates.clamp_(INT16_MIN, INT16_MAX).add_(self.zeros))
        return index

    def run(
        self, index: Tensor, h_0: Tensor, c_0: Tensor, layout: Layout, *, keep: bool = True
    ) -> Record:
        """All steps.

        Args:
            index: From :meth:`project`; the recurrent parts are added to it.
            h_0: Initial hidden states with their zero point, int8, ``(batch, out)``.
            c_0: Initial cells, whole numbers, ``(batch, hidden)``.
            layout: Of the rows.
            keep: Whether a backward needs the masks of what was not clipped.
        """
        inside_input = self._inside(index, 1) if keep else None
        rows, batch = layout.rows, layout.batch
        size, out = self.size, self.w_hh.stored.shape[1]
        record = Record(
            gates=index.new_empty((rows, 4 * size), dtype=torch.int16),
            c=index.new_empty((batch + rows, size), dtype=torch.int16),
            tanh_c=index.new_empty((rows, size), dtype=torch.int16),
            h=index.new_empty((batch + rows, out), dtype=torch.int8),
            inside_input=inside_input,
        )
        if self.saturates and keep:
            record.inside_recurrent = torch.empty_like(record.gates, dtype=torch.bool)
        record.h[:batch].copy_(h_0)
        record.c[:batch].copy_(c_0)
        # Before clipping.
        hidden = torch.empty_like(record.tanh_c, dtype=torch.int32)
        projected = None
        if self.projection is not None:
            record.hidden = torch.empty_like(record.tanh_c, dtype=torch.int8)
            projected = torch.empty_like(record.h[batch:], dtype=torch.int32)
        self._loop(index, record, hidden, projected, layout)
        if not keep:
            return record
        if record.inside_recurrent is not None and bool(record.inside_recurrent.all()):
            record.inside_recurrent = None
        record.inside_gates = self._inside(index, 0)
        record.inside_c = _between(record.c[batch:], INT16_MIN + 1, INT16_MAX - 1)
        record.inside_hidden = _between(hidden, self.grids.hidden.low, self.grids.hidden.high)
        if projected is not None:
            record.inside_h = _between(projected, self.grids.h.low, self.grids.h.high)
        return record

    def _loop(
        self,
        index: Tensor,
        record: Record,
        hidden: Tensor,
        projected: Tensor | None,
        layout: Layout,
    ) -> None:
        gates_of = gate_table(self.kernel, _MARGIN, index.device)
        tanh_of = cell_table(self.kernel, self.grids.cell_exponent, index.device)
        grid, sizes = self.grids.hidden, layout.sizes
        cells, states = (x.split((layout.batch, *sizes)) for x in (record.c, record.h))
        parts = [x.split(sizes) for x in (index, record.gates, record.tanh_c, hidden)]
        room = _Room(self, layout.batch)
        room.cells.copy_(record.c[: layout.batch])
        for step, (pre, gates, tanh_c, unclipped) in enumerate(zip(*parts, strict=True)):
            room = room.for_rows(sizes[step])
            before = states[step][: sizes[step]]
            room.sums.copy_(self.product(before, room.accumulator))
            recurrent = self.of_recurrent(room.sums)
            if self.saturates:
                recurrent.clamp_(INT16_MIN, INT16_MAX)
            if record.inside_recurrent is not None:
                inside = (recurrent > INT16_MIN) & (recurrent < INT16_MAX)
                record.inside_recurrent.split(sizes)[step].copy_(inside)
            if self.far:
                if self.of_recurrent.spills:
                    gates_in = pre - self.zeros
                    recurrent = wrap(recurrent + gates_in) - gates_in
                recurrent.clamp_(-_MARGIN, _MARGIN)
            pre.add_(room.recurrent.copy_(recurrent))
            torch.index_select(gates_of, 0, pre.view(-1), out=gates.view(-1))
            room.gates.copy_(gates)
            torch.mul(room.i_f, room.g_c, out=room.products)
            self.of_products(room.products)
            torch.add(room.new, room.retained, out=room.cells).clamp_(INT16_MIN, INT16_MAX)
            cells[step + 1].copy_(room.cells)
            room.cell_index.copy_(room.cells).add_(2**15)
            torch.index_select(tanh_of, 0, room.flat_cell_index, out=tanh_c.view(-1))
            room.hidden.copy_(tanh_c).mul_(room.o)
            self.of_hidden(room.hidden).add_(grid.zero_point)
            unclipped.copy_(room.hidden)
            room.hidden.clamp_(grid.low, grid.high)
            if record.hidden is None or projected is None:
                states[step + 1].copy_(room.hidden)
            else:
                rows = record.hidden.split(sizes)[step].copy_(room.hidden)
                self._project_hidden(rows, projected.split(sizes)[step], states[step + 1])

    def _project_hidden(self, hidden: Tensor, projected: Tensor, out: Tensor) -> None:
        grid = self.grids.h
        sums = self.of_projection(self.projection_product(hidden).double())
        projected.copy_(sums.add_(grid.zero_point))
        out.copy_(projected.clamp(grid.low, grid.high))

    def _inside(self, index: Tensor, margin: int) -> Tensor | None:
        """Mask of the gates' inputs inside their 16 bits by a margin; None if all are."""
        low, high = self.zeros + (INT16_MIN + margin), self.zeros + (INT16_MAX - margin)
        gates = index.view(-1, 4, self.size)
        first, last = gates.amin((0, 2)), gates.amax((0, 2))
        if bool(((first >= low[:: self.size]) & (last <= high[:: self.size])).all()):
            return None
        return (index >= low) & (index <= high)


class _Room:
    """Buffers of one step of a number of rows, allocated once, views included."""

    def __init__(self, cell: LSTMCell, rows: int) -> None:
        size, device = cell.size, cell.zeros.device
        wide = torch.empty(rows, 5, size, dtype=torch.float64, device=device)
        self.cell, self.rows = cell, rows
        self.accumulator = cell.product.empty(rows)
        self.sums = torch.empty(rows, 4 * size, dtype=torch.float64, device=device)
        self.recurrent = torch.empty(rows, 4 * size, dtype=torch.int32, device=device)
        # The gates i, f, g, o, and behind them the cell: i and f meet g and c in one product.
        self.gates, self.cells, self.o = wide.flatten(1)[:, : 4 * size], wide[:, 4], wide[:, 3]
        self.i_f, self.g_c = wide[:, 0:2], wide[:, 2:5:2]
        self.products = torch.empty(rows, 2, size, dtype=torch.float64, device=device)
        self.new, self.retained = self.products.unbind(1)
        self.cell_index = torch.empty(rows, size, dtype=torch.int32, device=device)
        self.flat_cell_index = self.cell_index.view(-1)
        self.hidden = torch.empty(rows, size, dtype=torch.float64, device=device)

    def for_rows(self, rows: int) -> _Room:
        """The same for the first sequences, where others have ended."""
        if rows == self.rows:
            return self
        room = _Room(self.cell, rows)
        room.cells.copy_(self.cells[:rows])
        return room


def _rescaler(
    weight: QuantizedWeight,
    x: QParams,
    scale: float,
    biases: Tensor | None,
    *,
    kernel: LSTMKernel,
    rounding: RoundingKind,
    limit: float,
    overflowed: Callable[..., Tensor],
    zero_point: int = 0,
) -> Rescaler:
    """From the accumulators of stored bytes to a scale."""
    like = weight.scales.new_tensor
    of_x, of_y = (like(s, dtype=torch.float64) for s in (x.scale, scale))
    factors = kernel.factor(weight.scales, of_x, of_y)
    offset = weight.row_sums * -x.zero_point
    largest = weight.largest_sum() * max(x.largest, 128)
    if biases is not None:
        offset += biases
        largest += float(biases.abs().max())
    settle, bound = None, min(largest, limit)
    if largest >= limit or spills(factors, rounding=rounding, largest=bound):
        settle = partial(
            overflowed, largest=largest, limit=limit, factors=factors, rounding=rounding
        )
    return Rescaler(
        factors,
        rounding=rounding,
        largest=bound,
        offset=offset,
        settle=settle,
        zero_point=zero_point,
    )


def _between(x: Tensor, low: int, high: int) -> Tensor | None:
    """Mask of the values in bounds; None if all are."""
    first, last = x.aminmax()
    if int(first) >= low and int(last) <= high:
        return None
    return (x >= low) & (x <= high)
