"""Learning under shift: prequential error and its cost, window by window or by ``WaveletRisk``.

A stream is cut into periods. Before each, models are trained again on all earlier examples,
standardized by them, and predict the labels of the period; the error is the fraction of wrong ones
over all periods except the first. A training is 60 steps of Adam over all its examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

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
    """

    x: Tensor
    y: Tensor
    period: int
    build: Callable[[], nn.Module]

    def fit(self, rows: Tensor | slice, reduction: Reduction) -> nn.Module:
        """Train on some of the examples."""
        model = self.build()
        x, y = self.x[rows], self.y[rows]
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=_DECAY)
        for _ in range(_STEPS):
            optimizer.zero_grad()
            losses = binary_cross_entropy_with_logits(model(x)[:, 0], y, reduction="none")
            reduction(losses).backward()
            optimizer.step()
        return model


#: Function from a history to a model and the number of trainings that it took.
Learner = Callable[[History], tuple[nn.Module, int]]


def fixed(history: History, periods: int | None) -> tuple[nn.Module, int]:
    """Train on the newest periods; None for all."""
    first = 0 if periods is None else -periods * history.period
    return history.fit(slice(first, None), torch.mean), 1


def rolling(history: History, constant: float) -> tuple[nn.Module, int]:
    """Train on 1, 2, 4, … periods and choose by ARW on validation examples."""
    count = len(history.x) // history.period
    every = torch.arange(len(history.x))
    validation = every % _VALIDATION == _VALIDATION - 1
    models, windows = [], [2**power for power in range(count.bit_length())]
    for window in [*windows, *([count] if count not in windows else [])]:
        rows = ~validation & (every >= len(every) - window * history.period)
        models.append(history.fit(rows, torch.mean))
    losses = torch.stack(
        [_losses(model, history.x[validation], history.y[validation]) for model in models]
    )
    periods = losses.double().unflatten(1, (count, -1)).mean(2)
    estimator = AdaptiveRollingWindow(constant=constant)
    return models[tournament(periods, estimator=estimator).winner], len(models)


def risk(history: History) -> tuple[nn.Module, int]:
    """Train once on the estimated newest risk."""
    return history.fit(slice(None), WaveletRisk(period=history.period)), 1


LEARNERS: dict[str, tuple[str, Learner]] = {
    "risk": ("WaveletRisk", risk),
    "whole": ("whole history", partial(fixed, periods=None)),
    "window_1": ("1 period", partial(fixed, periods=1)),
    "window_4": ("4 periods", partial(fixed, periods=4)),
    "window_16": ("16 periods", partial(fixed, periods=16)),
    "arw": ("window by ARW", partial(rolling, constant=0.4)),
}


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
    """List the grid, stream by stream."""
    return [
        LearningRun(case, seed, model, method)
        for case, seeds in SEEDS.items()
        for seed, model, method in itertools.product(seeds, MODELS, LEARNERS)
    ]


def learned(rows: Sequence[Row]) -> list[Row]:
    """Select the rows whose seed is one of the grid: a part of another is no comparison."""
    return [row for row in select(rows, table="learning") if row["seed"] in SEEDS[row["case"]]]


def checks(rows: Sequence[Row]) -> list[str]:
    """Check one training by ``WaveletRisk`` against a window chosen by ARW."""
    lines = []
    for case, model in itertools.product(SEEDS, MODELS):
        risk_rows, arw_rows = (
            select(learned(rows), case=case, model=model, method=name) for name in ("risk", "arw")
        )
        if risk_rows and arw_rows:
            error, rival = (mean(row["error"] for row in each) for each in (risk_rows, arw_rows))
            lines.append(
                f"- Learning on {case}, {model}: {error:.2%} errors with one training, "
                f"{rival:.2%} with a window chosen by ARW ({met(error <= rival)})."
            )
    return lines


def lines(rows: Sequence[Row]) -> list[str]:
    """Format one line a learner: mean error over seeds, and trainings a period."""
    formatted = []
    for name, (title, _) in LEARNERS.items():
        if not (selected := select(learned(rows), method=name)):
            continue
        columns = []
        for case, model in itertools.product(SEEDS, MODELS):
            each = select(selected, case=case, model=model)
            columns.append(f"{mean(row['error'] for row in each):.2%}" if each else "-")
        trainings = mean(row["trainings"] for row in selected)
        formatted.append(line(title, *columns, f"{trainings:.1f}"))
    return formatted


def prequential(case: str, seed: int, model: str, learner: Learner) -> tuple[float, float]:
    """Measure the error over all periods except the first, and the trainings a period."""
    x, y = stream(case, seed)
    period = PERIODS[case]
    wrong = trainings = 0
    count = len(x) // period
    for number in range(1, count):
        known = number * period
        center, deviation = x[:known].mean(0), x[:known].std(0) + 1e-6
        standard = (x[: known + period] - center) / deviation
        build = partial(_build, model, x.shape[1], seed)
        trained, count_trained = learner(History(standard[:known], y[:known], period, build))
        with torch.no_grad():
            predicted = trained(standard[known:])[:, 0] > 0
        wrong += int((predicted != (y[known : known + period] > 0.5)).sum())
        trainings += count_trained
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
