"""One rounding gives the kernel's result, and only where that is proved."""

from __future__ import annotations

import pytest
import torch

from lightning_nna.emulation.arithmetic.one_rounding import of_16_bits, to_16_bits
from lightning_nna.emulation.arithmetic.rescaling import RoundingKind, rescale

ROUNDINGS: tuple[RoundingKind, ...] = ("double", "single", "shift")


def factors(rounding: RoundingKind, smallest: float, largest: float) -> list[float]:
    """Factors of any digits, of few digits, and powers of two."""
    ratios = [largest * 0.5**k for k in range(6)]
    if rounding == "shift":
        return ratios
    drawn = smallest + (largest - smallest) * torch.rand(8, dtype=torch.float64)
    return [*ratios, *drawn.tolist(), largest * 201 / 256, largest * 3 / 7]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_results_of_16_bits(rounding: RoundingKind) -> None:
    torch.manual_seed(0)
    for factor in factors(rounding, 2.0**-17, 2.0**-14):
        largest = 2.0**31 - 1
        limit = min(largest, 2.0**16 / factor)
        anywhere = (torch.rand(200_000, dtype=torch.float64) * 2 - 1) * limit
        # Where the result changes: next to halves, up to a quarter, in units of the result.
        halves = torch.randint(-32768, 32768, (200_000,)) + 0.5
        steps = (halves / factor).round() + torch.randint(-3, 4, (200_000,))
        x = torch.cat([anywhere.round(), steps, torch.arange(-500.0, 500.0)]).double()
        x.clamp_(-largest, largest)
        expected = rescale(x.clone(), factor, rounding=rounding, largest=largest)
        result = to_16_bits(factor, rounding, largest)(x, torch.empty_like(x))
        bounds = -32769, 32768
        assert torch.equal(result.clamp(*bounds), expected.clamp(*bounds)), factor


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_operands_of_16_bits(rounding: RoundingKind) -> None:
    torch.manual_seed(0)
    x = torch.arange(-(2**15), 2**15).double()
    for factor in factors(rounding, 0.01, 0.5):
        expected = rescale(x * 2**15, factor, rounding=rounding, largest=2.0**31 - 1)
        result = of_16_bits(factor, rounding, 15)(x, torch.empty_like(x))
        assert torch.equal(result, expected), factor


def test_what_may_leave_32_bits_takes_the_kernel_s_steps() -> None:
    """A result of 2^31 wraps around, which no formula without steps does."""
    x = torch.tensor([2.0**29, 100.0]).double()
    result = to_16_bits(4.5, "double", 2.0**30)(x, torch.empty_like(x))
    expected = rescale(x.clone(), 4.5, rounding="double", largest=2.0**30)
    assert torch.equal(result, expected)
    assert float(expected[0]) < 2.0**29
