"""Exponential, logarithm, roots and absolute value pass the oracle, and have no other poles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_nna import calibrate, emulate
from lightning_nna.testing.operator_oracle import CHECKS, SPECS, Check, Example, check_operator
from lightning_nna.testing.replay import replays
from tests.emulation.operators.examples import Calling, function

pytestmark = pytest.mark.exactness
ROWS = (120, 100)


def positive(x: Tensor) -> Tensor:
    return torch.sigmoid(x) + 0.2


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_exp(check: Check) -> None:
    check_operator("exp", [Example(function(torch.exp), (ROWS,))], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_log(check: Check) -> None:
    example = Example(function(lambda x: torch.log(positive(x))), (ROWS,))
    check_operator("log", [example], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_sqrt(check: Check) -> None:
    example = Example(function(lambda x: torch.sqrt(positive(x))), (ROWS,))
    check_operator("sqrt", [example], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_rsqrt(check: Check) -> None:
    example = Example(function(lambda x: torch.rsqrt(positive(x))), (ROWS,))
    check_operator("rsqrt", [example], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_abs(check: Check) -> None:
    check_operator("abs", [Example(function(torch.abs), (ROWS,))], checks=[check], runtime="litert")


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "exp2": (torch.exp2, {"MUL", "EXP"}),
    "expm1": (torch.expm1, {"EXP", "SUB"}),
    "log2": (lambda x: positive(x).log2(), {"LOG"}),
    "log10": (lambda x: positive(x).log10(), {"LOG"}),
    "log1p": (lambda x: torch.log1p(x * x), {"LOG"}),
    "root of what may be negative": (lambda x: torch.tanh(positive(x)).sqrt(), {"RELU", "SQRT"}),
    "inverse of what may be": (lambda x: torch.tanh(positive(x)).rsqrt(), {"RELU", "RSQRT"}),
}


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_consists_of_them(name: str, bits: int) -> None:
    run, kernels = FUNCTIONS[name]
    net, x = Calling(run), torch.randn(40, 30)
    compared = replays(net, x, spec=SPECS[bits])
    assert kernels <= set(compared)
    calibrate(net, [x], spec=SPECS[bits])
    with emulate(net, SPECS[bits]), torch.no_grad():
        result = net(x)
    expected = run(x)
    span = float(expected.max() - expected.min())
    assert float((result - expected).abs().mean()) < 0.01 * span


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("pole", [torch.log, torch.sqrt, torch.rsqrt])
def test_zero_and_below_have_finite_results_and_gradients(
    pole: Callable[[Tensor], Tensor], bits: int
) -> None:
    net, x = Calling(lambda x: pole(torch.tanh(x))), torch.rand(40, 30) + 0.05
    below = torch.linspace(-1, 1, 201)[:, None].requires_grad_()
    replays(net, x, inputs=[below.detach()], spec=SPECS[bits])
    calibrate(net, [x], spec=SPECS[bits])
    with emulate(net, SPECS[bits]):
        result = net(below)
        result.sum().backward()
    assert below.grad is not None
    assert result.isfinite().all()
    assert below.grad.isfinite().all()
    assert not below.grad[:90].any()


@pytest.mark.parametrize("bits", SPECS)
def test_an_exponential_of_a_range_far_beyond_its_own(bits: int) -> None:
    net = Calling(lambda x: torch.exp(torch.minimum(x * 1.0, -x)))
    x = torch.linspace(-200, 200, 4000).reshape(40, 100)
    assert replays(net, x, spec=SPECS[bits])["EXP"] == 4000
    shared = Calling(lambda x: torch.exp((x * 1.0)[:1]))
    x[0] = torch.linspace(-3, 2, 100)
    assert replays(shared, x, spec=SPECS[bits])["EXP"] == 100
    calibrate(shared, [x], spec=SPECS[bits])
    with emulate(shared, SPECS[bits]), torch.no_grad():
        result = shared(x)
    assert float((result - x[:1].exp()).abs().max()) < {8: 8.0, 16: 0.1}[bits]
