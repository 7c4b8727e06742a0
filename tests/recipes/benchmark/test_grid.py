"""The runner of all grids: what is missing runs, and each row is written once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from recipes.benchmark import grid, report
from recipes.benchmark.grid import Run, Study, axis, run_missing
from recipes.benchmark.rows import Row, append_row, read_rows
from tests.conftest import ROOT


@dataclass(frozen=True)
class Squares(Run):
    """Rows of two numbers."""

    base: int
    fails: bool = False

    @property
    def keys(self) -> list[dict[str, int]]:
        return [{"base": self.base, "offset": offset} for offset in (0, 1)]

    def rows(self) -> Iterator[Row]:
        if self.fails:
            raise ValueError(f"{self.base} fails")
        for key in self.keys:
            yield {**key, "square": (self.base + key["offset"]) ** 2}


@dataclass(frozen=True)
class Keyed(Run):
    """A run with the usual key."""

    method: str
    seed: int


def squares(*, bases: list[int], threads: int = 1) -> list[Run]:
    return [Squares(base, threads=threads) for base in bases]


def test_positional_fields_are_the_key() -> None:
    assert Keyed("gq", 3, threads=2).keys == [{"method": "gq", "seed": 3}]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_only_missing_rows_are_appended(tmp_path: Path, workers: int) -> None:
    results = tmp_path / "squares.jsonl"
    append_row(results, {"base": 2, "offset": 1, "square": -1})
    runs = [Squares(1), Squares(2)]
    run_missing(runs, results, workers=workers)
    rows = read_rows(results)
    assert {(row["base"], row["offset"]): row["square"] for row in rows} == (
        {(2, 1): -1, (1, 0): 1, (1, 1): 4, (2, 0): 4}
    )
    assert all({"command", "commit"} <= row.keys() for row in rows[1:])
    run_missing(runs, results, workers=0)
    assert read_rows(results) == rows


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_was_done_before_an_error_stays(tmp_path: Path, workers: int) -> None:
    results = tmp_path / "squares.jsonl"
    with pytest.raises(ValueError, match="2 fails"):
        run_missing([Squares(1), Squares(2, fails=True)], results, workers=workers)
    assert [row["base"] for row in read_rows(results)] == [1, 1]


def test_the_command_line_runs_a_part_and_writes_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "TEMPLATES", tmp_path)
    template = "# Squares of $count\n\n$lines\n\n## Empty\n\n$none\n\n## Commands\n\n$commands\n"
    (tmp_path / "squares.md").write_text(template)
    study = Study(
        name="squares",
        runs=squares,
        report=lambda rows: {
            "count": len(rows),
            "lines": [report.line(row["base"], row["square"]) for row in rows],
            "none": [],
        },
        options={"bases": axis([1, 2, 3])},
    )
    study.main(["--bases", "3"])
    text = study.results.with_suffix(".md").read_text()
    assert text.startswith("# Squares of 2\n\n| 3 | 9 |\n| 3 | 16 |\n\n## Commands\n")
    study.main(["--page-only"])
    assert study.results.with_suffix(".md").read_text() == text
    with pytest.raises(SystemExit):
        study.main(["--bases", "4"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_runs_end_with_their_study(number: signal.Signals, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-m", "tests.recipes.benchmark.waiting_study", str(tmp_path)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores it, and so does what that starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as study:
        with (tmp_path / "pipe").open() as pipe:
            workers = {int(pipe.readline()) for _ in range(2)}
            assert len(workers) == 2
            study.send_signal(number)
            # Ends when the last process is gone that has it open to write.
            assert pipe.read() == ""
        assert study.wait(60) in (-number, 1, 130)
    assert not (tmp_path / "results.jsonl").exists()
