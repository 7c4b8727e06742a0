"""Arguments of the fused kernels, 100,000 numbers each with extremes; run in Triton's interpreter.

``TRITON_INTERPRET=1 python -m tests.emulation.kernel_cases`` compares the Triton kernels with the
reference and prints one line of JSON: for every case what differs, or an empty string. A process of
its own, since Triton decides when it is imported whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.integer_roots import inverse_roots
from lightning_nna.emulation.arithmetic.integer_softmax import exp_table
from lightning_nna.emulation.arithmetic.interpolated_tables import (
    interpolation_table,
    inverse_square_root,
)
from lightning_nna.emulation.kernels import recurrent_reference, reference

#: Shape (outer, channels, inner) of accumulators.
SHAPE = (5, 200, 100)
_INT32 = 2**31
#: Settings of a requantization: rounding, reach of the sums, accumulator's width, whether it
#: saturates, the bias's width, factors, bounds, whether a ReLU follows, wide, dtype of the sums.
REQUANTIZATIONS: dict[str, dict[str, Any]] = {
    "real": {"rounding": reference.REAL},
    "real wraps to 24 bits": {"rounding": reference.REAL, "accumulator_bits": 24},
    "real spills": {"rounding": reference.REAL, "largest_factor": 8.0, "zero_point": -128},
    "double": {"rounding": reference.DOUBLE, "dtype": torch.int32},
    "double spills": {"rounding": reference.DOUBLE, "largest_factor": 64.0, "zero_point": 5},
    "double saturates": {"rounding": reference.DOUBLE, "accumulator_bits": 20, "saturates": True},
    "double wide": {
        **{"rounding": reference.DOUBLE, "reach": 2.0**35, "accumulator_bits": 64},
        **{"wide": True, "bias_bits": 40, "dtype": torch.int64},
    },
    "reduced": {"rounding": reference.REDUCED, "reach": 2.0**36, "accumulator_bits": 64},
    "reduced of large sums": {
        **{"rounding": reference.REDUCED, "reach": 2.0**45, "accumulator_bits": 64},
        **{"bias_bits": 40, "smallest_factor": 2.0**-40, "largest_factor": 2.0**-18},
    },
    "reduced spills": {
        **{"rounding": reference.REDUCED, "reach": 2.0**40, "accumulator_bits": 64},
        **{"largest_factor": 2.0**20, "low": -(2**15), "high": 2**15 - 1},
    },
    "single": {"rounding": reference.SINGLE, "fused_relu": True},
    "single of small sums": {
        **{"rounding": reference.SINGLE, "reach": 2.0**19, "bias_bits": 16},
        **{"dtype": torch.float32},
    },
    "shift": {"rounding": reference.SHIFT, "accumulator_bits": 24, "saturates": True},
}


def requantization(
    name: str,
    *,
    rounding: int,
    reach: float = 2.0**31 - 2.0**20,
    accumulator_bits: int = 32,
    saturates: bool = False,
    bias_bits: int = 32,
    smallest_factor: float = 2.0**-34,
    largest_factor: float = 2.0**-3,
    zero_point: int = 3,
    low: int = -131,
    high: int = 124,
    fused_relu: bool = False,
    wide: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Any, ...]:
    """Arguments of a requantization of 100,000 sums, a factor for each of 200 channels."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    outer, channels, inner = SHAPE

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    spread = torch.tensor([smallest_factor, largest_factor]).double().log2()
    exponents = spread[0] + (spread[1] - spread[0]) * uniform(channels)
    scales = torch.exp2(exponents)
    # Powers of two, so that ties are met, and their neighbors.
    powers = torch.exp2(exponents[:60].round())
    scales[:20], scales[20:40] = powers[:20], powers[20:40] * (1 + 2.0**-23)
    scales[40:60] = powers[40:60] * (1 - 2.0**-24)
    if rounding == reference.SHIFT:
        scales = torch.exp2(exponents.round())
    # Sums whose results lie in the range and near it, and sums of any size.
    sums = (uniform(*SHAPE) - 0.5) * 400 / scales.view(-1, 1)
    sums = torch.where(uniform(*SHAPE) < 0.3, (uniform(*SHAPE) - 0.5) * 2 * reach, sums)
    # Ties of power-of-two factors: an odd multiple of a half.
    halves = ((uniform(outer, 40, inner) - 0.5) * 300).round() + 0.5
    sums[:, :40] = torch.where(
        uniform(outer, 40, inner) < 0.5, halves / scales[:40, None], sums[:, :40]
    )
    sums = sums.clamp(-reach, reach).round()
    extremes = [reach, -reach, reach - 1, 1 - reach, 0, 1, -1, 2**20, -(2**20)]
    sums[0, :, : len(extremes)] = torch.tensor(extremes, dtype=torch.float64)
    scale_before, scale_after = 0.0078125 * 1.5, 0.0078125 * 1.5
    bias = ((uniform(channels) - 0.5) * 2e3 * scale_before).float()
    bias[:4] = torch.tensor([1e30, -1e30, 0.0, -0.0])
    if largest_factor > 2**10:
        scale_after *= 2.0**-12
    offset = ((uniform(channels) - 0.5) * 2e5).round()
    return (
        *(sums.to(dtype), scales.float(), bias, offset, scale_before, scale_after, 0.125),
        *(rounding, accumulator_bits, saturates, bias_bits, zero_point, low, high, fused_relu),
        *(inner, wide),
    )


