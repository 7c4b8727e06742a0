"""Steps of recurrent layers in Triton, equal in every bit to :mod:`.recurrent_reference`.

A program has some units of the layer in some sequences, with all their gates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_nna.emulation.kernels.triton_kernels import accumulated, divided, lowest, rescaled

_BLOCK = 256


@triton.jit
def _clipped_to_16_bits(x):
    return tl.minimum(tl.maximum(x, -32768), 32767)


@triton.jit
def _fused_multiply_add(a, b, c):
    """Return a b + c of float32, rounded once, as instructions of processors do.

    The product is exact in float64. Where the sum is not, it is rounded to an odd number, of which
    float32 makes what it would of the exact sum: no odd number of 53 bits is a tie of 24.
    """
    product = a.to(tl.float64) * b.to(tl.float64)
    wide = c.to(tl.float64)
    total = product + wide
    part = total - product
    lost = (product - (total - part)) + (wide - part)
    bits = total.to(tl.int64, bitcast=True)
    # Away from zero if what was lost has the sign of the sum; a sum that is no number stays.
    step = tl.where((lost > 0) == (total > 0), 1, -1)
    is_even = ((bits & 1) == 0) & (tl.abs(lost) > 0)
    bits = bits + tl.where(is_even, step, 0)
    return bits.to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _gate(
    sums,
    inputs,
    factors,
    offset,
    gate_table,
    gates,
    row,
    unit,
    first,
    size,
    inside,
    NUMBER: tl.constexpr,
    TABLE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ACCUMULATOR_BITS: tl.constexpr,
    SATURATES: tl.constexpr,
    SATURATES_RECURRENT: tl.constexpr,
):
    """Return the output of a gate, int64, and its flags."""
    column = NUMBER * size + unit
    here = (first + row) * (4 * size) + column
    x = tl.load(sums + row * (4 * size) + column, mask=inside, other=0).to(tl.int64)
    x = x + tl.load(offset + column, mask=inside, other=0).to(tl.int64)
    factor = tl.load(factors + column, mask=inside, other=1.0)
    recurrent = rescaled(accumulated(x, ACCUMULATOR_BITS, SATURATES), factor, 0, ROUNDING, False)
    own = tl.load(inputs + here, mask=inside, other=0).to(tl.int64)
    flags = 4 * ((own > -32768) & (own < 32767)).to(tl.int32)
    if SATURATES_RECURRENT:
        recurrent = _clipped_to_16_bits(recurrent)
        flags += 2 * ((recurrent > -32768) & (recurrent < 32767)).to(tl.int32)
    else:
        flags += 2
    total = own + recurrent
    if ROUNDING == 1:
        total = lowest(total, 32)
    flags += ((total >= -32768) & (total <= 32767)).to(tl.int32)
    index = _clipped_to_16_bits(total) + (TABLE * 65536 + 32768)
    value = tl.load(gate_table + index, mask=inside, other=0)
    tl.store(gates + here, value, mask=inside)
    return value.to(tl.int64), flags


@triton.jit
def _rounded_product(
    x, EXPONENT: tl.constexpr, FACTOR: tl.constexpr, ROUNDING: tl.constexpr, DIVIDES: tl.constexpr
):
    if DIVIDES:
        result = divided(x, tl.full(x.shape, -EXPONENT, tl.int64))
    else:
        result = rescaled(x, tl.full(x.shape, FACTOR, tl.float64), 0, ROUNDING, False)
    return result


@triton.jit(do_not_specialize=["first", "before", "after", "rows", "zero_point", "low", "high"])
def _lstm_step_kernel(
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
    after,
    rows,
    size,
    hidden_factor: tl.float64,
    zero_point,
    low,
    high,
    scale: tl.float32,
    ROUNDING: tl.constexpr,
    ACCUMULATOR_BITS: tl.constexpr,
    SATURATES: tl.constexpr,
    SATURATES_RECURRENT: tl.constexpr,
    DIVIDES: tl.constexpr,
    NEW_EXPONENT: tl.constexpr,
    NEW_FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows * size
    row, unit = at // size, at % size
    i, flags_i = _gate(
        *(sums, inputs, factors, offset, gate_table, gates, row, unit, first, size, inside),
        *(0, 0, ROUNDING, ACCUMULATOR_BITS, SATURATES, SATURATES_RECURRENT),
    )
    f, flags_f = _gate(
        *(sums, inputs, factors, offset, gate_table, gates, row, unit, first, size, inside),
        *(1, 0, ROUNDING, ACCUMULATOR_BITS, SATURATES, SATURATES_RECURRENT),
    )
    g, flags_g = _gate(
        *(sums, inputs, factors, offset, gate_table, gates, row, unit, first, size, inside),
        *(2, 1, ROUNDING, ACCUMULATOR_BITS, SATURATES, SATURATES_RECURRENT),
    )
    o, flags_o = _gate(
        *(sums, inputs, factors, offset, gate_table, gates, row, unit, first, size, inside),
        *(3, 0, ROUNDING, ACCUMULATOR_BITS, SATURATES, SATURATES_RECURRENT),
    )
    c = tl.load(cells + (before + row) * size + unit, mask=inside, other=0).to(tl.int64)
    new = _rounded_product(i * g, NEW_EXPONENT, NEW_FACTOR, ROUNDING, DIVIDES)
    retained = _rounded_product(f * c, -15, 0.000030517578125, ROUNDING, DIVIDES)
    c = _clipped_to_16_bits(new + retained)
    tanh_c = tl.load(cell_table + c + 32768, mask=inside, other=0)
    factor = tl.full((BLOCK,), hidden_factor, tl.float64)
    product = tanh_c.to(tl.int64) * o
    hidden = rescaled(product, factor, zero_point, ROUNDING, False) + zero_point
    flags_o += 8 * ((hidden >= low) & (hidden <= high)).to(tl.int32)
    h = tl.minimum(tl.maximum(hidden, low), high)
    here = (first + row) * size + unit
    tl.store(state + at, h.to(state.dtype.element_ty), mask=inside)
    tl.store(outputs + here, (h - zero_point).to(tl.float32) * scale, mask=inside)
    tl.store(cells + (after + row) * size + unit, c.to(tl.int16), mask=inside)
    tl.store(tanh_cells + here, tanh_c, mask=inside)
    of_gates = flags + (first + row) * (4 * size) + unit
    tl.store(of_gates, flags_i.to(tl.uint8), mask=inside)
    tl.store(of_gates + size, flags_f.to(tl.uint8), mask=inside)
    tl.store(of_gates + 2 * size, flags_g.to(tl.uint8), mask=inside)
    tl.store(of_gates + 3 * size, flags_o.to(tl.uint8), mask=inside)


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
    block: int = _BLOCK,
) -> None:
    """Run a step of an LSTM, shapes as in :func:`.recurrent_reference.lstm_step`."""
    size = cells.shape[1]
    with torch.cuda.device_of(sums):
        _lstm_step_kernel[(triton.cdiv(rows * size, block),)](
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
            len(cells) - len(outputs) + first,
            rows,
            size,
            hidden_factor,
            zero_point,
            low,
            high,
            scale,
            ROUNDING=rounding,
            ACCUMULATOR_BITS=accumulator_bits,
            SATURATES=saturates,
            SATURATES_RECURRENT=saturates_recurrent,
            DIVIDES=divides,
            NEW_EXPONENT=-30 - cell_exponent,
            NEW_FACTOR=2.0 ** (-30 - cell_exponent),
            BLOCK=block,
            enable_fp_fusion=False,
        )


@triton.jit
def _gate_backward(
    flags,
    d_input,
    d_recurrent,
    here,
    inside,
    slope,
    meets,
    passed,
):
    """Write the gradients of a gate's input and recurrent part."""
    own = tl.load(flags + here, mask=inside, other=0).to(tl.int32)
    d_gate = slope * (own & 1).to(tl.float32) * meets * passed
    tl.store(d_input + here, d_gate * ((own >> 2) & 1).to(tl.float32), mask=inside)
    tl.store(d_recurrent + here, d_gate * ((own >> 1) & 1).to(tl.float32), mask=inside)


