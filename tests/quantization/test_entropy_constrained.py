"""Entropy-constrained levels against rate-distortion theory, uniform levels and Lloyd-Max."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import laplace, norm
from torch import Tensor

from lightning_nna.quantization.entropy_constrained import entropy_constrained, require_rate
from lightning_nna.quantization.lloyd_max import lloyd_max, nearest

PRETRAINED = Path(__file__).resolve().parents[2] / "recipes/pretrained/an4_rnnt.safetensors"
#: Distance of a quantizer with an entropy code from the Shannon bound at high rates: a cube's
#: normalized second moment against a ball's, 10 log10(2 pi e / 12) dB, a quarter of a bit.
SPACE_FILLING_DB = 10 * math.log10(2 * math.pi * math.e / 12)


def entropy(values: Tensor, centroids: Tensor) -> float:
    """Of the nearest centroid's index, counted."""
    shares = torch.bincount(nearest(values, centroids).flatten()).double() / values.numel()
    shares = shares[shares > 0]
    return float(-(shares * shares.log2()).sum())


def decibels(values: Tensor, centroids: Tensor) -> float:
    """Mean squared error against the values' mean square."""
    error = (values - centroids[nearest(values, centroids)]).double().square().mean()
    return 10 * math.log10(float(error / values.double().square().mean()))


def samples(density: str, count: int = 200_000) -> Tensor:
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=count) if density == "normal" else rng.laplace(size=count)
    return torch.from_numpy(drawn).float()


def pretrained() -> dict[str, Tensor]:
    """The larger weights of the recognizer of AN4."""
    tensors = load_file(PRETRAINED)
    return {name: x.float() for name, x in tensors.items() if x.ndim == 2 and x.numel() > 10_000}


def even_levels(values: Tensor, levels: int, rate: float) -> Tensor:
    """Evenly spaced levels about zero, as close together as the entropy allows."""
    low, high = 0.0, 2 * float(values.abs().max())
    steps = torch.arange(levels, dtype=torch.float64) - levels // 2
    for _ in range(40):
        middle = (low + high) / 2
        is_dear = entropy(values, (steps * middle).float()) > rate
        low, high = (middle, high) if is_dear else (low, middle)
    return (steps * high).float()


@pytest.mark.parametrize("rate", [3.0, 4.0, 4.5])
def test_a_normal_density_is_a_quarter_bit_from_the_shannon_bound(rate: float) -> None:
    x = torch.linspace(-7, 7, 40001, dtype=torch.float64)
    density = torch.from_numpy(norm.pdf(x.numpy()))
    found = entropy_constrained(x, 96, max_entropy_bits=rate, weights=density)
    assert rate - 0.05 <= found.max_entropy_bits <= rate
    above_bound = 10 * math.log10(found.distortion) + 20 * math.log10(2) * found.max_entropy_bits
    # At 3 bits, rounding to the nearest costs its part, see the module.
    assert above_bound == pytest.approx(SPACE_FILLING_DB, abs=0.1)


@pytest.mark.parametrize("rate", [3.5, 4.5])
def test_a_laplace_density_has_the_error_of_high_resolution(rate: float) -> None:
    x = torch.linspace(-25, 25, 100001, dtype=torch.float64)
    found = entropy_constrained(
        x, 255, max_entropy_bits=rate, weights=torch.from_numpy(laplace.pdf(x.numpy()))
    )
    differential = math.log2(2 * math.e)
    expected = 2 ** (2 * (differential - found.max_entropy_bits)) / 12
    assert 10 * math.log10(found.distortion / expected) == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("density", ["normal", "laplace"])
