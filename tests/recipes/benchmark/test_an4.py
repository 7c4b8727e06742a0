"""The grid on AN4: its cells, its rows, its page."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from recipes.benchmark import an4
from recipes.benchmark.an4 import Cell, page, row_of, run_cell, write_page
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
    row = row_of(Cell("rnnt", method, 2), _summary())
    assert row.keys() >= KEYS
    assert (row["seed"], row["method"], row["packed_bytes"]) == (2, method, packed_bytes)


def test_every_cell_has_a_folder_and_starts_from_the_float_weights_of_its_seed() -> None:
    choices = itertools.product(an4.MODELS, an4.TITLES, an4.SEEDS)
    cells = [Cell(*choice) for choice in choices]
    assert len({cell.folder for cell in cells}) == len(cells)
    for cell in cells:
        start = str(Cell(cell.model, "float", cell.seed).folder / "checkpoints" / "last.ckpt")
        assert any(start in word for word in cell.command) == (cell.method != "float")


def test_a_finished_run_gives_its_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cell = Cell("conformer", "nna8", 3)
    cell.folder.mkdir(parents=True)
    (cell.folder / "summary.json").write_text(json.dumps(_summary()))
    run_cell(cell)
    run_cell(cell)
    rows = read_rows(tmp_path / an4.ROWS)
    assert [(row["method"], row["seed"], row["wer"]) for row in rows] == [("nna8", 3, 0.2)]


def test_the_page_has_means_ranges_and_commands(tmp_path: Path) -> None:
    path = tmp_path / "an4.jsonl"
    for seed, wer in ((1, 0.15), (2, 0.17)):
        append_row(path, row_of(Cell("rnnt", "float", seed), _summary(wer)))
    write_page(path)
    text = (tmp_path / "an4.md").read_text()
    assert "| RNN-T | float | 2 | 16.0 % | 15.0 % to 17.0 % | 17.0 % | 0.2500 | - |" in text
    line = (
        "| RNN-T | 2 | float | 17.0 % | 15.0 % to 20.0 % | 18.0 % | 0.2500 | 2 min, 1 thread(s) |"
    )
    assert line in text
    assert text.count("python -m recipes.train seed=1") == 2
    assert (tmp_path / "an4.png").stat().st_size > 1000


def test_the_page_grows_with_its_rows() -> None:
    rows = [row_of(Cell("conformer", method, 1), _summary()) for method in ("float", "chip")]
    assert "untrained" not in page(rows[:1]).split("| model |")[1]
    assert "untrained" in page(rows).split("| model |")[1]


def test_a_method_is_compared_with_float_on_its_own_seeds() -> None:
    rows = [row_of(Cell("rnnt", "float", seed), _summary()) for seed in (1, 2)]
    rows[1]["loss_per_token"] = 9.0
    rows.append(row_of(Cell("rnnt", "chip", 1), _summary() | {"loss_per_token": 0.255}))
    assert "| 0.2550 | +2.0 % |" in page(rows)
