"""Mean and variance of channels, compiled for processors, with the bits of ``torch.var_mean``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_nna.emulation.kernels.compiled import array, compiled, over_rows

# Channels that are added up side by side: a processor divides as many at once.
_LANES = 8


@compiled
def _channel_statistics(x, variance, mean, first, last):  # type: ignore[no-untyped-def]
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
                if width == _LANES:
                    for lane in range(_LANES):
                        value = np.float64(x[n, start + lane, i])
                        delta = value - means[lane]
                        means[lane] += delta / count
                        squares[lane] += delta * (value - means[lane])
                else:
                    for lane in range(width):
                        value = np.float64(x[n, start + lane, i])
                        delta = value - means[lane]
                        means[lane] += delta / count
                        squares[lane] += delta * (value - means[lane])
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
