"""Scoring of stored sequences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lightning_nna.drift.detector import DriftDetector
from lightning_nna.drift.plot import draw
from recipes.csv_column import Column, read_column
from recipes.drift_replay import main, replay

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
    assert f"drift at {onset} (step {onset}): " in printed
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
    with pytest.raises(
        ValueError, match=r"3 columns: step, train/loss, val/wer; .* column=val/wer"
    ):
        read_column(path, None)
    with pytest.raises(ValueError, match="no column 'val/we'; did you mean val/wer"):
        read_column(path, "val/we")
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
    assert read_column(path, "wer") == Column("wer", [0.5])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("wer\n0.5\nhalf\n", r"log\.csv, line 3: 'half' in column 'wer' is no number"),
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


INFERRED = {
    "a header": ("wer\n0.5\n0.4\n", Column("wer", [0.5, 0.4])),
    "no header": ("0.5\n0.4\n", Column("value", [0.5, 0.4])),
    "a step": ("step,wer\n10,0.5\n20,0.4\n", Column("wer", [0.5, 0.4], [10, 20], "step")),
    "an epoch": ("wer,Epoch\n0.5,1\n0.4,2\n", Column("wer", [0.5, 0.4], [1, 2], "Epoch")),
    "blank cells": ("wer,step\n0.5,1\n,2\n 0.4 ,3\n", Column("wer", [0.5, 0.4], [1, 3], "step")),
    "blank lines": ("wer\n\n0.5\n\n0.4\n\n", Column("wer", [0.5, 0.4])),
    "one value": ("wer\n0.5\n", Column("wer", [0.5])),
    "text": ("day,wer\nMonday,0.5\nTuesday,0.4\n", Column("wer", [0.5, 0.4])),
    "semicolons": ("step;wer\n1;0.5\n2;0.4\n", Column("wer", [0.5, 0.4], [1, 2], "step")),
    "decimal commas": ("step;wer\n1;0,5\n2;0,4\n", Column("wer", [0.5, 0.4], [1, 2], "step")),
    "tabs": ("step\twer\n1\t0.5\n2\t0.4\n", Column("wer", [0.5, 0.4], [1, 2], "step")),
    "a quoted comma": ('"wer, of all"\n0.5\n', Column("wer, of all", [0.5])),
    "pandas": (",wer\n0,0.5\n1,0.4\n", Column("wer", [0.5, 0.4])),
}


@pytest.mark.parametrize("form", INFERRED)
def test_the_form_of_a_file_is_inferred(form: str, tmp_path: Path) -> None:
    text, expected = INFERRED[form]
    (tmp_path / "log.csv").write_text(text)
    assert read_column(tmp_path / "log.csv", None) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("loss,wer\n0.5,0.4\n", r"has 2 columns: loss, wer; say which .* as column=wer$"),
        ("0.5,0.4\n0.3,0.2\n", r"has 2 columns: 1, 2; say which .* as column=2$"),
        ("wer\n0,5\n0,4\n", r"line 2 has 2 cells, and the first row has 1: .*decimal commas"),
        ("wer\ngood\nbad\n", r"line 2: 'good' in column 'wer' is no number"),
        ("", r"log\.csv is empty"),
        ("wer\n0.5\n\0\n", r"log\.csv is no CSV file: it has zero bytes"),
    ],
)
def test_doubt_is_one_error_that_lists_the_columns(
    text: str, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_column(tmp_path / "log.csv", None)


def test_decimal_commas_are_no_delimiters(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("1,5;0,5\n2,5;0,4\n")
    assert read_column(tmp_path / "log.csv", "2") == Column("2", [0.5, 0.4])


def test_a_column_of_text_names_those_with_numbers(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("day,wer\nMonday,0.5\n")
    with pytest.raises(ValueError, match=r"'Monday' in column 'day' .*: wer, as column=wer"):
        read_column(path, "day")


def test_a_single_value_has_nothing_to_compare_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "one.csv"
    path.write_text("wer\n0.25\n")
    main([str(path)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [
        "wer: 1 value, 0 not finite and left out",
        "0.25 is the only value: nothing to compare with yet",
    ]
    assert (tmp_path / "drift_wer.png").is_file()


@pytest.mark.parametrize(("name", "label"), [("step", "step"), ("other", "validation")])
def test_the_figure_names_its_axes(name: str, label: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"{name},wer\n5,0.5\n10,0.4\n")
    column = read_column(path, "wer")
    _, readings = replay(DriftDetector(), column.values)
    figure = draw(readings, [0, 1], title=column.name, xlabel=column.time_name)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == (label, "wer")


def test_arguments_are_written_as_those_of_the_other_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "log.csv")
    main([str(path), "column=val/wer", "min_delta=10", f"plot={tmp_path / 'a.png'}"])
    assert "no drift" in capsys.readouterr().out
    assert (tmp_path / "a.png").is_file()
