"""The largest values and their indices are LiteRT's, on ties, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.testing.operator_oracle import CHECKS, SPECS, Check, Example, check_operator
from tests.emulation.modules import Function

pytestmark = pytest.mark.exactness

EXAMPLES = [
    Example(lambda: Function(lambda x: (2 * x).topk(5).values), ((2000, 9),)),
    Example(lambda: Function(lambda x: (2 * x).sort(0, descending=True)[0]), ((9, 1200),)),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_oracle(index: int, check: Check) -> None:
    check_operator("topk", [EXAMPLES[index]], checks=[check], runtime="litert")


FORMS: dict[str, Callable[..., Any]] = {
    "last axis": lambda x: torch.topk(x, 3),
    "another axis": lambda x: x.topk(k=2, dim=1, sorted=False),
    "sorted": lambda x: torch.sort(x, 1, True),
    "stable": lambda x: torch.sort(x, stable=True, dim=0, descending=True),
    "indices": lambda x: (x, torch.argsort(x, descending=True)),
}


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", FORMS)
def test_values_and_indices_are_results(tmp_path: Path, name: str, bits: int) -> None:
    net = Function(lambda x: tuple(FORMS[name](x.tanh())))
    x = torch.randint(-3, 4, (4, 6, 5)) / 3  # Ties.
    calibrate(net, [[x]], forward=lambda net, batch: net(*batch), spec=SPECS[bits])
    with emulate(net, SPECS[bits]), torch.no_grad():
        values, indices = net(x)
    expected = FORMS[name](x.tanh())
    assert type(values) is type(expected[0])
    assert torch.allclose(values, expected[0], atol=0.02)
    assert (indices.shape, indices.dtype) == (expected[1].shape, torch.int64)
    model = export_tflite(net, [x], tmp_path / "values.tflite")
    assert model.left_out == ()
    assert verify(net, model.path, [x]) == 1.0


@pytest.mark.parametrize("function", [lambda x: x.topk(2, largest=False)[0], lambda x: x.sort()[0]])
def test_smallest_values_say_what_to_write(function: Callable[..., Any]) -> None:
    (row,) = coverage(Function(lambda x: function(2 * x)), torch.randn(3, 4)).fallbacks
    assert "descending" in row.remedy
