"""Learning under shift: prequential error and its cost, window by window or by ``WaveletRisk``.

A stream is cut into periods. Before each, models are trained again on all earlier examples,
standardized by them, and predict the labels of the period; the error is the fraction of wrong ones
over all periods except the first. A training is 60 steps of Adam over all its examples. It may
start at the model of the period before (warm) and end with the mean of the weights of its newer
half (averaged).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.swa_utils import AveragedModel

from lightning_nna.drift.model_selection import tournament
from lightning_nna.drift.risk import WaveletRisk
from lightning_nna.drift.windows import AdaptiveRollingWindow
from recipes.benchmark.grid import Run
from recipes.benchmark.report import line, met
from recipes.benchmark.rows import Row, select

STREAMS_FOLDER = Path("../shared/data/streams")
#: Examples a period; half-hours, days, and points.
PERIODS = {"elec": 1000, "weather": 250, "rotating": 250}
MODELS = ("logistic", "mlp")
_REAL = ("weather", "elec")
SEEDS = {"rotating": (1, 2), "weather": (1,), "elec": (1,)}
_STEPS, _RATE, _DECAY = 60, 0.05, 1e-4
_HIDDEN = 16
# One example in so many validates the choice among windows.
_VALIDATION = 5

Reduction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class History:
    """Examples before a period, and the model that is trained on them.

    Attributes:
        x: Standardized features in the order of time, shape ``(examples, features)``.
        y: Labels, 0 or 1, shape ``(examples,)``.
        period: Number of examples of a period.
        build: Function that makes an untrained model.
        previous: What was learned before the period before; None before the first.
    """

    x: Tensor
    y: Tensor
    period: int
    build: Callable[[], nn.Module]
    previous: Learned | None = None

    def fit(
        self,
        rows: Tensor | slice,
        reduction: Reduction,
        *,
        start: nn.Module | None = None,
        averaged: bool = False,
    ) -> nn.Module:
        """Train on some of the examples.

        Args:
            rows: Examples that are trained on.
            reduction: Function from their losses, in the order of time, to what is minimized.
            start: Model whose weights the training starts at; None for an untrained one.
            averaged: Whether the result has the mean weights of the newer half of the steps.
        """
        model = self.build()
        if start is not None:
            model.load_state_dict(start.state_dict())
        average = AveragedModel(model)
        x, y = self.x[rows], self.y[rows]
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=_DECAY)
        for step in range(_STEPS):
            optimizer.zero_grad()
            losses = binary_cross_entropy_with_logits(model(x)[:, 0], y, reduction="none")
            reduction(losses).backward()
            optimizer.step()
            if averaged and step >= _STEPS // 2:
                average.update_parameters(model)
        return average.module if averaged else model


@dataclass(frozen=True)
class Learned:
    """Model that a learner made of a history.

    Attributes:
        model: Model that predicts the period.
        trainings: Number of trainings that it took.
        starts: Models that the trainings of the next period may start at, by the number of periods
            that they were trained on; 0 for all.
        window: Number of the newest examples that counted at the end; None for a learner that does
            not say.
    """

    model: nn.Module
    trainings: int = 1
    starts: Mapping[int, nn.Module] = field(default_factory=dict)
    window: int | None = None


#: Function from a history to what is learned from it.
Learner = Callable[[History], Learned]


def fixed(history: History, periods: int | None) -> Learned:
    """Train on the newest periods; None for all."""
    first = 0 if periods is None else -periods * history.period
    return Learned(history.fit(slice(first, None), torch.mean))


def rolling(
    history: History, constant: float, *, warm: bool = False, averaged: bool = False
) -> Learned:
    """Train on 1, 2, 4, … periods and choose by ARW on validation examples."""
    count = len(history.x) // history.period
    every = torch.arange(len(history.x))
    validation = every % _VALIDATION == _VALIDATION - 1
    windows = [2**power for power in range(count.bit_length())]
    windows += [count] if count not in windows else []
    previous = history.previous.starts if warm and history.previous is not None else {}
    starts = {}
    for window in windows:
        rows = ~validation & (every >= len(every) - window * history.period)
        # The window of all periods grows with them.
        key = 0 if window == count else window
        start = previous.get(key, previous.get(0))
        starts[key] = history.fit(rows, torch.mean, start=start, averaged=averaged)
    models = list(starts.values())
    losses = torch.stack(
        [_losses(model, history.x[validation], history.y[validation]) for model in models]
    )
    periods = losses.double().unflatten(1, (count, -1)).mean(2)
    estimator = AdaptiveRollingWindow(constant=constant)
    winner = tournament(periods, estimator=estimator).winner
    return Learned(models[winner], len(models), starts)


def risk(
    history: History, *, warm: bool = False, averaged: bool = False, carried: bool = False
) -> Learned:
    """Train once on the estimated newest risk, with the narrowing window.

    Args:
        history: Examples before a period.
        warm: Whether the training starts at the model of the period before.
        averaged: Whether the weights of the newer half of the steps are averaged.
        carried: Whether the window starts at that of the period before and the new period, in
            place of all examples.
    """
    reduction = WaveletRisk(period=history.period)
    count, previous = len(history.x), history.previous
    if carried and previous is not None and previous.window is not None:
        reduction.window = (previous.window + history.period) / count
    start = previous.model if warm and previous is not None else None
    model = history.fit(slice(None), reduction, start=start, averaged=averaged)
    return Learned(model, window=round(reduction.window * count))


def published(history: History, *, constant: float | None = None, wavelet: str = "haar") -> Learned:
    """Train once on the paper's objective."""
    reduction = WaveletRisk(
        objective="paper", period=history.period, constant=constant, wavelet=wavelet
    )
    return Learned(history.fit(slice(None), reduction))


