from __future__ import annotations

from typing import Any

import pytest

from recipes.benchmark import foreign_ranges
from recipes.benchmark.foreign import INSTALLED, SPECS, STUDY, ForeignRun, runs


def row(module: str, **columns: Any) -> dict[str, Any]:
    program = {
        "name": "",
        "is_deployed": True,
        "outputs": 12_000,
        "differing": 0,
        "operators": {"CONV_2D": 3},
        "cycles": 2000,
        "movement_cycles": 50,
        "cpu_operators": {},
    }
    whole = {
        "command": "python -m recipes.benchmark.foreign",
        "module": module,
        "spec": "litert-int8",
        "fallbacks": {},
        "training": {"float_loss": 1.0, "emulated_loss": 1.02, "loss_change": 0.02},
        "programs": [program],
        "gq": {"loss": 1.1, "tensors": 3, "most_values": 16, "zeros": 0.1},
        "csp": {"loss": 1.2, "tensors": 3, "most_values": 99, "zeros": 0.7},
        "time": {"float_ms": 9.0, "exact": 3.04, "fast": 2.5},
    }
    return whole | columns


def test_a_network_that_passes_every_check() -> None:
    text = STUDY.render([row("resnet8")])
    assert (
        "| MLPerf Tiny: ResNet8 | written out | 1.0000 | 1.0200 (+2.0%) | none | yes | "
        "all of 12,000 | none | 2.5 % | 16 values | 70% zeros | 3.0 | 2.5 |"
    ) in text
    assert text.count("- 1 of 1 ") == 7
    assert "What failed" not in text


def test_the_report_says_what_failed_and_what_is_missed() -> None:
    failed = {"error": "CaptureError: no operator"}
    rows = [
        row("resnet8"),
        row("bert", fallbacks={"pow": 2}, programs=[failed], gq={"error": "ValueError: no"}),
    ]
    rows[1]["training"] = {"float_loss": 1.0, "emulated_loss": 1.5, "loss_change": 0.5}
    text = STUDY.render(rows)
    assert "| 2 pow | no | - | - | - | failed | 70% zeros |" in text
    assert "- 1 of 2 without fallbacks; not BERT, masked language model." in text
    assert "- BERT, masked language model, gq: `ValueError: no`" in text
    assert "- BERT, masked language model, program: `CaptureError: no operator`" in text
    assert "a loss at most 10% above float's; not BERT, masked language model." in text


def test_programs_count_together() -> None:
    whisper = row("whisper")
    whisper["programs"] = [
        whisper["programs"][0] | {"name": "encoder", "outputs": 6000},
        whisper["programs"][0] | {"outputs": 5000, "cpu_operators": {"GatherV2": 1}},
    ]
    text = STUDY.render([whisper])
    assert "| 2 of 2 programs | all of 11,000 | 1 GatherV2 | 2.5 % |" in text
    assert "no operator but `GatherV2` on the U55's CPU." in text


def test_the_grid_has_every_network_on_both_accelerators() -> None:
    grid = runs()
    assert len(grid) == 2 * len(INSTALLED)
    assert grid[0].keys == [{"module": "bert", "spec": "litert-int8"}]


def test_differences_of_the_margins_are_means_over_seeds() -> None:
    changes = {f"{s} {m}": 0.01 for s in SPECS for m in foreign_ranges.MARGINS}
    rows = [
        {"command": "c", "module": "t5", "seed": seed, "float_loss": 1.0 + seed, "changes": each}
        for seed, each in enumerate([changes, changes | {"litert-int8 0.0": 0.03}])
    ]
    text = foreign_ranges.STUDY.render(rows)
    assert "| T5 | 2 | 1.5000 | +2.0 ± 1.4 % | +1.0 ± 0.0 % |" in text
    assert "| T5 | 1 | 1.0000 | +1.0 % |" in foreign_ranges.STUDY.render(rows[:1])
    assert len(foreign_ranges.runs()) == len(foreign_ranges.MODULES) * len(foreign_ranges.SEEDS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_small_network_runs_through_the_whole_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.benchmark.foreign.OUTPUTS", 2000)
    monkeypatch.setattr("recipes.benchmark.foreign.PAIRS", 1)
    (measured,) = ForeignRun("autoencoder", "litert-int8").rows()
    (program,) = measured["programs"]
    assert program["differing"] == 0
    assert program["outputs"] >= 2000
    assert program["cpu_operators"] == {}
    assert measured["gq"]["most_values"] <= 16
    assert measured["csp"]["zeros"] == pytest.approx(0.7, abs=0.01)
    assert abs(measured["training"]["loss_change"]) < 0.1
