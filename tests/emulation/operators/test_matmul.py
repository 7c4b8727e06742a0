"""Matrix products: every integer is LiteRT's, and the gradient is the float product's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.testing.replay import replays
from tests.emulation import oracle

Product = Callable[..., Tensor]

# The product, and the shapes of its operands.
CASES: dict[str, tuple[Product, tuple[int, ...], tuple[int, ...]]] = {
    "matrices": (torch.mm, (110, 30), (30, 100)),
    "bmm": (torch.bmm, (4, 60, 24), (4, 24, 50)),
    "heads": (lambda a, b: a @ b.transpose(-2, -1), (2, 4, 40, 16), (2, 4, 40, 16)),
    "broadcast": (torch.matmul, (3, 1, 40, 9), (4, 9, 30)),
    "one matrix": (torch.matmul, (5, 40, 20), (20, 60)),
    "a vector": (torch.matmul, (12_000, 7), (7,)),
    "a row": (torch.matmul, (7,), (7, 12_000)),
    "long": (torch.matmul, (100, 700), (700, 110)),
}


class Weighing(nn.Module):
    """Products with parameters in every position."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(40, 24))
        self.vector = nn.Parameter(torch.randn(24))
        self.heads = nn.Parameter(torch.randn(3, 24, 20))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scores = x @ self.table.T
        wide = self.table @ x.mT
        return scores @ self.table, x @ self.vector, x.unsqueeze(1) @ self.heads, wide


@pytest.mark.exactness
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", CASES)
def test_every_output_is_the_references(name: str, bits: int) -> None:
    product, *shapes = CASES[name]
    torch.manual_seed(0)
    operands = [torch.randn(shape) + 0.5 for shape in shapes]
    loud = [3 * x for x in operands]
    spec = {8: "litert-int8", 16: "litert-int16x8"}[bits]
    compared = replays(Calling(product), *operands, inputs=loud, spec=spec)
    assert set(compared) == {"BATCH_MATMUL", "QUANTIZE"}
    assert compared["BATCH_MATMUL"] >= 8_000


@pytest.mark.exactness
@pytest.mark.parametrize("bits", [8, 16])
def test_parameters(bits: int) -> None:
    torch.manual_seed(1)
    spec = {8: "litert-int8", 16: "litert-int16x8"}[bits]
    compared = replays(Weighing(), torch.randn(6, 50, 24), spec=spec)
    assert compared["FULLY_CONNECTED"] == 6 * 50 * (40 + 24 + 1)
    assert compared["BATCH_MATMUL"] == 6 * 50 * (3 * 20 + 40)


def test_a_transposed_parameter_is_a_linear_layer() -> None:
    torch.manual_seed(2)
    layer, x = nn.Linear(20, 30, bias=False), torch.randn(40, 20)
    linear, product = (emulated(call, layer, x) for call in (layer, lambda x: x @ layer.weight.T))
    assert torch.equal(linear, product)


def emulated(call: Product, layer: nn.Module, x: Tensor) -> Tensor:
    module = Calling(call)
    module.layer = layer
    with torch.no_grad(), emulate(module) as chip:
        with chip.observing():
            module(x)
        return module(x)


# float32 sums of 24 bits leave 16-bit results few bits to be right in.
@pytest.mark.parametrize(("bits", "share"), [(8, 1e-3), (16, 5e-3)])
def test_fast_differs_in_few_outputs(bits: int, share: float) -> None:
    torch.manual_seed(3)
    module, a, b = Calling(torch.bmm), torch.randn(6, 60, 32), torch.randn(6, 32, 60)
    spec = {8: "litert-int8", 16: "litert-int16x8"}[bits]
    with torch.no_grad(), emulate(module, spec) as chip:
        with chip.observing():
            module(a, b)
        exact = module(a, b)
        with chip.running(fidelity="fast"):
            assert float((exact != module(a, b)).float().mean()) < share


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
@pytest.mark.parametrize(
    "shapes", [((2, 3, 5, 6), (2, 3, 6, 4)), ((3, 5, 6), (6, 4)), ((6,), (6,))]
)
def test_the_gradient_is_the_float_products(shapes: Any, fidelity: Any) -> None:
    torch.manual_seed(4)
    module = Calling(torch.matmul)
    operands = [torch.randn(shape) for shape in shapes]
    with emulate(module, fidelity=fidelity) as chip:
        with chip.observing():
            module(*(2 * x for x in operands))  # Wide ranges: nothing is clipped.
        keys = [f"./batch_matmul#0/{name}" for name in ("input", "other")]
        steps = [oracle.grid(chip, key).scale for key in keys]
        pairs = list(zip(operands, steps, strict=True))
        found = [(x / step).round().mul(step).requires_grad_() for x, step in pairs]
        y = module(*found)
        slopes = torch.randn_like(y)
        y.backward(slopes)
    expected = [x.detach().clone().requires_grad_() for x in found]
    torch.matmul(*expected).backward(slopes)
    for mine, reference in zip(found, expected, strict=True):
        assert torch.allclose(mine.grad, reference.grad, rtol=0, atol=1e-5)


def test_no_gradient_where_the_output_is_clipped() -> None:
    module = Calling(torch.matmul)
    a, b = torch.tensor([[1.0], [0.25]], requires_grad=True), torch.tensor([[1.0, -1.0]])
    with emulate(module) as chip:
        with chip.observing():
            module(a.detach() / 2, b)
        chip.ranges["./batch_matmul#0/input"].update(a, -2.0, 2.0)
        module(a, b).square().sum().backward()
    assert (a.grad != 0).flatten().tolist() == [False, True]


class Calling(nn.Module):
    """A module of one function."""

    def __init__(self, function: Product) -> None:
        super().__init__()
        self.function = function

    def forward(self, *operands: Tensor) -> Tensor:
        return self.function(*operands)
