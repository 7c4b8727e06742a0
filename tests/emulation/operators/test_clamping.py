"""Clamping and extremes of two tensors pass the oracle, with bounds of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.testing.operator_oracle import CHECKS, SPECS, Check, Example, check_operator
from lightning_nna.testing.replay import replays
from tests.emulation.operators.examples import Calling

pytestmark = pytest.mark.exactness
ROWS = (120, 100)


def calling(function: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: Calling(function)


class Bounded(nn.Module):
    """A lower bound that is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.bound = nn.Parameter(torch.linspace(-1.0, 1.0, 100))

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, min=self.bound)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.clamp(x, -0.3, 0.7),
        lambda x: x.clip(min=0.2),
        lambda x: x.clamp_max(0.5),
    ],
)
def test_clamp(function: Callable[[Tensor], Tensor], check: Check) -> None:
    check_operator("clamp", [Example(calling(function), (ROWS,))], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_hardtanh(check: Check) -> None:
    for build in (nn.Hardtanh, calling(lambda x: F.hardtanh(x, 0.0, 1.0))):
        check_operator(
            "hardtanh", [Example(build, (ROWS,))], widths=[8], checks=[check], runtime="litert"
        )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_maximum(check: Check) -> None:
    function = lambda a, b: torch.maximum(torch.tanh(a), 0.4 * b)  # noqa: E731
    check_operator(
        "maximum", [Example(calling(function), (ROWS, ROWS))], checks=[check], runtime="litert"
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_minimum(check: Check) -> None:
    function = lambda a, b: torch.minimum(a, 2 * b)  # noqa: E731
    check_operator(
        "minimum", [Example(calling(function), (ROWS, (100,)))], checks=[check], runtime="litert"
    )


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "-1 to 1": (F.hardtanh, {"RELU_N1_TO_1"}),
    "0 to 1": (lambda x: x.clamp(0, 1), {"RELU_0_TO_1"}),
    "0 to 6": (lambda x: F.hardtanh(x, 0.0, 6.0), {"RELU6"}),
    "from 0": (lambda x: x.clamp(min=0), {"RELU"}),
    "threshold": (lambda x: F.threshold(x, 0, 0), {"RELU"}),
    "0 to 2": (lambda x: x.clamp(0, 2), {"RELU", "MINIMUM"}),
    "both": (lambda x: x.clip(-0.4, 1.3), {"MAXIMUM", "MINIMUM"}),
    "one above the other": (lambda x: x.clamp(1.5, 0.5), {"MAXIMUM", "MINIMUM"}),
    "a tensor": (lambda x: x.clamp(max=torch.tensor([0.5])), {"MINIMUM"}),
    "min of two": (lambda x: torch.min(x, other=x * x), {"MUL", "MINIMUM"}),
    "max of two": (lambda x: x.max(-x), {"MUL", "MAXIMUM"}),
    "of no effect": (lambda x: x.clamp(-100, 100), set()),
    "beyond the range": (lambda x: x.clamp(min=100), {"MAXIMUM"}),
    "below the range": (lambda x: x.clamp(max=-100), {"MINIMUM"}),
}


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_bound_is_that_of_float_and_of_litert(name: str, bits: int, tmp_path: Path) -> None:
    function, kernels = FUNCTIONS[name]
    if bits == 16:
        wide = {"RELU_N1_TO_1": {"MAXIMUM", "MINIMUM"}, "RELU_0_TO_1": {"RELU", "MINIMUM"}}
        kernels = set().union(*(wide.get(kernel, {kernel}) for kernel in kernels))
    net, x = Calling(lambda x: function(x + 0.0)), 4 * torch.randn(30, 10)
    x[0, :2] = torch.tensor([-9.0, 9.0])
    compared = replays(net, x, spec=SPECS[bits])
    assert set(compared) - {"ADD", "QUANTIZE"} == kernels
    calibrate(net, [x], spec=SPECS[bits])
    with emulate(net, SPECS[bits]):
        result = net(x)
    expected = function(x)
    step = 2 * float(max(x.abs().max(), expected.abs().max(), (x * x).max())) / 2**bits
    assert (result - expected).abs().max() < 3 * step
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0


@pytest.mark.parametrize("bits", SPECS)
def test_a_parameter_as_a_bound(bits: int) -> None:
    net, x = Bounded(), torch.randn(ROWS)
    assert replays(net, x, spec=SPECS[bits])["MAXIMUM"] == x.numel()
    with emulate(net, SPECS[bits]) as chip:
        with chip.observing():
            net(x)
        net(x).sum().backward()
    assert net.bound.grad is not None
    expected = (x < net.bound).float().sum(0)
    torch.testing.assert_close(net.bound.grad, expected, atol=3, rtol=0)


def test_operands_that_share_their_parameters_are_not_requantized() -> None:
    net, x = Calling(lambda x: torch.maximum(torch.tanh(x), torch.tanh(2 * x))), torch.randn(9, 9)
    # The quantizations are those of the input, for the first tanh and for the product.
    assert replays(net, x, spec="litert-int8")["QUANTIZE"] == 2 * x.numel()


def test_a_layer_before_a_clamp_from_0_ends_there() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Hardtanh(0.0, 0.5)), torch.randn(50, 4)
    calibrate(net, [x])
    with emulate(net) as chip:
        net(x)
        assert chip.state.fusion.fused_relu == {"0/fully_connected#0": 0.5}


def test_other_thresholds_run_in_float() -> None:
    assert coverage(nn.Threshold(0.1, 0.0), torch.randn(2, 3)).fallbacks
    assert not coverage(nn.Threshold(0.0, 0.0), torch.randn(2, 3)).fallbacks
