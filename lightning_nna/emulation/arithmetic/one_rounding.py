r"""Rescaling in one rounding, where that is proved to be equal to the kernel's two.

A fixed-point multiplier rounds twice, which takes eight passes in float64 if it is to be exact: its
product has 62 bits and more. With the multiplier's value :math:`k` and its last shift :math:`r`,

.. math:: q = \mathrm{round}(k x + \mathrm{clip}(x, -d, d)), \qquad d \approx 2^{-(r + 1)}

takes three, and differs only where the sum, which float64 rounds, lies next to a half. Kernel and
formula never decrease with :math:`x`. So they are equal for all :math:`x` if they are equal on both
sides of every step of the kernel's result, and there they are compared: 65,537 steps of a result in
16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from lightning_nna.emulation.arithmetic.fixed_point import INT16_MAX, INT16_MIN, quantize_multiplier
from lightning_nna.emulation.arithmetic.rescaling import RoundingKind, prepared, spills

#: Writes a function of the first tensor to the second and returns it; both are float64.
Rescaling = Callable[[Tensor, Tensor], Tensor]

# Bound on what float64 loses in the two operations on a result of 1: twice the least that it can.
_LOSS = 2.0**-51
# Results are compared below this: 16 bits and one more on either side.
_BEYOND = 2.0**15 + 2


@lru_cache(maxsize=1024)
def to_16_bits(factor: float, rounding: RoundingKind, largest: float) -> Rescaling:
    """Return the rescaling of whole numbers to results of 16 bits.

    Args:
        factor: Positive factor.
        rounding: See :func:`.rescaling.rescale`.
        largest: Bound on the absolute value of the numbers.

    Returns:
        Function of whole numbers, float64, any shape, equal to :func:`.rescaling.rescale` where the
        result is in 16 bits; beyond, it is beyond on the same side.

    Example:
        >>> x = torch.tensor([6.0, 5.0, -6.0]).double()
        >>> to_16_bits(0.25, "double", 2.0**30)(x, torch.empty_like(x))
        tensor([ 2.,  1., -2.], dtype=torch.float64)
    """
    with torch.inference_mode(False):
        exact = _exact(factor, rounding, largest)
        if spills(factor, rounding=rounding, largest=largest):
            return exact  # It may wrap around, and then decreases.
        result = torch.arange(INT16_MIN, INT16_MAX + 2, dtype=torch.float64)
        for formula in _formulas(factor, rounding, float(INT16_MAX)):
            # The least x of each result, and the one below it, as far as there are such.
            least = ((result - 0.5 - formula.middle * result.sub(0.5).sign()) / formula.k).ceil_()
            x = torch.stack([least - 1, least]).clamp_(-largest, largest)
            q = exact(x, torch.empty_like(x)).clamp_(-_BEYOND, _BEYOND - 1)
            is_step = (q[0] < result) & (q[1] >= result)
            is_step |= (x[0] == -largest) | (x[1] == largest)
            if bool(is_step.all()) and formula.equals(x, q, _BEYOND):
                return formula
        return exact


@lru_cache(maxsize=1024)
def of_16_bits(factor: float, rounding: RoundingKind, left_shift: int) -> Rescaling:
    """Return the rescaling of 16-bit integers that are first shifted to the left.

    Args:
        factor: Positive factor, below 1.
        rounding: See :func:`.rescaling.rescale`.
        left_shift: Bits by which the integers are shifted.

    Returns:
        Function of integers of 16 bits, float64, any shape, equal to :func:`.rescaling.rescale` of
        the shifted ones.

    Example:
        >>> x = torch.tensor([6.0, -5.0]).double()
        >>> of_16_bits(0.5, "double", 15)(x, torch.empty_like(x))
        tensor([ 98304., -81920.], dtype=torch.float64)
    """
    with torch.inference_mode(False):
        shift, largest = 2.0**left_shift, 2.0**31 - 1
        exact = _exact(factor, rounding, largest, shift)
        x = torch.arange(INT16_MIN, INT16_MAX + 1, dtype=torch.float64)
        q = exact(x, torch.empty_like(x))
        if torch.equal(q, x * (factor * shift)):
            return _Multiple(factor * shift)
        for formula in _formulas(factor, rounding, 2.0**15 * factor * shift, shift):
            if formula.equals(x, q, largest):
                return formula
        return exact


def _exact(factor: float, rounding: RoundingKind, largest: float, shift: float = 1.0) -> Rescaling:
    """The kernel's own steps."""
    rescaler = prepared(factor, rounding, largest)

    def rescaled(x: Tensor, out: Tensor) -> Tensor:
        result = rescaler(torch.mul(x, shift, out=out))
        return out if result is out else out.copy_(result)

    return rescaled


def _formulas(
    factor: float, rounding: RoundingKind, reach: float, shift: float = 1.0
) -> list[_OneRounding]:
    """Formulas that may be equal, of which the first decides ties as the kernel does."""
    k, d = factor, 0.0
    if rounding == "double":
        # The multiplier of 0.3 is 0.6 and a shift by one bit: 7.5 * 0.3 = 2.25 becomes 4.5, 5 and,
        # since 2.5 is a tie, 3. Results begin a quarter below a half, and d is a quarter.
        mantissa, exponent = quantize_multiplier(factor)
        k = mantissa * 2.0 ** (exponent - 31)
        d = 2.0 ** (exponent - 1) if exponent < 0 else 0.0
    little = 4 * _LOSS * (reach + 2)
    # The first rounding takes ties up, and a shift of a double away from zero.
    below = little if rounding in ("shift", "real") else -little
    bounds = [(d + below, d + little), (d, d)]
    return [_OneRounding(k * shift, -low, high, d) for low, high in bounds if k > 0]


class _OneRounding:
    """round(k x + clip(x, low, high)), with bounds near to -middle and middle."""

    def __init__(self, k: float, low: float, high: float, middle: float) -> None:
        self.k, self.low, self.high, self.middle = k, low, high, middle

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.clamp(x, self.low, self.high, out=out).add_(x, alpha=self.k).round_()

    def equals(self, x: Tensor, q: Tensor, limit: float) -> bool:
        """Tell whether the results of ``x`` are ``q``, whatever float64 loses.

        Args:
            x: Whole numbers, float64, any shape.
            q: Results in the same shape, in -limit … limit - 1, as results beyond are taken to be.
            limit: Limit.
        """
        total = (x * self.k).add_(x.clamp(self.low, self.high))
        loss = (q.abs() + 2).mul_(_LOSS)
        return all(
            torch.equal(result.round_().clamp_(-limit, limit - 1), q)
            for result in (total - loss, total + loss)
        )


class _Multiple:
    """K x, which is whole."""

    def __init__(self, k: float) -> None:
        self.k = k

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.mul(x, self.k, out=out)