def _requantizations() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, settings in REQUANTIZATIONS.items():
        yield f"requantize/{name}", requantization(name, **settings)
        # One factor, subnormal or 0 or of any size, and nothing to add.
        arguments = list(requantization(name, **settings))
        arguments[:4] = arguments[0][0, ::4], None, None, None
        for factor in (1e-310, 0.0, 0.0123, 0.25, 1 - 2.0**-53, 2.0**-32, 3 * 2.0**-33):
            arguments[4:6] = factor, 1.0
            yield f"requantize/{name}, factor {factor}", tuple(arguments)


def real_values(scale: float) -> Tensor:
    """100,000 quotients by a scale: any, ties, near ties, and beyond every range."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(100_000, generator=generator) * 80 * scale
    ties = (torch.arange(20_000) - 10_000 + 0.5) * scale
    values[:20_000] = ties
    values[20_000:40_000] = torch.nextafter(ties, torch.tensor(torch.inf))
    values[40_000:60_000] = torch.nextafter(ties, torch.tensor(-torch.inf))
    extremes = [0.0, -0.0, 1e-45, -1e-45, 1e38, -1e38, 2.0**23 * scale, -(2.0**22 + 0.5) * scale]
    values[60_000 : 60_000 + len(extremes)] = torch.tensor(extremes)
    return values


def _quantizations() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for scale, fused in ((0.0234375, False), (0.1, True), (2.0**-9, False), (3.0e-5, True)):
        yield f"quantize/{scale}", (real_values(scale), scale, -100, 155, fused)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = real_values(0.05).clamp(-60000, 60000).to(dtype)
        yield f"quantize/{dtype}", (x, 0.05, -32768, 32767, False)
    for special in (torch.inf, -torch.inf, torch.nan):
        x = real_values(0.1)
        x[77_777] = special
        yield f"quantize/{special}", (x, 0.1, -128, 127, False)
    yield "quantize/empty", (torch.empty(0, 3), 0.1, -128, 127, False)


def weights() -> dict[str, Tensor]:
    """Weights, most of 100,000 values: several shapes, with zeros, extremes, powers of two."""
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(200, 20, 25, generator=generator)
    wide *= torch.exp2(torch.linspace(-40, 40, 200)).view(-1, 1, 1)
    wide[0], wide[1], wide[2] = 0.0, 1e-45, 3e38
    wide[3:20, 0, 0] = torch.exp2(torch.arange(17.0))
    ties = (torch.arange(100_000) % 255 - 127.0).view(100, 1000) + 0.5
    ties[:, 0] = 127.0
    return {"wide": wide, "ties": ties, "short rows": torch.randn(60, 5, generator=generator)}


def _rows() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, weight in weights().items():
        for rows, maximum, power in ((1, 127, False), (len(weight) // 4, 7, True)):
            yield f"quantize_rows/{name}, {rows}", (weight, None, rows, maximum, power)
        yield f"quantize_rows/{name}, one scale", (weight, None, len(weight), 1, False)
        largest = weight.view(2, -1).split(100, 1)
        parts = torch.stack([x.abs().amax(1) for x in largest], 1)
        yield f"quantize_rows/{name}, two", (weight, parts, len(weight) // 2, 127, False)
        yield f"largest_of_groups/{name}", (weight, 4)
    weight = torch.ones(8, 9)
    weight[3, 3] = torch.nan
    yield "quantize_rows/nan", (weight, None, 2, 127, False)
    yield "largest_of_groups/nan", (weight, 2)
    yield "quantize_rows/float16", (torch.randn(8, 9).half(), None, 2, 127, False)


def _raises() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Weights of 100,000 integers, many and few different ones; scales that are raised or not."""
    generator = torch.Generator().manual_seed(5)
    scales = torch.exp2(torch.linspace(-40.0, 10.0, 10))
    scales[0] = 2.0**-60
    factors = torch.tensor([0.0, 1.0, 1 + 2.0**-20, 0.5, 1e9, 3.0, -7.77, 33.3, -1.9, 1e-9])
    cases = itertools.product((256, 33, 32, 3), ((1, False), (5, True), (10, False)))
    for count, (rows, power_of_two) in cases:
        own = torch.randperm(256, generator=generator)[:count] - 128
        stored = own[torch.randint(count, (10, 40, 250), generator=generator)].to(torch.int8)
        shared = scales.view(-1, rows)[:, :1].expand(-1, rows).reshape(-1)
        arguments = (stored, shared, shared * factors * 3.7, 3.7, rows, power_of_two)
        yield f"raise_scales/{count}, {rows}", arguments
    bias = torch.zeros(10)
    yield "raise_scales/no bias", (stored, scales, bias, 2.0**30, 1, False)
    bias[3:6] = torch.tensor([torch.nan, torch.inf, 3e38])
    yield "raise_scales/not finite", (stored, scales, bias, 2.0**-10, 1, False)


