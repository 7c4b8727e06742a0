"""Sums at indices are products with one-hot vectors, in every bit LiteRT's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.testing.operator_oracle import CHECKS, Check, Example, check_operator
from lightning_nna.testing.replay import replays
from tests.emulation.modules import Function

pytestmark = pytest.mark.exactness
SPECS = {8: "litert-int8", 16: "litert-int16x8"}
ROWS = torch.tensor([4, 0, 4, 1, 2, 0, 4, 3])


def added(x: Tensor, y: Tensor) -> Tensor:
    return x.index_add(1, ROWS, y)


def scattered(x: Tensor, y: Tensor) -> Tensor:
    """At another place in every row."""
    index = (torch.arange(y.numel()).reshape(y.shape) * 7 // 5) % x.shape[-1]
    return torch.scatter_add(x, -1, index, y)


EXAMPLES = {
    "index_add": Example(lambda: Function(added), ((10, 5, 250), (10, 8, 250))),
    "scatter_add": Example(lambda: Function(scattered), ((300, 40), (300, 30))),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", EXAMPLES)
def test_oracle(name: str, check: Check) -> None:
    check_operator("scatter_add", [EXAMPLES[name]], checks=[check], runtime="litert")


def best(x: Tensor) -> Tensor:
    return x.topk(2, -1).indices


#: Of activations (4, 6, 5) and (4, 6, 3).
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "to zeros": lambda x, y: torch.zeros(4, 6, 7).index_add(2, torch.tensor([6, 0, 6]), y),
    "a factor": lambda x, y: x.index_add(2, torch.tensor([4, 0, 4]), y, alpha=-0.5),
    "in place": lambda x, y: (x * 1).index_add_(-1, torch.tensor([4, 0, 4]), y),
    "first axis": lambda x, y: x.index_add(0, torch.tensor([3, 3]), 0.5 * x[1:3]),
    "repeated": lambda x, y: x.scatter_add(1, torch.tensor([[[2], [5]]]).expand(4, 2, 5), x[:, :2]),
    "part of the values": lambda x, y: x.scatter_add(2, torch.tensor([1, 1]).expand(4, 6, 2), y),
    "names": lambda x, y: torch.scatter_add(
        x, dim=2, index=torch.tensor([1, 4, 1]).repeat(4, 6, 1), src=y
    ),
    "computed": lambda x, y: torch.zeros(4, 6, 5).scatter_add(-1, best(x), y[..., 1:]),
    "computed, an addend": lambda x, y: x.scatter_add_(-1, best(x), y[..., :2] / 2),
    "computed, repeated": lambda x, y: x.scatter_add(
        1, best(x[..., 0])[..., None].expand(4, 2, 5), x[:, :2]
    ),
    "computed, of one axis": lambda x, y: x.index_add(1, best(x[0, :, 0]), x[:, 2:4]),
}


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_exported(name: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Function(lambda x, y: FORMS[name](2 * x, y.sigmoid()))
    x, y = torch.randperm(120).reshape(4, 6, 5) / 60 - 1, torch.randn(4, 6, 3)
    calibrate(net, [[x, y]], forward=lambda net, batch: net(*batch), spec=SPECS[bits])
    assert not coverage(net, x, y, spec=SPECS[bits]).fallbacks
    assert replays(net, x, y, spec=SPECS[bits])["BATCH_MATMUL"] > 0
    model = export_tflite(net, [x, y], tmp_path / "net.tflite")
    for each in ([x, y], [x.flip(2), y], [x, 2 * y]):
        assert verify(net, model.path, each) == 1.0


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", sorted({*FORMS} - {"part of the values"}))
def test_values_and_gradients_are_near_those_of_float(name: str, bits: int) -> None:
    torch.manual_seed(0)
    net = Function(lambda x, y: FORMS[name](2 * x, y.sigmoid()))
    x = (torch.arange(120).reshape(4, 6, 5) * 37 % 120 / 60 - 1).requires_grad_()
    y = torch.linspace(-2, 2, 72).reshape(4, 6, 3).requires_grad_()
    results = [net(x, y)]
    calibrate(net, [[x, y]], forward=lambda net, batch: net(*batch), spec=SPECS[bits])
    with emulate(net, SPECS[bits]):
        results += [net(x, y)]
    gradients = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(
                    result.square().sum(), [x, y], materialize_grads=True, allow_unused=True
                )
            ]
        )
        for result in results
    ]
    assert torch.allclose(*results, atol=0.03 * float(results[0].detach().abs().max()))
    # The ends of the range are clipped: there the gradient is 0.
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.98


def test_what_has_no_product_is_told() -> None:
    x = torch.randn(4, 6)
    index = torch.zeros(2, 6, dtype=torch.long)
    (row,) = coverage(Function(lambda x: (2 * x).scatter_add(1, index, 2 * x)), x).fallbacks
    assert "index_add" in row.remedy
    reduced = Function(lambda x: (2 * x).scatter_reduce(0, index, 2 * x, "sum"))
    (row,) = coverage(reduced, x).fallbacks
    assert "scatter_add" in row.remedy
    computed = Function(lambda x: (2 * x).scatter(1, (2 * x).topk(2).indices, 1.0))
    (row,) = coverage(computed, x, spec="litert-int8").fallbacks
    assert "scatter_add" in row.remedy
