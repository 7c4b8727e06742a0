r"""Requantization: from an accumulator's scale to the output's.

A chip multiplies the accumulator by :math:`s_x s_w / s_y` with a fixed-point multiplier rounded
twice (``"double"``), rounded once (``"single"``), by a shift (``"shift"``), or, as LiteRT's fully
connected kernel, in double precision (``"real"``). Where 64 bits have accumulated, as with 16-bit
activations, the multiplier keeps 16 bits (``"reduced"``). The integer arithmetic of
:mod:`lightning_nna.emulation.arithmetic.fixed_point` is done here in float64, which holds every
integer to :math:`2^{53}`: on a CPU a 64-bit integer product takes many times as long.

The reference kernels do all this in 32-bit integers, which wrap around: where a multiplier shifts
to the left before it multiplies, where a 64-bit product becomes a 32-bit result, and where the zero
point is added. A double that no 32-bit integer can hold becomes :math:`-2^{31}`, as on x86-64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_nna.elementary import power_of_two
from lightning_nna.emulation.arithmetic.device_tables import on_device_of
from lightning_nna.emulation.arithmetic.fixed_point import (
    float_factors,
    multiply_by_quantized_multiplier,
    quantize_multipliers,
)
from lightning_nna.emulation.arithmetic.on_host import in_memory, on_host

#: A rescaler or a multiplier.
Rescaling = TypeVar("Rescaling", "Rescaler", "Multiplier")
RoundingKind = Literal["real", "reference", "double", "reduced", "single", "shift"]

# float64 holds every integer up to here.
_FLOAT64_INTEGERS = 2.0**53
# An accumulator below this times a 31-bit mantissa is exact in float64.
_ONE_PRODUCT = 2.0**22
# The same for a 16-bit mantissa.
_ONE_REDUCED_PRODUCT = 2.0**37
# A 32-bit integer is at least minus this, and below it.
_INT32 = 2.0**31
# The largest number below one half: what it does not lift to the next whole number, one half would
# not, except for rounding in the sum.
_BELOW_HALF = {torch.float64: math.nextafter(0.5, 0.0), torch.float32: 0.5 - 2.0**-25}
#: Raises a tie above itself and moves no other quotient across one.
TIES_AWAY = 1 + 2.0**-40


def rescale(
    accumulator: Tensor,
    factors: float | Tensor,
    *,
    rounding: RoundingKind,
    largest: float,
    zero_point: int = 0,
) -> Tensor:
    r"""Multiply integers by positive factors and round as the kernel does, exactly.

    Args:
        accumulator: Whole numbers, float32, float64 or int, any shape; may be overwritten if it is
            float64.
        factors: One factor, or float64 factors whose shape broadcasts against the accumulator.
        rounding: ``"double"``, ``"reduced"``, ``"single"``, ``"shift"`` (the factor is a power of
            two) or ``"real"``.
        largest: Bound on the absolute value of the accumulator, at most :math:`2^{31}`;
            :math:`2^{47}` if ``rounding`` is ``"reduced"``.
        zero_point: What the kernel adds to the result, in 32 bits.

    Returns:
        Whole numbers, float64, without the zero point.

    Example:
        >>> rescale(torch.tensor([8.0, 24.0, -8.0]), 0.0625, rounding="double", largest=24)
        tensor([ 1.,  2., -1.], dtype=torch.float64)
    """
    x = accumulator.double()
    if isinstance(factors, float):
        return prepared(factors, rounding, largest, zero_point=zero_point)(x)
    return Rescaler(factors, rounding=rounding, largest=largest, zero_point=zero_point)(x)


def rescale_fast(accumulator: Tensor, factors: float | Tensor, *, rounding: RoundingKind) -> Tensor:
    """Rescale in the accumulator's own float type: equal except near a tie.

    Args:
        accumulator: Whole numbers, float, any shape; overwritten.
        factors: See :func:`rescale`.
        rounding: See :func:`rescale`.

    Returns:
        ``accumulator``, rescaled and rounded.
    """
    first, second = rounding_factors(factors, rounding=rounding)
    return round_fast(accumulator.mul_(on_device_of(accumulator, first)), second)


def rounding_factors(
    factors: float | Tensor, *, rounding: RoundingKind
) -> tuple[Tensor, Tensor | None]:
    """Return the factors before the first rounding, and before the second if there are two.

    An operator may put the first into an operand of its product and so save a pass.

    Args:
        factors: See :func:`rescale`.
        rounding: See :func:`rescale`.

    Returns:
        float32 factors; None for the second where the kind rounds once.

    Example:
        >>> rounding_factors(1 / 16, rounding="real")
        (tensor(0.0625), None)
    """
    if isinstance(factors, float):
        return _number_factors(factors, rounding)
    return _factors(factors, rounding)


@lru_cache(maxsize=4096)
def _number_factors(factor: float, rounding: RoundingKind) -> tuple[Tensor, Tensor | None]:
    with torch.inference_mode(False):
        return _factors(torch.tensor(factor, dtype=torch.float64), rounding)


def _factors(exact: Tensor, rounding: RoundingKind) -> tuple[Tensor, Tensor | None]:
    exact = exact.double()
    if rounding == "double":
        return float_factors(*quantize_multipliers(exact))
    if rounding == "reduced":
        return _reduced_factors(exact).float(), None
    return exact.float(), None


def round_fast(scaled: Tensor, second: Tensor | None) -> Tensor:
    """Round what the first factor has scaled, and again after the second.

    Args:
        scaled: Float, any shape; overwritten.
        second: See :func:`rounding_factors`.

    Returns:
        ``scaled``, whole numbers.
    """
    scaled.round_()
    return scaled if second is None else scaled.mul_(on_device_of(scaled, second)).round_()


def round_half_away(x: Tensor) -> Tensor:
    """Round float32 or float64 to nearest, ties away from zero.

    Args:
        x: Any values and shape; overwritten.

    Returns:
        ``x``, rounded.

    Example:
        >>> round_half_away(torch.tensor([0.5, -2.5, 0.49999999999999994], dtype=torch.float64))
        tensor([ 1., -3.,  0.], dtype=torch.float64)
    """
    # Truncation and the copying of signs have no fast kernels on a CPU; these have.
    half = _BELOW_HALF[x.dtype]
    above = (x + half).floor_().clamp_min_(0)
    return x.sub_(half).ceil_().clamp_max_(0).add_(above)


def spills(factors: float | Tensor, *, rounding: RoundingKind, largest: float) -> bool:
    """Tell whether a result, or a step on the way to it, may leave the kernel's 32 bits.

    Factors on a device are not looked at: their results may.

    Args:
        factors: One factor or several of any shape, see :func:`rescale`.
        rounding: See :func:`rescale`; an accelerator of another arithmetic has no such bound.
        largest: Bound on the absolute value of the accumulator.

    Example:
        >>> spills(0.01, rounding="real", largest=2.0**31)
        False
    """
    if rounding in ("single", "shift"):
        return False
    if isinstance(factors, Tensor) and not in_memory(factors):
        return True  # Perhaps: whoever asks takes the form that wraps.
    factor = largest_of(factors)
    # A mantissa is at least one half: what is shifted is at most twice the result.
    return 2 * factor * largest >= _INT32


def largest_of(factors: float | Tensor) -> float:
    """Return the largest of one factor or several, of any shape."""
    if isinstance(factors, float):
        return factors
    return float(factors.numpy().max()) if on_host(factors) else float(factors.max())


def wrap(x: Tensor, limit: float = _INT32) -> Tensor:
    """Wrap whole numbers, float64, any shape, to the integers from ``-limit`` to ``limit - 1``.

    Example:
        >>> wrap(torch.tensor([2.0**31, -(2.0**31) - 1, 5.0], dtype=torch.float64)).tolist()
        [-2147483648.0, 2147483647.0, 5.0]
    """
    return x - torch.floor((x + limit) / (2 * limit)) * (2 * limit)


def multiply(x: Tensor, mantissas: Tensor, shifts: Tensor, *, largest: float) -> Tensor:
    """Multiply whole numbers, float64, each by its own multiplier of the same shape."""
    return Multiplier(mantissas, shifts, largest=largest)(x)


class Rescaler:
    """round(factor (x + offset)) as the kernel rounds.

    Args:
        factors: Positive factors, float64, that broadcast against the accumulators.
        rounding: See :func:`.rescaling.rescale`.
        largest: Bound on the absolute value of ``x + offset`` and of ``x``.
        offset: Whole numbers (a bias, the zero point's fraction of a product), float64, that
            broadcast like the factors; None for none.
        exact: Every bit; otherwise in float32, equal but near a tie.
        settle: Function that saturates or wraps sums of an accumulator that may overflow.
        zero_point: Zero point, which the kernel adds to the result in 32 bits.

    Attributes:
        dtype: Type that accumulators must have.

    Example:
        >>> rescaler = Rescaler(torch.tensor(0.25).double(), rounding="double", largest=100.0)
        >>> rescaler(torch.tensor([6.0, 5.0, -6.0]).double())
        tensor([ 2.,  1., -2.], dtype=torch.float64)
    """

    def __init__(
        self,
        factors: Tensor,
        *,
        rounding: RoundingKind,
        largest: float,
        offset: Tensor | None = None,
        exact: bool = True,
        settle: Callable[[Tensor], Tensor] | None = None,
        zero_point: int = 0,
    ) -> None:
        self.factors, self.rounding, self.largest = factors, rounding, largest
        self.offset, self.settle, self.zero_point = offset, settle, zero_point
        self.spills = spills(factors, rounding=rounding, largest=largest)
        exactly = exact or settle is not None or self.spills
        self.dtype = torch.float64 if exactly else torch.float32
        self._multiplies_alone = False
        if self.dtype == torch.float32:
            self._prepare_fast()
        elif rounding == "double":
            mantissas, shifts = quantize_multipliers(factors)
            added = offset if settle is None else None
            self._multiply = Multiplier(
                mantissas, shifts, largest=largest, offset=added, zero_point=zero_point
            )
            self._multiplies_alone = settle is None
        elif rounding == "reduced" and not self.spills and largest < _ONE_REDUCED_PRODUCT:
            self._reduced = _reduced_factors(factors)

    def __call__(self, x: Tensor) -> Tensor:
        """Rescale whole numbers of :attr:`dtype`, in place."""
        if self._multiplies_alone:
            return self._multiply(x)
        return self._fast(x) if self.dtype == torch.float32 else self._generally(x)

    def moved(self, device: torch.device) -> Rescaler:
        """Return the rescaler with its constants on a device, decided by those on the host."""
        return _moved(self, device)

    def _generally(self, x: Tensor) -> Tensor:
        # The sum 1003 with a bias of -3 and the factor 0.0125 is 12.5:
        #   real     12.5 -> 13, ties away from zero
        #   single   0.8 * 2^31 -> 1717986918, a little less: 12.49999 -> 12, rounded once
        #   double   1000 * 0.8 -> 800 first, then 800 / 2^6 = 12.5 -> 13
        if self.offset is not None:
            x += self.offset
        if self.settle is not None:
            x = self.settle(x)
        if self.rounding == "double":
            return self._multiply(x)
        if self.rounding == "single":
            return x.copy_(_single(x, self.factors, self.largest))
        if self.rounding == "reduced":
            if self.spills:
                return x.copy_(_reduced_integers(x, self.factors, self.zero_point))
            if self.largest < _ONE_REDUCED_PRODUCT:
                return x.mul_(self._reduced).add_(0.5).floor_()
            return x.copy_(_reduced(x, self.factors))
        rounded = round_half_away(x.mul_(self.factors))
        return self._as_int32(rounded) if self.spills else rounded

    def _as_int32(self, x: Tensor) -> Tensor:
        """Convert whole numbers from double to 32 bits, less the zero point.

        A result of 2^31 becomes -2^31; with a zero point of -3 that is 2^31 - 3.
        """
        saturated = x.masked_fill_((x >= _INT32) | (x < -_INT32), -_INT32).add_(self.zero_point)
        return x.copy_(wrap(saturated)).sub_(self.zero_point)

    def _prepare_fast(self) -> None:
        self.first, self.second = rounding_factors(self.factors, rounding=self.rounding)
        self.constant = self.first.new_zeros(())
        if self.offset is not None:
            self.constant = (self.offset * self.first).float()

    def _fast(self, x: Tensor) -> Tensor:
        return round_fast(torch.addcmul(self.constant, x, self.first, out=x), self.second)


class Multiplier:
    """The doubling high multiplication (ties up), then the division by 2^r (ties away).

    Args:
        mantissas: 31-bit mantissas, int64.
        shifts: Exponents, int64, both of a shape that broadcasts against the accumulators.
        largest: Bound on the absolute value of ``x + offset`` and of ``x``; up to 2^31 they are
            integers of 32 bits.
        offset: Whole numbers, float64, of the shape of the mantissas.
        zero_point: What the kernel adds to the result, in 32 bits.

    Example:
        >>> multiplier = Multiplier(torch.tensor(2**30), torch.tensor(-3), largest=24)  # 1/16
        >>> multiplier(torch.tensor([8.0, 24.0, -8.0]).double())
        tensor([ 1.,  2., -1.], dtype=torch.float64)
    """

    def __init__(
        self,
        mantissas: Tensor,
        shifts: Tensor,
        *,
        largest: float,
        offset: Tensor | None = None,
        zero_point: int = 0,
    ) -> None:
        self.zero_point = zero_point
        self.on_device = not in_memory(mantissas)
        if self.on_device:
            self.mantissas, self.shifts, self.offset = mantissas, shifts, offset
            return

        def tensor(x: NDArray[np.float64]) -> Tensor:
            return torch.from_numpy(np.asarray(x))

        m, e = mantissas.numpy(), shifts.numpy()
        added = np.zeros(m.shape) if offset is None else offset.numpy()
        left = np.maximum(e, 0)
        shifted = largest * float(power_of_two(left).max())
        reach = largest * float((m * power_of_two(e - 31)).max())
        # What is shifted, or the result with its zero point, may need more than 32 bits.
        too_wide = (shifted > largest and shifted >= _INT32) or reach >= _INT32 - 2**8
        self.wraps = largest <= _INT32 and too_wide
        if self.wraps:
            # A processor shifts by the lowest five bits of what it is told.
            self.before, self.left = tensor(added), tensor(power_of_two(left % 32))
            added, left, largest = np.zeros_like(added), np.zeros_like(left), _INT32
        self.twice = bool((e < 0).any())
        # A factor of 1/16 is the mantissa 2^30 with the exponent -3: of the sum 24, the first
        # rounding makes floor(24 / 2 + 1/2) = 12, the second 12 / 8 = 1.5 -> 2, away from zero.
        self.second = tensor(power_of_two(np.minimum(e, 0)) * TIES_AWAY)
        # A factor formed in float32 has a short mantissa: one product in float64 is exact.
        odd = m // np.maximum(m & -m, 1)
        self.short = 4 * float(odd.max()) * largest < _FLOAT64_INTEGERS
        if self.short:
            first = m * power_of_two(left - 31)
            self.first, self.constant = tensor(first), tensor(added * first + 0.5)
            return
        # Two products of half the mantissa each, both exact: 0x6000_4001 is 0x6000 * 2^16 plus
        # 0x4001, and a sum of 31 bits times 16 bits has 47, of 53 that float64 holds.
        upper = (m >> 16) * power_of_two(left - 15)
        lower = (m & 0xFFFF) * power_of_two(left - 16)
        self.upper, self.lower = tensor(upper), tensor(lower)
        self.of_upper, self.of_lower = tensor(added * upper), tensor(added * lower + 2.0**14)

    def moved(self, device: torch.device) -> Multiplier:
        """Return the multiplier with its constants on a device, decided by those on the host."""
        return _moved(self, device)

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply whole numbers, float64, in place."""
        if self.on_device:
            return self._in_integers(x)
        if self.wraps:
            x.copy_(wrap((x + self.before).mul_(self.left)))
            result = wrap(self._multiply(x).add_(self.zero_point))
            return x.copy_(result).sub_(self.zero_point)
        return self._multiply(x)

    def _in_integers(self, x: Tensor) -> Tensor:
        """The same without a look at the multipliers, in integers of 64 bits."""
        sums = x if self.offset is None else x + self.offset
        scaled = multiply_by_quantized_multiplier(
            sums.long(), self.mantissas, self.shifts, self.zero_point
        )
        return x.copy_(scaled)

    def _multiply(self, x: Tensor) -> Tensor:
        if self.short:
            torch.addcmul(self.constant, x, self.first, out=x).floor_()
        else:
            # The lower product is floored at 2^-15, which no later floor can see.
            low = torch.addcmul(self.of_lower, x, self.lower).floor_().mul_(2.0**-15)
            torch.addcmul(self.of_upper, x, self.upper, out=x).add_(low).floor_()
        return x.mul_(self.second).round_() if self.twice else x


class Prepared:
    """A rescaling with one factor, whose constants are wherever it is used.

    Args:
        rescaling: Rescaling whose factor is on the host.
    """

    def __init__(self, rescaling: Rescaler | Multiplier) -> None:
        self._host = rescaling
        self._on_devices: dict[torch.device, Rescaler | Multiplier] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Rescale whole numbers, any shape, of the type that the rescaling takes, in place."""
        if x.is_cpu:
            return self._host(x)
        rescaling = self._on_devices.get(x.device)
        if rescaling is None:
            rescaling = self._on_devices[x.device] = self._host.moved(x.device)
        return rescaling(x)


@lru_cache(maxsize=1024)
def prepared(
    factor: float,
    rounding: RoundingKind,
    largest: float,
    exact: bool = True,
    zero_point: int = 0,
) -> Prepared:
    """A :class:`Rescaler` for one factor, made once."""
    with torch.inference_mode(False):
        factors = torch.tensor(factor, dtype=torch.float64)
        return Prepared(
            Rescaler(
                factors, rounding=rounding, largest=largest, exact=exact, zero_point=zero_point
            )
        )


def _moved(rescaling: Rescaling, device: torch.device) -> Rescaling:
    """A copy with its tensors on a device."""
    copied = copy.copy(rescaling)
    for name, value in vars(rescaling).items():
        if isinstance(value, Tensor):
            setattr(copied, name, value.to(device))
        elif isinstance(value, Multiplier):
            setattr(copied, name, value.moved(device))
    return copied


def _single(x: Tensor, factors: Tensor, largest: float) -> Tensor:
    """floor(x m 2^(e - 31) + 1/2), rounded once."""
    mantissas, shifts = quantize_multipliers(factors)
    # A larger factor leads out of every grid, as this one does.
    shifts = shifts.clamp_max(30)
    if largest < _ONE_PRODUCT:
        scaled = mantissas * power_of_two(shifts - 31)
        return (x * scaled).add_(0.5).floor_()
    product = x.long() * mantissas
    right = 31 - shifts
    return ((product + (torch.ones_like(right) << (right - 1))) >> right).double()


def _reduced_factors(factors: Tensor) -> Tensor:
    """Factors r 2^(e - 15) with a mantissa r of 16 bits, float64."""
    reduced, shifts = _reduced_multipliers(factors)
    return reduced * power_of_two(shifts - 15)


def _reduced(x: Tensor, factors: Tensor) -> Tensor:
    """floor(x r 2^(e - 15) + 1/2) of numbers whose product float64 does not hold."""
    reduced, shifts = _reduced_multipliers(factors)
    # Upper bits and the lower 16 apart: what the floor of the lower product drops is below the
    # half that rounds, except for factors so large that the result may leave 32 bits.
    upper = (x * 2.0**-16).floor_()
    lower = ((x - upper * 2.0**16) * reduced).mul_(2.0**-16).floor_()
    product = (upper * reduced).add_(lower)
    return (product * power_of_two(shifts + 1)).add_(0.5).floor_()


def _reduced_integers(x: Tensor, factors: Tensor, zero_point: int) -> Tensor:
    """The same in integers of 64 bits, whose lowest 32 are the result; shifts are of six bits."""
    reduced, shifts = _reduced_multipliers(factors)
    right = 15 - shifts
    half = torch.ones_like(right) << ((right - 1) % 64)
    product = (x.long() * reduced.long()).add_(half) >> (right % 64)
    low = (product.add_(zero_point + 2**31) & (2**32 - 1)) - 2**31
    return low.sub_(zero_point).double()


def _reduced_multipliers(factors: Tensor) -> tuple[Tensor, Tensor]:
    """Mantissas of 16 bits as float64, and exponents."""
    mantissas, shifts = quantize_multipliers(factors)
    return ((mantissas + 2**15) >> 16).clamp_max(2**15 - 1).double(), shifts
