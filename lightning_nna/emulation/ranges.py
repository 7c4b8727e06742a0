r"""Ranges of activations, and the quantization parameters that follow from them.

The range of a call site is observed while the network runs in float, then frozen:

.. math:: q = \mathrm{clip}(\mathrm{round}(x / s) + o,\ q_{lo},\ q_{hi}), \qquad x \approx s (q - o)

Scales have 16-bit significands (those of 16-bit activations 8-bit ones), so that every
:math:`s (q - o)` is exact in float32: an activation is passed on as the float tensor of its real
values, and its integers are recovered without loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_nna.distributed import is_distributed
from lightning_nna.elementary import ceil_log2
from lightning_nna.emulation.arithmetic.fixed_point import INT16_MAX, INT16_MIN
from lightning_nna.emulation.observers import OBSERVERS, MinMax, Observer, Range, new_range, restore

#: Significand bits of a scale by width of the activations. float32 has 24: with integers of 8 bits,
#: 16 are left for the scale, so that the product of both is exact.
_SIGNIFICAND_BITS = {8: 16, 16: 8}


@dataclass(frozen=True)
class QParams:
    """Quantization parameters of an activation.

    Args:
        scale: :math:`s > 0`, in the unit of the activation.
        zero_point: :math:`o`, the integer that stands for 0.
        low: Smallest integer, included.
        high: Largest integer, included.
        fused_relu: Whether a ReLU follows whose backward handles the values clipped at 0.

    Example:
        >>> QParams(0.5, -128).bounds
        (0, 255)
    """

    scale: float
    zero_point: int
    low: int = -128
    high: int = 127
    fused_relu: bool = field(default=False, compare=False, repr=False)

    def __hash__(self) -> int:
        """Return a hash that is computed once: parameters are keys of tables."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.scale, self.zero_point, self.low, self.high))

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest integer less the zero point."""
        return self.low - self.zero_point, self.high - self.zero_point

    @cached_property
    def bits(self) -> int:
        """Width of the integers, 8 or 16."""
        return 8 if self.high < 2**8 else 16

    @cached_property
    def largest(self) -> int:
        """Largest absolute value of the integers less the zero point."""
        low, high = self.bounds
        return max(-low, high)

    @cached_property
    def with_relu(self) -> QParams:
        """The same parameters, with a ReLU that follows."""
        return replace(self, fused_relu=True)

    @cached_property
    def without_relu(self) -> QParams:
        """The same parameters, without a ReLU that follows."""
        return replace(self, fused_relu=False)

    def widened(self) -> QParams:
        """Return 16-bit parameters that hold every value of 8-bit ones without loss.

        The scale is 128 times smaller, so 8-bit values from ±255 scales are integers in ±32640.

        Example:
            >>> QParams(0.5, 3).widened()
            QParams(scale=0.00390625, zero_point=0, low=-32768, high=32767)
        """
        return self if self.bits == 16 else QParams(self.scale / 128, 0, INT16_MIN, INT16_MAX)


class _Pending(QParams):
    """Mark an activation whose parameters are not known yet; unequal to all other parameters."""


#: Parameters of every activation while ranges are being observed.
PENDING: QParams = _Pending(1.0, 0)

#: Parameters of outputs that the reference kernels fix, whatever the data.
SIGMOID_OUTPUT = QParams(1 / 256, -128)
TANH_OUTPUT = QParams(1 / 128, 0)


def round_significand(scale: float, bits: int = 8) -> float:
    """Round a positive scale up to the significand bits of scales.

    Args:
        scale: Scale, positive.
        bits: Width of the activations, 8 or 16; scales have 16 or 8 significand bits.

    Example:
        >>> round_significand(0.1) * 255 == float(torch.tensor(round_significand(0.1)) * 255)
        True
    """
    significand = _SIGNIFICAND_BITS[bits]
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(math.ceil(mantissa * 2**significand), exponent - significand)


def round_to_significand(scale: float, bits: int = 8) -> float:
    """Round a positive scale to the nearest one with the significand bits of scales.

    Args:
        scale: Scale, positive.
        bits: Width of the activations, 8 or 16; scales have 16 or 8 significand bits.

    Example:
        >>> round_to_significand(1 + 2**-20), round_significand(1 + 2**-20) > 1
        (1.0, True)
    """
    significand = _SIGNIFICAND_BITS[bits]
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(round(mantissa * 2**significand), exponent - significand)


@lru_cache(maxsize=4096)
def affine_qparams(
    minimum: float, maximum: float, *, bits: int = 8, power_of_two: bool = False
) -> QParams:
    """Compute quantization parameters that cover a range and 0.

    For values from 0 to 255 the scale is 255 / 255 = 1, and the zero point -128 - 0 / 1 = -128: the
    integer -128 stands for 0 and 127 for 255.

    Args:
        minimum: Smallest value, in the activation's unit.
        maximum: Largest value, in the same unit.
        bits: Width of the integers: 8, with a zero point, or 16, symmetric.
        power_of_two: Whether the scale is rounded up to a power of two.

    Raises:
        ValueError: If the range is not finite, or ``minimum`` exceeds ``maximum``.

    Example:
        >>> affine_qparams(0.0, 255.0)
        QParams(scale=1.0, zero_point=-128, low=-128, high=127)
        >>> affine_qparams(-1.0, 0.5, bits=16, power_of_two=True).scale == 2**-14
        True
    """
    if not (math.isfinite(minimum) and math.isfinite(maximum)) or minimum > maximum:
        raise ValueError(f"a range needs finite minimum <= maximum, got {minimum} and {maximum}")
    if bits == 16:
        return symmetric_qparams(max(-minimum, maximum), bits=16, power_of_two=power_of_two)
    low, high = min(minimum, 0.0), max(maximum, 0.0)
    width = high - low
    if width < 1e-30:  # All values are 0, which every scale holds.
        return QParams(1.0, 0)
    scale = _rounded(width / 255, 8, power_of_two)
    zero_point = max(-128, min(127, round(-128 - low / scale)))
    return QParams(scale, zero_point)


@lru_cache(maxsize=4096)
def symmetric_qparams(magnitude: float, *, bits: int = 8, power_of_two: bool = False) -> QParams:
    """Compute quantization parameters with zero point 0 for values in ±magnitude.

    Args:
        magnitude: Largest absolute value, in the unit of the tensor.
        bits: Width of the integers: 8, from -127 to 127, or 16, from -32768 to 32767.
        power_of_two: Whether the scale is rounded up to a power of two.

    Example:
        >>> symmetric_qparams(127.0)
        QParams(scale=1.0, zero_point=0, low=-127, high=127)
    """
    limit = 127 if bits == 8 else INT16_MAX
    scale = _rounded(magnitude / limit, bits, power_of_two) if magnitude > 1e-30 else 1.0
    return QParams(scale, 0, -127 if bits == 8 else INT16_MIN, limit)


def _rounded(scale: float, bits: int, power_of_two: bool) -> float:
    """Round a scale up to one that the accelerator can represent."""
    return math.ldexp(1.0, ceil_log2(scale)) if power_of_two else round_significand(scale, bits)


def with_min_scale(qparams: QParams, min_scale: float, *, power_of_two: bool = False) -> QParams:
    """Return quantization parameters whose scale is at least ``min_scale``.

    Args:
        qparams: Any quantization parameters.
        min_scale: Smallest scale, positive, in the same unit.
        power_of_two: Whether a raised scale is rounded up to a power of two.

    Example:
        >>> with_min_scale(QParams(1e-9, 3), 0.25)
        QParams(scale=0.25, zero_point=3, low=-128, high=127)
    """
    if qparams.scale >= min_scale:
        return qparams
    return replace(qparams, scale=_rounded(min_scale, qparams.bits, power_of_two))


def cell_state_exponent(magnitude: float) -> int:
    """Return the exponent e of the scale 2^e of an LSTM cell state, from -15 to -9.

    It is the smallest whose 16-bit integers hold ±magnitude: 5.0 needs ±8 = 2^3, so e = 3 - 15.

    Args:
        magnitude: Largest absolute value of the cell state.

    Example:
        >>> cell_state_exponent(1.0), cell_state_exponent(5.0), cell_state_exponent(1000.0)
        (-15, -12, -9)
    """
    integer_bits = ceil_log2(max(magnitude, 1e-30))
    return max(-15, min(-9, integer_bits - 15))


@dataclass
class RangeTable:
    """Hold ranges by key: ``site/output``, or ``site/`` and the name of an operand.

    Args:
        observer: Rule by which a range follows from observed values, see :mod:`.observers`.
        ranges: Ranges by key.

    Raises:
        ValueError: If the observer is unknown.

    Example:
        >>> table = RangeTable()
        >>> table.observe("encoder/relu#0", torch.tensor([0.0, 2.55]))
        >>> table["encoder/relu#0"].maximum
        2.549999952316284
    """

    observer: Observer = "min_max"
    ranges: dict[str, Range] = field(default_factory=dict)
    # Ranges of the values that this rank has observed since the ranks last shared, and the state
    # after that: counts must not be added twice.
    _unshared: dict[str, Range] = field(default_factory=dict)
    _shared: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise ValueError(f"observer must be one of {list(OBSERVERS)}, got {self.observer!r}")

    def __contains__(self, key: str) -> bool:
        return key in self.ranges

    def __getitem__(self, key: str) -> Range:
        return self.ranges[key]

    def observe(self, key: str, x: Tensor) -> None:
        """Include values in a range.

        Args:
            key: Key of the range.
            x: Observed values, float, any shape; without elements nothing changes.

        Raises:
            FloatingPointError: If ``x`` has a value that is not finite; names the site.
        """
        if x.numel() == 0:
            return
        low, high = (float(bound) for bound in torch.aminmax(x.detach().float()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise FloatingPointError(not_finite(key, low, high))
        tables = [self.ranges, self._unshared] if is_distributed() else [self.ranges]
        for table in tables:
            table.setdefault(key, new_range(self.observer)).update(x, low, high)

    def rename(self, sites: Mapping[str, str]) -> None:
        """Rename sites in what this rank has observed since the ranks last shared.

        Args:
            sites: New keys of sites by their old keys.
        """
        self._unshared = {
            "/".join((sites.get(site, site), *rest)): unshared
            for key, unshared in self._unshared.items()
            for site, *rest in [_site_and_rest(key)]
        }

    def share(self) -> None:
        """Merge the ranges of all ranks of a distributed run."""
        if not is_distributed():
            return
        unshared = {key: observed.state() for key, observed in self._unshared.items()}
        tables: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(tables, unshared)
        self.ranges = {key: restore(state) for key, state in self._shared.items()}
        for table in tables:
            self.absorb(table)
        self._unshared, self._shared = {}, self.state_dict()

    def absorb(self, state: dict[str, list[Any]]) -> None:
        """Merge the ranges of another table into these.

        Args:
            state: What the other's :meth:`state_dict` has returned.
        """
        for key, saved in state.items():
            other = restore(saved)
            if key in self.ranges:
                self.ranges[key].merge(other)
            else:
                self.ranges[key] = other

    def clamp(self, uppers: Mapping[str, float]) -> None:
        """Clamp the ranges of outputs as fused ReLUs clamp their values.

        Args:
            uppers: Largest value of each ReLU by site, infinite for none.

        Example:
            >>> table = RangeTable()
            >>> table.observe("relu#0/output", torch.tensor([-9.0, 2.0]))
            >>> table.clamp({"relu#0": math.inf})
            >>> table["relu#0/output"]
            MinMax(minimum=0.0, maximum=2.0)
        """
        for site, upper in uppers.items():
            observed = self.ranges[f"{site}/output"]
            self.ranges[f"{site}/output"] = MinMax(0.0, min(max(observed.maximum, 0.0), upper))

    def widen(self, margin: float) -> None:
        """Move the bounds of all ranges away from 0.

        Args:
            margin: Fraction by which a negative minimum and a positive maximum grow.

        Example:
            >>> table = RangeTable()
            >>> table.observe("relu#0/output", torch.tensor([0.0, 2.0]))
            >>> table.widen(0.25)
            >>> table["relu#0/output"]
            MinMax(minimum=0.0, maximum=2.5)
        """
        if not margin:
            return
        for key, observed in self.ranges.items():
            minimum, maximum = observed.minimum, observed.maximum
            self.ranges[key] = MinMax(
                minimum + margin * min(minimum, 0.0), maximum + margin * max(maximum, 0.0)
            )

    def state_dict(self) -> dict[str, list[Any]]:
        """Return the ranges as plain values, by key."""
        return {key: observed.state() for key, observed in sorted(self.ranges.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace every range by the saved ones."""
        self.ranges = {key: restore(saved) for key, saved in state.items()}
        self._unshared, self._shared = {}, dict(state)


