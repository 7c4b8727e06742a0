"""Patterns of zeros on NPUs: rows, and their page."""

from __future__ import annotations

import importlib.util

import pytest

from recipes.benchmark.npu_patterns import LAYERS, PATTERNS, STUDY, PatternRun, report, runs
from recipes.benchmark.rows import read_rows


@pytest.mark.skipif(
    importlib.util.find_spec("ethosu") is None, reason="ethos-u-vela is not installed"
)
def test_rows_are_those_of_vela() -> None:
    rows = {
        pattern: next(PatternRun("conv3x3_16", "u85", pattern).rows())
        for pattern in ("dense", "unstructured 50 %", "2:4")
    }
    slowed = {pattern: row["slowed"] for pattern, row in rows.items()}
    assert slowed == {"dense": False, "unstructured 50 %": True, "2:4": False}
    assert rows["2:4"]["compute_cycles"] < 0.6 * rows["unstructured 50 %"]["compute_cycles"]
    assert rows["dense"]["encoded_bytes"] > 1.5 * rows["2:4"]["encoded_bytes"]


def test_the_page_has_ratios_to_the_dense_layer() -> None:
    key = {"layer": "linear", "target": "u85"}
    rows = [
        {**key, "pattern": "dense", "cycles": 1000, "slowed": False},
        {**key, "pattern": "2:4", "cycles": 500, "slowed": False},
        {**key, "pattern": "1x16 50 %", "cycles": 2000, "slowed": True},
    ]
    fields = report(rows)
    lines = {each.split("|")[1].strip(): each.split("|")[2].strip() for each in fields["u85"]}
    assert list(lines)[: len(PATTERNS)] == list(PATTERNS)
    assert lines["2:4"] == "500 (0.50)"
    assert lines["1x16 50 %"] == "**2,000 (2.00)**"
    assert lines["1:4"] == "-"


def test_the_published_page_is_that_of_its_rows() -> None:
    rows = read_rows(STUDY.results)
    assert STUDY.results.with_suffix(".md").read_text() == STUDY.render(rows)
    assert {row["layer"] for row in rows} >= set(LAYERS)
    assert len(runs()) == len({(run.layer, run.target, run.pattern) for run in runs()})
