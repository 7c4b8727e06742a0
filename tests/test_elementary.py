"""Functions that decide integers: against other libraries, and the same bits in every form."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import pytest
import torch
from scipy import special
from torch import Tensor

from lightning_nna import elementary

UNIT = 2.0**-53


def erfc(x: Tensor) -> Tensor:
    return torch.from_numpy(special.erfc(x.numpy()))


def points(low: float, high: float, count: int = 4001) -> Tensor:
    """Evenly spaced, without a library's own rounding of the steps."""
    return low + torch.arange(count, dtype=torch.float64) * ((high - low) / (count - 1))


@pytest.mark.parametrize(
    ("ours", "reference", "low", "high", "units"),
    [
        (elementary.exp2, torch.exp2, -1000.0, 1000.0, 4),
        (elementary.exp, torch.exp, -690.0, 690.0, 4),
        (elementary.expm1, torch.expm1, -5.0, 5.0, 4),
        (elementary.expm1, torch.expm1, -1e-3, 1e-3, 4),
        (elementary.log2, torch.log2, 1e-9, 1e3, 6),
        (elementary.log2, torch.log2, 0.99, 1.0099, 6),
        (elementary.log1p, torch.log1p, 0.0, 300.0, 4),
        (elementary.log1p, torch.log1p, -0.3, 0.3, 6),
        (elementary.sigmoid, torch.sigmoid, -40.0, 40.0, 5),
        (elementary.tanh, torch.tanh, -25.0, 25.0, 6),
        (elementary.tanh, torch.tanh, -0.1, 0.1, 6),
        (elementary.erfc, erfc, -6.0, 1.0, 40),
        (elementary.erfc, erfc, 1.0, 2.0, 1600),
        (elementary.erfc, erfc, 2.0, 12.0, 16),
    ],
)
def test_within_a_few_units_of_the_last_place(
    ours: Callable[[Tensor], Tensor],
    reference: Callable[[Tensor], Tensor],
    low: float,
    high: float,
    units: float,
) -> None:
    x = points(low, high)
    expected = reference(x)
    torch.testing.assert_close(ours(x), expected, rtol=units * UNIT, atol=1e-300)


def test_powers_of_two_and_their_logarithms_are_exact() -> None:
    exponents = torch.arange(-1022, 1024)
    powers = torch.tensor([math.ldexp(1.0, int(e)) for e in exponents], dtype=torch.float64)
    assert torch.equal(elementary.power_of_two(exponents), powers)
    assert torch.equal(elementary.exp2(exponents.double()), powers)
    assert torch.equal(elementary.log2(powers), exponents.double())
    assert [elementary.ceil_log2(float(p)) for p in powers] == exponents.tolist()
    above = [elementary.ceil_log2(math.nextafter(float(p), math.inf)) for p in powers[:-1]]
    assert above == (exponents[:-1] + 1).tolist()


@pytest.mark.parametrize(
    "function",
    [elementary.exp2, elementary.exp, elementary.expm1, elementary.log1p, elementary.sigmoid,
     elementary.tanh, elementary.erfc, lambda x: elementary.log2(x + 9.0)],
)  # fmt: skip
def test_a_value_has_the_same_bits_alone_and_among_others(
    function: Callable[[Tensor], Tensor],
) -> None:
    x = points(-0.9, 7.3, 103)
    alone = torch.stack([function(value) for value in x])
    assert torch.equal(function(x), alone)
    assert torch.equal(function(x[::3]), alone[::3])


def test_numbers_and_tensors_have_the_same_bits() -> None:
    x = points(0.01, 20.0, 301)
    assert elementary.exp2(x).tolist() == [elementary.exp2(float(value)) for value in x]
    assert elementary.log2(x).tolist() == [elementary.log2(float(value)) for value in x]
    assert elementary.log2(x).tolist() == elementary.log2(x.numpy()).tolist()


def test_square_roots_are_correctly_rounded() -> None:
    # Squares of the middles between two float32 numbers, rounded: the hardest arguments there are.
    middles = 1 + (2 * torch.arange(2**16, dtype=torch.float64) + 1) * 2.0**-24
    x = (middles * middles).float()
    expected = torch.tensor([math.sqrt(value) for value in x.tolist()], dtype=torch.float64)
    assert torch.equal(elementary.square_root(x), expected.float())


def test_these_are_the_bits() -> None:
    x = points(-6.0, 6.0, 1001)
    functions = (elementary.exp2, elementary.exp, elementary.expm1, elementary.sigmoid,
                 elementary.tanh, elementary.erfc)  # fmt: skip
    values = [f(x) for f in functions] + [elementary.log2(x + 7), elementary.log1p(x.abs())]
    digest = hashlib.sha256(torch.stack(values).numpy().tobytes()).hexdigest()
    assert digest[:16] == "14bb74fc4113ce97"
