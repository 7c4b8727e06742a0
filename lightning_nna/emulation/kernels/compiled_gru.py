"""Steps of a GRU, compiled for processors; equal to :mod:`.recurrent_reference`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from lightning_nna.emulation.kernels.compiled import compiled, inlined, over_rows
from lightning_nna.emulation.kernels.compiled_elements import accumulated
from lightning_nna.emulation.kernels.compiled_gates import (
    ONE,
    RunStep,
    array_of,
    clipped_16,
    flag,
    is_inside_16,
    multipliers_of,
    real_gate,
    rescaled_product,
    tanh_slope,
)


@inlined
def _multiplier(factors, mantissas, exponents, number):
    return factors[number], mantissas[number], exponents[number]


@inlined
def _scaled(x, multiplier, rounding):
    return rescaled_product(x, multiplier[0], multiplier[1], multiplier[2], rounding)


@lru_cache(maxsize=64)
def _gru_kernel(state_rounding: int, rounding: int, parts: int) -> Callable[..., int]:
    """The step of a kind of GRU, for a range of rows."""

    @compiled
    def run(
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
                x = accumulated(x + offset[k], bits, saturates)
                recurrent[k] = rescaled_product(
                    x, state_factors[k], state_mantissas[k], state_exponents[k], state_rounding
                )
            for k in range(2 * size):
                a = _scaled(np.int64(inputs[t, k]) << 15, of_gates_x, rounding)
                b = _scaled(clipped_16(recurrent[k]) << 15, of_gates_h, rounding)
                result[k] = _scaled(a + b, of_gates, rounding)
            for u in range(size):
                of_products = is_inside_16(recurrent[u]) | (is_inside_16(recurrent[size + u]) << 1)
                of_products |= is_inside_16(recurrent[2 * size + u]) << 2
                of_sums = (is_inside_16(result[u]) << 3) | (is_inside_16(result[size + u]) << 4)
                flags[u] = np.int32(of_products | of_sums)
            for k in range(2 * size):
                trace[t, k] = sigmoid[clipped_16(result[k]) + 32768]
            for u in range(size):
                new_h = clipped_16(recurrent[2 * size + u])
                trace[t, 3 * size + u] = np.int16(new_h)
                result[u] = _scaled(np.int64(trace[t, u]) * new_h, of_reset, rounding)
            for u in range(size):
                a = _scaled(np.int64(inputs[t, 2 * size + u]) << 15, of_new_x, rounding)
                b = _scaled(clipped_16(result[u]) << 15, of_new_h, rounding)
                other[u] = _scaled(a + b, of_new, rounding)
            for u in range(size):
                of_sums = (is_inside_16(result[u]) << 5) | (is_inside_16(other[u]) << 6)
                flags[u] |= np.int32(of_sums)
            for u in range(size):
                trace[t, 2 * size + u] = tanh[clipped_16(other[u]) + 32768]
            for u in range(size):
                a = _scaled(np.int64(states[before + r, u]) << 15, of_change_h, rounding)
                b = _scaled(np.int64(trace[t, 2 * size + u]) << 15, of_change_n, rounding)
                other[u] = _scaled(a - b, of_change, rounding)
            for u in range(size):
                change = clipped_16(other[u])
                trace[t, 4 * size + u] = np.int16(change)
                product = np.int64(trace[t, size + u]) * change
                result[u] = _scaled(product, of_update, rounding)
            for u in range(size):
                of_sums = (is_inside_16(other[u]) << 7) | (is_inside_16(result[u]) << 8)
                flags[u] |= np.int32(of_sums)
            for u in range(size):
                a = _scaled(np.int64(trace[t, 2 * size + u]) << 15, of_next_n, rounding)
                b = _scaled(clipped_16(result[u]) << 15, of_next_u, rounding)
                other[u] = _scaled(a + b, of_next, rounding)
            for u in range(size):
                trace[t, 5 * size + u] = np.int16(flags[u] | np.int32(is_inside_16(other[u]) << 9))
            for u in range(size):
                h = clipped_16(other[u])
                states[after + r, u] = np.int16(h)
                outputs[t, u] = np.float32(np.int32(h)) * real_scale
            for u in range(size):
                h = clipped_16(other[u])
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
    sums, inputs, state_factors, offset, factors, *others = map(array_of, buffers)
    state_rounding, rounding, *rest = numbers
    states, outputs = others[3:5]
    batch, elements = len(states) - len(outputs), 3 * states.shape[1]
    arguments = (
        *(sums.reshape(-1, elements), inputs, state_factors, *multipliers_of(state_factors)),
        *(offset.astype(np.int64), factors, *multipliers_of(factors), *others, *rest),
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
def _gru_backward(
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
            d_h[u] = total * flag(trace[t, 5 * size + u], 9)
        for u in range(size):
            flags = trace[t, 5 * size + u]
            d_update = d_h[u] * flag(flags, 8)
            d_of_change[u] = d_update * real_gate(trace[t, size + u]) * flag(flags, 7)
        for u in range(size):
            n, flags = trace[t, 2 * size + u], trace[t, 5 * size + u]
            d_new = (d_h[u] - d_of_change[u]) * tanh_slope(n)
            d_x[t, 2 * size + u] = d_new * flag(flags, 6)
        for u in range(size):
            flags, y = trace[t, 5 * size + u], real_gate(trace[t, u])
            new_h = np.float32(trace[t, 3 * size + u]) * recurrent_scale
            d_r = d_x[t, 2 * size + u] * flag(flags, 5) * new_h
            d_x[t, u] = d_r * (ONE - y) * y * flag(flags, 3)
        for u in range(size):
            flags, y = trace[t, 5 * size + u], real_gate(trace[t, size + u])
            change = np.float32(trace[t, 4 * size + u]) * change_scale
            d_z = d_h[u] * flag(flags, 8) * change
            d_x[t, size + u] = d_z * (ONE - y) * y * flag(flags, 4)
        for u in range(size):
            d_recurrent[t, u] = d_x[t, u] * flag(trace[t, 5 * size + u], 0)
        for u in range(size):
            d_recurrent[t, size + u] = d_x[t, size + u] * flag(trace[t, 5 * size + u], 1)
        for u in range(size):
            flags = trace[t, 5 * size + u]
            d_reset = d_x[t, 2 * size + u] * flag(flags, 5)
            d_recurrent[t, 2 * size + u] = d_reset * real_gate(trace[t, u]) * flag(flags, 2)
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
    arguments = (*map(array_of, buffers), *numbers)
    elements = 3 * arguments[2].shape[1]

    def run(first: int, rows: int) -> bool:
        return over_rows(rows, rows * elements, _gru_backward, *arguments, first) > 0

    return run


def gru_step_backward(*arguments: Any) -> None:
    """Run the backward of a step; see :func:`.recurrent_reference.gru_step_backward`."""
    prepared_gru_step_backward(arguments[:6], arguments[8:])(*arguments[6:8])
