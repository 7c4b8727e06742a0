"""Emulated softmax."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import coverage, emulate
from lightning_nna.testing.replay import replays
from tests.emulation.modules import Function


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


TYPES: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "softmax": lambda x, dtype: F.softmax(x, -1, dtype=dtype),
    "softmax by position": lambda x, dtype: torch.softmax(x, -1, dtype),
    "log softmax": lambda x, dtype: F.log_softmax(x, -1, dtype=dtype),
    "log softmax by position": lambda x, dtype: x.log_softmax(-1, dtype),
    "cumulative sum": lambda x, dtype: x.cumsum(-1, dtype=dtype),
    "sum": lambda x, dtype: x.sum(-1, dtype=dtype),
    "mean": lambda x, dtype: x.mean(-1, dtype=dtype),
    "norm": lambda x, dtype: torch.linalg.vector_norm(x, dim=-1, dtype=dtype),
}


@pytest.mark.parametrize("name", TYPES)
def test_results_of_another_type_are_refused(name: str) -> None:
    """A result of float64 would be float32, in silence."""
    x = torch.randn(3, 4)
    for dtype in (torch.float64, torch.float32):
        table = coverage(Function(lambda x, dtype=dtype: TYPES[name](2 * x, dtype)), x)
        remedies = [row.remedy for row in table.fallbacks]
        expected = {torch.float32: [], torch.float64: [f"leave dtype={dtype} out"]}[dtype]
        assert [remedy.partition(": ")[2] for remedy in remedies] == expected
    with emulate(module := Function(lambda x: TYPES[name](2 * x, torch.float64))) as chip:
        with chip.observing():
            module(x)
        assert module(x).dtype == torch.float64