def _site_and_rest(key: str) -> list[str]:
    """Split the key of a range into its site and the rest."""
    path, mark, rest = key.partition("#")
    ordinal, *others = rest.split("/", 1)
    return [path + mark + ordinal, *others]


def not_finite(key: str, low: float | None = None, high: float | None = None) -> str:
    """Return the message of an error for an activation that is not finite; bounds if known."""
    bounds = "" if low is None else f" (minimum {low}, maximum {high})"
    return (
        f"{key} produced a value that is not finite{bounds}; "
        f"lower the learning rate, look for a division or logarithm before it, or, if it is from "
        f"a front end (a logarithm of spectra), leave that out of the emulation with targets="
    )


@dataclass(frozen=True)
class MixedQParams:
    """Quantization parameters of a tensor whose elements have different ones.

    The last states of several recurrent layers, stacked, are such a tensor.

    Args:
        index: Position in ``qparams`` for each element, int64, of the tensor's shape.
        qparams: Quantization parameters; None for elements without any.
    """

    index: Tensor
    qparams: tuple[QParams | None, ...]

    def single(self) -> QParams | None:
        """Return the parameters that all elements share; None if they have several, or none."""
        positions = self.index.unique().tolist()
        return self.qparams[positions[0]] if len(positions) == 1 else None
