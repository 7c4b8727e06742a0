"""Bounds: their closed forms, and how often they hold in simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import pywt
import torch

from lightning_nna.drift.bounds import (
    denoising_rates,
    excess_risk_bound,
    haar_coefficients,
    haar_error_bound,
    sparsity_bound,
    theory_threshold,
    window_factor,
    window_oracle,
)
from lightning_nna.drift.wavelets import HaarEstimator


def courses(n: int) -> dict[str, np.ndarray]:
    """True series that move in different ways."""
    time = np.linspace(0, 1, n)
    return {
        "still": np.zeros(n),
        "level": np.full(n, 3.0),
        "jump": (time > 0.9).astype(float),
        "slope": time,
        "wave": np.sin(12 * time),
        "walk": np.random.default_rng(n).standard_normal(n).cumsum() / 20,
    }


def test_the_threshold_has_natural_logarithms() -> None:
    # 2 * 0.5 * sqrt(2 * log(6.931472 / 0.1)) = sqrt(2 * 4.238657)
    assert theory_threshold(1024, sigma=0.5, delta=0.1) == pytest.approx(2.91158, abs=1e-5)
    assert theory_threshold(1024, sigma=1.0, delta=0.1) == pytest.approx(5.82317, abs=1e-5)
    # e^e values have log(log n) = 1.
    n = round(math.e**math.e)
    assert theory_threshold(n, delta=1 / math.e) == pytest.approx(2 * math.sqrt(4), rel=0.01)
    # Of one or two values log n counts as 1.
    assert theory_threshold(1, delta=0.1) == theory_threshold(2, delta=0.1)
    assert theory_threshold(2, delta=0.1) == pytest.approx(2 * math.sqrt(2 * math.log(10)))


@pytest.mark.parametrize("n", [1, 2, 7, 64, 100])
def test_haar_coefficients_are_those_of_an_orthonormal_transform(n: int) -> None:
    rows = haar_coefficients(torch.eye(n, dtype=torch.float64))[1].T
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64))
    theta = torch.from_numpy(np.random.default_rng(0).standard_normal((3, n)))
    weights, coefficients = haar_coefficients(theta)
    torch.testing.assert_close(rows @ theta.T, coefficients.T)
    torch.testing.assert_close(coefficients @ weights, theta[:, -1])


def test_haar_coefficients_equal_those_of_pywavelets() -> None:
    theta = np.random.default_rng(1).standard_normal(64)
    average, *details = pywt.wavedec(theta, "haar", mode="periodization")
    _, coefficients = haar_coefficients(torch.from_numpy(theta))
    assert float(coefficients[0]) == pytest.approx(average[0])
    # The newest detail of each level, the finest first; PyWavelets subtracts the newer half.
    expected = [-level[-1] for level in reversed(details)]
    np.testing.assert_allclose(coefficients[1:].numpy(), expected, atol=1e-12)


def test_the_bound_of_lemma_1_is_a_sum_of_minima() -> None:
    theta = np.random.default_rng(2).standard_normal(32)
    weights, coefficients = haar_coefficients(torch.from_numpy(theta))
    found = float(sparsity_bound(weights, coefficients, 0.7))
    expected = math.fsum(
        6 * abs(w) * min(abs(b), 0.7)
        for w, b in zip(weights.tolist(), coefficients.tolist(), strict=True)
    )
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_factor_of_theorem_2() -> None:
    # max(4 sqrt(2 log(log(256) / 0.1)), 2 sqrt 2) * (8 + 1)
    expected = 4 * math.sqrt(2 * math.log(math.log(256) / 0.1)) * 9
    assert window_factor(256, delta=0.1) == pytest.approx(expected)
    # One value: log n counts as 1, and log2 n is 0.
    assert window_factor(1, delta=0.99) == pytest.approx(2 * math.sqrt(2))


def test_the_oracle_is_the_best_window() -> None:
    truth = torch.cat([torch.zeros(900), torch.ones(100)])
    oracle = window_oracle(truth, sigma=1.0)
    means = torch.cumsum(truth.flip(0), 0) / torch.arange(1, 1001)
    every = [max(1 - float(means[r - 1]), r**-0.5) for r in range(1, 1001)]
    assert oracle.error == pytest.approx(min(every))
    assert oracle.window == 1 + int(np.argmin(every)) == 110


def published_estimates(y: np.ndarray, threshold: float) -> np.ndarray:
    """Threshold every Haar coefficient, the average too, with PyWavelets; the newest value."""
    coefficients = pywt.wavedec(y, "haar", mode="periodization")
    shrunk = [pywt.threshold(each, threshold, "soft") for each in coefficients]
    return np.asarray(pywt.waverec(shrunk, "haar", mode="periodization"))[..., -1]


@pytest.mark.parametrize("n", [16, 256])
@pytest.mark.parametrize("delta", [0.05, 0.3])
@pytest.mark.parametrize("course", list(courses(16)))
def test_the_published_bounds_hold(course: str, delta: float, n: int) -> None:
    sigma, truth = 0.3, courses(n)[course]
    noise = np.random.default_rng(0).standard_normal((2000, n))
    threshold = theory_threshold(n, sigma=sigma, delta=delta)
    errors = np.abs(published_estimates(truth + sigma * noise, threshold) - truth[-1])
    weights, coefficients = haar_coefficients(torch.from_numpy(truth))
    # Where all coefficients are zero the bound is zero, and the estimate is, too.
    lemma_1 = float(sparsity_bound(weights, coefficients, threshold)) + 1e-12
    theorem_2 = (
        window_factor(n, delta=delta) * window_oracle(torch.from_numpy(truth), sigma=sigma).error
    )
    assert (errors <= lemma_1).mean() >= 1 - delta
    assert (errors <= theorem_2).mean() >= 1 - delta


@pytest.mark.parametrize("n", [16, 1024])
@pytest.mark.parametrize("delta", [0.05, 0.1, 0.3])
def test_no_noise_passes_half_of_the_threshold(delta: float, n: int) -> None:
    # The event of the proofs. A union of the sub-Gaussian tails of its coefficients would allow a
    # fraction of 2 delta (log2 n + 1) / log n.
    noise = torch.randn(4000, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    passed = haar_coefficients(noise)[1].abs().amax(-1) > theory_threshold(n, delta=delta) / 2
    assert float(passed.double().mean()) <= delta


def test_the_parts_of_theorem_9() -> None:
    risks = torch.tensor([[0.5] * 60 + [0.1] * 4, [0.2] * 64], dtype=torch.float64)
    bound = excess_risk_bound(risks, dimension=3, sigma=0.4, delta=0.1)
    assert bound.capacity == pytest.approx(8 * math.sqrt(2 * 3 * math.log(128) / 64))
    assert bound.confidence == pytest.approx(2 * math.sqrt(2 * math.log(30) / 64))
    weights, coefficients = haar_coefficients(risks)

    def greatest(delta: float) -> float:
        threshold = 2 * 0.4 * math.sqrt(2 * math.log(math.log(64) / delta))
        sums = 6 * (weights.abs() * coefficients.abs().clamp_max(threshold)).sum(-1)
        return float(sums.max())

    assert bound.estimation == pytest.approx(greatest(0.1))
    assert bound.drift == pytest.approx(math.sqrt(3) * greatest(0.1 / 3))
    assert bound.excess == pytest.approx(bound.capacity + bound.confidence + bound.drift)
    # More classifiers can only raise it.
    assert excess_risk_bound(risks[:1], dimension=3, sigma=0.4).drift <= bound.drift


def test_empirical_risk_minimization_is_within_its_bound() -> None:
    # Threshold classifiers x > t of points on a line whose boundary moves; dimension 1.
    n, rng = 512, np.random.default_rng(3)
    cuts = np.linspace(0, 1, 21)
    boundary = np.where(np.arange(n) < 400, 0.3, 0.7)
    # The risk of a cut is the probability between it and the boundary.
    risks = np.abs(cuts[:, None] - boundary)
    bound = excess_risk_bound(torch.from_numpy(risks), dimension=1)
    threshold = theory_threshold(n, sigma=0.5)
    excess = []
    for _ in range(50):
        x = rng.random(n)
        losses = (x > cuts[:, None]) != (x > boundary)
        chosen = published_estimates(losses.astype(float), threshold).argmin()
        excess.append(risks[chosen, -1] - risks[:, -1].min())
    assert (np.array(excess) <= bound.excess).mean() >= 0.9


@pytest.mark.parametrize("n", [1, 7, 64, 500])
def test_the_bound_of_the_estimator_holds(n: int) -> None:
    sigma, truth = 0.3, torch.from_numpy(np.random.default_rng(n).standard_normal(n).cumsum() / 20)
    bound = haar_error_bound(truth, sigma=sigma, delta=0.1)
    noise = torch.randn(500, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimate = HaarEstimator(sigma=sigma, constant=1.0, delta=0.1).latest(truth + sigma * noise)
    covered = (torch.as_tensor(estimate.value) - truth[-1]).abs() <= bound
    assert float(covered.double().mean()) >= 0.9
    # The constants of Lemma 1 serve every wavelet; these are for this one.
    weights, coefficients = haar_coefficients(truth)
    assert bound <= window_factor(n) * window_oracle(truth, sigma=sigma).error
    assert bound <= 0.05 + float(
        sparsity_bound(weights, coefficients, theory_threshold(n, sigma=sigma))
    ) + sigma * 3.1 / math.sqrt(n)


def test_rates_grow_with_their_exponents() -> None:
    rates = denoising_rates(4096, variation=3.0, sigma=0.5)
    assert rates.squared == pytest.approx(16 * 3 ** (2 / 3) * 0.5 ** (4 / 3))
    assert rates.absolute == pytest.approx(256 * 3 ** (1 / 3) * 0.5 ** (2 / 3))
    longer = denoising_rates(8 * 4096, variation=3.0, sigma=0.5)
    assert longer.squared / rates.squared == pytest.approx(2)
    assert longer.absolute / rates.absolute == pytest.approx(4)


def test_wrong_settings_are_named() -> None:
    truth = torch.zeros(4)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        theory_threshold(0)
    with pytest.raises(ValueError, match="delta must lie"):
        window_factor(8, delta=1.0)
    with pytest.raises(ValueError, match="at least one value"):
        window_oracle(truth[:0], sigma=1.0)
    with pytest.raises(ValueError, match="at least one value"):
        haar_coefficients(truth[:0])
    with pytest.raises(ValueError, match=r"a constant of at least 1, got 0\.5"):
        haar_error_bound(truth, sigma=1.0, constant=0.5)
    with pytest.raises(ValueError, match="dimension must be at least 1, got 0"):
        excess_risk_bound(truth[None], dimension=0)
    with pytest.raises(ValueError, match="at least one risk"):
        excess_risk_bound(truth[None, :0], dimension=1)
    with pytest.raises(ValueError, match="variation at least 0, got 4 and -1"):
        denoising_rates(4, variation=-1.0, sigma=1.0)
