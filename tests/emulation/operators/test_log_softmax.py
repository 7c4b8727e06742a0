"""Emulated log-softmax: LiteRT's integers, and the gradient of the float function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ai_edge_litert import schema_py_generated as schema
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
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
    assert replays(Function(FORMS[form]), x, spec="litert-int8")["LOG_SOFTMAX"] == 30_000


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


@pytest.mark.exactness
@pytest.mark.parametrize("span", [0.02, 0.3, 3.0, 40.0])
@pytest.mark.parametrize("form", FORMS)
def test_equals_litert_in_sixteen_bits(form: str, span: float) -> None:
    torch.manual_seed(0)
    x = span * torch.randn(20, 30, 50)
    x[:, :3] = x.amin()
    x[:, 3:6] = x.amax() * torch.randn(20, 3, 50).sign()
    compared = replays(Function(FORMS[form]), x, inputs=[1.5 * x], spec="litert-int16x8")
    kernels = {"QUANTIZE", "REDUCE_MAX", "SUB", "EXP", "MEAN", "MUL", "MAXIMUM", "LOG", "ADD"}
    assert set(compared) == kernels
    assert compared["EXP"] == 30_000
    assert compared["SUB"] == 60_000


@pytest.mark.exactness
@pytest.mark.parametrize(
    ("spec", "count"),
    [
        *(("litert-int8", count) for count in (4096, 5001)),
        *(("litert-int16x8", count) for count in (1, 2, 16, 17, 256, 257, 5001, 65_536)),
    ],
)
def test_any_number_of_classes_in_sixteen_bits(spec: str, count: int) -> None:
    torch.manual_seed(count)
    x = 6 * torch.randn(max(3, 12_000 // count), count)
    x[0], x[1] = 7.0, -7.0  # The largest sums.
    x[2, 0] = 25.0  # One that is certain.
    compared = replays(nn.LogSoftmax(-1), x, spec=spec)
    assert compared["SUB"] >= 2 * 12_000 - 2 * count


#: Classes and spread of the scores; decibels, and the largest error in steps of the output.
ACCURACY = [
    (29, 1.0, 82, 3.4),
    (29, 12.0, 87, 1.7),
    (1000, 1.0, 86, 2.5),
    (1000, 4.0, 84, 2.5),
    (4000, 1.0, 87, 1.9),
    (4000, 4.0, 81, 2.7),
]


@pytest.mark.parametrize(("count", "span", "least", "most"), ACCURACY)
def test_sixteen_bits_are_nearly_float(count: int, span: float, least: float, most: float) -> None:
    torch.manual_seed(0)
    net, x = nn.LogSoftmax(-1), span * torch.randn(40_000 // count, count)
    calibrate(net, [x], spec="litert-int16x8")
    with emulate(net, "litert-int16x8") as chip, torch.no_grad():
        result = net(x)
        qparams = chip.state.qparams_of(result)
    expected = net(x.double())
    error = result - expected
    assert qparams is not None
    assert 10 * torch.log10(expected.square().sum() / error.square().sum()) > least
    assert error.abs().max() < most * qparams.scale


def test_a_long_axis_of_eight_bits_has_the_steps_of_a_short_one() -> None:
    torch.manual_seed(0)
    net = nn.LogSoftmax(-1)
    x = torch.randint(-127, 129, (8, 5000)) / 16
    x[0, :2] = torch.tensor([-127, 128]) / 16
    calibrate(net, [x], spec="litert-int8")
    leaf, again = (x.clone().requires_grad_() for _ in range(2))
    with emulate(net) as chip:
        result = net(leaf)
        qparams = chip.state.qparams_of(result)
        result.square().sum().backward()
    assert qparams is not None
    assert (qparams.scale, qparams.zero_point) == (1 / 16, 127)
    expected = net(again)
    assert (result - expected.clamp_min(-255 / 16)).abs().max() < 0.51 / 16
    (expected * (2 * result.detach())).sum().backward()
    assert torch.allclose(leaf.grad, again.grad, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_a_sum_of_more_than_the_register_holds_runs_in_float(spec: str) -> None:
    (row,) = coverage(nn.LogSoftmax(-1), torch.randn(1, 65_537), spec=spec).fallbacks
    assert row.remedy.startswith("kernels add up at most 65,536 entries")


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


def test_the_gradient_of_sixteen_bits_is_the_float_one() -> None:
    torch.manual_seed(0)
    module, x, direction = nn.LogSoftmax(-1), 3 * torch.randn(50, 40), torch.randn(50, 40)
    leaf, again = (x.clone().requires_grad_() for _ in range(2))
    calibrate(module, [x], spec="litert-int16x8")
    with emulate(module, "litert-int16x8"):
        (module(leaf) * direction).sum().backward()
    (module(again) * direction).sum().backward()
    # The input is rounded to 16 bits.
    assert torch.allclose(leaf.grad, again.grad, rtol=0, atol=1e-3)


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
