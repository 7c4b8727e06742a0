"""Cumulative sums are products with a triangle of ones, in every bit LiteRT's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_nna import calibrate, emulate
from lightning_nna.testing.operator_oracle import CHECKS, Check, Example, check_operator
from tests.emulation.modules import Function

pytestmark = pytest.mark.exactness

EXAMPLES = [
    Example(lambda: Function(lambda x: x.cumsum(-1)), ((400, 30),)),
    Example(lambda: Function(lambda x: torch.cumsum(2 * x, dim=1)), ((6, 30, 60),)),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", EXAMPLES)
def test_oracle(example: Example, check: Check) -> None:
    check_operator("cumsum", [example], checks=[check], runtime="litert")


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("dim", [0, -1])
def test_it_is_near_the_float_result(shape: tuple[int, ...], dim: int) -> None:
    def function(x: Tensor) -> Tensor:
        return torch.tanh((x * 2).cumsum(dim))

    net, x = Function(function), torch.randn(shape)
    calibrate(net, [x])
    with emulate(net), torch.no_grad():
        assert net(x).shape == x.shape
        assert float((net(x) - function(x)).abs().max()) < 0.1