@triton.jit
def _sigmoid_slope(y):
    """Return y - y^2 of Q0.15, rounded once: 24576 (0.75) has (2^15 - 24576) 24576 2^-30."""
    return (y * (32768 - y)).to(tl.float32) * 9.313225746154785e-10


@triton.jit(do_not_specialize=["first", "before", "after", "rows"])
def _lstm_step_backward_kernel(
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
    after,
    rows,
    size,
    cell_scale: tl.float32,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows * size
    row, unit = at // size, at % size
    here = (first + row) * size + unit
    of_gates = (first + row) * (4 * size) + unit
    k_i = tl.load(gates + of_gates, mask=inside, other=0).to(tl.int32)
    k_f = tl.load(gates + of_gates + size, mask=inside, other=0).to(tl.int32)
    k_g = tl.load(gates + of_gates + 2 * size, mask=inside, other=0).to(tl.int32)
    k_o = tl.load(gates + of_gates + 3 * size, mask=inside, other=0).to(tl.int32)
    i, f = k_i.to(tl.float32) * 0.000030517578125, k_f.to(tl.float32) * 0.000030517578125
    g, o = k_g.to(tl.float32) * 0.000030517578125, k_o.to(tl.float32) * 0.000030517578125
    k_t = tl.load(tanh_cells + here, mask=inside, other=0)
    tanh_c = k_t.to(tl.float32) * 0.000030517578125
    c = tl.load(cells + (after + row) * size + unit, mask=inside, other=0).to(tl.int32)
    inside_c = ((c > -32768) & (c < 32767)).to(tl.float32)
    flags_o = tl.load(flags + of_gates + 3 * size, mask=inside, other=0).to(tl.int32)
    inside_hidden = ((flags_o >> 3) & 1).to(tl.float32)
    c_before = tl.load(cells + (before + row) * size + unit, mask=inside, other=0)
    c_before = c_before.to(tl.float32) * cell_scale
    d_h = tl.load(d_state + at, mask=inside, other=0.0)
    d_h = d_h + tl.load(grad + here, mask=inside, other=0.0)
    through_h = o * (1.0 - tanh_c * tanh_c) * inside_hidden
    d_c = _fused_multiply_add(d_h, through_h, tl.load(d_cell + at, mask=inside, other=0.0))
    slope_g = (1073741824 - k_g * k_g).to(tl.float32) * 9.313225746154785e-10
    _gate_backward(
        *(flags, d_input, d_recurrent, of_gates, inside),
        *(_sigmoid_slope(k_i), g * inside_c, d_c),
    )
    _gate_backward(
        *(flags, d_input, d_recurrent, of_gates + size, inside),
        *(_sigmoid_slope(k_f), c_before * inside_c, d_c),
    )
    _gate_backward(
        *(flags, d_input, d_recurrent, of_gates + 2 * size, inside),
        *(slope_g, i * inside_c, d_c),
    )
    _gate_backward(
        *(flags, d_input, d_recurrent, of_gates + 3 * size, inside),
        *(_sigmoid_slope(k_o), tanh_c * inside_hidden, d_h),
    )
    tl.store(d_cell + at, d_c * (f * inside_c), mask=inside)


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
    block: int = _BLOCK,
) -> None:
    """Run the backward of a step, shapes as in :func:`.recurrent_reference.lstm_step_backward`."""
    size = cells.shape[1]
    with torch.cuda.device_of(grad):
        _lstm_step_backward_kernel[(triton.cdiv(rows * size, block),)](
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
            len(cells) - len(grad) + first,
            rows,
            size,
            2.0**cell_exponent,
            BLOCK=block,
            enable_fp_fusion=False,
        )


