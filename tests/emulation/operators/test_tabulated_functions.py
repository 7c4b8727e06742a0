"""Tabulated functions pass the oracle, and are within a step of float."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.emulation.operators.catalog import operators
from lightning_nna.emulation.ranges import affine_qparams
from lightning_nna.testing.operator_oracle import CHECKS, SPECS, Check, Example, check_operator
from lightning_nna.testing.replay import replays
from tests.emulation.operators.examples import Calling, function

pytestmark = pytest.mark.exactness
ROWS = (120, 100)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "mish": F.mish,
    "celu": lambda x: F.celu(x, 0.7),
    "selu": F.selu,
    "log_sigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "erf": torch.erf,
    "erfc": torch.special.erfc,
    "tanhshrink": F.tanhshrink,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "sign": torch.sign,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "round": torch.round,
    "sin": torch.sin,
    "cos": torch.cos,
}
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus of another slope": lambda x: F.softplus(x, beta=3),
    "softplus with a low threshold": lambda x: F.softplus(x, 1.0, 0.5),
    "celu of 2": lambda x: torch.celu(x, alpha=2.0),
    "hardshrink of less": lambda x: torch.hardshrink(x, 0.1),
    "softshrink of more": lambda x: F.softshrink(x, 0.8),
    "round to no decimals": lambda x: torch.round(x, decimals=0),
    "elu": lambda x: F.elu(x, 0.5),
    "elu by position": lambda x: F.elu(x, 1.7),
}


def test_none_is_missing() -> None:
    looked_up = {name for name, each in operators().items() if "GATHER" in each.arithmetic}
    assert looked_up == {*FUNCTIONS, "elu", "reciprocal"}


def test_every_operator_has_both_widths() -> None:
    assert {name for name, each in operators().items() if each.widths != (8, 16)} == set()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_oracle(name: str, check: Check) -> None:
    check_operator(
        name, [Example(function(FUNCTIONS[name]), (ROWS,))], checks=[check], runtime="litert"
    )


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", [*FUNCTIONS, *FORMS])
def test_it_is_the_nearest_integer_of_the_function_of_the_integers(name: str, bits: int) -> None:
    run = {**FUNCTIONS, **FORMS}[name]
    net, x = Calling(run), torch.linspace(-4, 4, 1001)
    calibrate(net, [x], spec=SPECS[bits])
    leaf = x.clone().requires_grad_()
    with emulate(net, SPECS[bits]) as chip:
        result = net(leaf)
        qparams = chip.state.qparams_of(result)
        result.sum().backward()
    (observed,) = (each for key, each in chip.ranges.ranges.items() if key.endswith("/input"))
    step = affine_qparams(observed.minimum, observed.maximum, bits=bits).scale
    inputs = (x / step).round() * step
    assert qparams is not None
    expected = run(inputs.clamp(-4, 4))
    near = (result.detach() - expected).abs() < 1.01 * qparams.scale
    assert float(near.float().mean()) > 0.97
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_decimals_run_in_float() -> None:
    x = torch.randn(4, 5)
    assert coverage(Calling(lambda x: torch.round(x, decimals=1)), x).fallbacks


@pytest.mark.parametrize("name", [*FUNCTIONS, *FORMS])
def test_all_65536_entries_are_litert_s(name: str) -> None:
    run = {**FUNCTIONS, **FORMS}[name]
    x = torch.linspace(-7.0, 7.0, 2**16).view(256, 256)
    assert replays(Calling(run), x, spec="litert-int16x8")["GATHER"] == 2**16


def test_entries_for_integers_of_8_bits_that_were_widened() -> None:
    """float32 holds no product of a wide integer and such a scale."""
    net = nn.Sequential(nn.LSTM(6, 20), Calling(lambda pair: F.mish(pair[0])))
    assert replays(net, torch.randn(30, 20, 6), spec="litert-int16x8")["GATHER"] == 12_000


def test_an_embedding_whose_integers_begin_at_minus_127() -> None:
    rows = torch.arange(11).repeat(3, 1)
    net = nn.Sequential(nn.Embedding(11, 8), nn.Softshrink(0.3))
    assert replays(net, rows, spec="litert-int8")["GATHER"] == 2 * 3 * 11 * 8
