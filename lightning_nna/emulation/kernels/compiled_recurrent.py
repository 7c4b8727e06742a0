"""Steps of recurrent layers, compiled for processors; equal to :mod:`.recurrent_reference`.

A step is some short loops over a row, each over few arrays: a compiler turns a loop into vector
instructions only where a few comparisons tell that its arrays lie apart.

A sequence calls the same kernel with the same arrays at every step. What depends on these alone is
prepared once: each kernel has a function ``prepared_*`` of its buffers and numbers, without the
rows, which returns a function of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from lightning_nna.emulation.kernels.compiled import (
    compiled,
    divided,
    inlined,
    lowest,
    lowest_32,
    over_rows,
)
from lightning_nna.emulation.kernels.compiled_elements import multipliers, rescaled
from lightning_nna.emulation.kernels.reference import DOUBLE

#: Runs a step of certain rows, and tells whether the backward needs its masks; see
#: :func:`.library.prepared`.
RunStep = Callable[..., bool]

_MIN, _MAX = -(2**15), 2**15 - 1
_GATE_SCALE = np.float32(2.0**-15)
_SQUARED_SCALE = np.float32(2.0**-30)
_ONE = np.float32(1.0)


def _fused_multiply_add(typing_context, a, b, c):  # type: ignore[no-untyped-def]
    """Return a b + c of float32, rounded once."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fma(*arguments)

    number = numba.float32
    return number(number, number, number), generate


fused_multiply_add: Any = intrinsic(_fused_multiply_add)


@inlined
def _clipped(x):  # type: ignore[no-untyped-def]
    return min(max(x, _MIN), _MAX)


@inlined
def _is_inside(x):  # type: ignore[no-untyped-def]
    return np.int64((x >= _MIN) & (x <= _MAX))


@inlined
def _accumulated(x, bits, saturates):  # type: ignore[no-untyped-def]
    limit = np.int64(1) << (bits - 1)
    return min(max(x, -limit), limit - 1) if saturates else lowest(x, bits)


@inlined
def _flag(flags, bit):  # type: ignore[no-untyped-def]
    """Return a bit of int32 as float32."""
    return np.float32((np.int32(flags) >> bit) & np.int32(1))


@inlined
def _gate_slope(integer):  # type: ignore[no-untyped-def]
    """Return y - y^2 of Q0.15, rounded once: 24576 (0.75) has (2^15 - 24576) 24576 2^-30."""
    y = np.int32(integer)
    return np.float32(y * (np.int32(32768) - y)) * _SQUARED_SCALE


@inlined
def _tanh_slope(integer):  # type: ignore[no-untyped-def]
    """Return 1 - y^2 of Q0.15, rounded once."""
    y = np.int32(integer)
    return np.float32(np.int32(1073741824) - y * y) * _SQUARED_SCALE


@inlined
def _real(integer):  # type: ignore[no-untyped-def]
    return np.float32(integer) * _GATE_SCALE


@compiled
def _rescaled(x, factor, mantissa, exponent, rounding):  # type: ignore[no-untyped-def]
    """Rescale without a zero point; a function of its own takes less time to compile."""
    return rescaled(x, factor, mantissa, exponent, rounding, 0, False)


