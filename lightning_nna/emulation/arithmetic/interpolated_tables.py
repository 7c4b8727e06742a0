r"""Functions of 16-bit integers by a table of segments and straight lines between.

The input's range is cut into 512 segments (or another power of two). A table holds the function at
their ends, moved by half of the error that the straight line makes in the middle, so that the
error is the same at the ends and in the middle:

.. math:: t_i = f_i - \tfrac12 \left(\tfrac12 (f_i + f_{i+1}) - f_{i+1/2}\right), \qquad
          y = t_i + \lfloor (t_{i+1} - t_i)\, r / 2^7 \rceil

with :math:`i` the segment and :math:`r` the place within it. This is how LiteRT's reference
kernels compute functions of 16-bit tensors that have no arithmetic of their own; table and look-up
are equal to theirs in every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from lightning_nna.emulation.arithmetic.device_tables import on_device_of
from lightning_nna.emulation.arithmetic.fixed_point import INT16_MAX, INT16_MIN

#: A function of arrays; the second argument is the largest value of the output's grid.
RealFunction = Callable[[NDArray[Any], Any], NDArray[Any]]


def interpolation_table(
    function: RealFunction,
    input_scale: float,
    output_scale: float,
    *,
    segments: int = 512,
    zero_point: int = 0,
    precision: type[np.floating] = np.float32,
) -> Int[Tensor, " entries"]:
    """Tabulate a function of 16-bit numbers at the ends of segments.

    Args:
        function: Takes inputs and the largest value that the output can have.
        input_scale: Scale of the input.
        output_scale: Scale of the output.
        segments: A power of two, at most 65536.
        zero_point: The input's integer that stands for 0; the output's is 0.
        precision: In which the table is computed: the reference's softmax has float64.

    Returns:
        int64 table of ``segments + 1`` entries.

    Raises:
        ValueError: If ``segments`` is no power of two.

    Example:
        >>> table = interpolation_table(lambda x, _: x, 1.0, 1.0)
        >>> table[[0, 256, 512]]
        tensor([-32768,     -1,  32767])
    """
    if segments < 2 or segments > 2**16 or segments & (segments - 1):
        raise ValueError(f"segments must be a power of two from 2 to 65536, got {segments}")
    # One precision throughout, in the order of the reference.
    scale_in, scale_out = precision(input_scale), precision(output_scale)
    first = scale_in * precision(INT16_MIN - zero_point)
    last = scale_in * precision(INT16_MAX - zero_point)
    lowest, largest = scale_out * precision(INT16_MIN), scale_out * precision(INT16_MAX)
    inverse = precision(2**16) / (largest - lowest)
    return _entries(lambda x: function(x, largest), first, last, inverse, segments)


def table_between(
    function: Callable[[NDArray[Any]], NDArray[Any]], first: float, last: float
) -> Int[Tensor, "513"]:
    """Tabulate a function between two numbers in steps of 2^-15, as TFLite-Micro's softmax does.

    Args:
        function: Takes and returns float32.
        first: Number of the first entry.
        last: Number of the last.

    Returns:
        int64 table of 513 entries.

    Example:
        >>> table_between(lambda x: x, -1.0, 0.0)[[0, 256, 512]]
        tensor([-32768, -16384,      0])
    """
    return _entries(function, np.float32(first), np.float32(last), np.float32(2**15), 512)


def _entries(
    function: Callable[[NDArray[Any]], NDArray[Any]],
    first: np.floating,
    last: np.floating,
    inverse: np.floating,
    segments: int,
) -> Tensor:
    """Entries for segments from ``first`` to ``last``, where ``inverse`` is 1 over a step."""
    precision = type(first)
    step = (last - first) / precision(segments)
    starts = first + np.arange(segments + 1, dtype=precision) * step
    ends = function(starts).astype(precision)
    middles = function(starts[:-1] + step / precision(2)).astype(precision) * inverse
    values = _round(ends[:-1] * inverse)
    straight = _round((ends[1:] * inverse + values) / precision(2))
    bias = _round((straight - _round(middles)) / precision(2))
    end = _round(function(np.array([last])).astype(precision) * inverse)
    table = np.concatenate([values - bias, end]).clip(INT16_MIN, INT16_MAX)
    return torch.from_numpy(table.astype(np.int64))


def interpolate(table: Int[Tensor, " entries"], x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Look 16-bit integers up in a table of :func:`interpolation_table`.

    Args:
        table: ``2^k + 1`` entries.
        x: Integers in [-32768, 32767], int64.

    Returns:
        int64 integers, 16 bits.

    Example:
        >>> interpolate(torch.tensor([-100, 0, 100]), torch.tensor([-16384, 0, 8192]))
        tensor([-50,   0,  25])
    """
    shift = 16 - (len(table) - 1).bit_length() + 1
    table = on_device_of(x, table)
    offset = x - INT16_MIN
    segment, inside = offset >> shift, offset & ((1 << shift) - 1)
    start = table[segment]
    rise = (table[segment + 1] - start) * inside
    return start + ((rise + ((1 << shift) >> 1)) >> shift)


def inverse_square_root(x: NDArray[Any], largest: Any) -> NDArray[Any]:
    """1 / sqrt(x), and the largest output where x is not positive.

    Example:
        >>> inverse_square_root(np.array([4.0, 0.0], np.float32), np.float32(9.0)).tolist()
        [0.5, 9.0]
    """
    positive = np.maximum(x, np.float32(1e-38))
    return np.where(x > 0, np.float32(1) / np.sqrt(positive), largest).astype(np.float32)


def _round(x: NDArray[Any]) -> NDArray[Any]:
    """Ties away from zero, in the precision of ``x``."""
    return np.copysign(np.floor(np.abs(x) + x.dtype.type(0.5)), x)
