"""The cost of pruning: its commands, its report."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize

from recipes.benchmark.pruning_cost import METHODS, SPARSITY, STUDY, CostRun
from recipes.settings import check_settings


def _row(method: str, number: int, seconds: float, peak: int) -> dict[str, Any]:
    return {
        "command": f"python -m recipes.train compression={method} seed={number}",
        "method": method,
        "round": number,
        "train_seconds": seconds,
        "peak_bytes": peak,
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_command_composes_in_float(method: str) -> None:
    module, *overrides = CostRun(method, 2).command
    settings = [word for word in overrides if not word.startswith("hydra.")]
    with initialize(version_base="1.3", config_path="../../../recipes/conf"):
        config = compose(config_name=module.removeprefix("recipes."), overrides=settings)
    assert config.callbacks.get("nna") is None
    assert ("prune" in config.callbacks) == (method != "float")
    assert config.seed == 2
    check_settings(config, "train")
    assert config.sparsity == (None if method == "float" else SPARSITY)


def test_the_report_compares_runs_of_the_same_round() -> None:
    rows = [
        _row("float", 1, 50.0, 1_000_000_000),
        _row("float", 2, 100.0, 1_000_000_000),
        _row("csp", 1, 55.0, 1_200_000_000),
        _row("csp", 2, 120.0, 1_500_000_000),
        _row("gmp", 3, 60.0, 1_000_000_000),
    ]
    text = STUDY.render(rows)
    assert "| CSP, activations | 88 s | 1.15 (1.10-1.20) | 1350 MB | 1.35 (1.20-1.50) |" in text
    assert "| gradual magnitude | 60 s | - | 1000 MB | - |" in text
    assert "at most 1.15 times that of float: 1.15, met." in text
    assert "at most 1.3 times that of float: 1.35, missed." in text
    assert all(row["command"] in text for row in rows)


def test_a_run_that_was_stopped_is_not_measured(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    CostRun("csp", 1).folder.mkdir(parents=True)
    with pytest.raises(FileExistsError, match="round1 holds a run that was stopped"):
        next(CostRun("csp", 1).rows())
