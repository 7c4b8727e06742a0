r"""Ranges of activations, and the scales and zero points that follow from them.

A call site's range is observed while the network runs in float, then frozen:

.. math:: q = \mathrm{clip}(\mathrm{round}(x / s) + o,\ q_{lo},\ q_{hi}), \qquad x \approx s (q - o)

Scales have 16-bit significands, so that every :math:`s (q - o)` of an 8-bit activation is exact
in float32: an activation travels as the float tensor it stands for and its integers are recovered
without loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_SIGNIFICAND_BITS = 16


@dataclass(frozen=True)
class QParams:
    """Quantisation parameters of an activation.

    Args:
        scale: :math:`s > 0`, in the unit of the activation.
        zero_point: :math:`o`, the integer that stands for 0.
        low: Smallest integer, included.
        high: Largest integer, included.

    Example:
        >>> QParams(0.5, -128).bounds
        (0, 255)
    """

    scale: float
    zero_point: int
    low: int = -128
    high: int = 127

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest integer after the zero point is taken off."""
        return self.low - self.zero_point, self.high - self.zero_point


#: Stands in the place of parameters while ranges are being observed.
PENDING = QParams(1.0, 0)

#: Outputs that the reference fixes, whatever the data.
SIGMOID_OUTPUT = QParams(1 / 256, -128)
TANH_OUTPUT = QParams(1 / 128, 0)


def round_significand(scale: float) -> float:
    """Round a positive number up to a 16-bit significand.

    Example:
        >>> round_significand(0.1) * 255 == float(torch.tensor(round_significand(0.1)) * 255)
        True
    """
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(math.ceil(mantissa * 2**_SIGNIFICAND_BITS), exponent - _SIGNIFICAND_BITS)


def affine_qparams(minimum: float, maximum: float) -> QParams:
    """Scale and zero point of an int8 activation that covers a range and 0.

    Args:
        minimum: Smallest value, in the activation's unit.
        maximum: Largest value.

    Raises:
        ValueError: If the range is not finite or upside down.

    Example:
        >>> affine_qparams(0.0, 255.0)
        QParams(scale=1.0, zero_point=-128, low=-128, high=127)
    """
    if not (math.isfinite(minimum) and math.isfinite(maximum)) or minimum > maximum:
        raise ValueError(f"a range needs finite minimum <= maximum, got {minimum} and {maximum}")
    low, high = min(minimum, 0.0), max(maximum, 0.0)
    width = high - low
    if width < 1e-30:  # Nothing but zeros: any scale will do.
        return QParams(1.0, 0)
    scale = round_significand(width / 255)
    zero_point = max(-128, min(127, round(-128 - low / scale)))
    return QParams(scale, zero_point)


def symmetric_qparams(magnitude: float) -> QParams:
    """Scale of an int8 constant in ±magnitude with zero point 0.

    Example:
        >>> symmetric_qparams(127.0)
        QParams(scale=1.0, zero_point=0, low=-127, high=127)
    """
    scale = round_significand(magnitude / 127) if magnitude > 1e-30 else 1.0
    return QParams(scale, 0, -127, 127)


def cell_state_exponent(magnitude: float) -> int:
    """Exponent e of the LSTM cell's scale 2^e: the finest in -15 to -9 that holds a magnitude.

    Example:
        >>> cell_state_exponent(1.0), cell_state_exponent(5.0), cell_state_exponent(1000.0)
        (-15, -12, -9)
    """
    needed = math.ceil(math.log2(max(magnitude, 1e-30)))
    return max(-15, min(-9, needed - 15))


@dataclass
class Range:
    """Smallest and largest value that a site has shown."""

    minimum: float = math.inf
    maximum: float = -math.inf

    def update(self, minimum: float, maximum: float) -> None:
        """Widen the range to hold both values."""
        self.minimum = min(self.minimum, minimum)
        self.maximum = max(self.maximum, maximum)

    @property
    def magnitude(self) -> float:
        """Largest absolute value."""
        return max(abs(self.minimum), abs(self.maximum))


@dataclass
class RangeTable:
    """Ranges by key (``site`` or ``site/input``), observed, frozen, saved.

    Example:
        >>> table = RangeTable()
        >>> table.observe("encoder/relu#0", torch.tensor([0.0, 2.55]))
        >>> table["encoder/relu#0"].maximum
        2.549999952316284
    """

    ranges: dict[str, Range] = field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return key in self.ranges

    def __getitem__(self, key: str) -> Range:
        return self.ranges[key]

    def observe(self, key: str, x: Tensor) -> None:
        """Widen the range of ``key`` to the values of ``x``.

        Args:
            key: Name of the site, and of the operand where it has several.
            x: A float tensor; an empty one changes nothing.

        Raises:
            FloatingPointError: If ``x`` has a value that is not finite; names the site.
        """
        if x.numel() == 0:
            return
        low, high = (float(bound) for bound in torch.aminmax(x.detach().float()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise FloatingPointError(
                f"{key} produced a value that is not finite (minimum {low}, maximum {high}); "
                f"lower the learning rate, or look for a division or logarithm before it"
            )
        self.ranges.setdefault(key, Range()).update(low, high)

    def merge(self, other: RangeTable) -> None:
        """Widen every range by another table's, as ranks do when ranges freeze."""
        for key, observed in other.ranges.items():
            self.ranges.setdefault(key, Range()).update(observed.minimum, observed.maximum)

    def state_dict(self) -> dict[str, list[float]]:
        """Plain numbers by key."""
        return {key: [r.minimum, r.maximum] for key, r in sorted(self.ranges.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace every range by the saved ones."""
        self.ranges = {key: Range(float(low), float(high)) for key, (low, high) in state.items()}
