r"""Steps of recurrent layers in plain PyTorch, one kernel for all gates; see :mod:`.reference`.

A kernel takes the buffers of all steps and where its own rows begin, and writes to its own: what a
step launches is a matrix product and a kernel, and no copies. Buffers hold the rows of all steps,
step after step (see :class:`.sequences.Layout`); those of states have the ``batch`` initial ones in
front. A step reads and writes ``rows`` of them from ``first`` on, and the states before it from
``before`` on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.fixed_point import rounding_divide_by_power_of_two
from lightning_nna.emulation.kernels.reference import DOUBLE, accumulated, lowest, rescaled

_MIN, _MAX = -(2**15), 2**15 - 1
# Gates, of both kinds of numbers, are in Q0.15.
_GATE_SCALE = 2.0**-15
#: Bits of the flags of a gate: where its input, the recurrent part and the input part of that, and
#: the product of the output gate were not clipped.
GATE, RECURRENT, INPUT, HIDDEN = 1, 2, 4, 8


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
    here, batch, size = slice(first, first + rows), len(cells) - len(outputs), cells.shape[1]
    total = accumulated(sums[:rows].long() + offset.long(), accumulator_bits, saturates)
    recurrent, own = rescaled(total, factors, rounding, 0, False), inputs[here].long()
    inside = 4 * ((own > _MIN) & (own < _MAX)).long()
    if saturates_recurrent:
        recurrent = recurrent.clamp(_MIN, _MAX)
        inside += 2 * ((recurrent > _MIN) & (recurrent < _MAX)).long()
    else:
        inside += 2
    gate_inputs = own + recurrent
    if rounding == DOUBLE:
        gate_inputs = lowest(gate_inputs, 32)
    inside += ((gate_inputs >= _MIN) & (gate_inputs <= _MAX)).long()
    index = (gate_inputs.clamp(_MIN, _MAX) - _MIN).view(rows, 4, size)
    # Behind the table of the sigmoid is that of the tanh.
    index[:, 2] += 2**16
    values = gate_table.index_select(0, index.flatten()).long().view(rows, 4, size)
    i, f, g, o = values.unbind(1)
    c_before = cells[before : before + rows].long()
    products, exponents = (i * g, f * c_before), (-30 - cell_exponent, -15)
    new, retained = (
        _rounded_product(product, exponent, rounding, divides)
        for product, exponent in zip(products, exponents, strict=True)
    )
    c = (new + retained).clamp(_MIN, _MAX)
    tanh_c = cell_table.index_select(0, (c - _MIN).flatten()).long().view(rows, size)
    factor = factors.new_full((), hidden_factor)
    hidden = rescaled(tanh_c * o, factor, rounding, zero_point, False) + zero_point
    inside.view(rows, 4, size)[:, 3] += 8 * ((hidden >= low) & (hidden <= high)).long()
    h = hidden.clamp(low, high)
    state[:rows].copy_(h)
    outputs[here].copy_((h - zero_point).float().mul(scale))
    gates[here].copy_(values.view(rows, 4 * size))
    cells[batch + first : batch + first + rows].copy_(c)
    tanh_cells[here].copy_(tanh_c)
    flags[here].copy_(inside)


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
    here, batch, size = slice(first, first + rows), len(cells) - len(grad), cells.shape[1]
    values = gates[here].float().mul(_GATE_SCALE).view(rows, 4, size)
    i, f, g, o = values.unbind(1)
    tanh_c = tanh_cells[here].float().mul(_GATE_SCALE)
    inside = flags[here].view(rows, 4, size)
    c = cells[batch + first : batch + first + rows]
    inside_c = ((c > _MIN) & (c < _MAX)).float()
    inside_hidden = _flag(inside[:, 3], HIDDEN)
    c_before = cells[before : before + rows].float().mul(2.0**cell_exponent)
    # With y = 0.75, the slope of a sigmoid is 0.75 - 0.75 * 0.75 = 0.1875.
    slopes = torch.addcmul(values, values, values, value=-1.0)
    slopes[:, 2] = torch.addcmul(torch.ones_like(g), g, g, value=-1.0)
    slopes *= _flag(inside, GATE)
    meets = torch.stack(
        [g * inside_c, c_before * inside_c, i * inside_c, tanh_c * inside_hidden], 1
    )
    slopes *= meets
    d_h = d_state[:rows] + grad[here]
    through_h = o * (1 - tanh_c.square()) * inside_hidden
    d_c = torch.addcmul(d_cell[:rows], d_h, through_h)
    d_gates = slopes * torch.stack([d_c, d_c, d_c, d_h], 1)
    d_cell[:rows].copy_(d_c * (f * inside_c))
    d_input[here].copy_((d_gates * _flag(inside, INPUT)).view(rows, 4 * size))
    d_recurrent[here].copy_((d_gates * _flag(inside, RECURRENT)).view(rows, 4 * size))


def _flag(flags: Tensor, bit: int) -> Tensor:
    """1 where a bit is set, else 0, float32."""
    return ((flags & bit) > 0).float()


def _rounded_product(x: Tensor, exponent: int, rounding: int, divides: bool) -> Tensor:
    """Products times a power of two, divided or by the multiplier."""
    if divides:
        return rounding_divide_by_power_of_two(x, -exponent)
    return rescaled(x, torch.full_like(x, 2.0**exponent, dtype=torch.float64), rounding, 0, False)


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
    here, batch = slice(first, first + rows), len(states) - len(outputs)
    (_, parts, size), f = state.shape, factors.unbind(0)
    of_parts = sums.view(batch, parts, 3 * size)[:rows].long()
    total = of_parts[:, 0] if parts == 1 else 256 * of_parts[:, 0] + of_parts[:, 1]
    total = accumulated(total + offset.long(), accumulator_bits, saturates)
    recurrent = rescaled(total, state_factors, state_rounding, 0, False)
    inside = [_inside(part) for part in recurrent.split(size, 1)]
    gates_h, new_h = recurrent.clamp(_MIN, _MAX).split([2 * size, size], 1)
    gates_x, new_x = inputs[here].long().split([2 * size, size], 1)
    gate_inputs = _sum(gates_x, gates_h, f[0:3], rounding, 1)
    inside += [_inside(part) for part in gate_inputs.split(size, 1)]
    r, z = _entries(sigmoid, gate_inputs).split(size, 1)
    reset = rescaled(r * new_h, f[3], rounding, 0, False)
    new_inputs = _sum(new_x, reset.clamp(_MIN, _MAX), f[4:7], rounding, 1)
    n = _entries(tanh, new_inputs)
    change = _sum(states[before : before + rows].long(), n, f[7:10], rounding, -1)
    update = rescaled(z * change.clamp(_MIN, _MAX), f[10], rounding, 0, False)
    following = _sum(n, update.clamp(_MIN, _MAX), f[11:14], rounding, 1)
    inside += [_inside(each) for each in (reset, new_inputs, change, update, following)]
    flags = sum(each.long() << bit for bit, each in enumerate(inside))
    h = following.clamp(_MIN, _MAX)
    if parts == 1:
        state[:rows, 0].copy_(h)
    else:  # 1000 is 3 * 256 + 104 + 128.
        state[:rows, 0].copy_(h >> 8)
        state[:rows, 1].copy_((h & 255) - 128)
    states[batch + first : batch + first + rows].copy_(h)
    outputs[here].copy_(h.float().mul(scale))
    parts_of_trace = (r, z, n, new_h, change.clamp(_MIN, _MAX), flags)
    trace[here].copy_(torch.cat([x for x in parts_of_trace if isinstance(x, Tensor)], 1))


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
    here, size = slice(first, first + rows), d_change.shape[1]
    *integers, flags = trace[here].split(size, 1)
    scales = (*[_GATE_SCALE] * 3, recurrent_scale, change_scale)
    r, z, n, new_h, change = (
        each.float().mul(scale) for each, scale in zip(integers, scales, strict=True)
    )
    in_r, in_z, in_n, in_gate_r, in_gate_z, in_reset, in_new, in_change, in_update, in_next = (
        _flag(flags, 1 << bit) for bit in range(10)
    )
    d_h = (grad[here] + (d_change[:rows] + d_product[:rows])) * in_next
    d_update = d_h * in_update
    d_of_change = d_update * z * in_change
    d_new = torch.ops.aten.tanh_backward(d_h - d_of_change, n) * in_new
    d_reset = d_new * in_reset
    d_r = torch.ops.aten.sigmoid_backward(d_reset * new_h, r) * in_gate_r
    d_z = torch.ops.aten.sigmoid_backward(d_update * change, z) * in_gate_z
    d_change[:rows].copy_(d_of_change)
    d_x[here].copy_(torch.cat([d_r, d_z, d_new], 1))
    d_recurrent[here].copy_(torch.cat([d_r * in_r, d_z * in_z, d_reset * r * in_n], 1))


def _sum(a: Tensor, b: Tensor, factors: tuple[Tensor, ...], rounding: int, sign: int) -> Tensor:
    """A sum or a difference of 16-bit integers, each rescaled to fine steps and then the result."""
    first, second = (
        rescaled(x << 15, factor, rounding, 0, False)
        for x, factor in zip((a, b), factors[:2], strict=True)
    )
    return rescaled(first + sign * second, factors[2], rounding, 0, False)


def _inside(x: Tensor) -> Tensor:
    return (x >= _MIN) & (x <= _MAX)


def _entries(table: Tensor, x: Tensor) -> Tensor:
    """Entries of a table for integers that are clipped to 16 bits."""
    index = x.clamp(_MIN, _MAX) - _MIN
    return table.index_select(0, index.flatten()).long().view(x.shape)
