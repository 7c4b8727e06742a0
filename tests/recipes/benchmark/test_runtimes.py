"""Rows and page of the comparison of presets with runtimes."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lightning_nna.emulation.operators.catalog import operators
from lightning_nna.testing.operator_oracle import Example
from recipes.benchmark.report import render
from recipes.benchmark.rows import read_rows
from recipes.benchmark.runtimes import compare_operator, report


def test_rows_are_kept_and_summarized(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    examples = {
        "fully_connected": Example(lambda: nn.Linear(40, 50), ((200, 40),)),
        "gelu": Example(nn.GELU, ((20, 30),)),
    }
    pairs = [("litert-int8", "litert"), ("litert-int8", "tflm"), ("litert-int16x8", "litert")]
    for _ in range(2):
        for name, example in examples.items():
            operator = operators()[name]
            compare_operator(operator, example, "litert-int8", test=name, path=path, pairs=pairs)
    rows = read_rows(path)
    assert [(row["operator"], row["runtime"]) for row in rows] == [
        ("fully_connected", "litert"),
        ("fully_connected", "tflm"),
        ("gelu", "litert"),
        ("gelu", "tflm"),
    ]
    assert [row["outputs"] == row["equal"] for row in rows] == [True, False, True, True]
    assert rows[3]["missing"] == ["GELU int8"]
    page = render("runtimes", report(rows))
    outputs = f"{sum(row['outputs'] for row in rows if row['runtime'] == 'litert'):,}"
    assert (
        f"| LiteRT, reference kernels | {rows[0]['version']} | 2 of 2 | {outputs} | all |" in page
    )
    assert "| 0 of 2 |" in page
    assert "of FULLY_CONNECTED int8." in page
