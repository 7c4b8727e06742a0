"""Rescaling in float64 equals rescaling in integers of any length."""

from __future__ import annotations

import pytest
import torch

from lightning_nna.emulation.arithmetic.fixed_point import quantize_multiplier
from lightning_nna.emulation.arithmetic.rescaling import rescale


def reduced(x: int, factor: float) -> int:
    """The reference's product of a 64-bit sum: a 16-bit mantissa, rounded once."""
    mantissa, shift = quantize_multiplier(factor)
    short = min((mantissa + 2**15) >> 16, 2**15 - 1)
    return (x * short + (1 << (14 - shift))) >> (15 - shift)


@pytest.mark.parametrize("bits", [20, 36, 38, 47])
def test_a_mantissa_of_16_bits(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    largest = 2**bits
    sums = torch.randint(-largest, largest + 1, (3000,), generator=generator)
    sums[:3] = torch.tensor([-largest, 0, largest])
    # Results of 16 bits and a few more, and a mantissa that does not fit 16 bits.
    exponents = torch.randint(bits - 17, bits, (3000,), generator=generator)
    factors = torch.rand(3000, generator=generator, dtype=torch.float64).add_(1)
    factors = torch.ldexp(factors, -exponents)
    factors[3:6] = 2.0 ** (12 - bits) * (1 - 2.0**-20)
    found = rescale(sums.double(), factors, rounding="reduced", largest=largest)
    pairs = zip(sums.tolist(), factors.tolist(), strict=True)
    assert found.tolist() == [reduced(x, factor) for x, factor in pairs]
