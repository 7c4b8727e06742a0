"""Coverage tells what becomes of a function, where it is called, and what to write instead."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import CaptureError, export_tflite
from lightning_nna.emulation.operators.record import Form, Operator, registered
from lightning_nna.emulation.remedies import REMEDIES
from lightning_nna.testing import SmallNet
from tests.emulation.modules import Function

HERE = "tests/emulation/test_coverage.py"


class Mixed(nn.Module):
    """One function of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(4), nn.Linear(4, 6)
        self.register_buffer("angles", torch.arange(6.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(F.dropout(self.norm(x), 0.5, self.training))
        y = y.view(-1, 2, 3).transpose(1, 2).flatten(1) * torch.cos(self.angles)
        return torch.nan_to_num(y)


def line_of(text: str) -> int:
    """Return the line of this file on which a text first stands."""
    lines = Path(inspect.getfile(Mixed)).read_text().splitlines()
    return 1 + next(number for number, line in enumerate(lines) if text in line)


def test_four_kinds_are_told_apart() -> None:
    table = coverage(Mixed().eval(), torch.randn(5, 4))
    assert [(row.operator, row.where) for row in table.rows] == [
        ("batch_norm", "emulated"),
        ("fully_connected", "emulated"),
        ("cos", "constant"),
        ("mul", "emulated"),
        ("nan_to_num", "fallback"),
    ]
    assert [row.operator for row in table.data_movement] == ["view", "transpose", "flatten"]
    assert {row.where for row in table.data_movement} == {"layout"}
    assert "data movement: 1 view, 1 transpose, 1 flatten" in str(table)


def test_a_fallback_has_pytorchs_name_and_the_line_of_its_call() -> None:
    (row,) = coverage(Mixed().eval(), torch.randn(5, 4)).fallbacks
    assert row.function == "torch.nan_to_num"
    assert row.source == f"{HERE}:{line_of('return torch.nan_to_num')}"
    assert row.remedy == "leave it out: results of an accelerator are finite"
    table = str(coverage(Mixed().eval(), torch.randn(5, 4)))
    assert f"./nan_to_num#0 is torch.nan_to_num at {row.source}: {row.remedy}" in table


def test_the_line_is_that_of_the_code_outside_of_torch() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Sequential(nn.Sequential(nn.RReLU()))

        def forward(self, x: Tensor) -> Tensor:
            return self.parts(x)

    (row,) = coverage(Holder().eval(), torch.randn(2, 4)).fallbacks
    assert row.function == "torch.nn.functional.rrelu"
    assert row.source == f"{HERE}:{line_of('return self.parts(x)')}"


def gain(call: Any, input: Tensor) -> Tensor:
    return input


def supports_gain(input: Tensor) -> bool | str:
    return "write it for two axes" if input.dim() > 2 else True


def test_a_record_says_what_to_write_instead_and_the_site_is_called_as_the_function() -> None:
    operator = Operator(
        "gain",
        torch=("erfinv",),
        emulate=gain,
        supports=supports_gain,
        forms=(Form(("lgamma",), gain, supports_gain),),
    )
    with registered(operator):
        net = Function(lambda x: torch.lgamma(x) + torch.erfinv(x))
        rows = coverage(net, torch.rand(2, 3, 4)).fallbacks
        assert [(row.operator, row.remedy) for row in rows] == [
            ("lgamma", "write it for two axes"),
            ("erfinv", "write it for two axes"),
        ]
        assert not coverage(net, torch.rand(2, 3)).fallbacks


def test_a_spec_without_the_operator_or_its_width_is_the_reason() -> None:
    spec = {"name": "small", "operators": ["fully_connected"]}
    reasons = {row.remedy for row in coverage(SmallNet(), torch.randn(2, 4), spec=spec).fallbacks}
    assert "'small' lists the operators that it has, without tanh" in reasons
    with registered(Operator("gain", torch=("erfinv",), emulate=gain, widths=(8,))):
        net = Function(torch.erfinv)
        (row,) = coverage(net, torch.rand(2, 3), spec="litert-int16x8").fallbacks
    assert row.remedy == "gain has 8-bit activations, and not 16"


@pytest.mark.parametrize("spec", [None, "litert-int16x8"])
def test_a_module_with_an_emulator_is_covered_and_not_disturbed(spec: str | None) -> None:
    torch.manual_seed(0)
    net, x = Mixed(), torch.randn(32, 4)
    emulator = calibrate(net, [x])
    state, weights = copy.deepcopy(emulator.state_dict()), copy.deepcopy(net.state_dict())
    with emulate(net), torch.no_grad():
        expected = net.eval()(x)
    net.train()
    seeds = torch.get_rng_state()
    before = coverage(net, x, spec=spec)
    with emulate(net):
        assert coverage(net, x, spec=spec) == before  # Inside of a block, too.
    assert [row.operator for row in before.fallbacks] == ["nan_to_num"]
    assert emulator.state_dict() == state
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seeds)
    with emulate(net) as own, torch.no_grad():
        assert own is emulator
        assert torch.equal(net.eval()(x), expected)
    # A part of it has call sites of its own.
    assert [row.site for row in coverage(net.layer, x).rows] == ["./fully_connected#0"]


def test_a_failed_forward_leaves_the_emulator_in_its_mode() -> None:
    net, x = SmallNet(), torch.randn(16, 4)
    calibrate(net, [x])
    with emulate(net), torch.no_grad():
        expected = net(x)
        with pytest.raises(RuntimeError):
            coverage(net, torch.randn(3, 5))
        assert torch.equal(net(x), expected)


def test_an_error_of_the_export_says_the_same(tmp_path: Path) -> None:
    net, x = Mixed().eval(), torch.randn(5, 4)
    calibrate(net, [x])
    (row,) = coverage(net, x).fallbacks
    with pytest.raises(CaptureError) as error:
        export_tflite(net, [x], tmp_path / "net.tflite")
    assert f"(torch.nan_to_num at {row.source}): {row.remedy}" in str(error.value)


class FrontEnd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.log1p(x.square().mean(-1) - 1)


def test_a_front_end_that_is_not_finite_is_told_of_targets() -> None:
    net = nn.Sequential(FrontEnd(), nn.Linear(8, 4))
    with pytest.raises(FloatingPointError, match=r"0/log#0/output.*front end.*with targets="):
        calibrate(net, [torch.zeros(2, 8, 3)])
    assert calibrate(net, [torch.ones(2, 8, 3)], targets=["1"]).calibrated


@pytest.mark.parametrize(
    ("name", "function", "remedy"),
    [
        ("norm", lambda x: x.norm(dim=1), lambda x: x.square().sum(1).sqrt()),
        (
            "cosine_similarity",
            lambda x: F.cosine_similarity(x, x.flip(1)),
            lambda x: (F.normalize(x) * F.normalize(x.flip(1))).sum(1),
        ),
        (
            "rms_norm",
            lambda x: F.rms_norm(x, (4,), torch.full((4,), 0.5), 1e-5),
            lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * 0.5,
        ),
        (
            "rrelu",
            lambda x: F.rrelu(x, 0.1, 0.3),
            lambda x: F.leaky_relu(x, (0.1 + 0.3) / 2),
        ),
    ],
)
def test_remedies_compute_the_same(
    name: str, function: Callable[[Tensor], Tensor], remedy: Callable[[Tensor], Tensor]
) -> None:
    assert name in REMEDIES
    x = torch.rand(6, 4)
    torch.testing.assert_close(remedy(x), function(x))
