"""Rows of results on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.benchmark.rows import append_row, has_row, read_rows, spread


def test_rows_come_back_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.jsonl"
    rows = [{"seed": seed, "wer": seed / 3} for seed in (2, 1)]
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows
    assert [entry.name for entry in path.parent.iterdir()] == ["x.jsonl"]


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "x.jsonl") == []


@pytest.mark.parametrize("line", ["{", "3"])
def test_a_broken_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"seed": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .*x\.jsonl"):
        read_rows(path)


def test_a_row_is_found_by_all_of_its_values() -> None:
    rows = [{"seed": 1, "method": "float"}]
    assert has_row(rows, seed=1, method="float")
    assert not has_row(rows, seed=2, method="float")
    assert not has_row(rows, bits=8)


def test_spread_is_mean_least_greatest() -> None:
    assert spread(iter([3.0, 1.0, 2.0])) == (2.0, 1.0, 3.0)
