"""Power-average pooling passes the oracle for orders 1 and 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.emulation.operators.adaptive_pooling import adaptive_average_pool
from lightning_nna.emulation.operators.call import Call
from lightning_nna.emulation.operators.composition import compose
from lightning_nna.emulation.operators.pooling import average_pool
from lightning_nna.emulation.operators.record import Operator, registered
from lightning_nna.emulation.operators.resizing import interpolate
from lightning_nna.testing.operator_oracle import CHECKS, Check, Example, check_operator
from lightning_nna.testing.replay import replays
from tests.emulation.modules import Function

pytestmark = pytest.mark.exactness

EXAMPLES = [
    Example(lambda: nn.LPPool2d(2, 2), ((4, 16, 26, 26),)),
    Example(lambda: nn.LPPool1d(2, 3, 2), ((10, 25, 90),)),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", EXAMPLES)
def test_oracle(example: Example, check: Check) -> None:
    check_operator("power_average_pool", [example], checks=[check], runtime="litert")


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.lp_pool2d(x, 2, (2, 3), stride=1),
        lambda x: F.lp_pool2d(x, norm_type=2.0, kernel_size=3, ceil_mode=True),
        lambda x: F.lp_pool1d(x[0], 2, 2),
        lambda x: F.lp_pool2d(x.abs(), 1, 2),
    ],
)
def test_functions_and_their_arguments(
    spec: str, function: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x = Function(function), torch.randn(2, 3, 8, 6)
    assert not coverage(net, x, spec=spec).fallbacks
    replays(net, x, spec=spec)
    calibrate(net, [x], spec=spec)
    with torch.no_grad():
        expected = net(x)
        with emulate(net, spec):
            result = net(x)
    torch.testing.assert_close(result, expected, atol=0.06, rtol=0)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0


def test_other_orders_run_in_float() -> None:
    (row,) = coverage(nn.LPPool2d(3, 2), torch.rand(1, 2, 4, 4)).fallbacks
    assert "norm_type=2" in row.remedy


@pytest.mark.parametrize(
    ("step", "function"),
    [
        (lambda call, x: average_pool(call, x, 3, 1, 1), lambda x: F.avg_pool2d(x, 3, 1, 1)),
        (lambda call, x: adaptive_average_pool(call, x, 4), lambda x: F.adaptive_avg_pool2d(x, 4)),
        (
            lambda call, x: interpolate(call, x, 15, mode="bilinear"),
            lambda x: F.interpolate(x, 15, mode="bilinear"),
        ),
    ],
)
def test_widened_activations_hold_the_integers_of_averages(
    step: Callable[[Call, Tensor], Tensor], function: Callable[[Tensor], Tensor]
) -> None:
    def emulated(call: Call, input: Tensor) -> Tensor:
        operand = call.operand(input, "input")
        return compose(call, [operand], function, lambda wide, x: step(wide.child("step"), x))

    x = torch.randn(4, 5, 9, 9)
    with registered(Operator("wide", torch=("digamma",), emulate=emulated)):
        replays(Function(torch.digamma), x, inputs=[1.2 * x], spec="litert-int8")