@triton.jit
def _inside(x, BIT: tl.constexpr):
    """Return a bit that is set where a result is in 16 bits."""
    return ((x >= -32768) & (x <= 32767)).to(tl.int32) << BIT


@triton.jit
def _rescaled_by(x, factors, NUMBER: tl.constexpr, ROUNDING: tl.constexpr):
    """Rescale by one factor of a vector of them."""
    factor = tl.full(x.shape, tl.load(factors + NUMBER), tl.float64)
    return rescaled(x, factor, 0, ROUNDING, False)


@triton.jit
def _sum(a, b, factors, NUMBER: tl.constexpr, SIGN: tl.constexpr, ROUNDING: tl.constexpr):
    """Return a sum or a difference of 16-bit integers, at fine steps and then the result's."""
    first = _rescaled_by(a << 15, factors, NUMBER, ROUNDING)
    second = _rescaled_by(b << 15, factors, NUMBER + 1, ROUNDING)
    return _rescaled_by(first + SIGN * second, factors, NUMBER + 2, ROUNDING)


@triton.jit
def _state_product(
    sums,
    state_factors,
    offset,
    row,
    column,
    size,
    inside,
    PARTS: tl.constexpr,
    ROUNDING: tl.constexpr,
    ACCUMULATOR_BITS: tl.constexpr,
    SATURATES: tl.constexpr,
):
    """Return the state product of a gate, not clipped."""
    at = sums + row * (PARTS * 3 * size) + column
    x = tl.load(at, mask=inside, other=0).to(tl.int64)
    if PARTS == 2:
        x = 256 * x + tl.load(at + 3 * size, mask=inside, other=0).to(tl.int64)
    x = x + tl.load(offset + column, mask=inside, other=0).to(tl.int64)
    factor = tl.load(state_factors + column, mask=inside, other=1.0)
    return rescaled(accumulated(x, ACCUMULATOR_BITS, SATURATES), factor, 0, ROUNDING, False)


