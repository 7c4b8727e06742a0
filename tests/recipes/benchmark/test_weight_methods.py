from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_nna.weights.pipeline import pipeline_of
from recipes.benchmark import lloyd_max, weight_methods
from recipes.benchmark.weight_methods import METHODS
from recipes.benchmark.workloads import Workload
from recipes.comparators import DKMTransform


@pytest.mark.parametrize("method", METHODS)
def test_a_step_trains_with_few_values(method: str) -> None:
    modules: list[nn.Linear] = []

    def module() -> nn.Linear:
        modules.append(nn.Linear(32, 32))
        return modules[-1]

    workload = Workload(
        "tiny", module, lambda: (torch.randn(8, 32),), lambda y, _: y.square().sum() * 1e3
    )
    step = METHODS[method].step(workload, 2)
    before = modules[0].weight.detach().clone()
    step()
    assert not torch.equal(modules[0].weight, before)
    assert pipeline_of(modules[0]).phase == "latent"


def test_dkm_is_k_means_where_its_attention_is_sharp() -> None:
    weight = torch.cat([torch.full((50,), -1.0), torch.full((50,), 2.0)]).add(
        torch.randn(100, generator=torch.Generator().manual_seed(0)) * 0.01
    )
    transform = DKMTransform(weight, 1, iterations=3)
    transform._temperature = 1e-3
    weights = transform.apply(weight, hard=False)
    expected = torch.cat([weight[:50].mean().expand(50), weight[50:].mean().expand(50)])
    torch.testing.assert_close(weights, expected)
    assert transform.pull_back(weight, torch.ones(100)).shape == weight.shape


def row(method: str, bits: int, time: float, memory: float) -> dict[str, Any]:
    return {
        "command": "python -m recipes.benchmark.weight_methods",
        **{"work": "lstm", "bits": bits, "device": "CPU: some", "threads": 1, "method": method},
        **{"time_ratio": time, "time_ratio_low": time, "time_ratio_high": time},
        **{"memory_over_weights": memory, "float_ms": 100.0},
    }


def test_targets_are_judged_by_the_worst_row() -> None:
    rows = [row("gq", 2, 1.1, 0.5), row("gq_soft", 8, 1.26, 2.0), row("gq", 8, 1.2, 3.2)]
    text = weight_methods.STUDY.render(rows)
    assert "at worst 1.26 (GQ, soft, 8 bits), missed" in text
    assert "Memory of GQ, soft at 8 bits, at most 3 times the weights: 2.00, met" in text
    assert "Memory of GQ, hard at 8 bits, at most 3 times the weights: 3.20, missed" in text
    assert text.count("| LSTM 2x256, 100 steps of 16 | 8 |") == 2


@pytest.mark.parametrize("method", lloyd_max.METHODS)
def test_every_k_means_comes_near_to_the_least_error(method: str) -> None:
    weights = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    _, quantize = lloyd_max.METHODS[method]
    least = lloyd_max.distortion(weights, lloyd_max.ours(weights, 4))
    assert least <= lloyd_max.distortion(weights, quantize(weights, 4)) * (1 + 1e-6) <= 1.2 * least


def test_the_report_compares_with_the_least_error_of_the_row() -> None:
    shared = {"command": "c", "count": 10_000_000, "levels": 32, "machine": "CPU: some"}
    text = lloyd_max.STUDY.render(
        [
            {**shared, "method": "ours", "seconds": 2.5, "distortion": 0.01},
            {**shared, "method": "dkm", "seconds": 90.0, "distortion": 0.011},
        ]
    )
    assert "| 10,000,000 | 32 | 2.50 s, +0.0e+00 | - | - | 90.00 s, +1.0e-01 |" in text
    assert "in under 3 s on one core: 2.50 s, met" in text
