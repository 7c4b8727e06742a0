"""Quotients, powers and what consists of them pass the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.testing.operator_oracle import CHECKS, SPECS, Check, Example, check_operator
from lightning_nna.testing.replay import replays
from tests.emulation.operators.examples import Calling, function

pytestmark = pytest.mark.exactness
ROWS = (120, 100)


def away_from_0(x: Tensor) -> Tensor:
    return torch.sigmoid(x) + 0.1


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_reciprocal(check: Check) -> None:
    example = Example(function(lambda x: torch.reciprocal(away_from_0(x))), (ROWS,))
    check_operator("reciprocal", [example], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_addcmul(check: Check) -> None:
    example = Example(function(lambda a, b: torch.addcmul(a, a, b, value=-0.5)), (ROWS, ROWS))
    check_operator("addcmul", [example], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_lerp(check: Check) -> None:
    example = Example(function(lambda a, b: torch.lerp(a, b, 0.3)), (ROWS, ROWS))
    check_operator("lerp", [example], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_square(check: Check) -> None:
    check_operator(
        "square", [Example(function(torch.square), (ROWS,))], checks=[check], runtime="litert"
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_pow(check: Check) -> None:
    example = Example(function(lambda x: (x * 0.7) ** 3), (ROWS,))
    check_operator("pow", [example], checks=[check], runtime="litert")


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quotient": lambda x: torch.tanh(x) / away_from_0(2 * x),
    "quotient by negative numbers": lambda x: x / (torch.tanh(x) - 1.2),
    "one over": lambda x: 1 / away_from_0(x),
    "quotient by a mean": lambda x: x / away_from_0(x).mean(1, keepdim=True),
    "a number over": lambda x: 3 / away_from_0(x),
    "a constant over": lambda x: torch.linspace(1, 2, 30) / away_from_0(x),
    "by a constant": lambda x: x / torch.linspace(1, 2, 30),
    "reciprocal": lambda x: away_from_0(x).reciprocal(),
    "div": lambda x: torch.div(x, away_from_0(x)),
    "addcdiv": lambda x: torch.addcdiv(x, x, away_from_0(x), value=0.5),
    "lerp of a tensor": lambda x: x.lerp(2 * x, torch.sigmoid(x)),
    "rsub": lambda x: torch.rsub(x, torch.tanh(x), alpha=0.5),
    "second power": lambda x: x**2,
    "fourth power": lambda x: x.pow(4),
    "fifth power": lambda x: torch.tanh(x) ** 5,
    "root": lambda x: away_from_0(x) ** 0.5,
    "inverse root": lambda x: away_from_0(x).pow(-0.5),
    "inverse": lambda x: away_from_0(x) ** -1,
    "inverse square": lambda x: away_from_0(x) ** -2,
    "three halves": lambda x: away_from_0(x) ** 1.5,
    "five halves": lambda x: away_from_0(x) ** 2.5,
    "power of two": lambda x: 2**x,
    "power of a half": lambda x: torch.pow(0.5, x),
    "norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
}


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_is_near_float_and_exported(name: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Calling(FUNCTIONS[name]), torch.randn(40, 30)
    assert not coverage(net, x, spec=SPECS[bits]).fallbacks
    replays(net, x, inputs=[1.2 * x], spec=SPECS[bits])
    calibrate(net, [x], spec=SPECS[bits])
    leaf, again = (x.clone().requires_grad_() for _ in range(2))
    with emulate(net, SPECS[bits]):
        result = net(leaf)
        result.sum().backward()
    expected = net(again)
    expected.sum().backward()
    result, expected = result.detach(), expected.detach()
    assert leaf.grad is not None
    assert again.grad is not None
    noise = (result - expected).square().mean() / expected.square().mean()
    assert float(noise) < 2e-3
    cosine = torch.nn.functional.cosine_similarity(leaf.grad.flatten(), again.grad.flatten(), 0)
    assert float(cosine) > 0.95
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0


@pytest.mark.parametrize("bits", SPECS)
def test_results_are_written_where_out_says(bits: int) -> None:
    def run(x: Tensor) -> Tensor:
        result = torch.empty(0)
        torch.pow(x, 3.0, out=result)
        torch.div(x, away_from_0(result), out=result)
        return torch.clamp(result, -0.5, 0.5, out=torch.empty(0))

    net, x = Calling(run), torch.randn(40, 30)
    assert not coverage(net, x, spec=SPECS[bits]).fallbacks
    calibrate(net, [x], spec=SPECS[bits])
    with emulate(net, SPECS[bits]), torch.no_grad():
        result = net(x)
    expected = (x / away_from_0(x**3)).clamp(-0.5, 0.5)
    assert float((result - expected).square().mean()) < 1e-2


@pytest.mark.parametrize("bits", SPECS)
def test_divisors_of_0_give_the_end_of_the_range(bits: int) -> None:
    net, x = Calling(lambda x: 1 / torch.tanh(x)), torch.rand(40, 30) + 0.05
    zeros = torch.linspace(-1e-4, 1e-4, 21)[:, None].requires_grad_()
    replays(net, x, inputs=[zeros.detach()], spec=SPECS[bits])
    calibrate(net, [x], spec=SPECS[bits])
    with emulate(net, SPECS[bits]):
        result = net(zeros)
        result.sum().backward()
    assert zeros.grad is not None
    assert result.isfinite().all()
    assert zeros.grad.isfinite().all()
    assert float(result.detach().min()) > 15


@pytest.mark.parametrize(
    "run",
    [
        lambda x: torch.div(x, away_from_0(x), rounding_mode="floor"),
        lambda x: x // 0.3,
        lambda x: x % 0.3,
        lambda x: torch.fmod(x, away_from_0(x)),
        lambda x: away_from_0(x) ** 0.3,
        lambda x: away_from_0(x) ** torch.tanh(x),
    ],
)
def test_what_is_rounded_or_no_such_power_runs_in_float(run: Callable[[Tensor], Tensor]) -> None:
    assert coverage(Calling(run), torch.randn(4, 5)).fallbacks
