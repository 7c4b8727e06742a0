"""The benchmark of temporal shift: its series, its scores, its report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_nna.drift.bounds import theory_threshold
from lightning_nna.drift.windows import FixedWindow, WholeAverage
from recipes.benchmark import (
    shift_detection,
    shift_doppler,
    shift_latest,
    shift_learning,
    shift_streaming,
)
from recipes.benchmark.rows import append_row, read_rows
from recipes.benchmark.shift import STUDY, checks, plot, runs
from recipes.benchmark.shift_latest import is_first


def test_series_are_of_unit_deviation_and_noise_is_that_of_its_seed() -> None:
    for course in shift_latest.series(3).values():
        assert course.mean() == pytest.approx(0, abs=1e-12)
        assert course.std() == pytest.approx(1)
    truth, y = shift_latest.noisy([1, 2], 0.5)
    assert truth.shape == y.shape == (2, len(shift_latest.CASES), shift_latest.LENGTH)
    assert float((y - truth).std()) == pytest.approx(0.5, rel=0.05)
    again = shift_latest.noisy([2], 0.5)[1]
    torch.testing.assert_close(again[0], y[1], rtol=0, atol=0)
    assert not set(shift_latest.SEEDS) & set(shift_latest.TUNING_SEEDS)
    assert not set(shift_detection.TRIALS) & set(shift_detection.TUNING_TRIALS)


def test_the_oracle_is_the_best_window_of_each_case() -> None:
    truth, y = shift_latest.noisy([1], 0.5)
    best, windows = shift_latest.oracle(truth, y)
    for number in range(len(shift_latest.CASES)):
        every = [
            float(shift_latest.errors(FixedWindow(window=r, sigma=1.0), truth, y)[0, number])
            for r in shift_latest.WINDOWS
        ]
        assert float(best[0, number]) == pytest.approx(min(every))
        assert int(windows[number]) == shift_latest.WINDOWS[int(np.argmin(every))]
    average = shift_latest.errors(WholeAverage(sigma=1.0), truth, y)
    assert (average >= best).all()


def test_scores_of_detectors_that_are_known() -> None:
    always = shift_detection.score(lambda: lambda y: True, "step", range(5))
    assert always == {"detected": 0.0, "delay": None, "false_alarm": 1.0}
    never = shift_detection.score(lambda: lambda y: False, "flat", range(5))
    assert never == {"detected": None, "delay": None, "false_alarm": 0.0}
    rises = shift_detection.noisy("step", range(50))
    firsts = (rises > 0.265).argmax(1)
    level = shift_detection.score(lambda: lambda y: y > 0.265, "step", range(50))
    assert level["detected"] == pytest.approx(((firsts >= 30) & (firsts < 35)).mean())
    assert level["delay"] == pytest.approx((firsts[firsts >= 30] - 30).mean())
    assert level["false_alarm"] == pytest.approx((firsts < 30).mean())
    ours = shift_detection.score(shift_detection.ours, "step", range(5))
    assert ours["detected"] == 1.0
    assert ours == shift_detection.score(shift_detection.ours, "step, ten times", range(5))


@pytest.mark.parametrize("learner", sorted(shift_learning.LEARNERS))
def test_learners_take_as_many_trainings_as_they_say(
    learner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = []

    class Counted(shift_learning.History):
        def fit(self, rows: Any, reduction: Any, **settings: Any) -> torch.nn.Module:
            fitted.append(rows)
            return super().fit(rows, reduction, **settings)

    x, y = shift_learning.stream("rotating", 1)
    history = Counted(x[:1500], y[:1500], 250, lambda: torch.nn.Linear(6, 1))
    first = shift_learning.LEARNERS[learner][1](history)
    assert len(fitted) == first.trainings
    assert first.model(x[:3]).shape == (3, 1)
    longer = Counted(x[:1750], y[:1750], 250, lambda: torch.nn.Linear(6, 1), first)
    second = shift_learning.LEARNERS[learner][1](longer)
    assert len(fitted) == first.trainings + second.trainings


def test_a_training_starts_where_it_is_told_and_averages_its_newer_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = shift_learning.stream("rotating", 1)

    def build() -> torch.nn.Linear:
        torch.manual_seed(0)
        return torch.nn.Linear(6, 1)

    history = shift_learning.History(x[:500], y[:500], 250, build)
    weights = []
    for steps in range(5):
        monkeypatch.setattr(shift_learning, "_STEPS", steps)
        weights.append(history.fit(slice(None), torch.mean).weight)
    averaged = history.fit(slice(None), torch.mean, averaged=True)
    torch.testing.assert_close(averaged.weight, (weights[3] + weights[4]) / 2)
    monkeypatch.setattr(shift_learning, "_STEPS", 0)
    again = history.fit(slice(None), torch.mean, start=averaged)
    torch.testing.assert_close(again.weight, averaged.weight, rtol=0, atol=0)
    assert again is not averaged


def test_a_carried_window_starts_at_that_of_the_period_before() -> None:
    x, y = shift_learning.stream("rotating", 1)
    learner = shift_learning.LEARNERS["risk_carried"][1]
    history = shift_learning.History(x[:3000], y[:3000], 250, lambda: torch.nn.Linear(6, 1))
    first = learner(history)
    assert first.window is not None
    assert first.window < 3000
    second = learner(replace(history, x=x[:3250], y=y[:3250], previous=first))
    assert second.window is not None
    assert second.window <= first.window + 250


def test_a_grid_has_the_learners_that_are_asked_for() -> None:
    assert {run.method for run in runs(tables=["learning"], learners=["paper"])} == {"paper"}  # type: ignore[attr-defined]
    methods = [run.method for run in runs(tables=["learning"])]  # type: ignore[attr-defined]
    assert set(methods) == set(shift_learning.LEARNERS)
    assert len(runs(tables=["doppler"], learners=["paper"])) == len(shift_doppler.runs())


def test_streaming_and_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift_streaming, "UPDATES", 5)
    for method in shift_streaming.STREAMING:
        (row,) = shift_streaming.StreamingRun(100, method).rows()
        assert row["update_us"] > 0
    y = np.random.default_rng(0).standard_normal(256)
    assert shift_streaming.with_pywavelets(y) == pytest.approx(shift_streaming.with_batch(y))
    truth = shift_streaming.piecewise_constant(4096)
    assert np.abs(np.diff(truth)).sum() == pytest.approx(4.0, abs=0.3)
    assert shift_streaming.slope([10, 100, 1000], [1, 10, 100]) == pytest.approx(1.0)


@pytest.mark.parametrize("method", sorted(shift_streaming.RATES))
def test_denoised_is_nearer_to_the_truth(method: str) -> None:
    (row,) = shift_streaming.RateRun(512, method).rows()
    assert 0 < row["error"] < 0.5 * 512 * 0.5**2


@pytest.mark.parametrize("mode", shift_doppler.MODES)
@pytest.mark.parametrize(("wavelet", "n"), [("haar", 50), ("haar", 64), ("db8", 64), ("db8", 100)])
def test_doppler_weighs_the_coefficients_of_the_newest_value(
    wavelet: str, n: int, mode: str
) -> None:
    transform = shift_doppler.Transform(wavelet, mode, n)
    y = np.random.default_rng(0).standard_normal((3, n))
    parts = transform.analyze(y)
    np.testing.assert_allclose(transform.synthesize(parts), y, atol=1e-8)
    shrunk = [shift_doppler.soft(part, 0.5) for part in parts]
    weights = shift_doppler.newest_weights(transform)
    found = sum(part @ weight for part, weight in zip(shrunk, weights, strict=True))
    np.testing.assert_allclose(found, transform.synthesize(shrunk)[:, -1], atol=1e-12)


@pytest.mark.parametrize("scored", shift_doppler.SCORED)
@pytest.mark.parametrize("case", shift_doppler.CASES)
def test_doppler_is_scaled_by_the_published_average(case: str, scored: str) -> None:
    theta, scale = shift_doppler.scaled(case, 256, scored)
    errors = [row["mse"] for row in shift_doppler._average_lines(theta, scored)]
    assert errors[0][0] == pytest.approx(0.511, rel=0.02)
    assert theta / scale == pytest.approx(shift_doppler.course(case, 256))


def test_doppler_searches_thresholds_and_ends() -> None:
    found = shift_doppler.search("newest", shift_doppler.CASES[0], 64)
    (best, measured) = shift_doppler._nearest_lines(found, "haar")
    assert (best["sigma_known"], measured["sigma_known"]) == (True, False)
    chosen = found["haar", best["mode"]][best["averages"], best["threshold"], True]
    assert best["mse"] == chosen
    joint = shift_doppler._joint(found, "joint", 64)
    assert len(joint["lines"]) == 4
    assert joint["distance"] == pytest.approx(
        np.mean([line["distance"] for line in joint["lines"]])
    )
    theory = shift_doppler._joint(found, "theory", 64)
    assert shift_doppler._joint(found, "separate", 64)["distance"] <= joint["distance"]
    assert theory["lines"][0]["threshold"] == pytest.approx(theory_threshold(64, delta=0.1))
    assert theory["distance"] >= joint["distance"]
    # What is published is at no distance from itself.
    published = shift_doppler.PUBLISHED["haar", True]
    assert shift_doppler.distance(published, published) == 0
    # An estimate that is the newest value itself has the error of the noise.
    raw = shift_doppler.errors_of_transform(
        shift_doppler.Transform("haar", "symmetric", 64),
        np.zeros(64),
        np.random.default_rng(0).standard_normal((4000, 64)),
        "newest",
    )[False, 7.0, True]
    # All details are below 7 standard deviations: the mean of 64 values.
    assert raw == pytest.approx([sigma**2 / 64 for sigma in shift_doppler.SIGMAS], rel=0.1)


def small_rows() -> list[dict[str, Any]]:
    """A few rows of each table, with figures that are known."""
    rows: list[dict[str, Any]] = []
    for number, method in enumerate([*shift_latest.METHODS, "oracle"]):
        for case in shift_latest.CASES:
            figure = {"mse": 0.1 + 0.01 * number, "mse_error": 0.001, "window": 8}
            key = {"case": case, "sigma": 0.5, "sigma_known": True, "method": method}
            rows.append({"table": "latest", **key, **figure})
    place = {"table": "doppler", "scored": "newest", "n": 256, "case": "sin(4/t)", "scale": 1.2}
    setting = {"mode": "symmetric", "threshold": 4.0, "averages": False}
    found = [
        {"method": method, "sigma_known": known, "mse": [1.05 * x for x in mse], "distance": 0.05}
        for (method, known), mse in shift_doppler.PUBLISHED.items()
    ]
    for each in found:
        rows.append({**place, "method": each["method"], "lines": [{**setting, **each}]})
    lines = [
        {**each, "threshold": 4.0 if each["sigma_known"] else 3.0}
        for each in found
        if each["method"] in shift_doppler.WAVELETS
    ]
    lines[0] = {**lines[0], "mse": [0.1, 0.2, 0.3]}
    rows += [
        {**place, **setting, "method": method, "distance": 0.1, "lines": lines}
        for method in shift_doppler.TOGETHER
    ]
    for method in shift_detection.METHODS:
        for case, onset in shift_detection.ONSETS.items():
            figure = {"detected": None if onset is None else 0.97, "delay": 1.5}
            key = {"table": "detection", "case": case, "method": method}
            rows.append(key | figure | {"false_alarm": 0.08 if case == "flat" else 0.01})
    for method in shift_learning.LEARNERS:
        figures = {"error": 0.2, "trainings": 6.0 if method == "arw" else 1.0}
        key = {"table": "learning", "case": "elec", "seed": 1, "model": "mlp", "method": method}
        rows.append(key | figures)
    for method in shift_streaming.STREAMING:
        rows.append({"table": "streaming", "n": 1000, "method": method, "update_us": 12.3})
    for n in (256, 512):
        rows.append({"table": "rate", "n": n, "method": "haar", "error": n ** (1 / 3)})
    return [{"command": "python -m recipes.benchmark.shift", **row} for row in rows]


def test_targets_are_judged() -> None:
    text = "\n".join(checks(small_rows()))
    assert "first or tied in 8 of 8 cases (100%; target 80%, met)" in text
    assert "6 of 6 lines within 10% in every cell" in text
    assert "lines of the wavelets: 3 of 4 with one setting for all; 3 of 4 with a" in text
    assert "97.0% of the steps detected within 5 epochs (target 95 %, met)" in text
    assert "False alarms on flat runs: 8.0% (target 5 %, missed)" in text
    assert "False alarms on falling runs: 1.0% (target 5 %, met)" in text
    assert "elec, mlp: 20.00% errors with one training, 20.00% with a window chosen" in text
    row, rival = {"mse": 0.11, "mse_error": 0.01}, {"mse": 0.1, "mse_error": 0.0}
    assert is_first(row, rival)
    assert not is_first(row | {"mse_error": 0.005}, rival)


def test_the_report_has_every_table_and_a_figure(tmp_path: Path) -> None:
    text = STUDY.render(small_rows())
    assert "| **mixture of wavelets** | - | " in text
    assert (
        "| DB8, noise known | 0.007 / 0.032 / 0.129 | 0.007 / 0.034 / 0.135 | +5% / +5% / +5% |"
        in text
    )
    assert "newest value, sin(4/t), n = 256, scale 1.20, threshold 4.00 (c = 1.41) where" in text
    assert "| ours, Haar | 97.0% | 1.5 | 1.0% | 97.0% | 1.5 | 8.0% | 1.0% | 97.0% |" in text
    assert "| WaveletRisk | - | - | - | - | - | 20.00% | 1.0 |" in text
    assert "| StreamingHaar.update | 12.3 µs | - | - | - |" in text
    assert "| tv_denoise, Haar, soft | 0.333 | 6.3 | 8.0 |" in text
    plot(small_rows(), tmp_path / "shift.png")
    assert (tmp_path / "shift.png").stat().st_size > 10_000


def test_what_is_there_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shift_streaming, "LENGTHS", (64, 128))
    monkeypatch.setattr(shift_streaming, "UPDATES", 3)
    append_row(
        STUDY.results,
        {"table": "streaming", "n": 64, "method": "batch", "update_us": 1.0, "command": ""},
    )
    STUDY.main(["--tables", "streaming"])
    rows = read_rows(STUDY.results)
    assert len(rows) == 2 * len(shift_streaming.STREAMING)
    assert all(row.keys() >= {"table", "command", "method"} for row in rows)
    STUDY.main(["--tables", "streaming"])
    assert read_rows(STUDY.results) == rows
    assert STUDY.results.with_suffix(".md").read_text() == STUDY.render(rows)
