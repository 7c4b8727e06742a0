"""Estimates of the newest value by wavelets, against PyWavelets and full transforms."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import pywt
import torch

from lightning_nna.drift.bounds import nested_windows
from lightning_nna.drift.estimators import noise_level, running_noise_level
from lightning_nna.drift.interval_estimator import IntervalWaveletEstimator
from lightning_nna.drift.interval_wavelets import (
    edge_filters,
    interval_transform,
    inverse_interval_transform,
)
from lightning_nna.drift.streaming_haar import StreamingHaar
from lightning_nna.drift.symmetric_wavelets import SymmetricWaveletEstimator, newest_rows
from lightning_nna.drift.wavelets import (
    HaarEstimator,
    haar_latest,
    wavelet_estimator,
    wavelet_latest,
)


def walk(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).cumsum(-1)


def quantile(n: int, delta: float = 0.1) -> float:
    return math.sqrt(2 * math.log(max(math.log2(n), 1) / delta))


@pytest.mark.parametrize("rule", ["soft", "hard"])
@pytest.mark.parametrize("power", [0, 1, 2, 5, 10])
def test_haar_is_the_transform_for_powers_of_two(power: int, rule: str) -> None:
    y = walk(3, 2**power)
    threshold = 0.7 * quantile(2**power) * 0.4
    coarse, *details = pywt.wavedec(y, "haar", level=power) if power else [y]
    kept = [pywt.threshold(detail, threshold, rule) for detail in details]
    expected = pywt.waverec([coarse, *kept], "haar")[:, -1] if power else y[:, -1]
    found = haar_latest(y, sigma=0.4, constant=0.7, rule=rule)
    np.testing.assert_allclose(found.value, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [*range(1, 40), 100, 1000])
def test_haar_is_its_closed_form_for_any_length(n: int) -> None:
    y = walk(n, seed=n)
    windows = nested_windows(n)
    means = [y[-r:].mean() for r in windows]
    sigma, value, variance = 0.5, means[-1], 1 / n
    for (r, mean), (wider, mean_of_wider) in pairwise(zip(windows, means, strict=True)):
        share = 1 / r - 1 / wider
        detail = mean - mean_of_wider
        beyond = max(abs(detail) - quantile(n) * sigma * math.sqrt(share), 0.0)
        value += math.copysign(beyond, detail)
        variance += share * (beyond > 0)
    found = haar_latest(y, sigma=sigma)
    assert float(found.value) == pytest.approx(value, abs=1e-10)
    assert float(found.effective_window) == pytest.approx(1 / variance)
    assert float(found.radius) == pytest.approx(quantile(n) * sigma * math.sqrt(variance))


def test_windows_are_the_one_way_to_write_a_length() -> None:
    for n in range(1, 3000):
        windows = nested_windows(n)
        assert windows[0] == 1
        assert windows[-1] == n
        sizes = np.diff([0, *windows])
        powers, counts = np.unique(sizes, return_counts=True)
        assert (powers == 2 ** np.arange(len(powers))).all()
        assert counts.max() <= 2
        assert max((b / a for a, b in pairwise(windows)), default=1) <= 3
    assert nested_windows(1024) == [2**power for power in range(11)]


@pytest.mark.parametrize("n", [1, 5, 37, 64, 200])
@pytest.mark.parametrize("wavelet", ["db2", "db8", "sym5", "coif2", "bior2.4", "dmey"])
def test_symmetric_extension_is_that_of_pywavelets(wavelet: str, n: int) -> None:
    y = walk(2, n)
    levels = pywt.dwt_max_level(n, pywt.Wavelet(wavelet).dec_len)
    coarse, *details = pywt.wavedec(y, wavelet, mode="symmetric", level=levels) if levels else [y]
    kept = [pywt.threshold(detail, 0.3 * quantile(n), "soft") for detail in details]
    back = pywt.waverec([coarse, *kept], wavelet, mode="symmetric") if levels else y
    found = wavelet_latest(y, wavelet=wavelet, sigma=0.3)
    np.testing.assert_allclose(found.value, back[:, n - 1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("wavelet", ["db1", "db4", "bior3.1", "rbio1.3"])
def test_rows_of_the_newest_value_give_it_back(wavelet: str) -> None:
    for n in (1, 2, 9, 50, 131):
        rows, at_newest = newest_rows(wavelet, n)
        whole = rows[0] + at_newest @ rows[1:]
        np.testing.assert_allclose(whole, np.eye(n)[-1], rtol=0, atol=1e-10)


def test_what_was_estimated_in_inference_mode_can_be_differentiated_later() -> None:
    y = torch.from_numpy(walk(77))
    with torch.inference_mode():
        quiet = wavelet_latest(y, wavelet="db5", sigma=0.3)
    loud = y.clone().requires_grad_()
    found = wavelet_latest(loud, wavelet="db5", sigma=0.3)
    found.value.backward()  # type: ignore[union-attr]
    torch.testing.assert_close(found.value.detach(), quiet.value)  # type: ignore[union-attr]
    assert loud.grad is not None


@pytest.mark.parametrize("rule", ["soft", "hard"])
@pytest.mark.parametrize(("order", "n", "levels"), [(2, 80, 4), (3, 144, 4), (5, 120, 3)])
def test_interval_estimate_is_that_of_the_whole_transform(
    order: int, n: int, levels: int, rule: str
) -> None:
    y = torch.from_numpy(walk(4, n))
    threshold = 0.5 * quantile(n) * 0.3
    averages, details = interval_transform(y, order, levels)
    kept = [torch.from_numpy(pywt.threshold(d.numpy(), threshold, rule)) for d in details]
    # The estimate, which knows no far edge, would go on with more values.
    deeper = n >= 2**levels * (4 * order - 2) - order + 1
    polynomials = edge_filters(order, mirrored=True)[levels - 1].polynomials
    turn = torch.from_numpy(np.linalg.qr(polynomials)[0])
    edge = averages[:, -order:].flip(-1) @ turn
    bent = torch.from_numpy(pywt.threshold(edge[:, 1:].numpy(), threshold, rule))
    edge = torch.cat([edge[:, :1], bent], dim=1) @ turn.T
    averages = torch.cat([averages[:, :-order], edge.flip(-1)], dim=1)
    expected = inverse_interval_transform(averages, kept, order)[:, -1]
    found = IntervalWaveletEstimator(order=order, sigma=0.3, constant=0.5, rule=rule).latest(y)
    assert not deeper
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", range(1, 9))
def test_polynomials_are_estimated_without_error(order: int) -> None:
    x = torch.linspace(-1, 1, 3000, dtype=torch.float64)
    y = sum(x**degree for degree in range(order))
    assert isinstance(y, torch.Tensor)
    found = IntervalWaveletEstimator(order=order, sigma=0.0).prefixes(y)
    torch.testing.assert_close(found.value[8 * order :], y[8 * order :], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "estimator",
    [
        HaarEstimator(sigma=1.0),
        IntervalWaveletEstimator(order=3, sigma=1.0),
        SymmetricWaveletEstimator(wavelet="db3", sigma=1.0),
    ],
    ids=["haar", "interval", "symmetric"],
)
def test_effective_window_is_that_of_the_weights(estimator: HaarEstimator) -> None:
    y = torch.from_numpy(walk(300)).requires_grad_()
    found = estimator.latest(y)
    (weights,) = torch.autograd.grad(found.value, y)
    assert float(1 / weights.square().sum()) == pytest.approx(float(found.effective_window))
    assert float(found.details) > 0


@pytest.mark.parametrize("n", [64, 100])
def test_the_tree_is_one_window(n: int) -> None:
    y = np.random.default_rng(0).standard_normal((50, n)) + 4.0 * (np.arange(n) >= n - 20)
    windows = nested_windows(n)
    means = np.array([y[:, -r:].mean(1) for r in windows])
    share = np.array([1 / a - 1 / b for a, b in pairwise(windows)])
    above = np.abs(np.diff(means, axis=0)) > quantile(n) * np.sqrt(share)[:, None]
    chosen = np.where(above.any(0), above.argmax(0), len(windows) - 1)
    found = haar_latest(y, sigma=1.0, rule="tree")
    np.testing.assert_allclose(found.value, means[chosen, np.arange(50)], atol=1e-10)
    np.testing.assert_allclose(found.effective_window, np.array(windows)[chosen])


def test_derivative_of_haar() -> None:
    y = torch.from_numpy(walk(100)).requires_grad_()
    estimator = HaarEstimator(sigma=0.5)
    assert torch.autograd.gradcheck(lambda z: estimator.latest(z).value, y)


def test_stream_is_the_batch_over_a_million_values() -> None:
    count = 2**20
    rng = np.random.default_rng(1)
    y = rng.standard_normal(count) + np.repeat([0.0, 3.0, -2.0, 5.0], count // 4)
    stream, checked = StreamingHaar(sigma=1.0), np.sort(rng.choice(count, 200, replace=False))
    found = {}
    wanted = {0, 1, 2, *checked.tolist(), count - 1}
    for number, value in enumerate(y.tolist()):
        stream.push(value)
        if number in wanted:
            found[number] = stream.estimate()
    times = torch.tensor(sorted(found))
    batch = HaarEstimator().estimate_at(torch.from_numpy(y), times, torch.ones(len(times)).double())
    for name in ("value", "radius", "effective_window", "details"):
        streamed = [getattr(found[time], name) for time in sorted(found)]
        np.testing.assert_allclose(streamed, getattr(batch, name), rtol=1e-12, atol=1e-12)
    assert len(stream.blocks) <= 2 * math.log2(count)


def test_stream_measures_the_noise_as_the_batch_does() -> None:
    y = walk(3000)
    stream, batch = StreamingHaar(), HaarEstimator().prefixes(y).sigma
    found = np.array([stream.update(value).sigma for value in y.tolist()])
    np.testing.assert_allclose(found, batch, rtol=0.006)


def test_stream_resumes_and_refuses_what_is_not_finite() -> None:
    y = walk(500).tolist()
    whole, first, second = StreamingHaar(), StreamingHaar(), StreamingHaar()
    for value in y[:333]:
        whole.push(value)
        first.push(value)
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="must be finite, got nan"):
        second.push(math.nan)
    for value in y[333:]:
        assert whole.update(value) == second.update(value)
    with pytest.raises(ValueError, match="at least one value"):
        StreamingHaar().estimate()


def test_noise_of_every_prefix_is_its_own() -> None:
    y = torch.from_numpy(walk(3, 50))
    running = running_noise_level(y)
    for n in range(1, 51):
        torch.testing.assert_close(running[:, n - 1], noise_level(y[:, :n]))
    details = np.abs(np.diff(y.numpy(), axis=-1)) / math.sqrt(2)
    np.testing.assert_allclose(running[:, -1], np.median(details, axis=-1) / 0.6745)


def test_radius_covers_the_noise() -> None:
    y = torch.randn(2000, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = haar_latest(y, sigma=1.0)
    assert float((found.value.abs() <= found.radius).double().mean()) >= 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": -1.0}, "sigma must be finite and at least 0"),
        ({"delta": 1.0}, "delta must lie between 0 and 1, got 1.0"),
        ({"constant": math.inf}, "constant must be finite"),
        ({"rule": "firm"}, "rule must be 'soft', 'hard' or 'tree', got 'firm'"),
        ({"rule": "tree"}, "rule 'tree' needs levels that nest"),
        ({"wavelet": "db99"}, "no discrete wavelet 'db99'"),
        ({"wavelet": "sym4", "boundary": "interval"}, "interval wavelets are 'db2' to 'db8'"),
        ({"wavelet": "db9", "boundary": "interval"}, "one of 1 to 8, got 9"),
        ({"boundary": "periodic"}, "boundary must be 'symmetric' or 'interval'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wavelet_estimator(**settings)  # type: ignore[arg-type]
