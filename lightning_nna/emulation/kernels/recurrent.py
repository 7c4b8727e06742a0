"""Steps of recurrent layers as operators of PyTorch: one kernel for all gates; see definitions.

Buffers hold the rows of all steps, step after step (see :class:`.sequences.Layout`); those of
states have the ``batch`` initial ones in front. A step reads and writes ``rows`` of them from
``first`` on, and the states before it from ``before`` on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nna.emulation.kernels import recurrent_reference
from lightning_nna.emulation.kernels.library import define

_SCHEMAS = (
    "lstm_step(Tensor sums, Tensor inputs, Tensor factors, Tensor offset, Tensor gate_table, "
    "Tensor cell_table, Tensor(a!) state, Tensor(b!) outputs, Tensor(c!) gates, Tensor(d!) cells, "
    "Tensor(e!) tanh_cells, Tensor(f!) flags, int first, int before, int rows, int rounding, "
    "int accumulator_bits, bool saturates, bool saturates_recurrent, bool divides, "
    "int cell_exponent, float hidden_factor, int zero_point, int low, int high, float scale) -> ()",
    "lstm_step_backward(Tensor grad, Tensor d_state, Tensor(a!) d_cell, Tensor gates, "
    "Tensor cells, Tensor tanh_cells, Tensor flags, Tensor(b!) d_input, Tensor(c!) d_recurrent, "
    "int first, int before, int rows, int cell_exponent) -> ()",
    "gru_step(Tensor sums, Tensor inputs, Tensor state_factors, Tensor offset, Tensor factors, "
    "Tensor sigmoid, Tensor tanh, Tensor(a!) state, Tensor(b!) states, Tensor(c!) outputs, "
    "Tensor(d!) trace, int first, int before, int rows, int state_rounding, int rounding, "
    "int accumulator_bits, bool saturates, float scale) -> ()",
    "gru_step_backward(Tensor grad, Tensor d_product, Tensor(a!) d_change, Tensor trace, "
    "Tensor(b!) d_x, Tensor(c!) d_recurrent, int first, int rows, float recurrent_scale, "
    "float change_scale) -> ()",
)


def lstm_step(
    sums: Tensor,
    inputs: Tensor,
    factors: Tensor,
    offset: Tensor,
    gate_table: Tensor,
    cell_table: Tensor,
    state: Tensor,
    outputs: Tensor,
    gates: Tensor,
    cells: Tensor,
    tanh_cells: Tensor,
    flags: Tensor,
    first: int,
    before: int,
    rows: int,
    rounding: int,
    accumulator_bits: int,
    saturates: bool,
    saturates_recurrent: bool,
    divides: bool,
    cell_exponent: int,
    hidden_factor: float,
    zero_point: int,
    low: int,
    high: int,
    scale: float,
) -> None:
    """Run a step of the LSTM kernel behind its recurrent product; see :mod:`.lstm_cell`.

    Args:
        sums: Products of stored states and recurrent weight, whole numbers, float32 or float64,
            shape ``(batch, 4 * hidden)``, gates i, f, g, o.
        inputs: Input parts of the gates' inputs in Q3.12, saturated to 16 bits, float32, shape
            ``(all rows, 4 * hidden)``.
        factors: Factors from sums to Q3.12, float64, shape ``(4 * hidden,)``.
        offset: Numbers added to the sums for the zero point, float64, shape ``(4 * hidden,)``.
        gate_table: Sigmoid and, behind it, tanh of all 16-bit numbers, int16, ``(2 * 65536,)``.
        cell_table: Tanh of all cells, int16, ``(65536,)``.
        state: Receives the next stored states, of the dtype of ``sums``, ``(batch, hidden)``.
        outputs: Receives real values of the states, float32, ``(all rows, hidden)``.
        gates: Receives outputs of the gates in Q0.15, int16, ``(all rows, 4 * hidden)``.
        cells: Has the cells before and receives those after, int16, ``(batch + all rows, hidden)``.
        tanh_cells: Receives the tanh of the cells in Q0.15, int16, ``(all rows, hidden)``.
        flags: Receives what was not clipped, uint8, ``(all rows, 4 * hidden)``.
        first: First row of the step.
        before: Row of the first cell before.
        rows: Number of rows.
        rounding: Number of the rounding of the multipliers, see :data:`.definitions.ROUNDINGS`.
        accumulator_bits: Width of the accumulator, at most 32.
        saturates: Whether a sum beyond that width saturates; otherwise it wraps.
        saturates_recurrent: Whether the recurrent part saturates to 16 bits by itself.
        divides: Whether products of two gates are divided, ties away from zero, and not multiplied.
        cell_exponent: Exponent of the scale of the cells.
        hidden_factor: Factor from Q0.30 to the scale of the states.
        zero_point: Zero point of the states.
        low: Smallest stored state.
        high: Largest stored state.
        scale: Scale of the states.
    """
    torch.ops.lightning_nna.lstm_step.default(
        sums,
        inputs,
        factors,
        offset,
        gate_table,
        cell_table,
        state,
        outputs,
        gates,
        cells,
        tanh_cells,
        flags,
        first,
        before,
        rows,
        rounding,
        accumulator_bits,
        saturates,
        saturates_recurrent,
        divides,
        cell_exponent,
        hidden_factor,
        zero_point,
        low,
        high,
        scale,
    )


def lstm_step_backward(
    grad: Tensor,
    d_state: Tensor,
    d_cell: Tensor,
    gates: Tensor,
    cells: Tensor,
    tanh_cells: Tensor,
    flags: Tensor,
    d_input: Tensor,
    d_recurrent: Tensor,
    first: int,
    before: int,
    rows: int,
    cell_exponent: int,
) -> None:
    """Run the backward of a step before the product with the recurrent weight.

    Args:
        grad: Gradient of the outputs, float32, contiguous, shape ``(all rows, hidden)``.
        d_state: Gradient of the states from later steps, float32, ``(batch, hidden)``.
        d_cell: Gradient of the cells; becomes that of the cells before, float32,
            ``(batch, hidden)``.
        gates: See :func:`lstm_step`, as the next three.
        cells: Shape ``(batch + all rows, hidden)``.
        tanh_cells: Shape ``(all rows, hidden)``.
        flags: Shape ``(all rows, 4 * hidden)``.
        d_input: Receives the gradient of the input parts, float32, ``(all rows, 4 * hidden)``.
        d_recurrent: Receives that of the recurrent parts, of the same shape.
        first: First row of the step.
        before: Row of the first cell before.
        rows: Number of rows.
        cell_exponent: Exponent of the scale of the cells.
    """
    torch.ops.lightning_nna.lstm_step_backward.default(
        grad,
        d_state,
        d_cell,
        gates,
        cells,
        tanh_cells,
        flags,
        d_input,
        d_recurrent,
        first,
        before,
        rows,
        cell_exponent,
    )


def gru_step(
    sums: Tensor,
    inputs: Tensor,
    state_factors: Tensor,
    offset: Tensor,
    factors: Tensor,
    sigmoid: Tensor,
    tanh: Tensor,
    state: Tensor,
    states: Tensor,
    outputs: Tensor,
    trace: Tensor,
    first: int,
    before: int,
    rows: int,
    state_rounding: int,
    rounding: int,
    accumulator_bits: int,
    saturates: bool,
    scale: float,
) -> None:
    """Run the instructions of a step of a GRU behind its state product; see :mod:`.gru_sequence`.

    Args:
        sums: Products of states and recurrent weight, whole numbers, float32 or float64, shape
            ``(batch * parts, 3 * hidden)``, gates r, z, n.
        inputs: Input products, integers of 16 bits, float32, shape ``(all rows, 3 * hidden)``.
        state_factors: Factors from sums to the state product, float64, shape ``(3 * hidden,)``.
        offset: Numbers added to the sums, float64, shape ``(3 * hidden,)``.
        factors: Factors of the other instructions, float64, shape ``(14,)``: of both operands and
            of the result of the gates' sum, of the reset gate's product, of the new state's sum, of
            the difference, of the update gate's product and of the last sum.
        sigmoid: Sigmoid of the gates' inputs, int16, shape ``(65536,)``.
        tanh: Tanh of the new state's inputs, int16, shape ``(65536,)``.
        state: Receives what the next product takes, of the dtype of ``sums``, shape
            ``(batch, parts, hidden)``: integers, or with two parts their upper bytes and their
            lower ones less 128.
        states: Has the integers of the states before and receives those after, int16,
            ``(batch + all rows, hidden)``.
        outputs: Receives real values of the states, float32, ``(all rows, hidden)``.
        trace: Receives what the backward needs, int16, shape ``(all rows, 6 * hidden)``: r, z, n,
            the state product of n, the difference, and a bit for each result that was not clipped.
        first: First row of the step.
        before: Row of the first state before.
        rows: Number of rows.
        state_rounding: Number of the rounding of the state product, see
            :data:`.definitions.ROUNDINGS`.
        rounding: Number of the rounding of the other instructions.
        accumulator_bits: Width of the accumulator of the state product.
        saturates: Whether a sum beyond that width saturates; otherwise it wraps.
        scale: Scale of the states.
    """
    torch.ops.lightning_nna.gru_step.default(
        sums,
        inputs,
        state_factors,
        offset,
        factors,
        sigmoid,
        tanh,
        state,
        states,
        outputs,
        trace,
        first,
        before,
        rows,
        state_rounding,
        rounding,
        accumulator_bits,
        saturates,
        scale,
    )


def gru_step_backward(
    grad: Tensor,
    d_product: Tensor,
    d_change: Tensor,
    trace: Tensor,
    d_x: Tensor,
    d_recurrent: Tensor,
    first: int,
    rows: int,
    recurrent_scale: float,
    change_scale: float,
) -> None:
    """Run the backward of a step before the product with the recurrent weight.

    Args:
        grad: Gradient of the outputs, float32, contiguous, shape ``(all rows, hidden)``.
        d_product: Gradient of the states from the later step's product, float32,
            ``(batch, hidden)``.
        d_change: Gradient of the states from the later step's difference; becomes that of the
            states before, float32, ``(batch, hidden)``.
        trace: See :func:`gru_step`, shape ``(all rows, 6 * hidden)``.
        d_x: Receives the gradient of the input products, float32, ``(all rows, 3 * hidden)``.
        d_recurrent: Receives that of the state products, of the same shape.
        first: First row of the step.
        rows: Number of rows.
        recurrent_scale: Scale of the state product.
        change_scale: Scale of the difference.
    """
    torch.ops.lightning_nna.gru_step_backward.default(
        grad,
        d_product,
        d_change,
        trace,
        d_x,
        d_recurrent,
        first,
        rows,
        recurrent_scale,
        change_scale,
    )


for _schema in _SCHEMAS:
    define(_schema, recurrent_reference, "triton_recurrent")
