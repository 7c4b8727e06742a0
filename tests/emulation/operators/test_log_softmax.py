"""Emulated log-softmax: LiteRT's integers, and the gradient of the float function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ai_edge_litert import schema_py_generated as schema
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.emulation.arithmetic.integer_log_softmax import log_softmax_int8
from lightning_nna.emulation.coverage import coverage
from lightning_nna.testing.replay import replays
from tests import litert
from tests.emulation.modules import Function
from tests.litert import OperatorSpec, TensorSpec

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "functional": lambda x: F.log_softmax(x, dim=-1),
    "torch": lambda x: torch.log_softmax(x, 1),
    "method": lambda x: x.log_softmax(0),
    "module": nn.LogSoftmax(-1),
}


@pytest.mark.exactness
@pytest.mark.parametrize("span", [0.02, 0.3, 3.0, 40.0])
@pytest.mark.parametrize("form", FORMS)
def test_equals_litert(form: str, span: float) -> None:
    torch.manual_seed(0)
    x = span * torch.randn(20, 30, 50)
    x[:, :3] = x.amin()  # Rows of equal scores, and rows of extremes.
    x[:, 3:6] = x.amax() * torch.randn(20, 3, 50).sign()
    assert replays(Function(FORMS[form]), x)["LOG_SOFTMAX"] == 30_000


@pytest.mark.exactness
@pytest.mark.parametrize("count", [1, 2, 29, 500, 4095])
@pytest.mark.parametrize("seed", range(8))
def test_any_scale_and_any_number_of_classes(seed: int, count: int) -> None:
    """Rows of random scores, of extremes, of equal ones (the largest sum), and of low ones."""
    rng = np.random.default_rng(seed)
    scale = float(np.float32(2 ** rng.uniform(-12, 3)))
    x = rng.integers(-128, 128, (max(6, 2000 // count), count))
    x[:2] = rng.choice([-128, 127], (2, count))
    x[2], x[3] = 5, rng.integers(-128, -100, count)
    given = TensorSpec(x.shape, "int8", scale, -17)
    result = TensorSpec(x.shape, "int8", 1 / 16, 127)
    operator = OperatorSpec("LOG_SOFTMAX", ("x",), ("y",), schema.LogSoftmaxOptionsT())
    program = litert.build_model({"x": given, "y": result}, [operator], ["x"], ["y"])
    (expected,) = litert.run_model(program, [x.astype(np.int8)])
    found = log_softmax_int8(torch.from_numpy(x), scale).numpy() + 127
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("count", "bits"), [(4096, 8), (50, 16)])
def test_what_the_chip_does_not_have_runs_in_float(count: int, bits: int) -> None:
    spec = {8: "litert-int8", 16: "litert-int16x8"}[bits]
    rows = coverage(nn.LogSoftmax(-1), torch.randn(4, count), spec=spec).rows
    assert [row.on_chip for row in rows] == [False]


def test_fast_differs_by_one_step_at_most() -> None:
    torch.manual_seed(0)
    module, x = nn.LogSoftmax(-1), 2 * torch.randn(50, 30, 40)
    with emulate(module) as chip:
        with chip.observing():
            module(x)
        exact = module(x)
        with chip.running(fidelity="fast"):
            fast = module(x)
    difference = ((fast - exact) * 16).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


def test_the_gradient_is_the_float_one_at_the_quantized_input() -> None:
    torch.manual_seed(0)
    module = nn.LogSoftmax(-1)
    x = torch.randint(-127, 129, (50, 8)) / 4  # On the grid; some outputs are at its low end.
    x[0, :2] = torch.tensor([-127, 128]) / 4
    direction = torch.randn(50, 8)
    leaf, again = (x.clone().requires_grad_() for _ in range(2))
    with emulate(module) as chip:
        with chip.observing():
            module(x)
        on_chip = module(leaf)
        (on_chip * direction).sum().backward()
    (module(again) * direction).sum().backward()
    assert on_chip.min() == -255 / 16
    assert torch.allclose(leaf.grad, again.grad, rtol=0, atol=1e-6)
