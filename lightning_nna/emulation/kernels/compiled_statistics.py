"""Sums of channels and rows, compiled for processors, with the bits of PyTorch's functions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_nna.emulation.kernels.compiled import array, compiled, inlined, over_rows

# Channels that are added up side by side: a processor divides as many at once.
_LANES = 8


@inlined
def _add(x, n, start, i, count, means, squares, lanes):
    """Add one element of each channel of a block to the means and sums of squares."""
    for lane in range(lanes):
        value = np.float64(x[n, start + lane, i])
        delta = value - means[lane]
        means[lane] += delta / count
        squares[lane] += delta * (value - means[lane])


@compiled
def _channel_statistics(x, variance, mean, first, last):
    """Welford's recurrence in float64, in the order of memory within a channel."""
    samples, _, size = x.shape
    means, squares = np.zeros(_LANES, np.float64), np.zeros(_LANES, np.float64)
    for block in range(first, last):
        start = block * _LANES
        width = min(_LANES, x.shape[1] - start)
        means[:], squares[:] = 0.0, 0.0
        count = 0.0
        for n in range(samples):
            for i in range(size):
                count += 1.0
                # A number of lanes that is known becomes vector instructions.
                if width == _LANES:
                    _add(x, n, start, i, count, means, squares, _LANES)
                else:
                    _add(x, n, start, i, count, means, squares, width)
        for lane in range(width):
            variance[start + lane] = np.float32(squares[lane] / count)
            mean[start + lane] = np.float32(means[lane])
    return 0


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the variance, not corrected, and the mean of each channel, whatever the threads.

    Args:
        x: float32, shape ``(batch, channels, ...)``.

    Returns:
        float32, shape ``(channels,)`` each.
    """
    values = array(x)
    samples, channels = values.shape[:2]
    variance, mean = np.empty(channels, np.float32), np.empty(channels, np.float32)
    size = values.size // max(samples * channels, 1)
    shaped = values.reshape(samples, channels, size)
    blocks = -(-channels // _LANES)
    over_rows(blocks, values.size, _channel_statistics, shaped, variance, mean)
    return torch.from_numpy(variance), torch.from_numpy(mean)


@compiled
def _row_sums(stored, sums, sizes, first, last):
    for r in range(first, last):
        total, size = np.int32(0), np.int32(0)
        for i in range(stored.shape[1]):
            total += np.int32(stored[r, i])
            size += abs(np.int32(stored[r, i]))
        sums[r], sizes[r] = total, size
    return 0


def row_sums(stored: Tensor) -> tuple[Tensor, float]:
    """Return the sum of each row of a weight, and the largest sum of absolute values.

    Args:
        stored: int8, shape ``(rows, ...)``.

    Returns:
        float64, shape ``(rows,)``, and a whole number.
    """
    integers = array(stored)
    rows = len(integers)
    sums, sizes = np.empty(rows, np.float64), np.empty(rows, np.int32)
    matrix = integers.reshape(rows, -1) if integers.size else integers.reshape(rows, 0)
    over_rows(rows, integers.size, _row_sums, matrix, sums, sizes)
    return torch.from_numpy(sums), float(sizes.max()) if rows else 0.0


@compiled
def _row_values(stored, scales, values, first, last):
    for r in range(first, last):
        scale = scales[r] if len(scales) else np.float32(1.0)
        for i in range(stored.shape[1]):
            values[r, i] = np.float32(stored[r, i]) * scale
    return 0


_NO_SCALES = np.zeros(0, np.float32)


def row_values(stored: Tensor, scales: Tensor | None) -> Tensor:
    """Return what the integers of a weight stand for, float32, in its shape.

    Args:
        stored: int8, shape ``(rows, ...)``.
        scales: float32, shape ``(rows,)``; None for 1.
    """
    integers = array(stored)
    values, rows = np.empty(integers.shape, np.float32), len(integers)
    if integers.size:
        factors = _NO_SCALES if scales is None else array(scales)
        matrix = integers.reshape(rows, -1), factors, values.reshape(rows, -1)
        over_rows(rows, integers.size, _row_values, *matrix)
    return torch.from_numpy(values)
