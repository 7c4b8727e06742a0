"""Emulated softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.testing.replay import replays


class Scores(nn.Module):
    """A softmax of scores along an axis."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, self.axis)


@pytest.mark.exactness
@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
@pytest.mark.parametrize("axis", [-1, 1, 0])
@pytest.mark.parametrize("span", [0.3, 3.0, 40.0])
def test_equals_litert(span: float, axis: int, spec: str) -> None:
    torch.manual_seed(0)
    x = span * torch.randn(20, 30, 50)
    x[:, :3] = x.amin()  # Rows of equal scores, and rows of extremes.
    x[:, 3:6] = x.amax() * torch.randn(20, 3, 50).sign()
    assert replays(Scores(axis), x, spec=spec)["SOFTMAX"] == 30_000


def test_fast_differs_by_one_step_at_most() -> None:
    torch.manual_seed(0)
    module, x = Scores(-1), 2 * torch.randn(50, 30, 40)
    with emulate(module) as chip:
        with chip.observing():
            module(x)
        exact = module(x)
        with chip.running(fidelity="fast"):
            fast = module(x)
    difference = ((fast - exact) * 256).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


def test_the_gradient_is_that_of_the_float_softmax() -> None:
    torch.manual_seed(0)
    module, x = Scores(-1), torch.randn(50, 8)
    direction = torch.randn(50, 8)
    grads = []
    with emulate(module) as chip:
        with chip.observing():
            module(2 * x)
        for phase in ("emulate", "float"):
            with chip.running(phase):
                leaf = x.clone().requires_grad_()
                (module(leaf) * direction).sum().backward()
                grads.append(leaf.grad)
    assert (grads[0] - grads[1]).norm() < 0.03 * grads[1].norm()
