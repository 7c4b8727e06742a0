from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_nna.emulation.arithmetic.fixed_point import (
    lstm_sigmoid_table,
    lstm_tanh_table,
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    quantize_multipliers,
    round_half_away,
    rounding_divide_by_power_of_two,
)


def truncated(numerator: int, denominator: int) -> int:
    """Division of C: toward zero."""
    quotient = abs(numerator) // denominator
    return quotient if numerator >= 0 else -quotient


def reference_multiply(x: int, m: int, shift: int) -> int:
    """The reference's two roundings, on Python's integers, as C writes them."""
    product = (x << max(shift, 0)) * m
    nudge = 2**30 if product >= 0 else 1 - 2**30
    high = truncated(product + nudge, 2**31)
    right = max(-shift, 0)
    mask = (1 << right) - 1
    threshold = (mask >> 1) + (1 if high < 0 else 0)
    return (high >> right) + (1 if (high & mask) > threshold else 0)


@given(st.floats(1e-9, 1e4))
def test_quantize_multiplier_is_within_half_a_unit_of_31_bits(factor: float) -> None:
    m, e = quantize_multiplier(factor)
    assert 2**30 <= m < 2**31
    assert abs(Fraction(m) * Fraction(2) ** (e - 31) - Fraction(factor)) <= Fraction(2) ** (e - 32)


def test_quantize_multiplier_of_nothing_is_nothing() -> None:
    assert quantize_multiplier(0.0) == (0, 0)
    assert quantize_multiplier(1e-20) == (0, 0)


@pytest.mark.parametrize("factor", [-0.1, float("nan"), float("inf")])
def test_quantize_multiplier_refuses(factor: float) -> None:
    with pytest.raises(ValueError, match="rescaling factor"):
        quantize_multiplier(factor)


@given(
    st.lists(st.integers(-(2**22), 2**22), min_size=1, max_size=50),
    st.floats(1e-7, 100.0),
)
def test_multiply_equals_the_reference_on_python_integers(xs: list[int], factor: float) -> None:
    m, e = quantize_multiplier(factor)
    expected = [reference_multiply(x, m, e) for x in xs]
    assert multiply_by_quantized_multiplier(torch.tensor(xs), m, e).tolist() == expected


def test_multiply_per_channel_equals_channel_by_channel() -> None:
    x = torch.randint(-(2**20), 2**20, (100, 4), generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([0.001, 0.5, 1.0, 3.7], dtype=torch.float64)
    together = multiply_by_quantized_multiplier(x, *quantize_multipliers(factors))
    for channel, factor in enumerate(factors.tolist()):
        alone = multiply_by_quantized_multiplier(x[:, channel], *quantize_multiplier(factor))
        assert torch.equal(together[:, channel], alone)


@given(st.integers(-(2**30), 2**30), st.integers(0, 20))
def test_divide_rounds_to_nearest_ties_away(x: int, exponent: int) -> None:
    magnitude = (2 * abs(x) + 2**exponent) // 2 ** (exponent + 1)
    expected = magnitude if x >= 0 else -magnitude
    assert int(rounding_divide_by_power_of_two(torch.tensor(x), exponent)) == expected


@given(st.floats(-1e6, 1e6))
def test_round_half_away_is_that_of_c(x: float) -> None:
    exact = abs(Fraction(x)) + Fraction(1, 2)
    magnitude = exact.numerator // exact.denominator
    expected = magnitude if x >= 0 else -magnitude
    assert float(round_half_away(torch.tensor(x, dtype=torch.float64))) == expected


def test_sigmoid_table_is_near_sigmoid_monotone_and_complementary() -> None:
    table = lstm_sigmoid_table().double()
    x = torch.arange(-(2**15), 2**15, dtype=torch.float64) / 2**12
    # The approximation is good to some units of 2^-15, and never falls by more than that.
    assert float((table - 2**15 * torch.sigmoid(x)).abs().max()) < 8
    assert float(table.diff().min()) >= -8
    positive, negative = table[2**15 + 1 :], table[1 : 2**15].flip(0)
    assert torch.equal(positive + negative, torch.full_like(positive, 2**15 - 1))


@pytest.mark.parametrize("integer_bits", range(7))
def test_tanh_table_is_near_tanh_and_odd(integer_bits: int) -> None:
    table = lstm_tanh_table(integer_bits).double()
    x = torch.arange(-(2**15), 2**15, dtype=torch.float64) / 2.0 ** (15 - integer_bits)
    assert float((table - 2**15 * torch.tanh(x)).abs().max()) < 14
    assert torch.equal(table[2**15 + 1 :], -table[1 : 2**15].flip(0))


def test_tanh_table_refuses_more_bits_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"integer_bits must be 0 to 6 .*, got 7"):
        lstm_tanh_table(7)


def test_tables_are_whole_numbers_of_16_bits() -> None:
    for table in (lstm_sigmoid_table(), lstm_tanh_table(3)):
        assert table.dtype == torch.int32
        assert np.iinfo(np.int16).min <= int(table.min()) <= int(table.max()) <= 2**15 - 1
