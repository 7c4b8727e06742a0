"""Steps of an LSTM, compiled for processors; equal to :mod:`.recurrent_reference`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from lightning_nna.emulation.kernels.compiled import compiled, divided, lowest_32, over_rows
from lightning_nna.emulation.kernels.compiled_elements import accumulated, rescaled
from lightning_nna.emulation.kernels.compiled_gates import (
    INT16_MAX,
    INT16_MIN,
    ONE,
    RunStep,
    array_of,
    clipped_16,
    flag,
    fused_multiply_add,
    gate_slope,
    is_inside_16,
    multipliers_of,
    real_gate,
    rescaled_product,
    tanh_slope,
)
from lightning_nna.emulation.kernels.reference import DOUBLE


@lru_cache(maxsize=64)
def _lstm_kernel(rounding: int, saturates_recurrent: bool, divides: bool) -> Callable[..., int]:
    """The step of a kind of LSTM, for a range of rows."""

    @compiled
    def run(
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
                x = accumulated(np.int64(sums[r, k]) + offset[k], bits, saturates)
                recurrent[k] = rescaled_product(x, factors[k], mantissas[k], exponents[k], rounding)
            for k in range(4 * size):
                own, part = np.int64(inputs[t, k]), recurrent[k]
                passed = 4 * np.int64((own > INT16_MIN) & (own < INT16_MAX))
                if saturates_recurrent:
                    part = clipped_16(part)
                    passed += 2 * np.int64((part > INT16_MIN) & (part < INT16_MAX))
                else:
                    passed += 2
                total = own + part
                if rounding == DOUBLE:
                    total = lowest_32(total)
                flags[t, k] = np.uint8(passed + is_inside_16(total))
                clipped += passed != 6
                index[k] = np.int32(clipped_16(total) + 32768)
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
                    c = rescaled_product(product, new_factor, new_m, new_e, rounding)
                    c += rescaled_product(
                        carried, retained_factor, retained_m, retained_e, rounding
                    )
                cells[after + r, u] = np.int16(clipped_16(c))
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
    sums, inputs, factors, offset, *others = map(array_of, buffers)
    rounding, bits, saturates, saturates_recurrent, divides, exponent, factor, *rest = numbers
    outputs, cells = others[3], others[5]
    batch, elements = len(cells) - len(outputs), 4 * cells.shape[1]
    of_products = np.array([2.0 ** (-30 - exponent), 2.0**-15, factor])
    arguments = (
        *(sums, inputs, factors, *multipliers_of(factors), offset.astype(np.int64), *others),
        *(of_products, *multipliers_of(of_products), bits, saturates, 30 + exponent, *rest),
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
    def run(
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
                tanh_c = real_gate(tanh_cells[t, u])
                passed = flag(flags[t, 3 * size + u], 3)
                through_h = real_gate(gates[t, 3 * size + u]) * (ONE - tanh_c * tanh_c) * passed
                d_c[u] = fused_multiply_add(d_h[u], through_h, d_cell[r, u])
            for u in range(size):
                c = cells[a, u]
                meets = real_gate(gates[t, 2 * size + u]) * np.float32(
                    (c > INT16_MIN) & (c < INT16_MAX)
                )
                slope = gate_slope(gates[t, u]) * flag(flags[t, u], 0)
                d_input[t, u] = slope * meets * d_c[u]
            for u in range(size):
                c = cells[a, u]
                c_before = np.float32(cells[before + r, u]) * cell_scale
                meets = c_before * np.float32((c > INT16_MIN) & (c < INT16_MAX))
                k = size + u
                slope = gate_slope(gates[t, k]) * flag(flags[t, k], 0)
                d_input[t, k] = slope * meets * d_c[u]
            for u in range(size):
                c = cells[a, u]
                meets = real_gate(gates[t, u]) * np.float32((c > INT16_MIN) & (c < INT16_MAX))
                k = 2 * size + u
                slope = tanh_slope(gates[t, k]) * flag(flags[t, k], 0)
                d_input[t, k] = slope * meets * d_c[u]
            for u in range(size):
                k = 3 * size + u
                meets = real_gate(tanh_cells[t, u]) * flag(flags[t, k], 3)
                slope = gate_slope(gates[t, k]) * flag(flags[t, k], 0)
                d_input[t, k] = slope * meets * d_h[u]
            for u in range(size):
                c = cells[a, u]
                forget = real_gate(gates[t, size + u]) * np.float32(
                    (c > INT16_MIN) & (c < INT16_MAX)
                )
                d_cell[r, u] = d_c[u] * forget
            if not is_shared:
                for k in range(4 * size):
                    d_recurrent[t, k] = d_input[t, k] * flag(flags[t, k], 1)
                for k in range(4 * size):
                    d_input[t, k] *= flag(flags[t, k], 2)
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
    arguments = (*map(array_of, buffers), 2.0 ** numbers[0])
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