def _normalizations() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Rows of 100,000 integers of 16 bits: loud, quiet, constant and extreme ones."""
    generator = torch.Generator().manual_seed(6)
    direct = inverse_roots(32767, 2.0**-8, 1 / 32767)
    lines = interpolation_table(inverse_square_root, 2.0**-8, 1 / 32767)
    settings = (
        *((reference.DOUBLE, [direct], 1, 20_000, 1), (reference.DOUBLE, [lines] * 2, 2, 3, 5)),
        *((reference.SINGLE, [lines], 2, 5, 1), (reference.REAL, [direct] * 2, 1, 1, 0)),
        (reference.SHIFT, [lines], 4, 1, 0),
    )
    for rounding, tables, groups, channels, rows in settings:
        columns = 100_000 // (rows or 5) // 4 if channels < 20_000 else channels
        columns = columns // channels * channels
        count = 100_000 // columns
        q = torch.randn(count, columns, generator=generator) * 8000
        q[: count // 2] *= torch.logspace(-3, 0, count // 2).view(-1, 1)
        q[-1], q[-2, :9], q[-2, 9:20] = 7.0, 32767.0, -32768.0
        q, constants = q.round().clamp(-32768, 32767), groups * channels
        power = torch.exp2 if rounding == reference.SHIFT else lambda x: 1.07 * torch.exp2(x)
        numbers = power(torch.tensor([0.0, -15.0, -14.0, -13.0, -1.0, 0.0, -2.0, -3.0])).tolist()
        one, square, product, root, half, same, quarter, eighth = numbers
        is_wide = channels > 1
        of_center = [one / columns, half, quarter, same * 2.0**-14] if is_wide else []
        of_normalize = [square, 2 * one / columns, root, product, one / columns, root]
        means = [*((2**30 + 12345) // 3, -12), *(2**30 + 77, -13), *(2**29 + 99, -14)]
        first = 0 if is_wide else 2
        gain, shift = torch.randn(2, constants, generator=generator)
        yield (
            f"normalize_rows/{rounding}, {columns}",
            (
                *(q * 2.0**-12, gain, shift if is_wide else None, tables, 2.0**-12, of_center),
                of_normalize[: 3 * len(tables)],
                [3.0, half, eighth, same * 2.0**-14] if rows else [],
                [2.0**-13, product],
                [2.0**-14, half, eighth, same * 2.0**-14] if is_wide else [],
                [quarter * 2.0**-5] if rows else [],
                means[first : first + 2 * (is_wide + len(tables))],
                *(rounding, groups, channels, -131, 124, 0.125, not rows),
            ),
        )


def _folds() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Weights of 100,000 integers, and factors of any size and sign."""
    generator = torch.Generator().manual_seed(7)
    stored = torch.randint(-127, 128, (50, 2000), generator=generator).to(torch.int8)
    vectors = torch.randn(6, 50, generator=generator)
    scales, layer_bias, mean, variance, weight, bias = vectors * torch.exp2(20 * vectors.flip(0))
    scales, variance = scales.abs().clamp(2.0**-60, 2.0**30), variance.abs()
    weight[:6] = torch.tensor([0.0, -0.0, 1e-38, -1e-45, 1e30, -1.0])
    for bits, eps in itertools.product(range(8), (1e-5, 0.0009)):
        optional = layer_bias, weight, bias
        selection = [x if bits >> k & 1 else None for k, x in enumerate(optional)]
        arguments = (selection[0], mean, variance + eps, *selection[1:], eps)
        yield f"fold_batch_norm/{bits}, {eps}", (stored.view(50, 40, 50), scales, *arguments)