def _multipliers(factors: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Write factors, shape ``(n,)``, as mantissas and exponents."""
    mantissas, exponents = (np.empty(factors.shape, np.int64) for _ in range(2))
    multipliers(factors, mantissas, exponents)
    return mantissas, exponents


def _array(x: Tensor) -> NDArray[Any]:
    """The memory of a tensor without gaps, any shape."""
    assert x.is_contiguous()
    return x.detach().numpy()


@lru_cache(maxsize=64)
def _lstm_kernel(rounding: int, saturates_recurrent: bool, divides: bool) -> Callable[..., int]:
    """The step of a kind of LSTM, for a range of rows."""

    @compiled
    def run(  # type: ignore[no-untyped-def]
        sums, inputs, factors, mantissas, exponents, offset, gate_table, cell_table, state,
        outputs, gates, cells, tanh_cells, flags, of_products, of_mantissas, of_exponents, bits,
        saturates, shift, zero_point, low, high, scale, here, before, after, first, last,
    ):  # fmt: skip
        size, clipped = cells.shape[1], 0
        recurrent, index = np.empty(4 * size, np.int64), np.empty(4 * size, np.int32)
        hidden = np.empty(size, np.int64)
        new_factor, retained_factor, factor = of_products[0], of_products[1], of_products[2]
        new_m, retained_m, mantissa = of_mantissas[0], of_mantissas[1], of_mantissas[2]
        new_e, retained_e, exponent = of_exponents[0], of_exponents[1], of_exponents[2]
        real_scale = np.float32(scale)
        for r in range(first, last):
            t = here + r
            for k in range(4 * size):
                x = _accumulated(np.int64(sums[r, k]) + offset[k], bits, saturates)
                recurrent[k] = _rescaled(x, factors[k], mantissas[k], exponents[k], rounding)
            for k in range(4 * size):
                own, part = np.int64(inputs[t, k]), recurrent[k]
                passed = 4 * np.int64((own > _MIN) & (own < _MAX))
                if saturates_recurrent:
                    part = _clipped(part)
                    passed += 2 * np.int64((part > _MIN) & (part < _MAX))
                else:
                    passed += 2
                total = own + part
                if rounding == DOUBLE:
                    total = lowest_32(total)
                flags[t, k] = np.uint8(passed + _is_inside(total))
                clipped += passed != 6
                index[k] = np.int32(_clipped(total) + 32768)
            for k in range(2 * size):
                gates[t, k] = gate_table[index[k]]
            for k in range(2 * size, 3 * size):
                gates[t, k] = gate_table[65536 + index[k]]
            for k in range(3 * size, 4 * size):
                gates[t, k] = gate_table[index[k]]
            for u in range(size):
                i, f, g = gates[t, u], gates[t, size + u], gates[t, 2 * size + u]
                product = np.int64(i) * np.int64(g)
                carried = np.int64(f) * np.int64(cells[before + r, u])
                if divides:
                    c = divided(product, shift) + divided(carried, 15)
                else:
                    c = _rescaled(product, new_factor, new_m, new_e, rounding)
                    c += _rescaled(carried, retained_factor, retained_m, retained_e, rounding)
                cells[after + r, u] = np.int16(_clipped(c))
            for u in range(size):
                tanh_cells[t, u] = cell_table[np.int64(cells[after + r, u]) + 32768]
            for u in range(size):
                product = np.int64(tanh_cells[t, u]) * np.int64(gates[t, 3 * size + u])
                hidden[u] = zero_point + rescaled(
                    product, factor, mantissa, exponent, rounding, zero_point, False
                )
            for u in range(size):
                y = hidden[u]
                h = min(max(y, low), high)
                flags[t, 3 * size + u] += np.uint8(8 * np.int64((y >= low) & (y <= high)))
                state[r, u] = h
                outputs[t, u] = np.float32(np.int32(h - zero_point)) * real_scale
        return clipped

    return run


def prepared_lstm_step(buffers: Sequence[Tensor], numbers: Sequence[Any]) -> RunStep:
    """Prepare steps of an LSTM.

    Args:
        buffers: The first twelve arguments of :func:`.recurrent_reference.lstm_step`.
        numbers: Those after ``rows``.

    Returns:
        Function of ``first``, ``before`` and ``rows``.
    """
    sums, inputs, factors, offset, *others = map(_array, buffers)
    rounding, bits, saturates, saturates_recurrent, divides, exponent, factor, *rest = numbers
    outputs, cells = others[3], others[5]
    batch, elements = len(cells) - len(outputs), 4 * cells.shape[1]
    of_products = np.array([2.0 ** (-30 - exponent), 2.0**-15, factor])
    arguments = (
        *(sums, inputs, factors, *_multipliers(factors), offset.astype(np.int64), *others),
        *(of_products, *_multipliers(of_products), bits, saturates, 30 + exponent, *rest),
    )
    kernel = _lstm_kernel(rounding, saturates_recurrent, divides)

    def run(first: int, before: int, rows: int) -> bool:
        return (
            over_rows(rows, rows * elements, kernel, *arguments, first, before, batch + first) > 0
        )

    return run


def lstm_step(*arguments: Any) -> None:
    """Run a step of an LSTM; see :func:`.recurrent_reference.lstm_step`."""
    prepared_lstm_step(arguments[:12], arguments[15:])(*arguments[12:15])


@lru_cache(maxsize=2)
def _lstm_backward(is_shared: bool) -> Callable[..., int]:
    """The backward of an LSTM's step, for a range of rows.

    Args:
        is_shared: Whether the gradients of input and recurrent parts are the same.
    """

    @compiled
    def run(  # type: ignore[no-untyped-def]
        grad, d_state, d_cell, gates, cells, tanh_cells, flags, d_input, d_recurrent, scale, here,
        before, after, first, last,
    ):  # fmt: skip
        size, cell_scale = cells.shape[1], np.float32(scale)
        d_h, d_c = np.empty(size, np.float32), np.empty(size, np.float32)
        for r in range(first, last):
            t, a = here + r, after + r
            for u in range(size):
                d_h[u] = d_state[r, u] + grad[t, u]
            for u in range(size):
                tanh_c = _real(tanh_cells[t, u])
                passed = _flag(flags[t, 3 * size + u], 3)
                through_h = _real(gates[t, 3 * size + u]) * (_ONE - tanh_c * tanh_c) * passed
                d_c[u] = fused_multiply_add(d_h[u], through_h, d_cell[r, u])
            for u in range(size):
                c = cells[a, u]
                meets = _real(gates[t, 2 * size + u]) * np.float32((c > _MIN) & (c < _MAX))
                slope = _gate_slope(gates[t, u]) * _flag(flags[t, u], 0)
                d_input[t, u] = slope * meets * d_c[u]
            for u in range(size):
                c = cells[a, u]
                c_before = np.float32(cells[before + r, u]) * cell_scale
                meets = c_before * np.float32((c > _MIN) & (c < _MAX))
                k = size + u
                slope = _gate_slope(gates[t, k]) * _flag(flags[t, k], 0)
                d_input[t, k] = slope * meets * d_c[u]
            for u in range(size):
                c = cells[a, u]
                meets = _real(gates[t, u]) * np.float32((c > _MIN) & (c < _MAX))
                k = 2 * size + u
                slope = _tanh_slope(gates[t, k]) * _flag(flags[t, k], 0)
                d_input[t, k] = slope * meets * d_c[u]
            for u in range(size):
                k = 3 * size + u
                meets = _real(tanh_cells[t, u]) * _flag(flags[t, k], 3)
                slope = _gate_slope(gates[t, k]) * _flag(flags[t, k], 0)
                d_input[t, k] = slope * meets * d_h[u]
            for u in range(size):
                c = cells[a, u]
                forget = _real(gates[t, size + u]) * np.float32((c > _MIN) & (c < _MAX))
                d_cell[r, u] = d_c[u] * forget
            if not is_shared:
                for k in range(4 * size):
                    d_recurrent[t, k] = d_input[t, k] * _flag(flags[t, k], 1)
                for k in range(4 * size):
                    d_input[t, k] *= _flag(flags[t, k], 2)
        return 0

    return run


def prepared_lstm_step_backward(buffers: Sequence[Tensor], numbers: Sequence[Any]) -> RunStep:
    """Prepare the backward of steps of an LSTM.

    Args:
        buffers: The first nine arguments of :func:`.recurrent_reference.lstm_step_backward`. The
            last two may be one tensor where no input or recurrent part was clipped.
        numbers: The exponent of the cells.

    Returns:
        Function of ``first``, ``before`` and ``rows``.
    """
    arguments = (*map(_array, buffers), 2.0 ** numbers[0])
    batch, elements = len(arguments[4]) - len(arguments[0]), 4 * arguments[4].shape[1]
    kernel = _lstm_backward(buffers[7].data_ptr() == buffers[8].data_ptr())

    def run(first: int, before: int, rows: int) -> bool:
        return (
            over_rows(rows, rows * elements, kernel, *arguments, first, before, batch + first) > 0
        )

    return run


def lstm_step_backward(*arguments: Any) -> None:
    """Run the backward of a step; see :func:`.recurrent_reference.lstm_step_backward`."""
    prepared_lstm_step_backward(arguments[:9], arguments[12:])(*arguments[9:12])


@inlined
def _multiplier(factors, mantissas, exponents, number):  # type: ignore[no-untyped-def]
    return factors[number], mantissas[number], exponents[number]


@inlined
def _scaled(x, multiplier, rounding):  # type: ignore[no-untyped-def]
    return _rescaled(x, multiplier[0], multiplier[1], multiplier[2], rounding)


@lru_cache(maxsize=64)
def _gru_kernel(state_rounding: int, rounding: int, parts: int) -> Callable[..., int]:
    """The step of a kind of GRU, for a range of rows."""

    @compiled
    def run(  # type: ignore[no-untyped-def]
        sums, inputs, state_factors, state_mantissas, state_exponents, offset, factors, mantissas,
        exponents, sigmoid, tanh, state, states, outputs, trace, bits, saturates, scale, here,
        before, after, first, last,
    ):  # fmt: skip
        size = states.shape[1]
        recurrent, result = np.empty(3 * size, np.int64), np.empty(2 * size, np.int64)
        flags, other = np.empty(size, np.int32), np.empty(size, np.int64)
        real_scale = np.float32(scale)
        of_gates_x = _multiplier(factors, mantissas, exponents, 0)
        of_gates_h = _multiplier(factors, mantissas, exponents, 1)
        of_gates = _multiplier(factors, mantissas, exponents, 2)
        of_reset = _multiplier(factors, mantissas, exponents, 3)
        of_new_x = _multiplier(factors, mantissas, exponents, 4)
        of_new_h = _multiplier(factors, mantissas, exponents, 5)
        of_new = _multiplier(factors, mantissas, exponents, 6)
        of_change_h = _multiplier(factors, mantissas, exponents, 7)
        of_change_n = _multiplier(factors, mantissas, exponents, 8)
        of_change = _multiplier(factors, mantissas, exponents, 9)
        of_update = _multiplier(factors, mantissas, exponents, 10)
        of_next_n = _multiplier(factors, mantissas, exponents, 11)
        of_next_u = _multiplier(factors, mantissas, exponents, 12)
        of_next = _multiplier(factors, mantissas, exponents, 13)
        for r in range(first, last):
            t = here + r
            for k in range(3 * size):
                x = np.int64(sums[parts * r, k])
                if parts == 2:
                    x = 256 * x + np.int64(sums[parts * r + 1, k])
                x = _accumulated(x + offset[k], bits, saturates)
                recurrent[k] = _rescaled(
                    x, state_factors[k], state_mantissas[k], state_exponents[k], state_rounding
                )
            for k in range(2 * size):
                a = _scaled(np.int64(inputs[t, k]) << 15, of_gates_x, rounding)
                b = _scaled(_clipped(recurrent[k]) << 15, of_gates_h, rounding)
                result[k] = _scaled(a + b, of_gates, rounding)
            for u in range(size):
                of_products = _is_inside(recurrent[u]) | (_is_inside(recurrent[size + u]) << 1)
                of_products |= _is_inside(recurrent[2 * size + u]) << 2
                of_sums = (_is_inside(result[u]) << 3) | (_is_inside(result[size + u]) << 4)
                flags[u] = np.int32(of_products | of_sums)
            for k in range(2 * size):
                trace[t, k] = sigmoid[_clipped(result[k]) + 32768]
            for u in range(size):
                new_h = _clipped(recurrent[2 * size + u])
                trace[t, 3 * size + u] = np.int16(new_h)
                result[u] = _scaled(np.int64(trace[t, u]) * new_h, of_reset, rounding)
            for u in range(size):
                a = _scaled(np.int64(inputs[t, 2 * size + u]) << 15, of_new_x, rounding)
                b = _scaled(_clipped(result[u]) << 15, of_new_h, rounding)
                other[u] = _scaled(a + b, of_new, rounding)
            for u in range(size):
                of_sums = (_is_inside(result[u]) << 5) | (_is_inside(other[u]) << 6)
                flags[u] |= np.int32(of_sums)
            for u in range(size):
                trace[t, 2 * size + u] = tanh[_clipped(other[u]) + 32768]
            for u in range(size):
                a = _scaled(np.int64(states[before + r, u]) << 15, of_change_h, rounding)
                b = _scaled(np.int64(trace[t, 2 * size + u]) << 15, of_change_n, rounding)
                other[u] = _scaled(a - b, of_change, rounding)
            for u in range(size):
                change = _clipped(other[u])
                trace[t, 4 * size + u] = np.int16(change)
                product = np.int64(trace[t, size + u]) * change
                result[u] = _scaled(product, of_update, rounding)
            for u in range(size):
                of_sums = (_is_inside(other[u]) << 7) | (_is_inside(result[u]) << 8)
                flags[u] |= np.int32(of_sums)
            for u in range(size):
                a = _scaled(np.int64(trace[t, 2 * size + u]) << 15, of_next_n, rounding)
                b = _scaled(_clipped(result[u]) << 15, of_next_u, rounding)
                other[u] = _scaled(a + b, of_next, rounding)
            for u in range(size):
                trace[t, 5 * size + u] = np.int16(flags[u] | np.int32(_is_inside(other[u]) << 9))
            for u in range(size):
                h = _clipped(other[u])
                states[after + r, u] = np.int16(h)
                outputs[t, u] = np.float32(np.int32(h)) * real_scale
            for u in range(size):
                h = _clipped(other[u])
                if parts == 2:  # 1000 is 3 * 256 + 104 + 128.
                    state[r, 0, u] = h >> 8
                    state[r, 1, u] = (h & 255) - 128
                else:
                    state[r, 0, u] = h
        return 0

    return run


def prepared_gru_step(buffers: Sequence[Tensor], numbers: Sequence[Any]) -> RunStep:
    """Prepare steps of a GRU.

    Args:
        buffers: The first eleven arguments of :func:`.recurrent_reference.gru_step`.
        numbers: Those after ``rows``.

    Returns:
        Function of ``first``, ``before`` and ``rows``.
    """
    sums, inputs, state_factors, offset, factors, *others = map(_array, buffers)
    state_rounding, rounding, *rest = numbers
    states, outputs = others[3:5]
    batch, elements = len(states) - len(outputs), 3 * states.shape[1]
    arguments = (
        *(sums.reshape(-1, elements), inputs, state_factors, *_multipliers(state_factors)),
        *(offset.astype(np.int64), factors, *_multipliers(factors), *others, *rest),
    )
    kernel = _gru_kernel(state_rounding, rounding, buffers[7].shape[1])

    def run(first: int, before: int, rows: int) -> bool:
        return (
            over_rows(rows, rows * elements, kernel, *arguments, first, before, batch + first) > 0
        )

    return run


def gru_step(*arguments: Any) -> None:
    """Run a step of a GRU; see :func:`.recurrent_reference.gru_step`."""
    prepared_gru_step(arguments[:11], arguments[14:])(*arguments[11:14])


@compiled
def _gru_backward(  # type: ignore[no-untyped-def]
    grad, d_product, d_change, trace, d_x, d_recurrent, scale_of_recurrent, scale_of_change, here,
    first, last,
):  # fmt: skip
    size = d_change.shape[1]
    recurrent_scale, change_scale = np.float32(scale_of_recurrent), np.float32(scale_of_change)
    d_h, d_of_change = np.empty(size, np.float32), np.empty(size, np.float32)
    for r in range(first, last):
        t = here + r
        for u in range(size):
            total = grad[t, u] + (d_change[r, u] + d_product[r, u])
            d_h[u] = total * _flag(trace[t, 5 * size + u], 9)
        for u in range(size):
            flags = trace[t, 5 * size + u]
            d_update = d_h[u] * _flag(flags, 8)
            d_of_change[u] = d_update * _real(trace[t, size + u]) * _flag(flags, 7)
        for u in range(size):
            n, flags = trace[t, 2 * size + u], trace[t, 5 * size + u]
            d_new = (d_h[u] - d_of_change[u]) * _tanh_slope(n)
            d_x[t, 2 * size + u] = d_new * _flag(flags, 6)
        for u in range(size):
            flags, y = trace[t, 5 * size + u], _real(trace[t, u])
            new_h = np.float32(trace[t, 3 * size + u]) * recurrent_scale
            d_r = d_x[t, 2 * size + u] * _flag(flags, 5) * new_h
            d_x[t, u] = d_r * (_ONE - y) * y * _flag(flags, 3)
        for u in range(size):
            flags, y = trace[t, 5 * size + u], _real(trace[t, size + u])
            change = np.float32(trace[t, 4 * size + u]) * change_scale
            d_z = d_h[u] * _flag(flags, 8) * change
            d_x[t, size + u] = d_z * (_ONE - y) * y * _flag(flags, 4)
        for u in range(size):
            d_recurrent[t, u] = d_x[t, u] * _flag(trace[t, 5 * size + u], 0)
        for u in range(size):
            d_recurrent[t, size + u] = d_x[t, size + u] * _flag(trace[t, 5 * size + u], 1)
        for u in range(size):
            flags = trace[t, 5 * size + u]
            d_reset = d_x[t, 2 * size + u] * _flag(flags, 5)
            d_recurrent[t, 2 * size + u] = d_reset * _real(trace[t, u]) * _flag(flags, 2)
        for u in range(size):
            d_change[r, u] = d_of_change[u]
    return 0


def prepared_gru_step_backward(buffers: Sequence[Tensor], numbers: Sequence[Any]) -> RunStep:
    """Prepare the backward of steps of a GRU.

    Args:
        buffers: The first six arguments of :func:`.recurrent_reference.gru_step_backward`.
        numbers: The last two.

    Returns:
        Function of ``first`` and ``rows``.
    """
    arguments = (*map(_array, buffers), *numbers)
    elements = 3 * arguments[2].shape[1]

    def run(first: int, rows: int) -> bool:
        return over_rows(rows, rows * elements, _gru_backward, *arguments, first) > 0

    return run


def gru_step_backward(*arguments: Any) -> None:
    """Run the backward of a step; see :func:`.recurrent_reference.gru_step_backward`."""
    prepared_gru_step_backward(arguments[:6], arguments[8:])(*arguments[6:8])
