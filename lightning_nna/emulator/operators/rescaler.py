r"""A requantisation made ready for many small blocks, as the steps of a recurrent layer are.

The arithmetic is that of :mod:`.rescaling`; whatever does not depend on the accumulators is formed
once, and an offset (a bias, the zero point's share of a matrix product) costs no pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_nna.emulator.operators.rescaling import TIES_AWAY, RoundingKind, rescale
from lightning_nna.functional.fixed_point import quantize_multipliers

# float64 holds every integer up to here.
_FLOAT64_INTEGERS = 2.0**53


class Rescaler:
    """round(factor (x + offset)) as the chip rounds, exact.

    Args:
        factors: Positive factors, float64, that broadcast against the accumulators.
        rounding: See :func:`.rescaling.rescale`.
        largest: Bound on the absolute value of ``x + offset`` and of ``x``.
        offset: Whole numbers, float64, that broadcast like the factors.
        settle: What an accumulator too narrow makes of its sums, if it may overflow.

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
        settle: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.settle = settle
        self.factors, self.rounding, self.largest = factors, rounding, largest
        self.offset = torch.zeros_like(factors) if offset is None else offset
        mantissas, shifts = quantize_multipliers(factors.cpu())
        left = shifts.clamp_min(0)
        self.twice = bool((shifts < 0).any())
        self.second = _to(factors, torch.exp2(shifts.clamp_max(0).double()) * TIES_AWAY)
        # A factor formed in float32 has a short mantissa: one product in float64 is exact.
        odd = mantissas // (mantissas & -mantissas).clamp_min(1)
        self.short = 4 * float(odd.max()) * largest < _FLOAT64_INTEGERS
        if self.short:
            self.first = _to(factors, torch.ldexp(mantissas.double(), left - 31))
            self.constant = self.offset * self.first + 0.5
            return
        upper, lower = mantissas >> 16, mantissas & 0xFFFF
        self.upper = _to(factors, torch.ldexp(upper.double(), left - 15))
        self.lower = _to(factors, torch.ldexp(lower.double(), left - 16))
        self.of_upper, self.of_lower = self.offset * self.upper, self.offset * self.lower + 2.0**14

    def __call__(self, x: Tensor) -> Tensor:
        """Rescale whole numbers, float64, in place."""
        if self.rounding != "double" or self.settle is not None:
            x += self.offset
            settled = x if self.settle is None else self.settle(x)
            rounding, largest = self.rounding, self.largest
            return x.copy_(rescale(settled, self.factors, rounding=rounding, largest=largest))
        if self.short:
            torch.addcmul(self.constant, x, self.first, out=x).floor_()
        else:
            # The lower half of the mantissa is floored where no later floor can see it.
            low = torch.addcmul(self.of_lower, x, self.lower).floor_().mul_(2.0**-15)
            torch.addcmul(self.of_upper, x, self.upper, out=x).add_(low).floor_()
        return x.mul_(self.second).round_() if self.twice else x


def _to(like: Tensor, x: Tensor) -> Tensor:
    return x.to(like.device)