@triton.jit(do_not_specialize=["first", "before", "after", "rows"])
def _gru_step_kernel(
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
    after,
    rows,
    size,
    scale: tl.float32,
    PARTS: tl.constexpr,
    STATE_ROUNDING: tl.constexpr,
    ROUNDING: tl.constexpr,
    ACCUMULATOR_BITS: tl.constexpr,
    SATURATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows * size
    row, unit = at // size, at % size
    recurrent_r = _state_product(
        *(sums, state_factors, offset, row, unit, size, inside),
        *(PARTS, STATE_ROUNDING, ACCUMULATOR_BITS, SATURATES),
    )
    recurrent_z = _state_product(
        *(sums, state_factors, offset, row, size + unit, size, inside),
        *(PARTS, STATE_ROUNDING, ACCUMULATOR_BITS, SATURATES),
    )
    recurrent_n = _state_product(
        *(sums, state_factors, offset, row, 2 * size + unit, size, inside),
        *(PARTS, STATE_ROUNDING, ACCUMULATOR_BITS, SATURATES),
    )
    flags = _inside(recurrent_r, 0) | _inside(recurrent_z, 1) | _inside(recurrent_n, 2)
    here = (first + row) * (3 * size) + unit
    x_r = tl.load(inputs + here, mask=inside, other=0).to(tl.int64)
    x_z = tl.load(inputs + here + size, mask=inside, other=0).to(tl.int64)
    x_n = tl.load(inputs + here + 2 * size, mask=inside, other=0).to(tl.int64)
    gate_r = _sum(x_r, _clipped_to_16_bits(recurrent_r), factors, 0, 1, ROUNDING)
    gate_z = _sum(x_z, _clipped_to_16_bits(recurrent_z), factors, 0, 1, ROUNDING)
    flags = flags | _inside(gate_r, 3) | _inside(gate_z, 4)
    r = tl.load(sigmoid + _clipped_to_16_bits(gate_r) + 32768, mask=inside, other=0)
    z = tl.load(sigmoid + _clipped_to_16_bits(gate_z) + 32768, mask=inside, other=0)
    new_h = _clipped_to_16_bits(recurrent_n)
    reset = _rescaled_by(r.to(tl.int64) * new_h, factors, 3, ROUNDING)
    new = _sum(x_n, _clipped_to_16_bits(reset), factors, 4, 1, ROUNDING)
    n = tl.load(tanh + _clipped_to_16_bits(new) + 32768, mask=inside, other=0)
    h = tl.load(states + (before + row) * size + unit, mask=inside, other=0).to(tl.int64)
    difference = _sum(h, n.to(tl.int64), factors, 7, -1, ROUNDING)
    change = _clipped_to_16_bits(difference)
    update = _rescaled_by(z.to(tl.int64) * change, factors, 10, ROUNDING)
    following = _sum(n.to(tl.int64), _clipped_to_16_bits(update), factors, 11, 1, ROUNDING)
    flags = flags | _inside(reset, 5) | _inside(new, 6) | _inside(difference, 7)
    flags = flags | _inside(update, 8) | _inside(following, 9)
    h = _clipped_to_16_bits(following)
    element = state.dtype.element_ty
    to_state = state + row * (PARTS * size) + unit
    if PARTS == 2:  # 1000 is 3 * 256 + 104 + 128.
        tl.store(to_state, (h >> 8).to(element), mask=inside)
        tl.store(to_state + size, ((h & 255) - 128).to(element), mask=inside)
    else:
        tl.store(to_state, h.to(element), mask=inside)
    tl.store(states + (after + row) * size + unit, h.to(tl.int16), mask=inside)
    tl.store(outputs + (first + row) * size + unit, h.to(tl.float32) * scale, mask=inside)
    to_trace = trace + (first + row) * (6 * size) + unit
    tl.store(to_trace, r, mask=inside)
    tl.store(to_trace + size, z, mask=inside)
    tl.store(to_trace + 2 * size, n, mask=inside)
    tl.store(to_trace + 3 * size, new_h.to(tl.int16), mask=inside)
    tl.store(to_trace + 4 * size, change.to(tl.int16), mask=inside)
    tl.store(to_trace + 5 * size, flags.to(tl.int16), mask=inside)


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
    block: int = _BLOCK,
) -> None:
    """Run a step of a GRU, shapes as in :func:`.recurrent_reference.gru_step`."""
    size = states.shape[1]
    with torch.cuda.device_of(sums):
        _gru_step_kernel[(triton.cdiv(rows * size, block),)](
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
            len(states) - len(outputs) + first,
            rows,
            size,
            scale,
            PARTS=state.shape[1],
            STATE_ROUNDING=state_rounding,
            ROUNDING=rounding,
            ACCUMULATOR_BITS=accumulator_bits,
            SATURATES=saturates,
            BLOCK=block,
            enable_fp_fusion=False,
        )


