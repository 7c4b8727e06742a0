"""Compile kernels for processors with Numba: one pass over memory for what takes PyTorch many.

A kernel is a function of NumPy arrays that works on a range of rows. Numba compiles it when it is
first called, for the processor at hand, and keeps the result in a cache. It needs no compiler of
the system. Float arithmetic is IEEE's: nothing is reordered or fused.

Each function of the modules ``compiled_*`` has the name and the arguments of one of
:mod:`.reference`, and its bits. A mask of clipped elements is None where nothing was clipped: most
often there is nothing, and a backward has nothing to do then.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Elements from which on a thread is worth its start.
_ELEMENTS_OF_A_THREAD = 2**15

#: Integer that PyTorch makes of a real number that int64 does not hold, on x86-64.
_NO_INTEGER = -(2**63)


def _digest() -> str:
    """Digest of the sources that compiled kernels are made of."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


_SOURCES = _digest()


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function of arrays; while it runs, other threads of Python go on."""
    return _jitted(function)


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a function of numbers into the loops that call it."""
    return _jitted(function, inline="always")


def _jitted(function: Callable[..., Any], **options: Any) -> Any:
    jit = partial(numba.njit, nogil=True, error_model="numpy", **options)
    try:
        kernel: Any = jit(cache=True)(function)
        # Numba looks at the time of the kernel's own file, which is the same in each release of a
        # package: a kernel is compiled anew wherever the source of any has changed.
        index = kernel._cache._cache_file
        index._source_stamp = index._source_stamp, _SOURCES
    except (RuntimeError, AttributeError):
        # No folder can be written, or this Numba has another cache: each process compiles.
        return jit()(function)
    return kernel


def array(x: Tensor) -> NDArray[Any]:
    """Return the memory of a tensor of any shape as an array; a copy if it has gaps."""
    # Each of these calls takes as long as a kernel takes for some hundred elements.
    if x.requires_grad:
        x = x.detach()
    return (x if x.is_contiguous() else x.contiguous()).numpy()


def over_rows(rows: int, elements: int, kernel: Callable[..., int], *arguments: Any) -> int:
    """Run a kernel on ranges of rows, one for each thread that PyTorch may use.

    Args:
        rows: Number of rows.
        elements: Number of elements of all rows.
        kernel: Compiled function of ``arguments``, the first row and the row after the last.
        arguments: Arrays and numbers.

    Returns:
        Sum of what the kernel returns.
    """
    threads = min(torch.get_num_threads(), elements // _ELEMENTS_OF_A_THREAD, rows)
    if threads < 2:
        return kernel(*arguments, 0, rows)
    bounds = [rows * k // threads for k in range(threads + 1)]
    ranges = list(itertools.pairwise(bounds))
    others = [_pool(os.getpid()).submit(kernel, *arguments, *each) for each in ranges[1:]]
    return kernel(*arguments, *ranges[0]) + sum(each.result() for each in others)


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of a process: those of its parent do not live in it."""
    return ThreadPoolExecutor(max(os.cpu_count() or 1, 1), f"lightning-nna-{process}")


def mask_of(mask: NDArray[np.bool_], clipped: int) -> Tensor | None:
    """Return a mask of clipped elements as a tensor; None if there are none."""
    return torch.from_numpy(mask) if clipped else None


@inlined
def rounded_half_away(x):
    """Round float64, ties away from zero; see :func:`.fixed_point.round_half_away`."""
    integral = np.trunc(x)
    rest = x - integral
    return integral + np.float64(rest >= 0.5) - np.float64(rest <= -0.5)


@inlined
def rounded_half_away_32(x):
    """Round float32, ties away from zero."""
    integral = np.trunc(x)
    rest = x - integral
    half = np.float32(0.5)
    return integral + np.float32(rest >= half) - np.float32(rest <= -half)


@inlined
def lowest(x, bits):
    """Return the lowest bits of int64 as an integer with a sign."""
    return (x << (64 - bits)) >> (64 - bits)


@inlined
def lowest_32(x):
    """Return the lowest 32 bits of int64 as an integer with a sign."""
    return np.int64(np.int32(x))


@inlined
def divided(x, exponent):
    """Divide by a power of two, ties away from zero."""
    half = (np.int64(1) << exponent) >> 1
    # With no exponent there is no tie, and nothing may be taken away.
    return (x + half + (x >> 63 if exponent > 0 else 0)) >> exponent


@inlined
def multiplied(x, mantissa, left, right):
    """Multiply integers of 32 bits by m 2^(left - right - 31), rounded twice."""
    high = (lowest_32(x << left) * lowest_32(mantissa) + 0x40000000) >> 31
    return divided(high, right)


@compiled
def integers_of(x, scale, integers):
    """Write the integers of real values, one axis; see ``_integers`` of :mod:`.reference`.

    Args:
        x: Real values.
        scale: Their scale, float32.
        integers: Array of int64 that is written, of the length of ``x``.
    """
    smallest = np.int64(0)
    bound = np.float32(2147483648.0)
    for i in range(len(integers)):
        quotient = np.rint(x[i] / scale)
        integer = np.int64(np.int32(quotient if abs(quotient) < bound else -bound))
        integers[i] = integer
        smallest = min(smallest, integer)
    if smallest == -2147483648:  # By 64 bits, for which most processors have no vectors.
        bound = np.float32(9223372036854775808.0)
        for i in range(len(integers)):
            quotient = np.rint(x[i] / scale)
            integers[i] = np.int64(quotient) if abs(quotient) < bound else _NO_INTEGER
