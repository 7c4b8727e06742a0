"""Rows of what Vela does with an operator, and their column in the documentation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from torch import nn

from lightning_nna.emulation.operators.catalog import operators
from lightning_nna.testing.operator_oracle import Example
from recipes.benchmark.npu_operators import compile_operator
from recipes.benchmark.rows import read_rows

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ethosu") is None, reason="ethos-u-vela is not installed"
)


def test_an_operator_is_compiled_once(tmp_path: Path) -> None:
    path, example = tmp_path / "rows.jsonl", Example(nn.Tanh, ((4, 8),))
    for accelerators in (["ethos-u55-128"], ["ethos-u55-128", "ethos-u85-256"]):
        compile_operator(operators()["tanh"], example, 8, path=path, accelerators=accelerators)
    rows = read_rows(path)
    assert [row["accelerator"] for row in rows] == ["ethos-u55-128", "ethos-u85-256"]
    assert all(row["npu"] == ["Tanh"] and row["cpu"] == [] for row in rows)


def test_what_is_no_program_says_why(tmp_path: Path) -> None:
    class Drawn(nn.Tanh):
        def forward(self, x: object) -> object:
            return nn.functional.dropout(super().forward(x), 0.5, training=True)  # type: ignore[arg-type]

    path = tmp_path / "rows.jsonl"
    compile_operator(operators()["tanh"], Example(Drawn, ((4, 8),)), 8, path=path)
    assert len(read_rows(path)) == 3
    assert all("random" in row["error"] for row in read_rows(path))