def _dequantizations() -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(9)
    sums = (torch.randn(SHAPE, generator=generator) * 2.0**22).round().double()
    sums[0, 0, :4] = torch.tensor([2.0**24 + 1, -(2.0**31), 0.0, 1.0]).double()
    scales, bias = torch.randn(2, SHAPE[1], generator=generator)
    for dtype, added in ((torch.float64, bias), (torch.float32, bias), (torch.float64, None)):
        arguments = (sums.to(dtype), scales.abs(), added, 0.0234375, SHAPE[2])
        yield f"dequantize/{dtype}, {added is None}", arguments


def _softmax() -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(8)
    for columns, scale in itertools.product((7, 5000, 20_000), (0.1, 0.0234375, 2.0**-9)):
        count = min(100_000 // columns, 12)
        q = torch.randint(-128, 128, (count, columns), generator=generator)
        q[0], q[1, 1:] = 5, -128
        yield f"softmax_rows/{columns}, {scale}", (q.float() * scale, exp_table(scale), scale)


def _look_ups() -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(3)
    for bits, scale in ((8, 0.1), (8, 0.0234375), (16, 2.0**-11), (16, 255 * 2.0**-13)):
        entries = 2**bits
        table = torch.randn(entries, generator=generator)
        mask = torch.rand(entries, generator=generator) < 0.1
        zero = -7 if bits == 8 else 0
        first = -(entries // 2) - zero
        q = torch.randint(first, first + entries, (100, 1000), generator=generator)
        q.view(-1)[:entries] = torch.arange(first, first + entries)
        x = q.float() * scale
        yield f"look_up/{bits}, {scale}", (x, table, mask, scale, first)
        yield f"look_up/{bits}, {scale}, no mask", (x, table, None, scale, first)
        yield f"whole_numbers/{bits}, {scale}", (x, scale)
        integers = (x, scale, zero)
        if bits == 8:
            yield f"centered_integers/{scale}", integers
    yield "look_up/empty", (torch.empty(0), torch.zeros(256), None, 1.0, -128)


_SHAPES = (
    *(((100_000,), (100_000,)), ((50, 40, 50), (50,)), ((40, 1), (50, 40, 50)), ((), (1000, 100))),
    *(((40, 1, 50), (1, 50, 50)), ((40, 1, 50), (40, 50, 1)), ((1, 1), (1,)), ((0, 3), (3,))),
)


def _pairs() -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(65536, generator=generator)
    mask = torch.rand(65536, generator=generator) < 0.1
    for shapes in _SHAPES:
        a, b = (torch.randint(-128, 128, shape, generator=generator) for shape in shapes)
        x, y = (a + 5).float() * 0.1, (b - 90).float() * 0.0234375
        arguments = (x, y, table, mask, 0.1, -128 + 5, 0.0234375, -128 - 90)
        yield f"look_up_pair/{shapes}", arguments
    yield "look_up_pair/no mask", (*arguments[:3], None, *arguments[4:])


#: Steps of an LSTM: what differs from the defaults of :func:`lstm_step`.
LSTM_STEPS: dict[str, dict[str, Any]] = {
    "litert": {},
    "litert spills": {"largest_factor": 4.0, "dtype": torch.float64},
    "litert single": {"rounding": reference.SINGLE},
    "litert shift": {"rounding": reference.SHIFT, "saturates": True, "accumulator_bits": 20},
    "tflm": {"is_micro": True},
    "tflm spills": {"is_micro": True, "largest_factor": 4.0, "accumulator_bits": 24},
    "tflm single": {"is_micro": True, "rounding": reference.SINGLE, "cell_exponent": -9},
    "tflm shift": {"is_micro": True, "rounding": reference.SHIFT, "cell_exponent": -15},
}
_STEP = {"rows": 190, "batch": 200, "size": 180, "steps": 3}


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def lstm_step(
    name: str,
    *,
    rounding: int = reference.DOUBLE,
    is_micro: bool = False,
    largest_factor: float = 0.3,
    accumulator_bits: int = 32,
    saturates: bool = False,
    cell_exponent: int = -11,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, ...]:
    """Arguments of the second step of three, of 136,800 gates."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    rows, batch, size, steps = _STEP.values()
    every, gates = batch + (steps - 1) * rows, 4 * size
    bits = torch.int16
    sums = _uniform(generator, -1, 1, batch, gates) * torch.exp2(
        _uniform(generator, 0, 31, batch, 1)
    )
    inputs = _uniform(generator, -(2**15), 2**15 - 1, every, gates) * _uniform(
        generator, 0, 1, gates
    )
    inputs[:, ::7] = torch.tensor([-(2.0**15), 2.0**15 - 1]).repeat(every)[:every, None]
    factors = torch.exp2(_uniform(generator, -20, 0, gates)) * largest_factor
    if rounding == reference.SHIFT:
        factors = torch.exp2(factors.log2().round())
    offset = _uniform(generator, -1e4, 1e4, gates).round()
    tables = (_uniform(generator, -(2**15), 2**15, 3, 2**16)).floor().to(bits)
    tables[0] = tables[0].abs()
    cells = _uniform(generator, -(2**15), 2**15, batch + every, size).floor().to(bits)
    buffers = (torch.zeros(every, size), *(torch.zeros(every, gates, dtype=bits) for _ in range(1)))
    return (
        *(sums.round().to(dtype), inputs.round().float(), factors, offset),
        *(tables[:2].flatten(), tables[2], torch.zeros(batch, size, dtype=dtype), *buffers),
        *(
            cells,
            torch.zeros(every, size, dtype=bits),
            torch.zeros(every, gates, dtype=torch.uint8),
        ),
        *(batch, batch, rows, rounding, accumulator_bits, saturates, is_micro, not is_micro),
        *(cell_exponent, 2.0**-30 / 0.0071, -9, -128, 127, 0.0071),
    )


def _lstm_steps() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, settings in LSTM_STEPS.items():
        yield f"lstm_step/{name}", lstm_step(name, **settings)


def _lstm_steps_backward() -> Iterator[tuple[str, tuple[Any, ...]]]:
    rows, batch, size, steps = _STEP.values()
    every = batch + (steps - 1) * rows
    for name in ("random", "large", "not finite"):
        arguments = lstm_step(name, is_micro=True, largest_factor=0.01)
        recurrent_reference.lstm_step(*arguments)
        gates, cells, tanh_cells, flags = arguments[8:12]
        generator = torch.Generator().manual_seed(8)
        grad, d_state, d_cell = (
            torch.randn(n, size, generator=generator) for n in (every, batch, batch)
        )
        if name == "large":
            grad, d_cell = grad * 1e30, d_cell * 1e-30
        if name == "not finite":
            grad[::9], d_cell[::7, 0], d_state[::5, 1] = torch.inf, torch.nan, -3e38
        d_gates = [torch.zeros(every, 4 * size) for _ in range(2)]
        yield (
            f"lstm_step_backward/{name}",
            (
                *(grad, d_state, d_cell, gates, cells, tanh_cells, flags, *d_gates),
                *(batch, batch, rows, -11),
            ),
        )


#: Steps of a GRU: what differs from the defaults of :func:`gru_step`.
GRU_STEPS: dict[str, dict[str, Any]] = {
    "litert": {"state_rounding": reference.REAL},
    "tflm": {},
    "one part": {"parts": 1, "dtype": torch.float64},
    "single": {"state_rounding": reference.SINGLE, "rounding": reference.SINGLE},
    "shift": {
        **{"state_rounding": reference.SHIFT, "rounding": reference.SHIFT},
        **{"saturates": True, "accumulator_bits": 24},
    },
    "double": {"state_rounding": reference.DOUBLE, "accumulator_bits": 32},
}


def gru_step(
    name: str,
    *,
    state_rounding: int = reference.REDUCED,
    rounding: int = reference.DOUBLE,
    parts: int = 2,
    saturates: bool = False,
    accumulator_bits: int = 64,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, ...]:
    """Arguments of the second step of three, of 102,600 gates."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    rows, batch, size, steps = _STEP.values()
    every, gates = batch + (steps - 1) * rows, 3 * size

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return _uniform(generator, low, high, *shape)

    sums = uniform(-1, 1, batch * parts, gates) * torch.exp2(uniform(4, 22, batch * parts, 1))
    inputs = uniform(-(2**15), 2**15, every, gates).floor()
    state_factors = torch.exp2(uniform(-24, -8, gates))
    factors = torch.tensor(
        (
            *(0.5, 0.31, 0.9e-4, 0.71 / 2**15, 0.2, 0.5, 1.1e-4),
            *(0.5, 0.4, 0.8e-4, 1.3 / 2**15, 0.5, 0.47, 0.9e-4),
        ),
        dtype=torch.float64,
    )
    if rounding == reference.SHIFT:
        state_factors, factors = (
            torch.exp2(each.log2().round()) for each in (state_factors, factors)
        )
    offset = uniform(-1e6, 1e6, gates).round()
    tables = uniform(-(2**15), 2**15, 2, 2**16).floor().to(torch.int16)
    tables[0] = tables[0].abs()
    states = uniform(-(2**15), 2**15, batch + every, size).floor().to(torch.int16)
    return (
        *(sums.round().to(dtype), inputs.float(), state_factors, offset, factors, *tables),
        *(torch.zeros(batch, parts, size, dtype=dtype), states, torch.zeros(every, size)),
        *(torch.zeros(every, 6 * size, dtype=torch.int16), batch, batch, rows),
        *(state_rounding, rounding, accumulator_bits, saturates, 0.00037),
    )


def _gru_steps() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, settings in GRU_STEPS.items():
        yield f"gru_step/{name}", gru_step(name, **settings)


def _gru_steps_backward() -> Iterator[tuple[str, tuple[Any, ...]]]:
    rows, batch, size, steps = _STEP.values()
    every = batch + (steps - 1) * rows
    for name in ("random", "large", "not finite"):
        arguments = gru_step(name)
        recurrent_reference.gru_step(*arguments)
        generator = torch.Generator().manual_seed(9)
        grad, d_product, d_change = (
            torch.randn(n, size, generator=generator) for n in (every, batch, batch)
        )
        if name == "large":
            grad, d_change = grad * 1e30, d_change * 1e-30
        if name == "not finite":
            grad[::9], d_change[::7, 0], d_product[::5, 1] = torch.inf, torch.nan, -3e38
        gradients = [torch.zeros(every, 3 * size) for _ in range(2)]
        rest = (arguments[10], *gradients, batch, rows, 0.0013, 0.00051)
        yield f"gru_step_backward/{name}", (grad, d_product, d_change, *rest)


#: Cases by the name of their operator.
CASES: dict[str, Callable[[], Iterator[tuple[str, tuple[Any, ...]]]]] = {
    "requantize": _requantizations,
    "quantize": _quantizations,
    "quantize_rows": _rows,
    "raise_scales": _raises,
    "normalize_rows": _normalizations,
    "fold_batch_norm": _folds,
    "softmax_rows": _softmax,
    "dequantize": _dequantizations,
    "look_up": _look_ups,
    "look_up_pair": _pairs,
    "lstm_step": _lstm_steps,
    "lstm_step_backward": _lstm_steps_backward,
    "gru_step": _gru_steps,
    "gru_step_backward": _gru_steps_backward,
}


def difference(expected: Any, computed: Any) -> str:
    """Say how results of a kernel differ from those of the reference; empty if in no bit."""
    if isinstance(expected, Tensor):
        expected, computed = (expected,), (computed,)
    for position, (a, b) in enumerate(zip(expected, computed, strict=True)):
        b = b.cpu()
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"result {position}: {a.dtype} {a.shape}, {b.dtype} {b.shape}"
        bits = {torch.float32: torch.int32, torch.float64: torch.int64}.get(a.dtype, a.dtype)
        unequal = (a.view(bits) != b.view(bits)) & ~(a.isnan() & b.isnan())
        if bool(unequal.any()):
            return f"result {position}: {int(unequal.sum())} differ, {a[unequal]}, {b[unequal]}"
    return ""


def differences(run: Callable[..., Any], *operators: str) -> Iterator[tuple[str, str]]:
    """Compare cases with the reference; ``run`` takes a name, then arguments.

    A kernel that writes to its arguments returns these.
    """
    for make in map(CASES.__getitem__, operators or CASES):
        for name, arguments in make():
            operator = name.partition("/")[0]
            module = reference if hasattr(reference, operator) else recurrent_reference
            own, other = ([_cloned(x) for x in arguments] for _ in range(2))
            expected, computed = getattr(module, operator)(*own), run(operator, *other)
            if expected is None:  # The kernel has written to its arguments.
                expected, computed = (
                    tuple(x for x in each if isinstance(x, Tensor)) for each in (own, computed)
                )
            yield name, difference(expected, computed)


def _cloned(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def main() -> None:
    """Print what differs between the interpreted Triton kernels and the reference."""
    from lightning_nna.emulation.kernels import (
        triton_kernels,
        triton_layers,
        triton_normalization,
        triton_recurrent,
    )

    def run(operator: str, *arguments: Any) -> Any:
        modules = triton_kernels, triton_layers, triton_normalization, triton_recurrent
        module = next(each for each in modules if hasattr(each, operator))
        results = getattr(module, operator)(*arguments, block=2**14)
        if operator == "largest_of_groups":
            return results.amax(1, keepdim=True)
        if operator in ("quantize", "quantize_rows"):  # Each program tells of its own.
            return *results[:2], results[2].all()
        return arguments if results is None else results

    print(json.dumps(dict(differences(run, *sys.argv[1:]))))


if __name__ == "__main__":
    main()