@pytest.mark.parametrize("levels", [8, 32])
@pytest.mark.parametrize("less", [0.15, 0.3, 0.5])
def test_at_the_same_entropy_neither_even_levels_nor_fewer_are_better(
    density: str, levels: int, less: float
) -> None:
    x = samples(density)
    least = lloyd_max(x, levels, pin_zero=True)
    rate = entropy(x, least.centroids) - less
    found = entropy_constrained(x, levels, max_entropy_bits=rate, pin_zero=True)
    ours = decibels(x, found.centroids)
    # A hundredth of a bit is 0.06 dB.
    assert ours <= decibels(x, even_levels(x, levels, rate)) + 0.06
    fewer = [lloyd_max(x, k, pin_zero=True).centroids for k in range(levels // 2, levels)]
    affordable = [decibels(x, z) for z in fewer if entropy(x, z) <= rate]
    assert ours <= min(affordable)


def test_on_trained_weights_it_beats_lloyd_max_of_fewer_levels_and_even_ones() -> None:
    for weight in list(pretrained().values())[::3]:
        found = entropy_constrained(weight, 32, max_entropy_bits=4.3, pin_zero=True)
        assert entropy(weight, found.centroids) == pytest.approx(4.3, abs=0.05)
        ours = decibels(weight, found.centroids)
        fewer = next(
            z
            for k in range(28, 15, -1)
            if entropy(weight, z := lloyd_max(weight, k, pin_zero=True).centroids) <= 4.3
        )
        assert ours < decibels(weight, fewer) - 0.3
        assert ours < decibels(weight, even_levels(weight, 32, 4.3))


def test_a_price_of_nothing_is_lloyd_max() -> None:
    x = samples("laplace", 20_000)
    free, least = entropy_constrained(x, 16, multiplier=0.0), lloyd_max(x, 16)
    assert torch.equal(free.centroids, least.centroids)
    assert free.distortion == pytest.approx(least.distortion, rel=1e-6)
    assert free.max_entropy_bits == pytest.approx(entropy(x, least.centroids), abs=1e-4)
    # So is a rate that Lloyd-Max does not need.
    assert torch.equal(entropy_constrained(x, 16, max_entropy_bits=4.0).centroids, least.centroids)


def test_a_higher_price_is_less_entropy_and_more_error() -> None:
    x = samples("normal", 50_000)
    error = lloyd_max(x, 32).distortion
    found = [entropy_constrained(x, 32, multiplier=error * k) for k in (0.0, 0.5, 1.0, 2.0, 4.0)]
    rates = [quantizer.max_entropy_bits for quantizer in found]
    errors = [quantizer.distortion for quantizer in found]
    assert rates == sorted(rates, reverse=True)
    assert errors == sorted(errors)
    # The cost itself is no more than that of any other of these levels.
    for quantizer in found:
        costs = [q.distortion + quantizer.multiplier * q.max_entropy_bits for q in found]
        own = quantizer.distortion + quantizer.multiplier * quantizer.max_entropy_bits
        assert own <= min(costs) * 1.01


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-30, 30), min_size=2, max_size=60),
    st.integers(2, 16),
    st.floats(0.05, 1.0),
    st.booleans(),
)
def test_the_entropy_is_never_above_the_wanted_one(
    whole: list[int], levels: int, share: float, pin_zero: bool
) -> None:
    x = torch.tensor(whole, dtype=torch.float32)
    rate = share * math.log2(levels)
    found = entropy_constrained(x, levels, max_entropy_bits=rate, pin_zero=pin_zero)
    z = found.centroids
    assert entropy(x, z.unique()) <= rate + 1e-6
    assert z.tolist() == sorted(z.tolist())
    assert len(z) == levels
    assert not pin_zero or 0.0 in z.tolist()


def test_weights_count_as_repetitions_and_a_scale_as_nothing() -> None:
    x = samples("laplace", 3000)
    counts = torch.from_numpy(np.random.default_rng(1).integers(1, 4, len(x)))
    weighted = entropy_constrained(x, 8, max_entropy_bits=2.0, weights=counts.float())
    repeated = entropy_constrained(x.repeat_interleave(counts), 8, max_entropy_bits=2.0)
    torch.testing.assert_close(weighted.centroids, repeated.centroids, rtol=1e-5, atol=1e-5)
    scaled = entropy_constrained(x * 4, 8, max_entropy_bits=2.0, weights=counts.float())
    torch.testing.assert_close(scaled.centroids, weighted.centroids * 4, rtol=1e-5, atol=1e-5)


def test_values_as_frequent_fall_into_fewer_levels() -> None:
    values = torch.tensor([0.0, 1.0, 6.0, 8.0])
    levels = {
        rate: entropy_constrained(values, 4, max_entropy_bits=rate).centroids.unique().tolist()
        for rate in (2.0, 1.5, 1.0)
    }
    assert levels == {2.0: [0.0, 1.0, 6.0, 8.0], 1.5: [0.5, 6.0, 8.0], 1.0: [0.5, 7.0]}


def test_what_is_constant_has_no_entropy() -> None:
    found = entropy_constrained(torch.full((7,), 0.5), 4, max_entropy_bits=0.1)
    assert (found.max_entropy_bits, found.centroids.tolist()) == (0.0, [0.5] * 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either max_entropy_bits or multiplier"),
        ({"max_entropy_bits": 1.0, "multiplier": 1.0}, "either max_entropy_bits or multiplier"),
        ({"max_entropy_bits": 0.0}, "above 0 and at most 2 bits, got 0.0"),
        ({"max_entropy_bits": 2.1}, "above 0 and at most 2 bits, got 2.1"),
        ({"max_entropy_bits": math.nan}, "above 0 and at most 2 bits, got nan"),
        ({"multiplier": -1.0}, "at least 0 and finite, got -1.0"),
        ({"multiplier": math.inf}, "at least 0 and finite, got inf"),
    ],
)
def test_bad_input(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entropy_constrained(torch.tensor([-1.0, 1.0]), 4, **arguments)  # type: ignore[arg-type]


def test_a_rate_of_indices() -> None:
    require_rate(5, 5)
    with pytest.raises(ValueError, match=r"at most 5 bits, got 5\.5"):
        require_rate(5.5, 5)
