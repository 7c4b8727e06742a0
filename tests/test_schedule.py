from __future__ import annotations

import math

import pytest

from lightning_nna.schedule import Schedule


@pytest.mark.parametrize(
    ("shape", "middle"),
    [("linear", 5.0), ("cosine", 5.0), ("geometric", 3.0)],
)
def test_from_start_to_end(shape: str, middle: float) -> None:
    schedule = Schedule(1.0, 9.0, begin=10, until=30, shape=shape)
    values = [schedule.at(step) for step in range(41)]
    assert values[:11] == [1.0] * 11
    assert values[30:] == [9.0] * 11
    assert values[20] == pytest.approx(middle)
    assert values == sorted(values)


def test_shares_of_a_run_are_steps_of_it() -> None:
    shares = Schedule(0.0, 1.0, begin=0.25, until=0.75)
    steps = Schedule(0.0, 1.0, begin=50, until=150)
    assert [shares.at(s, total=200) for s in range(200)] == [steps.at(s) for s in range(200)]


def test_a_share_of_a_run_without_an_end() -> None:
    with pytest.raises(ValueError, match="set max_steps or max_epochs"):
        Schedule(0.0, 1.0).at(3, total=math.inf)
    assert Schedule(2.0).at(3, total=math.inf) == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "square"}, "shape must be one of"),
        ({"begin": -1}, "begin must be at least 0, got -1"),
        ({"until": 1.5}, r"until is a fraction of the run if it is a float, at most 1.0, got 1.5"),
        ({"start": 0.0, "shape": "geometric"}, "needs positive values, got 0.0 to 1.0"),
    ],
)
def test_wrong_schedules_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**({"start": 0.5, "end": 1.0} | settings))
