"""The oracle on every operator, and what it says where one is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_nna.emulation.operators.catalog import operators
from lightning_nna.testing.operator_oracle import CHECKS, SPECS, Check, check_operator
from lightning_nna.testing.replay import replays
from tests.emulation.operators.examples import EXAMPLES, ROWS, Calling
from tests.emulation.operators.test_tabulated_functions import FUNCTIONS

pytestmark = [
    pytest.mark.exactness,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
EACH = [
    (name, index, bits)
    for name, examples in EXAMPLES.items()
    for index in range(len(examples))
    for bits in operators()[name].widths
]


def test_none_is_missing() -> None:
    folder = Path(__file__).parent / "operators"
    tests = " ".join(path.read_text() for path in folder.glob("test_*.py"))
    elsewhere = set(re.findall(r'check_operator\(\s*"(\w+)"', tests))
    assert set(EXAMPLES) | elsewhere | set(FUNCTIONS) == set(operators())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "index", "bits"), EACH)
def test_it_passes(name: str, index: int, bits: int, check: Check) -> None:
    check_operator(name, [EXAMPLES[name][index]], widths=[bits], checks=[check])


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("call", [torch.sub, lambda a, b: a + (-b)])
def test_operands_that_nearly_cancel(call: Callable[..., Any], bits: int) -> None:
    """The observed range asks for a grid so fine that LiteRT's ADD aborts and its SUB is wrong."""
    torch.manual_seed(2)
    a = torch.randn(ROWS)
    b = a * (1 + 1e-7 * torch.randn(ROWS))
    compared = replays(Calling(call), a, b, inputs=[a, b], spec=SPECS[bits])
    assert compared["SUB"] + compared["ADD"] == 12_000