@triton.jit
def _flag(flags, BIT: tl.constexpr):
    return ((flags >> BIT) & 1).to(tl.float32)


@triton.jit(do_not_specialize=["first", "rows"])
def _gru_step_backward_kernel(
    grad,
    d_product,
    d_change,
    trace,
    d_x,
    d_recurrent,
    first,
    rows,
    size,
    recurrent_scale: tl.float32,
    change_scale: tl.float32,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows * size
    row, unit = at // size, at % size
    of_trace = trace + (first + row) * (6 * size) + unit
    r = tl.load(of_trace, mask=inside, other=0).to(tl.float32) * 0.000030517578125
    z = tl.load(of_trace + size, mask=inside, other=0).to(tl.float32) * 0.000030517578125
    k_n = tl.load(of_trace + 2 * size, mask=inside, other=0).to(tl.int32)
    new_h = tl.load(of_trace + 3 * size, mask=inside, other=0).to(tl.float32) * recurrent_scale
    change = tl.load(of_trace + 4 * size, mask=inside, other=0).to(tl.float32) * change_scale
    flags = tl.load(of_trace + 5 * size, mask=inside, other=0).to(tl.int32)
    carried = tl.load(d_change + at, mask=inside, other=0.0)
    carried = carried + tl.load(d_product + at, mask=inside, other=0.0)
    d_h = tl.load(grad + (first + row) * size + unit, mask=inside, other=0.0) + carried
    d_h = d_h * _flag(flags, 9)
    d_update = d_h * _flag(flags, 8)
    d_of_change = d_update * z * _flag(flags, 7)
    # 1 - n^2, rounded once, as sums of a product are.
    slope_n = (1073741824 - k_n * k_n).to(tl.float32) * 9.313225746154785e-10
    d_new = (d_h - d_of_change) * slope_n * _flag(flags, 6)
    d_reset = d_new * _flag(flags, 5)
    d_r = (d_reset * new_h) * (1.0 - r) * r * _flag(flags, 3)
    d_z = (d_update * change) * (1.0 - z) * z * _flag(flags, 4)
    tl.store(d_change + at, d_of_change, mask=inside)
    here = (first + row) * (3 * size) + unit
    tl.store(d_x + here, d_r, mask=inside)
    tl.store(d_x + here + size, d_z, mask=inside)
    tl.store(d_x + here + 2 * size, d_new, mask=inside)
    tl.store(d_recurrent + here, d_r * _flag(flags, 0), mask=inside)
    tl.store(d_recurrent + here + size, d_z * _flag(flags, 1), mask=inside)
    tl.store(d_recurrent + here + 2 * size, d_reset * r * _flag(flags, 2), mask=inside)


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
    block: int = _BLOCK,
) -> None:
    """Run the backward of a step, shapes as in :func:`.recurrent_reference.gru_step_backward`."""
    size = d_change.shape[1]
    with torch.cuda.device_of(grad):
        _gru_step_backward_kernel[(triton.cdiv(rows * size, block),)](
            grad,
            d_product,
            d_change,
            trace,
            d_x,
            d_recurrent,
            first,
            rows,
            size,
            recurrent_scale,
            change_scale,
            BLOCK=block,
            enable_fp_fusion=False,
        )
