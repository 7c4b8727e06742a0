"""One battery for every estimator of the newest value."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from lightning_nna.drift.aligator import Aligator
from lightning_nna.drift.estimators import Estimate, LatestEstimator
from lightning_nna.drift.interval_estimator import IntervalWaveletEstimator
from lightning_nna.drift.symmetric_wavelets import SymmetricWaveletEstimator
from lightning_nna.drift.wavelet_mixture import WaveletMixture
from lightning_nna.drift.wavelets import HaarEstimator
from lightning_nna.drift.windows import (
    AdaptiveRollingWindow,
    DoublingWindow,
    ExponentialAverage,
    FixedWindow,
    WholeAverage,
)

ESTIMATORS: dict[str, LatestEstimator] = {
    "haar": HaarEstimator(),
    "haar hard": HaarEstimator(rule="hard", constant=0.5),
    "haar tree": HaarEstimator(rule="tree"),
    "interval tree": IntervalWaveletEstimator(order=2, rule="tree"),
    "interval 1": IntervalWaveletEstimator(order=1),
    "interval 4": IntervalWaveletEstimator(order=4, constant=0.5),
    "symmetric": SymmetricWaveletEstimator(wavelet="db2"),
    "mixture": WaveletMixture(orders=(1, 3), soft=(0.4,), tree=(1.0,)),
    "whole": WholeAverage(),
    "window": FixedWindow(window=7),
    "exponential": ExponentialAverage(decay=0.8),
    "arw": AdaptiveRollingWindow(),
    "arw bound": AdaptiveRollingWindow(bound=0.5, constant=0.4),
    "doubling": DoublingWindow(),
    "aligator": Aligator(),
}
#: Those that know no noise, and so do not adapt to a jump.
LINEAR = {"whole", "window", "exponential"}
NAMES = [field.name for field in fields(Estimate)]

every = pytest.mark.parametrize("name", ESTIMATORS)


def series(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape) + np.linspace(0, 3, shape[-1])


def assert_equal(first: Estimate, second: Estimate, *, tolerance: float = 1e-9) -> None:
    for name in NAMES:
        np.testing.assert_allclose(
            np.asarray(getattr(first, name)),
            np.asarray(getattr(second, name)),
            rtol=tolerance,
            atol=tolerance,
            err_msg=name,
        )


@every
@pytest.mark.parametrize("sigma", [None, 0.7])
def test_a_prefix_knows_nothing_of_what_follows(name: str, sigma: float | None) -> None:
    estimator = replace(ESTIMATORS[name], sigma=sigma)
    y = series(2, 70)
    prefixes = estimator.prefixes(y)
    for n in (1, 2, 3, 16, 31, 70):
        found = Estimate(**{field: getattr(prefixes, field)[:, n - 1] for field in NAMES})
        assert_equal(estimator.latest(y[:, :n]), found)


@every
def test_numpy_torch_and_batches_are_alike(name: str) -> None:
    estimator, y = ESTIMATORS[name], series(2, 3, 40)
    found = estimator.latest(y)
    tensors = estimator.latest(torch.from_numpy(y))
    assert isinstance(found.value, np.ndarray)
    assert isinstance(tensors.value, torch.Tensor)
    assert found.value.shape == (2, 3)
    assert_equal(found, tensors)
    single = estimator.latest(y[1, 2])
    assert float(single.value) == pytest.approx(found.value[1, 2], abs=1e-9)
    in_float32 = estimator.latest(torch.from_numpy(y).float())
    assert isinstance(in_float32.value, torch.Tensor)
    assert in_float32.value.dtype == torch.float32


@every
def test_one_value_and_equal_values(name: str) -> None:
    estimator = ESTIMATORS[name]
    one = estimator.latest(np.array([3.0]))
    assert (one.value, one.radius, one.sigma, one.effective_window) == (3.0, np.inf, np.inf, 1.0)
    same = estimator.latest(np.full(50, 2.5))
    assert float(same.value) == pytest.approx(2.5)
    assert (same.radius, same.sigma) == (0.0, 0.0)


@every
def test_shift_and_scale_go_through(name: str) -> None:
    estimator, y = ESTIMATORS[name], series(60)
    found = estimator.latest(y)
    scaled = estimator.latest(4.0 * y)
    invariant = "arw bound"  # Its bound is in the unit of the series.
    assert float(estimator.latest(y + 10).value) == pytest.approx(float(found.value) + 10)
    assert (name == invariant) or float(scaled.value) == pytest.approx(4 * float(found.value))


@every
def test_gradients_sum_to_one(name: str) -> None:
    y = torch.from_numpy(series(40)).requires_grad_()
    ESTIMATORS[name].latest(y).value.sum().backward()
    assert y.grad is not None
    assert float(y.grad.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - LINEAR))
def test_a_jump_is_followed_and_a_level_is_averaged(name: str) -> None:
    estimator = replace(ESTIMATORS[name], sigma=1.0)
    noise = np.random.default_rng(0).standard_normal((200, 150))
    jump = np.where(np.arange(150) < 75, 0.0, 20.0)
    after = np.square(estimator.latest(noise + jump).value - 20.0).mean()
    level = np.square(estimator.latest(noise).value).mean()
    whole = np.square((noise + jump).mean(-1) - 20.0).mean()
    assert after < 0.9
    assert level < 0.6
    assert whole > 90


@every
def test_an_empty_series_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="at least one value"):
        ESTIMATORS[name].latest(np.zeros((3, 0)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedWindow(window=0),
        lambda: ExponentialAverage(decay=1.0),
        lambda: AdaptiveRollingWindow(bound=-1.0),
        lambda: DoublingWindow(delta=0.0),
        lambda: Aligator(rate=-1.0),
        lambda: WaveletMixture(memory=1.5),
        lambda: WaveletMixture(orders=()),
        lambda: IntervalWaveletEstimator(order=9),
    ],
)
def test_wrong_settings_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match=r"must|needs"):
        make()  # type: ignore[operator]


def test_rolling_window_is_the_definition() -> None:
    y, sigma, delta = series(40), 0.8, 0.1
    n = len(y)
    means = np.array([y[n - r :].mean() for r in range(1, n + 1)])
    psi = sigma * np.sqrt(2 * np.log(2 / delta) / np.arange(1, n + 1))
    cost = [
        psi[r] + max(max(abs(means[r] - means[i]) - psi[r] - psi[i] for i in range(r + 1)), 0.0)
        for r in range(n)
    ]
    found = AdaptiveRollingWindow(sigma=sigma, delta=delta).latest(y)
    assert float(found.value) == pytest.approx(means[int(np.argmin(cost))])


def test_exponential_average_is_the_recursion() -> None:
    y = series(30)
    weights = 0.8 ** np.arange(30)[::-1]
    found = ExponentialAverage(decay=0.8).latest(y)
    assert float(found.value) == pytest.approx(np.average(y, weights=weights))
    window = weights.sum() ** 2 / np.square(weights).sum()
    assert float(found.effective_window) == pytest.approx(window)


def test_doubling_window_is_the_definition() -> None:
    for seed in range(10):
        y, sigma, delta = series(41, seed=seed), 0.3, 0.1
        quantile, r = np.sqrt(2 * np.log(np.log2(41) / delta)), 1
        while (
            2 * r <= 41
            and abs(y[-r:].mean() - y[-2 * r :].mean()) <= 0.6 * sigma * quantile / r**0.5
        ):
            r *= 2
        found = DoublingWindow(constant=0.6, sigma=sigma, delta=delta).latest(y)
        assert float(found.effective_window) == r
        assert float(found.value) == pytest.approx(y[-r:].mean())


def test_aligator_is_experts_that_live_between_cuts() -> None:
    y, sigma, rate = series(70), 0.8, 0.3
    weights: dict[tuple[int, int], float] = {}
    said = 0.0
    for number in range(1, 71):
        # The expert of level k began at the last multiple of 2^k; it is known by level and start.
        cuts = ((level, number >> level << level) for level in range(number.bit_length()))
        before = {expert: weights.get(expert, 1.0) for expert in cuts}
        weights = {
            (level, start): weight
            * np.exp(
                -rate
                * ((said if start == number else y[start - 1 : number - 1].mean()) - y[number - 1])
                ** 2
                / sigma**2
            )
            for (level, start), weight in before.items()
        }
        kept = sum(before.values()) / sum(weights.values())
        weights = {expert: weight * kept for expert, weight in weights.items()}
        means = [y[start - 1 : number].mean() for _, start in weights]
        said = float(np.average(means, weights=list(weights.values())))
    found = Aligator(rate=rate, sigma=sigma).latest(y)
    assert float(found.value) == pytest.approx(said)
