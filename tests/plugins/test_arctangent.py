"""An operator from outside of the package passes the oracle of those inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.record import Operator, registered
from lightning_nna.emulation.program import Activation
from lightning_nna.testing.operator_oracle import CHECKS, Check, Example, check_operator, is_covered
from tests.plugins.arctangent import ARCTANGENT


class Arctangent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.atan(x)


class AreaSine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.asinh(x)


EXAMPLES = [Example(Arctangent, ((120, 100),))]


@pytest.fixture(autouse=True)
def _arctangent_is_registered() -> Iterator[None]:
    with registered(ARCTANGENT):
        yield


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_oracle(check: Check) -> None:
    check_operator("atan", EXAMPLES, checks=[check])


def test_it_is_an_operator_as_any_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), Arctangent(), nn.Linear(8, 4), Arctangent())
    x = torch.randn(16, 6)
    assert {row.operator for row in coverage(net, x).rows} == {"fully_connected", "atan"}
    calibrate(net, [x])
    with emulate(net, learned_scales="all") as chip:
        net(x).sum().backward()
        assert {"1/atan#0/output", "3/atan#0/output"} <= set(chip.scales.activations)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert {"CAST", "ADD", "GATHER"} < set(model.operators)
    assert verify(net, model.path, [x]) == 1.0


def test_16_bits_are_a_table_too() -> None:
    table = coverage(Arctangent(), torch.randn(4, 6), spec="litert-int16x8")
    assert [(row.operator, row.where) for row in table.rows] == [("atan", "emulated")]


def test_what_is_wrong_is_named() -> None:
    wrong = dataclasses.replace(ARCTANGENT, name="arcsine", learns_scale=False)
    with pytest.raises(AssertionError, match=r"'arcsine', tflm-int8, example 0, is_covered: no si"):
        check_operator(wrong, EXAMPLES, checks=[is_covered])
    with pytest.raises(
        AssertionError, match=r"example 0, equals_the_runtime_on_random.* enlarge the s"
    ):
        check_operator("atan", [Example(Arctangent, ((2, 3),))])


def test_an_entry_of_the_table_that_is_wrong_is_shown() -> None:
    def wrong(
        operator: Operator, call: Call, operands: tuple[Activation, ...], y: Activation, **rest: Any
    ) -> None:
        assert ARCTANGENT.instructions is not None
        raised = Activation(y.value + y.qparams.scale, y.qparams)
        ARCTANGENT.instructions(operator, call, operands, raised, **rest)

    broken = dataclasses.replace(ARCTANGENT, name="broken", torch=("asinh",), instructions=wrong)
    message = r"/broken#0: result 0 of GATHER .*differs .* 12000 of 12000 .*first at \[0, 0\]: "
    with registered(broken), pytest.raises(AssertionError, match=message):
        check_operator(broken, [Example(AreaSine, ((120, 100),))])
