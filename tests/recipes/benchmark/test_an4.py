"""The grid on AN4: its runs, its rows, its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.benchmark.an4 import STUDY, AN4Run, runs
from recipes.benchmark.rows import append_row, read_rows

KEYS = {
    *("command", "commit", "seed", "corpus", "model", "method", "bits", "sparsity"),
    *("wer", "wer_low", "wer_high", "loss_per_token", "packed_bytes", "train_seconds"),
}


def _summary(wer: float = 0.2) -> dict[str, Any]:
    return {
        "command": "python -m recipes.train seed=1",
        "commit": "0" * 40,
        "wer": wer,
        "wer_low": wer - 0.02,
        "wer_high": wer + 0.03,
        "wer_greedy": wer + 0.01,
        "beam_width": 5,
        "loss_per_token": 0.25,
        "parameters": 1000,
        "train_seconds": 120.0,
        "threads": 1,
    }


@pytest.mark.parametrize(("method", "packed_bytes"), [("float", 4000), ("chip", 1000)])
def test_a_row_has_the_keys_of_the_design(method: str, packed_bytes: int) -> None:
    row = AN4Run("rnnt", method, 2).row(_summary())
    assert row.keys() >= KEYS
    assert (row["seed"], row["method"], row["packed_bytes"]) == (2, method, packed_bytes)


def test_every_run_has_a_folder_and_starts_from_the_float_weights_of_its_seed() -> None:
    grid = runs()
    assert len({run.folder for run in grid}) == len(grid) == 18
    for run in grid:
        start = str(AN4Run(run.model, "float", run.seed).checkpoint)
        assert any(start in word for word in run.command) == (run.method != "float")
    # The others start from the float weights, which come first.
    assert [run.method for run in runs(methods=["nna8", "float"], models=["rnnt"])] == (
        ["float"] * 3 + ["nna8"] * 3
    )


def test_a_finished_run_gives_its_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = AN4Run("conformer", "nna8", 3)
    run.folder.mkdir(parents=True)
    (run.folder / "summary.json").write_text(json.dumps(_summary()))
    part = "--models conformer --methods nna8 --seeds 3 --workers 0".split()
    STUDY.main(part)
    STUDY.main(part)
    rows = read_rows(tmp_path / STUDY.results)
    assert [(row["method"], row["seed"], row["wer"]) for row in rows] == [("nna8", 3, 0.2)]


def test_the_report_has_means_ranges_and_commands(tmp_path: Path) -> None:
    path = tmp_path / "an4.jsonl"
    for seed, wer in ((1, 0.15), (2, 0.17)):
        command = {"command": f"python -m recipes.train seed={seed}"}
        append_row(path, {**AN4Run("rnnt", "float", seed).row(_summary(wer)), **command})
    STUDY.write_report(path)
    text = (tmp_path / "an4.md").read_text()
    assert "| RNN-T | float | 2 | 16.0 % | 15.0 % to 17.0 % | 17.0 % | 0.2500 | - |" in text
    line = (
        "| RNN-T | 2 | float | 17.0 % | 15.0 % to 20.0 % | 18.0 % | 0.2500 | 2 min, 1 thread(s) |"
    )
    assert line in text
    assert [text.count(f"python -m recipes.train seed={seed}") for seed in (1, 2)] == [1, 1]
    assert (tmp_path / "an4.png").stat().st_size > 1000


def test_the_report_grows_with_its_rows() -> None:
    rows = [AN4Run("conformer", method, 1).row(_summary()) for method in ("float", "chip")]
    assert "untrained" not in STUDY.render(rows[:1]).split("| model |")[1]
    assert "untrained" in STUDY.render(rows).split("| model |")[1]


def test_a_method_is_compared_with_float_on_its_own_seeds() -> None:
    rows = [AN4Run("rnnt", "float", seed).row(_summary()) for seed in (1, 2)]
    rows[1] = {**rows[1], "loss_per_token": 9.0}
    rows.append(AN4Run("rnnt", "chip", 1).row(_summary() | {"loss_per_token": 0.255}))
    assert "| 0.2550 | +2.0 % |" in STUDY.render(rows)
