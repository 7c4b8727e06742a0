r"""Ranges of activations, and the scales and zero points that follow from them.

A call site's range is observed while the network runs in float, then frozen:

.. math:: q = \mathrm{clip}(\mathrm{round}(x / s) + o,\ q_{lo},\ q_{hi}), \qquad x \approx s (q - o)

Scales have 16-bit significands (those of 16-bit activations 8-bit ones), so that every
:math:`s (q - o)` is exact in float32: an activation travels as the float tensor it stands for and
its integers are recovered without loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_nna.distributed import is_distributed
from lightning_nna.elementary import ceil_log2
from lightning_nna.emulation.arithmetic.fixed_point import INT16_MAX, INT16_MIN
from lightning_nna.emulation.observers import OBSERVERS, MinMax, Observer, Range, new_range, restore

#: float32 has 24 bits: what the integer does not take is the scale's.
_SIGNIFICAND_BITS = {8: 16, 16: 8}


@dataclass(frozen=True)
class QParams:
    """Quantization parameters of an activation.

    Args:
        scale: :math:`s > 0`, in the unit of the activation.
        zero_point: :math:`o`, the integer that stands for 0.
        low: Smallest integer, included.
        high: Largest integer, included.
        rectified: Whether a ReLU follows, whose backward takes care of what was clipped at 0.

    Example:
        >>> QParams(0.5, -128).bounds
        (0, 255)
    """

    scale: float
    zero_point: int
    low: int = -128
    high: int = 127
    rectified: bool = field(default=False, compare=False, repr=False)

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest integer after the zero point is taken off."""
        return self.low - self.zero_point, self.high - self.zero_point

    @property
    def bits(self) -> int:
        """Width of the integers, 8 or 16."""
        return 8 if self.high < 2**8 else 16

    @property
    def largest(self) -> int:
        """Largest absolute value of the integers less the zero point."""
        low, high = self.bounds
        return max(-low, high)

    def widened(self) -> QParams:
        """The 16-bit grid that holds every value of an 8-bit one: 128 steps for each of its own.

        Example:
            >>> QParams(0.5, 3).widened()
            QParams(scale=0.00390625, zero_point=0, low=-32768, high=32767)
        """
        return self if self.bits == 16 else QParams(self.scale / 128, 0, INT16_MIN, INT16_MAX)


class _Pending(QParams):
    """No parameters yet: equal to those of no grid, whatever their values."""


#: Stands in the place of parameters while ranges are being observed.
PENDING: QParams = _Pending(1.0, 0)

#: Outputs that the reference fixes, whatever the data.
SIGMOID_OUTPUT = QParams(1 / 256, -128)
TANH_OUTPUT = QParams(1 / 128, 0)


def round_significand(scale: float, bits: int = 8) -> float:
    """Round a positive scale up to the significand that activations of a width leave to it.

    Example:
        >>> round_significand(0.1) * 255 == float(torch.tensor(round_significand(0.1)) * 255)
        True
    """
    significand = _SIGNIFICAND_BITS[bits]
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(math.ceil(mantissa * 2**significand), exponent - significand)


def round_to_significand(scale: float, bits: int = 8) -> float:
    """Round a positive scale to the nearest of the scales that :func:`round_significand` gives.

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
    """Scale and zero point of an activation that covers a range and 0.

    Args:
        minimum: Smallest value, in the activation's unit.
        maximum: Largest value.
        bits: 8, with a zero point, or 16, symmetric.
        power_of_two: Round the scale up to a power of two.

    Raises:
        ValueError: If the range is not finite or upside down.

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
    if width < 1e-30:  # Nothing but zeros: any scale will do.
        return QParams(1.0, 0)
    scale = _rounded(width / 255, 8, power_of_two)
    zero_point = max(-128, min(127, round(-128 - low / scale)))
    return QParams(scale, zero_point)


@lru_cache(maxsize=4096)
def symmetric_qparams(magnitude: float, *, bits: int = 8, power_of_two: bool = False) -> QParams:
    """Scale of a constant or a 16-bit activation in ±magnitude with zero point 0.

    Example:
        >>> symmetric_qparams(127.0)
        QParams(scale=1.0, zero_point=0, low=-127, high=127)
    """
    limit = 127 if bits == 8 else INT16_MAX
    scale = _rounded(magnitude / limit, bits, power_of_two) if magnitude > 1e-30 else 1.0
    return QParams(scale, 0, -127 if bits == 8 else INT16_MIN, limit)


def _rounded(scale: float, bits: int, power_of_two: bool) -> float:
    """Return a scale that the accelerator has, not below the given one."""
    return math.ldexp(1.0, ceil_log2(scale)) if power_of_two else round_significand(scale, bits)