LEARNERS: dict[str, tuple[str, Learner]] = {
    "risk": ("WaveletRisk", risk),
    "risk_warm": ("WaveletRisk, warm", partial(risk, warm=True)),
    "risk_averaged": ("WaveletRisk, averaged", partial(risk, averaged=True)),
    "risk_warm_averaged": (
        "WaveletRisk, warm, averaged",
        partial(risk, warm=True, averaged=True),
    ),
    "risk_carried": (
        "WaveletRisk, warm, averaged, window carried",
        partial(risk, warm=True, averaged=True, carried=True),
    ),
    "paper": ("the paper's objective, constant 2", published),
    "paper_small": ("the paper's objective, constant 0.6", partial(published, constant=0.6)),
    "paper_db4": ("the paper's objective, db4", partial(published, wavelet="db4")),
    "whole": ("whole history", partial(fixed, periods=None)),
    "window_1": ("1 period", partial(fixed, periods=1)),
    "window_4": ("4 periods", partial(fixed, periods=4)),
    "window_16": ("16 periods", partial(fixed, periods=16)),
    "arw": ("window by ARW", partial(rolling, constant=0.4)),
    "arw_warm_averaged": (
        "window by ARW, warm, averaged",
        partial(rolling, constant=0.4, warm=True, averaged=True),
    ),
}


#: Learners that were tried where ARW still wins.
VARIANTS = ("risk_warm", "risk_averaged", "risk_warm_averaged", "risk_carried")


@dataclass(frozen=True)
class LearningRun(Run):
    """One learner of one model on one stream.

    Attributes:
        case: A key of :data:`PERIODS`.
        seed: Seed of the stream and of the weights.
        model: One of :data:`MODELS`.
        method: A key of :data:`LEARNERS`.
        table: Name of the table.
    """

    case: str
    seed: int
    model: str
    method: str
    table: str = "learning"

    def rows(self) -> Iterator[Row]:
        """Measure the error and the trainings a period."""
        learner = LEARNERS[self.method][1]
        error, trainings = prequential(self.case, self.seed, self.model, learner)
        yield {**self.keys[0], "error": error, "trainings": trainings}


def runs() -> list[LearningRun]:
    """List the grid, stream by stream, the real ones first."""
    return [
        LearningRun(case, seed, model, method)
        for case in sorted(SEEDS, key=lambda case: case not in _REAL)
        for seed, model, method in itertools.product(SEEDS[case], MODELS, LEARNERS)
    ]


def learning_rows(rows: Sequence[Row]) -> list[Row]:
    """Select the rows whose seed is one of the grid: a part of another is no comparison."""
    return [row for row in select(rows, table="learning") if row["seed"] in SEEDS[row["case"]]]


