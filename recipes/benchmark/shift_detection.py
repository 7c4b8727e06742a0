"""Drift in short series: rates of detection and false alarms, compared with river's detectors.

A trial is one value per epoch. Settings of detectors that are not defaults were chosen with
:func:`tune`, on other seeds than those that are reported: the most steps detected in time, with at
most 5 % of flat and of falling trials raising an alarm where any setting does so.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lightning_nna.drift.detector import DriftDetector
from recipes import require_extra
from recipes.benchmark.grid import Run
from recipes.benchmark.report import line, met
from recipes.benchmark.rows import Row, select

EPOCHS, ONSET, IN_TIME = 60, 30, 5
SLOW_ONSET = 20
NOISE, STEP = 0.02, 0.10
_TEN_TIMES = ", ten times"
TRIALS = range(1000)
TUNING_TRIALS = range(100_000, 100_300)
#: Epoch in which the drift of a course begins; None without a drift.
ONSETS: dict[str, int | None] = {
    "step": ONSET,
    "slow ramp": SLOW_ONSET,
    "flat": None,
    "falling": None,
    "step, ten times": ONSET,
    "flat, ten times": None,
}

#: Function from the next value to whether it raises an alarm.
Update = Callable[[float], bool]


@dataclass(frozen=True)
class Method:
    """A detector of the table.

    Attributes:
        title: Name in tables.
        make: Function that makes a fresh one.
    """

    title: str
    make: Callable[[], Update]


def course(case: str) -> np.ndarray:
    """Make the true value at each epoch, of shape ``(epochs,)``."""
    epoch = np.arange(EPOCHS)
    return (
        scale(case)
        * {
            "step": 0.2 + STEP * (epoch >= ONSET),
            "slow ramp": 0.2 + 0.15 * np.clip((epoch - SLOW_ONSET) / (EPOCHS - SLOW_ONSET), 0, 1),
            "flat": np.full(EPOCHS, 0.2),
            "falling": 0.15 + 0.8 * np.exp(-epoch / 12),
        }[case.removesuffix(_TEN_TIMES)]
    )


def scale(case: str) -> float:
    """Return the unit of a course; a detector is not told it."""
    return 10.0 if case.endswith(_TEN_TIMES) else 1.0


def noisy(case: str, trials: Sequence[int]) -> np.ndarray:
    """Make noisy series of a course, of shape ``(trials, epochs)``."""
    noise = [np.random.default_rng([trial, 3]).standard_normal(EPOCHS) for trial in trials]
    return course(case) + scale(case) * NOISE * np.array(noise)


def ours(wavelet: str = "haar") -> Update:
    """Make the monitor's detector with its defaults."""
    detector = DriftDetector(wavelet=wavelet)
    return lambda y: detector.update(y).drift


def of_river(name: str, **settings: Any) -> Update:
    """Make a detector of river.

    Raises:
        ImportError: If river is missing: install the extra ``bench``.
    """
    require_extra("bench", "river")
    from river import drift

    detector = getattr(drift, name)(**settings)

    def update(y: float) -> bool:
        detector.update(y)
        return bool(detector.drift_detected)

    return update


METHODS: dict[str, Method] = {
    "ours": Method("ours, Haar", ours),
    "adwin": Method("ADWIN, default", partial(of_river, "ADWIN")),
    "adwin_tuned": Method(
        "ADWIN, most sensitive",
        partial(of_river, "ADWIN", delta=0.5, clock=1, min_window_length=2, grace_period=5),
    ),
    "page_hinkley": Method("Page-Hinkley, default", partial(of_river, "PageHinkley")),
    "page_hinkley_tuned": Method(
        "Page-Hinkley, tuned",
        partial(of_river, "PageHinkley", min_instances=5, delta=0.02, threshold=0.1, mode="up"),
    ),
    "kswin": Method("KSWIN, default", partial(of_river, "KSWIN", seed=0)),
    "kswin_tuned": Method(
        "KSWIN, most sensitive",
        partial(of_river, "KSWIN", window_size=30, stat_size=5, alpha=0.01, seed=0),
    ),
    "always": Method("always fires", lambda: lambda y: True),
    "never": Method("never fires", lambda: lambda y: False),
}

GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "ADWIN": {
        "delta": (0.002, 0.05, 0.2, 0.5),
        "clock": (1,),
        "min_window_length": (2, 3, 5),
        "grace_period": (5, 10),
    },
    "PageHinkley": {
        "min_instances": (5, 10),
        "delta": (0.005, 0.01, 0.02, 0.03),
        "threshold": (0.05, 0.08, 0.1, 0.12, 0.15, 0.2),
        "alpha": (0.99, 0.9999),
        "mode": ("up",),
    },
    # A longer window would not be full in time for the step.
    "KSWIN": {
        "window_size": (15, 20, 25, 30),
        "stat_size": (3, 4, 5, 7),
        "alpha": (0.005, 0.01, 0.03, 0.05, 0.1, 0.2),
        "seed": (0,),
    },
}


