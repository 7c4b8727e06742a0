"""The drift detector: what is drift, what is not, and going on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from lightning_nna.drift.detector import MEMORY, DriftDetector
from lightning_nna.drift.wavelets import haar_latest, wavelet_latest

EPOCH = np.arange(60)


def noise(seed: int, scale: float = 0.02) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal(60)


def flags(values: np.ndarray, **settings: object) -> np.ndarray:
    detector = DriftDetector(**settings)  # type: ignore[arg-type]
    return np.array([detector.update(value).drift for value in values.tolist()])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_steps_are_found_and_flat_and_falling_runs_are_left_alone(scale: float) -> None:
    found = []
    for seed in range(20):
        step = flags(scale * (0.2 + 0.1 * (EPOCH >= 30) + noise(seed)))
        flat = flags(scale * (0.2 + noise(seed)))
        falling = flags(scale * (0.15 + 0.8 * np.exp(-EPOCH / 12) + noise(seed)))
        found.append([step[30:35].any(), flat.any(), falling.any()])
    detected, on_flat, on_falling = np.mean(found, axis=0)
    assert detected >= 0.95
    assert on_flat <= 0.05
    assert on_falling == 0


def test_less_or_more_is_better() -> None:
    values = 0.2 + 0.1 * (EPOCH >= 30) + noise(0)
    assert (flags(values) == flags(-values, mode="max")).all()
    assert not flags(values, mode="max").any()
    assert not flags(values, min_delta=0.2).any()


@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4"])
def test_the_estimate_is_that_of_the_whole_series(wavelet: str) -> None:
    values = 0.2 + 0.1 * (EPOCH >= 30) + noise(1)
    detector = DriftDetector(wavelet=wavelet, constant=0.5, delta=0.1)
    reading = [detector.update(value) for value in values.tolist()][-1]
    sigma = detector.noise_level()
    settings = {"sigma": sigma, "constant": 0.5, "delta": 0.1}
    expected = (
        haar_latest(values, **settings)  # type: ignore[arg-type]
        if wavelet == "haar"
        else wavelet_latest(
            values,
            wavelet=wavelet,
            boundary="interval" if wavelet == "db2" else "symmetric",
            **settings,  # type: ignore[arg-type]
        )
    )
    assert detector.n == 60
    assert reading.value == pytest.approx(float(expected.value))
    assert reading.radius == pytest.approx(float(expected.radius))


def test_noise_is_measured_beside_jumps() -> None:
    detector = DriftDetector()
    values = np.random.default_rng(0).standard_normal(1000) + 50 * (np.arange(1000) // 100)
    assert detector.noise_level() == math.inf
    for value in values.tolist():
        detector.update(value)
    assert detector.noise_level() == pytest.approx(1.0, rel=0.05)


def test_equal_values_and_coarse_ones() -> None:
    detector = DriftDetector()
    readings = [detector.update(0.5) for _ in range(20)]
    assert detector.constant_so_far
    assert not any(reading.drift for reading in readings)
    assert (readings[-1].value, readings[-1].radius) == (0.5, 0.0)
    # Of a metric in steps of 0.1 most neighbors are equal; one step up and down is its noise.
    coarse = np.tile([0.5, 0.5, 0.5, 0.6], 20)
    assert not flags(coarse).any()


@pytest.mark.parametrize("wavelet", ["haar", "db3"])
def test_resuming_goes_on_to_the_bit(wavelet: str) -> None:
    values = (0.2 + 0.1 * (EPOCH >= 30) + noise(2)).tolist()
    whole, first, second = (DriftDetector(wavelet=wavelet) for _ in range(3))
    for value in values[:31]:
        whole.update(value)
        first.update(value)
    second.load_state_dict(json.loads(json.dumps(first.state_dict()), object_hook=_with_numbers))
    for value in values[31:]:
        assert repr(whole.update(value)) == repr(second.update(value))


def _with_numbers(node: dict[str, object]) -> dict[object, object]:
    return {int(key) if key.lstrip("-").isdecimal() else key: node[key] for key in node}


def test_long_streams_keep_a_bounded_state_and_resume() -> None:
    values = np.random.default_rng(3).standard_normal(3 * MEMORY)
    whole, second = DriftDetector(), DriftDetector()
    for value in values[: 2 * MEMORY].tolist():
        whole.update(value)
    second.load_state_dict(whole.state_dict())
    for value in values[2 * MEMORY :].tolist():
        assert whole.update(value) == second.update(value)
    state = whole.state_dict()
    assert len(state["newest"]) == MEMORY + 1
    differences = np.abs(np.diff(values[-MEMORY - 1 :]))
    inside = differences[differences <= 4 * np.median(differences) / 0.6745]
    expected = inside.mean() / (0.7976642 * math.sqrt(2)) * (1 + 4 / (MEMORY + 1))
    assert whole.noise_level() == pytest.approx(expected)


def test_what_is_not_finite_changes_nothing() -> None:
    detector = DriftDetector()
    detector.update(1.0)
    before = detector.state_dict()
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="must be finite"):
            detector.update(value)
    assert detector.state_dict() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "up"}, "mode must be 'min' or 'max', got 'up'"),
        ({"warmup": 1}, "warmup must be at least 2, got 1"),
        ({"min_delta": -1.0}, "min_delta must not be negative"),
        ({"delta": 0.0}, "delta must lie between 0 and 1"),
        ({"wavelet": "daubechies"}, "no discrete wavelet 'daubechies'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DriftDetector(**settings)  # type: ignore[arg-type]