def checks(rows: Sequence[Row]) -> list[str]:
    """Check one training by ``WaveletRisk`` against a window chosen by ARW."""
    lines = []
    for case, model in itertools.product(SEEDS, MODELS):
        risk_rows, arw_rows = (
            select(learning_rows(rows), case=case, model=model, method=name)
            for name in ("risk", "arw")
        )
        if risk_rows and arw_rows:
            error, rival = (mean(row["error"] for row in each) for each in (risk_rows, arw_rows))
            lines.append(
                f"- Learning on {case}, {model}: {error:.2%} errors with one training, "
                f"{rival:.2%} with a window chosen by ARW ({met(error <= rival)})."
            )
    return [*lines, *_variant_checks(rows)]


def _variant_checks(rows: Sequence[Row]) -> list[str]:
    """Count the real streams on which each variant of ``WaveletRisk`` is no worse than ARW."""
    lines = []
    cells = list(itertools.product(_REAL, MODELS))
    for name in VARIANTS:
        pairs = [
            tuple(
                select(learning_rows(rows), case=case, model=model, method=each)
                for each in (name, "arw")
            )
            for case, model in cells
        ]
        if all(ours and rivals for ours, rivals in pairs):
            wins = sum(ours[0]["error"] <= rivals[0]["error"] for ours, rivals in pairs)
            lines.append(
                f"- Learning on weather and elec, {LEARNERS[name][0]}: no worse than a window "
                f"chosen by ARW in {wins} of {len(cells)} cases (target all, "
                f"{met(wins == len(cells))})."
            )
    return lines


def lines(rows: Sequence[Row]) -> list[str]:
    """Format one line a learner: mean error over seeds, and trainings a period."""
    formatted = []
    for name, (title, _) in LEARNERS.items():
        if not (selected := select(learning_rows(rows), method=name)):
            continue
        columns = []
        for case, model in itertools.product(SEEDS, MODELS):
            each = select(selected, case=case, model=model)
            # A part of the seeds is no comparison.
            complete = len(each) == len(SEEDS[case])
            columns.append(f"{mean(row['error'] for row in each):.2%}" if complete else "-")
        trainings = mean(row["trainings"] for row in selected)
        formatted.append(line(title, *columns, f"{trainings:.1f}"))
    return formatted


def prequential(case: str, seed: int, model: str, learner: Learner) -> tuple[float, float]:
    """Measure the error over all periods except the first, and the trainings a period."""
    x, y = stream(case, seed)
    period = PERIODS[case]
    wrong = trainings = 0
    count = len(x) // period
    learned: Learned | None = None
    for number in range(1, count):
        known = number * period
        center, deviation = x[:known].mean(0), x[:known].std(0) + 1e-6
        standard = (x[: known + period] - center) / deviation
        build = partial(_build, model, x.shape[1], seed)
        learned = learner(History(standard[:known], y[:known], period, build, learned))
        with torch.no_grad():
            predicted = learned.model(standard[known:])[:, 0] > 0
        wrong += int((predicted != (y[known : known + period] > 0.5)).sum())
        trainings += learned.trainings
    return wrong / ((count - 1) * period), trainings / (count - 1)


@lru_cache(maxsize=4)
def stream(case: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return features and labels in the order of time.

    The rotating stream has 10,000 normal points in six dimensions; the boundary turns once through
    the plane of the first two.
    """
    y: np.ndarray
    if case == "rotating":
        rng = np.random.default_rng([seed, 4])
        x = rng.standard_normal((10_000, 6))
        angle = np.linspace(0, 2 * np.pi, len(x))
        side = x[:, 0] * np.cos(angle) + x[:, 1] * np.sin(angle)
        y = side + 0.3 * rng.standard_normal(len(x)) > 0
    else:
        table = np.loadtxt(STREAMS_FOLDER / f"{case}.csv.gz", delimiter=",", skiprows=1)
        x, y = table[:, :-1], table[:, -1]
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)


def _build(model: str, features: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if model == "logistic":
        return nn.Linear(features, 1)
    return nn.Sequential(nn.Linear(features, _HIDDEN), nn.Tanh(), nn.Linear(_HIDDEN, 1))


@torch.no_grad()
def _losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(model(x)[:, 0], y, reduction="none")
