"""The chip's arithmetic restated with NumPy integers: slow, literal, independent of the emulator.

Each function predicts what LiteRT's reference kernel computes, bit for bit; ``test_litert.py``
holds them to it. Arrays of stored integers come and go as int64; scales are float32, as in a file.

Vocabulary: ``acc`` an accumulator, ``multiplier`` and ``shift`` a rescaling by
multiplier 2^(shift - 31), ``zero`` a zero point.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# LiteRT takes expf and tanhf from the machine's C library, whose last bit is its own.
_C = ctypes.CDLL("libm.so.6")
for _name in ("expf", "tanhf"):
    getattr(_C, _name).restype = ctypes.c_float
    getattr(_C, _name).argtypes = [ctypes.c_float]

INT8 = (-128, 127)
INT16 = (-(2**15), 2**15 - 1)
INT32 = (-(2**31), 2**31 - 1)


class Stored(NamedTuple):
    """Stored integers, with the scale and zero point that give them a value."""

    values: np.ndarray
    scale: float | np.ndarray
    zero: int = 0


# Rounding and rescaling


def truncating_divide(a: np.ndarray, b: int) -> np.ndarray:
    """Divide toward zero, as C does; NumPy's own division rounds down."""
    return np.sign(a) * (np.abs(a) // b)


def round_half_away(x: np.ndarray) -> np.ndarray:
    """Round to the nearest integer, ties away from zero; x + 0.5 could round by itself."""
    whole = np.trunc(x)
    return (whole + np.sign(x) * (np.abs(x - whole) >= 0.5)).astype(np.int64)


def rounding_divide_by_power(x: np.ndarray, exponent: int) -> np.ndarray:
    """Return x / 2^exponent, ties away from zero."""
    threshold = ((1 << exponent) - 1 >> 1) + (x < 0)
    return (x >> exponent) + ((x & ((1 << exponent) - 1)) > threshold)


def doubling_high_multiply(a: np.ndarray, b: int | np.ndarray, bits: int = 32) -> np.ndarray:
    """Return 2 a b / 2^bits rounded, for two integers of ``bits`` bits."""
    product = a * np.asarray(b, np.int64)
    half = 1 << (bits - 2)
    nudged = product + np.where(product >= 0, half, 1 - half)
    return np.minimum(truncating_divide(nudged, 1 << (bits - 1)), (1 << (bits - 1)) - 1)


def quantize_multiplier(real: float) -> tuple[int, int]:
    """Return (multiplier, shift) such that real is about multiplier 2^(shift - 31)."""
    fraction, shift = math.frexp(float(real))
    multiplier = math.floor(fraction * 2**31 + 0.5)
    if multiplier == 2**31:
        return 2**30, shift + 1
    return (0, 0) if shift < -31 else (multiplier, shift)


def rescale(x: np.ndarray, real: float) -> np.ndarray:
    """Return x times real in double rounding: high multiply, then divide by a power of two."""
    multiplier, shift = quantize_multiplier(real)
    high = doubling_high_multiply(x << max(shift, 0), multiplier)
    return rounding_divide_by_power(high, max(-shift, 0))


# Operators


def fully_connected(
    x: Stored, weight: Stored, bias: np.ndarray | None, y: Stored, *, relu: bool = False
) -> np.ndarray:
    """Predict FULLY_CONNECTED: the one operator that rescales in double precision."""
    acc = (x.values.astype(np.int64) - x.zero) @ weight.values.astype(np.int64).T
    if bias is not None:
        acc = acc + bias
    real = np.float64(x.scale) * np.asarray(weight.scale, np.float64) / np.float64(y.scale)
    rescaled = round_half_away(acc.astype(np.float64) * real) + y.zero
    return np.clip(rescaled, max(INT8[0], y.zero) if relu else INT8[0], INT8[1])


def add(a: Stored, b: Stored, y: Stored, *, sign: int = 1) -> np.ndarray:
    """Predict ADD, or SUB with ``sign`` -1: both sides on a common grid 2^20 finer."""
    twice_max = 2 * np.float64(max(a.scale, b.scale))
    left = rescale((a.values.astype(np.int64) - a.zero) << 20, np.float64(a.scale) / twice_max)
    right = rescale((b.values.astype(np.int64) - b.zero) << 20, np.float64(b.scale) / twice_max)
    total = rescale(left + sign * right, twice_max / (2**20 * np.float64(y.scale)))
    return np.clip(total + y.zero, *INT8)


def multiply(a: Stored, b: Stored, y: Stored) -> np.ndarray:
    """Predict MUL; its scales are multiplied and divided in single precision."""
    product = (a.values.astype(np.int64) - a.zero) * (b.values.astype(np.int64) - b.zero)
    real = np.float32(np.float32(a.scale) * np.float32(b.scale)) / np.float32(y.scale)
    return np.clip(rescale(product, real) + y.zero, *INT8)


def requantize(x: Stored, y: Stored, *, limits: tuple[int, int] = INT8) -> np.ndarray:
    """Predict QUANTIZE from integers to integers."""
    real = np.float64(x.scale) / np.float64(y.scale)
    return np.clip(rescale(x.values.astype(np.int64) - x.zero, real) + y.zero, *limits)


def relu(x: Stored, y: Stored) -> np.ndarray:
    """Predict RELU, which may rescale as it goes."""
    real = np.float32(x.scale) / np.float32(y.scale)
    rescaled = rescale(x.values.astype(np.int64) - x.zero, real) + y.zero
    return np.clip(rescaled, max(INT8[0], y.zero), INT8[1])


def quantize(x: np.ndarray, y: Stored, *, limits: tuple[int, int] = INT8) -> np.ndarray:
    """Predict QUANTIZE from float32 to integers."""
    return np.clip(round_half_away(x.astype(np.float32) / np.float32(y.scale)) + y.zero, *limits)


def dequantize(x: Stored) -> np.ndarray:
    """Predict DEQUANTIZE to float32."""
    return np.float32(x.scale) * (x.values.astype(np.int32) - x.zero).astype(np.float32)


def logistic_single(value: float) -> float:
    """Return the sigmoid in the kernel's steps: expf, then single precision."""
    return float(np.float32(1) / (np.float32(1) + np.float32(_C.expf(-value))))


def tanh_single(value: float) -> float:
    """Return the C library's tanhf, which is not always the nearest single to tanh."""
    return float(_C.tanhf(value))


def table(function: Callable[[float], float], x: Stored, y: Stored) -> np.ndarray:
    """Predict an int8 non-linearity, a table of 256 entries made in single precision."""
    real = np.float32(x.scale) * np.arange(-128 - x.zero, 128 - x.zero).astype(np.float32)
    image = np.array([function(float(value)) for value in real]).astype(np.float32)
    scaled = image * (np.float32(1) / np.float32(y.scale))
    entries = np.clip(round_half_away(scaled) + y.zero, *INT8)
    return entries[x.values.astype(np.int64) + 128]


# 16-bit fixed-point functions of the LSTM. A raw value with k integer bits is raw / 2^(15 - k).


def _constant(value: float) -> int:
    """Return a constant as the 16-bit rounding of its 32-bit form."""
    return int(rounding_divide_by_power(np.int64(round(value * 2**31)), 16))


def _multiply16(a: np.ndarray, b: int | np.ndarray) -> np.ndarray:
    return doubling_high_multiply(a, b, bits=16)


def _shift_left16(x: np.ndarray, exponent: int) -> np.ndarray:
    return np.clip(x << exponent, *INT16)


def exp_near_zero(a: np.ndarray) -> np.ndarray:
    """Return exp(a) for a in [-1/4, 0), all in Q0.15: a Taylor polynomial about -1/8."""
    x = a + (1 << 12)
    x2 = _multiply16(x, x)
    x3 = _multiply16(x2, x)
    x4_over_4 = rounding_divide_by_power(_multiply16(x2, x2), 2)
    third = _multiply16(x4_over_4 + x3, _constant(1 / 3))
    tail = rounding_divide_by_power(third + x2, 1)
    constant = _constant(math.exp(-1 / 8))
    return np.clip(constant + _multiply16(x + tail, constant), *INT16)


def exp_of_negative(a: np.ndarray, integer_bits: int) -> np.ndarray:
    """Return exp(a) in Q0.15 for a <= 0: its value near zero, times a power for each bit."""
    fraction_bits = 15 - integer_bits
    quarter = 1 << (fraction_bits - 2)
    near = (a & (quarter - 1)) - quarter
    result = exp_near_zero(_shift_left16(near, integer_bits))
    remainder = near - a
    for exponent in range(-2, 5):
        if integer_bits > exponent:
            reduced = _multiply16(result, _constant(math.exp(-(2.0**exponent))))
            bit = 1 << (fraction_bits + exponent)
            result = np.where(remainder & bit, reduced, result)
    if integer_bits > 5:
        result = np.where(a < -(32 << fraction_bits), 0, result)
    return np.where(a == 0, INT16[1], result)


def _reciprocal(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return x = 2 / (1 + a) in Q2.13 for a in [0, 1] in Q0.15, by three Newton steps."""
    total = a + INT16[1]
    half = truncating_divide(total + np.where(total >= 0, 1, -1), 2)
    x = _constant(48 / 17 / 4) + _multiply16(half, _constant(-32 / 17 / 4))
    for _ in range(3):
        error = (1 << 13) - _multiply16(half, x)
        x = x + _shift_left16(_multiply16(x, error), 2)
    return x


def logistic16(x: np.ndarray) -> np.ndarray:
    """Return the sigmoid of Q3.12 in Q0.15."""
    positive = _shift_left16(_reciprocal(exp_of_negative(-np.abs(x), 3)), 1)
    return np.where(x == 0, 1 << 14, np.where(x > 0, positive, INT16[1] - positive))


def tanh16(x: np.ndarray, integer_bits: int) -> np.ndarray:
    """Return the hyperbolic tangent in Q0.15 of a number with ``integer_bits``."""
    reciprocal = _reciprocal(exp_of_negative(-np.abs(x), integer_bits + 1))
    positive = _shift_left16(reciprocal - (1 << 13), 2)
    return np.where(x == 0, 0, np.where(x > 0, positive, -positive))


# LSTM


def lstm(
    x: Stored,
    input_weights: Sequence[Stored],
    recurrent_weights: Sequence[Stored],
    biases: Sequence[np.ndarray],
    hidden: Stored,
    cell: Stored,
    *,
    cell_clip: float = 0.0,
) -> np.ndarray:
    """Predict UNIDIRECTIONAL_SEQUENCE_LSTM 8x8_16 over x (batch, time, input).

    ``hidden`` and ``cell`` hold the initial state; gates come as input, forget, cell, output.
    """
    cell_exponent = round(math.log2(cell.scale))
    state, memory = hidden.values.astype(np.int64), cell.values.astype(np.int64)
    limits = INT16
    if cell_clip > 0:
        bound = int(min(np.float32(cell_clip) / np.float32(cell.scale), INT16[1]))
        limits = (-bound, bound)
    outputs = []
    for step in range(x.values.shape[1]):
        frame = x._replace(values=x.values[:, step])
        past = hidden._replace(values=state)
        i, f, g, o = (
            _gate(frame, past, *gate)
            for gate in zip(input_weights, recurrent_weights, biases, strict=True)
        )
        i, f, g, o = logistic16(i), logistic16(f), tanh16(g, 3), logistic16(o)
        kept = rounding_divide_by_power(f * memory, 15)
        new = rounding_divide_by_power(i * g, 30 + cell_exponent)
        memory = np.clip(np.clip(kept + new, *INT16), *limits)
        squashed = tanh16(memory, 15 + cell_exponent)
        real = np.float32(2.0**-15) / np.float32(hidden.scale) * np.float32(2.0**-15)
        state = np.clip(rescale(o * squashed, real) + hidden.zero, *INT8)
        outputs.append(state)
    return np.stack(outputs, axis=1)


def _gate(
    x: Stored, hidden: Stored, input_weight: Stored, recurrent_weight: Stored, bias: np.ndarray
) -> np.ndarray:
    """Return a gate's pre-activation in Q3.12; the two terms saturate one after the other."""
    gate: np.ndarray | int = 0
    for source, weight, offset in ((x, input_weight, bias), (hidden, recurrent_weight, 0)):
        acc = (source.values.astype(np.int64) - source.zero) @ weight.values.astype(np.int64).T
        real = np.float32(weight.scale) * np.float32(source.scale) / np.float32(2.0**-12)
        gate = np.clip(rescale(acc + offset, real) + gate, *INT16)
    return np.asarray(gate)