def no_finer(grid: QParams, step: float, *, power_of_two: bool = False) -> QParams:
    """A grid, with steps of at least ``step``.

    Args:
        grid: Any grid.
        step: Smallest scale.
        power_of_two: Round the scale up to a power of two.

    Example:
        >>> no_finer(QParams(1e-9, 3), 0.25)
        QParams(scale=0.25, zero_point=3, low=-128, high=127)
    """
    if grid.scale >= step:
        return grid
    return replace(grid, scale=_rounded(step, grid.bits, power_of_two))


def cell_state_exponent(magnitude: float) -> int:
    """Exponent e of the LSTM cell's scale 2^e: the finest in -15 to -9 that holds a magnitude.

    Example:
        >>> cell_state_exponent(1.0), cell_state_exponent(5.0), cell_state_exponent(1000.0)
        (-15, -12, -9)
    """
    needed = ceil_log2(max(magnitude, 1e-30))
    return max(-15, min(-9, needed - 15))


@dataclass
class RangeTable:
    """Ranges by key (``site`` or ``site/input``), observed, frozen, saved.

    Args:
        observer: How a range follows from what was seen, see :mod:`.observers`.

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
    #: What this rank has seen since the ranks last shared: counts must not be added twice.
    _fresh: dict[str, Range] = field(default_factory=dict)
    _shared: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise ValueError(f"observer must be one of {list(OBSERVERS)}, got {self.observer!r}")

    def __contains__(self, key: str) -> bool:
        return key in self.ranges

    def __getitem__(self, key: str) -> Range:
        return self.ranges[key]

    def observe(self, key: str, x: Tensor) -> None:
        """Take the values of ``x`` into the range of ``key``.

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
            raise FloatingPointError(not_finite(key, low, high))
        tables = [self.ranges, self._fresh] if is_distributed() else [self.ranges]
        for table in tables:
            table.setdefault(key, new_range(self.observer)).update(x, low, high)

    def rename(self, sites: Mapping[str, str]) -> None:
        """Let what this rank has seen since the ranks last shared belong to sites of other keys."""
        self._fresh = {
            "/".join((sites.get(site, site), *rest)): seen
            for key, seen in self._fresh.items()
            for site, *rest in [_site_and_rest(key)]
        }

    def share(self) -> None:
        """Let every rank of a distributed run have what any of them has seen."""
        if not is_distributed():
            return
        mine = {key: seen.state() for key, seen in self._fresh.items()}
        tables: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(tables, mine)
        self.ranges = {key: restore(state) for key, state in self._shared.items()}
        for table in tables:
            self.absorb(table)
        self._fresh, self._shared = {}, self.state_dict()

    def absorb(self, state: dict[str, list[Any]]) -> None:
        """Let the ranges cover what another table has seen, given its :meth:`state_dict`."""
        for key, saved in state.items():
            seen = restore(saved)
            if key in self.ranges:
                self.ranges[key].merge(seen)
            else:
                self.ranges[key] = seen

    def clamp(self, uppers: Mapping[str, float]) -> None:
        """Let the outputs of sites begin at 0 and end at a largest value.

        Args:
            uppers: Largest values by site, infinite for none.

        Example:
            >>> table = RangeTable()
            >>> table.observe("relu#0/output", torch.tensor([-9.0, 2.0]))
            >>> table.clamp({"relu#0": math.inf})
            >>> table["relu#0/output"]
            MinMax(minimum=0.0, maximum=2.0)
        """
        for site, upper in uppers.items():
            seen = self.ranges[f"{site}/output"]
            self.ranges[f"{site}/output"] = MinMax(0.0, min(max(seen.maximum, 0.0), upper))

    def state_dict(self) -> dict[str, list[Any]]:
        """Plain values by key."""
        return {key: seen.state() for key, seen in sorted(self.ranges.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace every range by the saved ones."""
        self.ranges = {key: restore(saved) for key, saved in state.items()}
        self._fresh, self._shared = {}, dict(state)


def _site_and_rest(key: str) -> list[str]:
    """A key's site, and what follows it."""
    path, mark, rest = key.partition("#")
    ordinal, *others = rest.split("/", 1)
    return [path + mark + ordinal, *others]


def not_finite(key: str, low: float, high: float) -> str:
    """The message of an activation that is not finite."""
    return (
        f"{key} produced a value that is not finite (minimum {low}, maximum {high}); "
        f"lower the learning rate, or look for a division or logarithm before it"
    )


@dataclass(frozen=True)
class Parts:
    """Grids of a tensor whose elements lie on several, as the last states of several layers.

    Args:
        which: Number of the grid of every element, of the tensor's shape.
        grids: The grids; None for what is on none.
    """

    which: Tensor
    grids: tuple[QParams | None, ...]

    def one_grid(self) -> QParams | None:
        """The grid of all elements; None where there are several, or none."""
        numbers = self.which.unique().tolist()
        return self.grids[numbers[0]] if len(numbers) == 1 else None
