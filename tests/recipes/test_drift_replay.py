"""Scoring of stored sequences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lightning_nna.drift.detector import DriftDetector
from recipes.drift_replay import main, read_column, replay

VALUES = 0.2 + 0.1 * (np.arange(40) >= 20) + 0.02 * np.random.default_rng(0).standard_normal(40)


def written(path: Path) -> Path:
    """A log as Lightning writes it: other columns, rows that leave the metric empty."""
    lines = ["step,train/loss,val/wer"]
    for step, value in enumerate(VALUES.tolist()):
        lines += [f"{step},0.5,", f"{step},,{value}"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("folder", [False, True])
def test_a_column_is_scored_and_drawn(
    folder: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = written(tmp_path / "metrics" / "version_0" / "metrics.csv")
    main([str(tmp_path if folder else log), "--column", "val/wer"])
    folder_of_log = tmp_path if folder else log.parent
    assert (folder_of_log / "drift_val_wer.png").stat().st_size > 10_000
    rows = json.loads((folder_of_log / "drift_val_wer.json").read_text())
    _, readings = replay(DriftDetector(), VALUES.tolist())
    assert [row["value"] for row in rows] == [reading.value for reading in readings]
    assert [row["drift"] for row in rows] == [reading.drift for reading in readings]
    assert rows[0]["radius"] is None
    onset = [row["drift"] for row in rows].index(True)
    printed = capsys.readouterr().out
    assert "val/wer: 40 values, 0 not finite and left out" in printed
    assert f"drift at {onset}: " in printed
    assert "drifted" in printed.splitlines()[-2]
    assert 20 <= onset < 25


def test_the_other_direction_and_a_path_of_the_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "one.csv"
    path.write_text("accuracy\n" + "\n".join(map(str, VALUES)) + "\nnan\n")
    main([str(path), "--mode", "max", "--plot", str(tmp_path / "plots" / "a.png")])
    assert (tmp_path / "plots" / "a.png").is_file()
    printed = capsys.readouterr().out
    assert "40 values, 1 not finite" in printed
    assert "no drift" in printed


def test_missing_columns_and_values_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "log.csv")
    with pytest.raises(ValueError, match=r"no column None; name one of \['step'"):
        read_column(path, None)
    with pytest.raises(ValueError, match="no column 'wer'"):
        read_column(path, "wer")
    with pytest.raises(FileNotFoundError, match=r"no metrics\.csv"):
        read_column(tmp_path, "val/wer")
    empty = tmp_path / "empty.csv"
    empty.write_text("a\nnan\n")
    with pytest.raises(SystemExit):
        main([str(empty)])
    assert "has no finite value" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("wer\n0.5\n", encoding="utf-8-sig")
    assert read_column(path, "wer") == ("wer", [0.5])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("wer\n0.5\nhalf\n", r"log\.csv, line 3: 'half' is no number"),
        ("wer,wer\n0.5,0.6\n", r"log\.csv has 2 columns 'wer'"),
    ],
)
def test_a_log_that_is_wrong_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_column(path, "wer")


def test_a_folder_of_several_logs_is_an_error(tmp_path: Path) -> None:
    for version in ("version_0", "version_1"):
        written(tmp_path / "metrics" / version / "metrics.csv")
    with pytest.raises(ValueError, match=r"version_0/metrics\.csv, metrics/version_1/metrics\.csv"):
        read_column(tmp_path, "val/wer")
