"""The oracle on every operator, and what it says where one is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_nna.emulation.coverage import coverage
from lightning_nna.emulation.operators.catalog import operators
from lightning_nna.testing.operator_oracle import (
    CHECKS,
    SPECS,
    SPECS_OF,
    Check,
    check_operator,
    equals_the_runtime_in_the_worst_case,
    equals_the_runtime_on_random_inputs,
    is_covered,
    is_exported,
)
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


#: Kernels of 16 bits that TFLite-Micro lacks, by the operator whose first example needs them.
LACKING = {
    "log_softmax": "REDUCE_MAX",
    "reduce_max": "REDUCE_MAX",
    "reduce_min": "REDUCE_MIN",
    "select": "LESS",
}
#: Examples that it has all kernels for; the tests of the LSTM run those of recurrent layers.
MICRO = [
    (name, index, bits)
    for name, index, bits in EACH
    if not (bits == 16 and name in LACKING and not index) and name != "lstm"
]
MICRO_CHECKS = (
    equals_the_runtime_on_random_inputs,
    equals_the_runtime_in_the_worst_case,
    is_covered,
    is_exported,
)


def test_none_is_missing() -> None:
    folder = Path(__file__).parent / "operators"
    tests = " ".join(path.read_text() for path in folder.glob("test_*.py"))
    elsewhere = set(re.findall(r'check_operator\(\s*"(\w+)"', tests))
    assert set(EXAMPLES) | elsewhere | set(FUNCTIONS) == set(operators())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "index", "bits"), EACH)
def test_it_passes(name: str, index: int, bits: int, check: Check) -> None:
    check_operator(name, [EXAMPLES[name][index]], widths=[bits], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", MICRO_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "index", "bits"), MICRO)
def test_it_passes_on_tflite_micro(name: str, index: int, bits: int, check: Check) -> None:
    example = EXAMPLES[name][index]
    check_operator(name, [example], widths=[bits], runtime="tflm", checks=[check])


@pytest.mark.parametrize("name", LACKING)
def test_what_tflite_micro_lacks_is_named(name: str) -> None:
    example, kernel, bits = EXAMPLES[name][0], LACKING[name], 16
    table = coverage(example.build(), *example.inputs(), spec=SPECS_OF["tflm"][bits])
    assert any(
        row.remedy.startswith(f"TFLite-Micro has no kernel {kernel} of int{bits}: ")
        for row in table.fallbacks
    )
    assert table.cpu_fraction > 0


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("call", [torch.sub, lambda a, b: a + (-b)])
def test_operands_that_nearly_cancel(call: Callable[..., Any], bits: int) -> None:
    """The observed range asks for a grid so fine that LiteRT's ADD aborts and its SUB is wrong."""
    torch.manual_seed(2)
    a = torch.randn(ROWS)
    b = a * (1 + 1e-7 * torch.randn(ROWS))
    compared = replays(Calling(call), a, b, inputs=[a, b], spec=SPECS[bits])
    assert compared["SUB"] + compared["ADD"] == 12_000
