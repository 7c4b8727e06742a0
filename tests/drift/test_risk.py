"""Learning under drift: the risk, its gradient, its bound, batches and tournaments."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import pywt
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset

from lightning_nna.drift.estimators import LatestEstimator
from lightning_nna.drift.model_selection import compare, tournament
from lightning_nna.drift.risk import TimeOrderedBatches, WaveletRisk
from lightning_nna.drift.wavelets import HaarEstimator
from lightning_nna.drift.windows import AdaptiveRollingWindow, WholeAverage
from lightning_nna.testing.contract import trainer


def losses(*parts: tuple[int, float], noise: float = 0.1, seed: int = 0) -> torch.Tensor:
    level = np.concatenate([np.full(count, value) for count, value in parts])
    drawn = level + noise * np.random.default_rng(seed).standard_normal(len(level))
    return torch.from_numpy(drawn).requires_grad_()


@pytest.mark.parametrize("objective", ["narrowing", "window"])
def test_the_value_is_the_estimate(objective: str) -> None:
    series = losses((64, 0.2), (8, 1.0))
    found = WaveletRisk(objective=objective, sigma=0.1, constant=0.7)(series)  # type: ignore[arg-type]
    expected = HaarEstimator(sigma=0.1, constant=0.7).latest(series.detach()).value
    torch.testing.assert_close(found.detach(), expected)


def with_pywavelets(
    y: np.ndarray, threshold: float, *, wavelet: str = "haar", mode: str = "symmetric"
) -> float:
    """Shrink the details of a series with PyWavelets; return its newest value."""
    smooth, *details = pywt.wavedec(y, wavelet, mode=mode)
    shrunk = [pywt.threshold(each, threshold, "soft") for each in details]
    return float(pywt.waverec([smooth, *shrunk], wavelet, mode=mode)[len(y) - 1])


@pytest.mark.parametrize("constant", [2.0, 0.5])
@pytest.mark.parametrize(("wavelet", "n"), [("haar", 64), ("db4", 64), ("db8", 100), ("sym5", 77)])
def test_the_published_objective_is_the_estimate_of_pywavelets(
    wavelet: str, n: int, constant: float
) -> None:
    y = losses((n - 8, 0.2), (8, 1.0))
    risk = WaveletRisk(objective="paper", sigma=0.1, delta=0.2, constant=constant, wavelet=wavelet)
    threshold = constant * 0.1 * math.sqrt(2 * math.log(math.log(n) / 0.2))
    expected = with_pywavelets(y.detach().numpy(), threshold, wavelet=wavelet)
    assert float(risk(y).detach()) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("settings", [{}, {"wavelet": "db4"}, {"sigma": 0.02, "constant": 0.5}])
@pytest.mark.parametrize("n", [1, 2, 16, 71])
def test_the_gradient_of_the_published_objective_is_that_of_its_value(
    settings: dict[str, Any], n: int
) -> None:
    risk = WaveletRisk(**{"objective": "paper", "sigma": 0.1, **settings})
    assert torch.autograd.gradcheck(risk, losses((n - n // 4, 0.2), (n // 4, 1.0)))


def test_the_published_objective_may_weigh_old_losses_negatively() -> None:
    # Fine detail 0.1, coarse one 0: the older half of the newest pair counts against the newer.
    y = torch.tensor([0.55, 0.55, 0.1, 1.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(WaveletRisk(objective="paper", sigma=0.1, constant=0.5)(y), y)
    assert gradient.tolist() == pytest.approx([0.25, 0.25, -0.25, 0.75])
    (ours,) = torch.autograd.grad(WaveletRisk(sigma=0.1, constant=0.5)(y), y)
    assert (ours >= 0).all()


def test_constants_depend_on_the_objective() -> None:
    assert WaveletRisk(objective="paper").constant == 2.0
    assert WaveletRisk().constant == WaveletRisk(objective="window").constant == 0.6
    assert WaveletRisk(objective="paper", constant=0.0).constant == 0.0


def test_the_window_narrows_where_the_newest_part_does_worse() -> None:
    risk = WaveletRisk(sigma=0.1, every=1)
    series = losses((56, 0.2), (8, 1.0))
    windows = []
    for _ in range(4):
        series.grad = None
        risk(series).backward()
        windows.append(risk.window * 64)
    # One look takes the largest window with a difference; the next goes on from there.
    assert windows == [32, 16, 8, 8]
    assert series.grad is not None
    assert series.grad.tolist() == [0.0] * 56 + [1 / 8] * 8
    # It does not widen again in the same training.
    risk(losses((64, 0.2)))
    assert risk.window == 8 / 64
    risk.reset()
    assert risk.window == 1.0


def test_what_does_better_narrows_nothing() -> None:
    risk = WaveletRisk(sigma=0.1)
    risk(losses((56, 1.0), (8, 0.2)))
    assert risk.window == 1.0
    both = WaveletRisk(objective="window", sigma=0.1)
    series = losses((56, 1.0), (8, 0.2))
    both(series).backward()
    assert series.grad is not None
    assert (series.grad[:56] == 0).all()


def test_the_window_is_looked_at_every_so_often() -> None:
    risk = WaveletRisk(sigma=0.1, constant=1.0, every=3)
    for series in (losses((64, 0.2)), losses((56, 0.2), (8, 1.0)), losses((56, 0.2), (8, 1.0))):
        risk(series)
    assert risk.window == 1.0
    risk(losses((56, 0.2), (8, 1.0)))
    assert risk.window == 0.5


def test_periods_are_means() -> None:
    series = losses((40, 0.2), (24, 1.0))
    found = WaveletRisk(period=8, sigma=0.05)(torch.cat([series[:3], series]))
    means = series.unflatten(0, (-1, 8)).mean(1)
    torch.testing.assert_close(found, WaveletRisk(sigma=0.05)(means))


def test_noise_is_measured_from_neighbors() -> None:
    series = losses((2000, 0.5), noise=0.3)
    measured, known = WaveletRisk(), WaveletRisk(sigma=0.3)
    found, expected = measured(series.detach()), known(series.detach())
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    one = torch.tensor([0.7])
    assert float(measured(one)) == pytest.approx(0.7)


def test_a_model_follows_a_drift_in_one_training() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 2))
    side = np.where(np.arange(2000) < 1500, x[:, 0], -x[:, 0])
    x, y = torch.from_numpy(x).float(), torch.from_numpy(side > 0).float()

    def trained(reduction: object) -> float:
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            each = binary_cross_entropy_with_logits(model(x)[:, 0], y, reduction="none")
            reduction(each).backward()  # type: ignore[operator]
            optimizer.step()
        return float(((model(x[-500:])[:, 0] > 0) == (y[-500:] > 0.5)).float().mean())

    assert trained(torch.mean) < 0.2
    assert trained(WaveletRisk(period=50)) > 0.95


def test_in_a_training_step_it_takes_the_place_of_the_mean() -> None:
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    y = (torch.where(torch.arange(400) < 300, x[:, 0], -x[:, 0]) > 0).float()

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.risk = nn.Linear(2, 1), WaveletRisk(period=20)

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            said = self.linear(batch[0])[:, 0]
            return self.risk(binary_cross_entropy_with_logits(said, batch[1], reduction="none"))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.1)

    module = Classifier()
    batches = TimeOrderedBatches(400, batch_size=400)
    loader = DataLoader(TensorDataset(x, y), batch_sampler=batches)
    run = trainer(max_epochs=60, steps=-1)
    run.fit(module, loader)
    assert run.global_step == 60
    assert module.risk.window < 0.5
    assert float(((module.linear(x)[:, 0] > 0) == (y > 0.5))[-100:].float().mean()) > 0.9


def test_batches_are_samples_of_all_of_time_in_order() -> None:
    batches = TimeOrderedBatches(100, batch_size=30, seed=1)
    first, second = list(batches), list(batches)
    assert len(first) == len(batches) == 3
    assert all(batch == sorted(batch) for batch in first)
    assert len({index for batch in first for index in batch}) == 90
    assert first != second
    batches.set_epoch(0)
    assert list(batches) == first
    assert max(batch[-1] - batch[0] for batch in first) > 80
    with pytest.raises(ValueError, match="between 1 and 100, got 101"):
        TimeOrderedBatches(100, batch_size=101)


@pytest.mark.parametrize("estimator", [None, AdaptiveRollingWindow(constant=0.5)])
def test_the_model_that_is_best_now_wins(estimator: LatestEstimator | None) -> None:
    rng = np.random.default_rng(0)
    level = np.full((5, 200), 0.5)
    level[1, :150], level[1, 150:] = 0.1, 0.9
    level[3, 150:] = 0.2
    series = torch.from_numpy(level + 0.1 * rng.standard_normal((5, 200)))
    found = tournament(series, estimator=estimator)
    assert found.winner == 3
    assert len(found.comparisons) == 4
    assert compare(series, 3, 1, estimator=estimator).certain
    assert tournament(series, estimator=WholeAverage()).winner == 1
    assert tournament(series[:1]).comparisons == ()
    with pytest.raises(ValueError, match="at least one model"):
        tournament(series[:0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "none"}, "objective must be"),
        ({"wavelet": "db4"}, "has no wavelet 'db4': take objective='paper'"),
        ({"objective": "paper", "wavelet": "db40"}, "no discrete wavelet 'db40'"),
        ({"objective": "paper", "wavelet": "db9", "boundary": "interval"}, "got 9"),
        ({"period": 0}, "period and every must be at least 1"),
        ({"delta": 2.0}, "delta must lie"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WaveletRisk(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="take a larger batch or a shorter period"):
        WaveletRisk(period=4)(torch.ones(3))
