"""Denoising of whole series, and exact total variation against its optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear
from skimage.restoration import denoise_wavelet

from lightning_nna.drift.interval_estimator import IntervalWaveletEstimator
from lightning_nna.drift.total_variation import taut_string, tv_denoise
from lightning_nna.drift.wavelets import HaarEstimator
from lightning_nna.drift.windows import FixedWindow, WholeAverage


def walk(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n).cumsum()


@pytest.mark.parametrize("penalty", [0.0, 0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("n", [1, 2, 3, 10, 200])
def test_taut_string_is_optimal(n: int, penalty: float) -> None:
    y = walk(n, seed=n)
    x = taut_string(y, penalty)
    # The sums of residuals stay in a tube, and touch it where the solution jumps.
    sums, jumps = (y - x).cumsum(), np.diff(x)
    assert abs(sums[-1]) < 1e-8
    assert (np.abs(sums[:-1]) <= penalty + 1e-8).all()
    touching = np.abs(jumps) > 1e-9
    np.testing.assert_allclose(sums[:-1][touching], -penalty * np.sign(jumps[touching]), atol=1e-7)


def test_taut_string_is_the_dual_problem_of_scipy() -> None:
    y, penalty = walk(30), 0.8
    differences = np.diff(np.eye(30), axis=0)
    dual = lsq_linear(differences.T, y, bounds=(-penalty, penalty), tol=1e-14, method="bvls").x
    np.testing.assert_allclose(taut_string(y, penalty), y - differences.T @ dual, atol=1e-8)


def test_every_prefix_and_its_mirror() -> None:
    y = walk(100)
    estimator = IntervalWaveletEstimator(order=2, sigma=0.5, constant=0.5)
    past = [float(estimator.latest(y[:n]).value) for n in range(1, 101)]
    np.testing.assert_allclose(tv_denoise(y, estimator), past, atol=1e-9)
    both = tv_denoise(y, estimator, two_sided=True)
    np.testing.assert_allclose(
        tv_denoise(y[::-1].copy(), estimator, two_sided=True), both[::-1], atol=1e-9
    )


def test_two_sides_of_plain_means_are_the_mean_of_their_union() -> None:
    y = walk(50)
    np.testing.assert_allclose(
        tv_denoise(y, WholeAverage(), two_sided=True), np.full(50, y.mean()), atol=1e-12
    )
    both = tv_denoise(y, FixedWindow(window=4), two_sided=True)
    assert both[20] == pytest.approx(y[17:24].mean())


def test_later_values_help_and_wavelet_denoising_is_the_yardstick() -> None:
    truth = np.where(np.arange(1024) // 200 % 2, 2.0, 0.0)
    y = truth + 0.5 * np.random.default_rng(0).standard_normal((20, 1024))
    soft = HaarEstimator(sigma=0.5, constant=0.6)
    hard = HaarEstimator(sigma=0.5, constant=1.2, rule="hard")

    def error(found: np.ndarray) -> float:
        return float(np.square(found - truth).mean())

    past, both, both_hard = (
        error(np.asarray(tv_denoise(y, estimator, two_sided=two_sided)))
        for estimator, two_sided in ((soft, False), (soft, True), (hard, True))
    )
    # With soft thresholds, as by default. With few jumps VisuShrink is better with hard ones.
    settings = {"sigma": 0.5, "wavelet": "db1"}
    visu, bayes = (
        error(np.array([denoise_wavelet(row, method=method, **settings) for row in y]))
        for method in ("VisuShrink", "BayesShrink")
    )
    exact = error(np.array([taut_string(row, 4.0) for row in y]))
    assert exact < both < past < error(y) / 3
    assert both < visu
    assert exact < both_hard < bayes < both


def test_error_grows_with_the_third_root() -> None:
    lengths, errors = [2**power for power in range(8, 15)], []
    for n in lengths:
        pieces = round(n ** (1 / 3))
        truth = np.arange(n) * pieces // n % 2 * (2.0 / pieces) + 2.0 * (np.arange(n) >= n // 3)
        y = truth + 0.5 * np.random.default_rng(0).standard_normal((8, n))
        found = np.asarray(tv_denoise(y, HaarEstimator(sigma=0.5, constant=0.85)))
        errors.append(np.square(found - truth).sum(-1).mean())
    slope = np.polyfit(np.log(lengths), np.log(errors), 1)[0]
    assert slope == pytest.approx(1 / 3, abs=0.1)


def test_kinds_and_wrong_arguments() -> None:
    y = torch.from_numpy(walk(20)).float()
    found = tv_denoise(y)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.float32
    with pytest.raises(ValueError, match="at least 0, got 3 and -1"):
        taut_string(np.zeros(3), -1.0)
    with pytest.raises(ValueError, match="got 0 and 1"):
        taut_string(np.zeros(0), 1.0)
