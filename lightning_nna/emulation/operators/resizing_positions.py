"""Positions of resized images in the kernels of runtimes.

LiteRT and TFLite-Micro have 10 fraction bits, TOSA the fraction itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# What LiteRT divides the distance of two elements into.
_PARTS = 1024


@dataclass(frozen=True)
class Positions:
    """Positions of outputs along an axis.

    Args:
        lower: Element before the position, int64, shape ``(outputs,)``.
        upper: Element after it.
        fraction: Distance from the lower element, float32, whole numbers.
        one: Distance of two elements in the same unit.
    """

    lower: Tensor
    upper: Tensor
    fraction: Tensor
    one: float


@lru_cache(maxsize=256)
def positions_of_litert(before: int, after: int, corners: bool) -> Positions:
    """Return the positions of outputs between the elements of an axis.

    Args:
        before: Number of elements.
        after: Number of outputs.
        corners: Whether corners are in the same places, and not centers.

    Example:
        >>> (positions_of_litert(4, 8, False).fraction / 1024)[2:4]
        tensor([0.7500, 0.2500])
    """
    # 4 elements become 8, so that the scale is 512: the positions are -256, 256, 768 and so on,
    # which are -1/4, 1/4 and 3/4.
    scale = (_PARTS * before + after // 2) // after
    if corners and after > 1:
        scale = (_PARTS * (before - 1) + (after - 1) // 2) // (after - 1)
    positions = torch.arange(after) * scale
    if not corners:
        positions += scale // 2 - _PARTS // 2
    lower = positions.div(_PARTS, rounding_mode="trunc").clamp_min(0)
    upper = (positions + _PARTS - 1).div(_PARTS, rounding_mode="trunc").clamp_max(before - 1)
    return Positions(lower, upper, (positions - _PARTS * lower).float(), _PARTS)


@lru_cache(maxsize=256)
def positions_of_tosa(before: int, after: int, corners: bool) -> Positions:
    """Return the same as TOSA's RESIZE has them in the converter's programs.

    Args:
        before: Number of elements.
        after: Number of outputs.
        corners: Whether corners are in the same places, and not centers.

    Example:
        >>> positions = positions_of_tosa(4, 8, False)
        >>> positions.fraction[2:4], positions.one
        (tensor([3., 1.]), 4.0)
    """
    if before == 1:
        only = torch.zeros(after, dtype=torch.int64)
        return Positions(only, only, only.float(), float(after))
    aligned = corners and after > 1
    outputs, inputs = (after - 1, before - 1) if aligned else (after, before)
    shared = math.gcd(outputs, inputs)
    one, step = 2 * outputs // shared, 2 * inputs // shared
    positions = torch.arange(after) * step
    if not corners:
        positions += step // 2 - one // 2
    lower = positions // one
    fraction = (positions - one * lower).float()
    upper = (lower + 1).clamp(0, before - 1)
    return Positions(lower.clamp(0, before - 1), upper, fraction, float(one))


def nearest_of_litert(before: int, after: int, *, half_pixel: bool) -> Tensor:
    """Return the elements that the kernel takes, int64, shape ``(after,)``.

    Args:
        before: Number of elements.
        after: Number of outputs.
        half_pixel: Whether positions are those of centers.

    Example:
        >>> nearest_of_litert(3, 4, half_pixel=False)
        tensor([0, 0, 1, 2])
    """
    scale = np.float32(before) / np.float32(after)
    offset = np.float32(0.5 if half_pixel else 0.0)
    positions = np.floor((np.arange(after, dtype=np.float32) + offset) * scale)
    return torch.from_numpy(np.minimum(positions, before - 1)).long()


def nearest_of_tosa(before: int, after: int, *, half_pixel: bool) -> Tensor:
    """Return the same in TOSA, which takes the nearer one of two elements, the latter of equals.

    Args:
        before: Number of elements.
        after: Number of outputs.
        half_pixel: Whether positions are those of centers.

    Example:
        >>> nearest_of_tosa(3, 4, half_pixel=False)
        tensor([0, 1, 2, 2])
    """
    twice = 2 * torch.arange(after) * before
    # Centers are half an element further in.
    twice += (before - after) if half_pixel else 0
    return ((twice + after) // (2 * after)).clamp(0, before - 1)