def score(make: Callable[[], Update], case: str, trials: Sequence[int]) -> dict[str, float | None]:
    """Run a fresh detector over each trial.

    Returns:
        ``detected``: fraction of trials whose first alarm is at the onset or up to four epochs
        later, for the slow ramp at any time after it; None without a drift. ``delay``: mean epochs
        from the onset to the first alarm, where it is not before. ``false_alarm``: fraction of
        trials with an alarm before the onset, or at all without a drift.
    """
    onset = ONSETS[case]
    firsts = np.array([_first(make(), values) for values in noisy(case, trials)])
    if onset is None:
        return {"detected": None, "delay": None, "false_alarm": float((firsts < EPOCHS).mean())}
    after = (firsts >= onset) & (firsts < EPOCHS)
    last = EPOCHS if case == "slow ramp" else onset + IN_TIME
    return {
        "detected": float((after & (firsts < last)).mean()),
        "delay": float((firsts[after] - onset).mean()) if after.any() else None,
        "false_alarm": float((firsts < onset).mean()),
    }


@dataclass(frozen=True)
class DetectionRun(Run):
    """One detector on one course.

    Attributes:
        case: A key of :data:`ONSETS`.
        method: A key of :data:`METHODS`.
        table: Name of the table.
    """

    case: str
    method: str
    table: str = "detection"

    def rows(self) -> Iterator[Row]:
        """Score the detector."""
        yield {**self.keys[0], **score(METHODS[self.method].make, self.case, TRIALS)}


def runs() -> list[DetectionRun]:
    """List the grid, course by course."""
    return [DetectionRun(case, method) for case, method in itertools.product(ONSETS, METHODS)]


def checks(rows: Sequence[Row]) -> list[str]:
    """Check detections and false alarms of the monitor's detector."""
    by_case = {row["case"]: row for row in select(rows, table="detection", method="ours")}
    if not by_case.keys() >= {"step", "flat", "falling"}:
        return []
    detected = by_case["step"]["detected"]
    alarms = {case: by_case[case]["false_alarm"] for case in ("flat", "falling")}
    return [
        f"- Drift of a short series: {detected:.1%} of the steps detected within {IN_TIME} epochs "
        f"(target 95 %, {met(detected >= 0.95)}).",
        *(
            f"- False alarms on {case} runs: {rate:.1%} (target 5 %, {met(rate <= 0.05)})."
            for case, rate in alarms.items()
        ),
    ]


def lines(rows: Sequence[Row]) -> list[str]:
    """Format one line a detector."""
    formatted = []
    for name, method in METHODS.items():
        by_case = {row["case"]: row for row in select(rows, table="detection", method=name)}
        if by_case.keys() >= ONSETS.keys():
            columns = (_column(by_case[case][metric], metric) for case, metric in _COLUMNS)
            formatted.append(line(method.title, *columns))
    return formatted


# Columns of the table: course and metric.
_COLUMNS = (
    ("step", "detected"),
    ("step", "delay"),
    ("step", "false_alarm"),
    ("slow ramp", "detected"),
    ("slow ramp", "delay"),
    ("flat", "false_alarm"),
    ("falling", "false_alarm"),
    ("step, ten times", "detected"),
    ("flat, ten times", "false_alarm"),
)


def _column(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if metric == "delay" else f"{value:.1%}"


def tune(names: Sequence[str]) -> None:
    """Print the five best settings of each grid."""
    for name in names:
        ranked = []
        for values in itertools.product(*GRIDS[name].values()):
            settings = dict(zip(GRIDS[name], values, strict=True))
            make = partial(of_river, name, **settings)
            step = score(make, "step", TUNING_TRIALS)["detected"] or 0.0
            alarms = [
                score(make, case, TUNING_TRIALS)["false_alarm"] for case in ("flat", "falling")
            ]
            worst = max(each or 0.0 for each in alarms)
            ranked.append((step - max(worst - 0.05, 0.0), step, alarms, settings))
        for _, step, alarms, settings in sorted(ranked, key=lambda each: -each[0])[:5]:
            print(f"{name} {settings}: detected {step:.3f}, alarms {alarms}", flush=True)


def _first(update: Update, values: np.ndarray) -> int:
    """Find the epoch of the first alarm; the number of epochs without one."""
    for epoch, y in enumerate(values.tolist()):
        if update(y):
            return epoch
    return EPOCHS


def main() -> None:
    """Tune from the command line."""
    parser = argparse.ArgumentParser(description=tune.__doc__)
    parser.add_argument("names", nargs="*", default=list(GRIDS))
    tune(parser.parse_args().names)


if __name__ == "__main__":
    main()
