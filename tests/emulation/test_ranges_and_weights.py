from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_nna.emulation.arithmetic.quantized_weight import (
    SMALLEST_SCALE,
    largest_scales,
    powers_of_two,
    quantize_weight,
    round_significands,
)
from lightning_nna.emulation.ranges import (
    RangeTable,
    affine_qparams,
    cell_state_exponent,
    symmetric_qparams,
)

finite = st.floats(-1e4, 1e4, allow_subnormal=False, width=32)


@given(finite, finite)
def test_a_grid_covers_its_range_and_zero_and_is_exact_in_float32(a: float, b: float) -> None:
    q = affine_qparams(min(a, b), max(a, b))
    low, high = q.bounds
    assert low <= 0 <= high
    # The zero point is rounded, so an end may lie half a step outside.
    assert low * q.scale - 0.51 * q.scale <= min(a, b, 0.0)
    assert max(a, b, 0.0) <= high * q.scale + 0.51 * q.scale
    integers = torch.arange(low, high + 1, dtype=torch.float32)
    values = integers * q.scale
    assert torch.equal(values.double(), integers.double() * q.scale)
    assert torch.equal((values / q.scale).round(), integers)


@pytest.mark.parametrize("bounds", [(float("nan"), 1.0), (0.0, float("inf")), (1.0, -1.0)])
def test_a_broken_range_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="finite minimum <= maximum"):
        affine_qparams(*bounds)


def test_nothing_but_zeros_has_a_grid() -> None:
    assert affine_qparams(0.0, 0.0).scale == 1.0
    assert symmetric_qparams(0.0).scale == 1.0


@pytest.mark.parametrize("magnitude", [0.01, 0.99, 1.0, 1.01, 7.9, 8.0, 63.0])
def test_cell_exponent_is_the_finest_that_holds(magnitude: float) -> None:
    exponent = cell_state_exponent(magnitude)
    assert 2.0 ** (exponent + 15) >= magnitude
    assert exponent == -15 or 2.0 ** (exponent + 14) < magnitude


def test_observing_names_a_site_that_is_not_finite() -> None:
    with pytest.raises(FloatingPointError, match="encoder/add#0 produced a value that is not fin"):
        RangeTable().observe("encoder/add#0", torch.tensor([1.0, float("nan")]))


def test_ranges_merge_and_save() -> None:
    one, two = RangeTable(), RangeTable()
    one.observe("a", torch.tensor([-1.0, 2.0]))
    two.observe("a", torch.tensor([-3.0, 1.0]))
    two.observe("b", torch.tensor([5.0]))
    one.absorb(two.state_dict())
    assert one.state_dict() == {"a": ["min_max", -3.0, 2.0], "b": ["min_max", 5.0, 5.0]}
    three = RangeTable()
    three.load_state_dict(one.state_dict())
    assert three.state_dict() == one.state_dict()


@pytest.mark.parametrize("rows_per_scale", [1, 2, 8])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantizing_a_weight_is_idempotent_and_close(rows_per_scale: int, bits: int) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(8, 30) * torch.logspace(-4, 2, 8)[:, None]
    maximum = 2 ** (bits - 1) - 1
    once = quantize_weight(weight, rows_per_scale=rows_per_scale, maximum=maximum)
    twice = quantize_weight(once.values, rows_per_scale=rows_per_scale, maximum=maximum)
    assert torch.equal(once.values, twice.values)
    assert torch.equal(once.integers, twice.integers)
    assert float(once.integers.abs().max()) == maximum
    error = (weight - once.values).abs() / once.scales[:, None]
    assert float(error.max()) <= 0.5 * (1 + 2**-10)


def test_zero_channels_and_broken_weights() -> None:
    weight = torch.zeros(2, 3)
    assert torch.equal(quantize_weight(weight, rows_per_scale=1, maximum=127).values, weight)
    weight[1, 1] = float("inf")
    with pytest.raises(FloatingPointError, match="weight is not finite"):
        quantize_weight(weight, rows_per_scale=1, maximum=127)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_scales_of_a_processor_are_those_of_any_device(power_of_two: bool) -> None:
    weights = torch.randn(100_000, 1) * torch.exp2(torch.randint(-60, 60, (100_000, 1)))
    extremes = torch.tensor([0.0, 127.0, 2.0**-149, 3e38, -1.0, 254.0, 2.0**-60 * 127])
    groups = torch.cat([weights, extremes[:, None]])
    scales = largest_scales(groups, maximum=127, power_of_two=power_of_two)
    magnitudes = (groups[:, 0].abs().double() / 127).clamp_min(SMALLEST_SCALE)
    rounded = powers_of_two(magnitudes) if power_of_two else round_significands(magnitudes)
    assert torch.equal(scales, rounded.float())
