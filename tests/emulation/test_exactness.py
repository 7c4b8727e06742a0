"""Every operator of the chip against LiteRT's reference kernels, tolerance zero.

A module is calibrated on wide inputs, then fed inputs on the whole integer grid (extremes among
them); its output integers are compared with those of a one-operator LiteRT program that has the
emulator's integer weights, scales and zero points.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.emulation.ranges import SIGMOID_OUTPUT, TANH_OUTPUT, QParams
from tests import litert
from tests.emulation.oracle import (
    check,
    fully_connected_program,
    grid,
    integers,
    random_integers,
    real,
    spec,
)
from tests.litert import TensorSpec

pytestmark = pytest.mark.exactness


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(7, 9, True), (320, 64, False)])
def test_fully_connected(inputs: int, outputs: int, bias: bool, per_channel: bool) -> None:
    torch.manual_seed(inputs)
    layer = nn.Linear(inputs, outputs, bias=bias)
    granularity = "per_channel" if per_channel else "per_tensor"
    settings = {"preset": "litert-int8", "weight_granularity": granularity}
    with emulate(layer, settings) as chip:
        with chip.observing():
            layer(torch.randn(64, inputs) - 0.5)
        x, y = grid(chip, "./fully_connected#0/input"), grid(chip, "./fully_connected#0/output")
        q_x = random_integers((2000, inputs), 1)
        emulated = integers(layer(real(q_x, x)), y)
        program = fully_connected_program(chip, layer, q_x.shape, x, y)
    check(program, [q_x], emulated)


def test_fully_connected_accumulates_exactly_at_the_worst_case() -> None:
    """4096 products of 255 and 127: the accumulator passes 2^24, where float32 loses integers."""
    layer = nn.Linear(4096, 4, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[1, ::2] = -1.0
        layer.weight[2, 1:] = 0.5001
    x = QParams(1.0, -128)
    with emulate(layer, "litert-int8") as chip:
        chip.ranges.observe("./fully_connected#0/input", torch.tensor([0.0, 255.0]))
        chip.ranges.observe("./fully_connected#0/output", torch.tensor([-4.2e5, 1.1e6]))
        chip.freeze()
        q_x = random_integers((300, 4096), 3)
        q_x[0], q_x[1] = 127, -128
        y = grid(chip, "./fully_connected#0/output")
        emulated = integers(layer(real(q_x, x)), y)
        program = fully_connected_program(chip, layer, q_x.shape, x, y)
    check(program, [q_x], emulated)


class Binary(nn.Module):
    """One elementwise operator of two operands."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)


BINARY = {
    "add": ("ADD", lambda a, b: a + b),
    "sub": ("SUB", lambda a, b: a - b),
    "mul": ("MUL", lambda a, b: a * b),
}


@pytest.mark.parametrize("shapes", [((120, 100), (120, 100)), ((40, 1, 30), (1, 20, 30))])
@pytest.mark.parametrize("ratio", [1.0, 0.037, 11.3])
@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str, ratio: float, shapes: tuple[tuple[int, ...], ...]) -> None:
    kernel, function = BINARY[name]
    module = Binary(function)
    torch.manual_seed(0)
    with emulate(module, "litert-int8") as chip:
        with chip.observing():
            module(torch.randn(shapes[0]) + 0.3, ratio * torch.randn(shapes[1]))
        a, b = grid(chip, f"./{name}#0/input"), grid(chip, f"./{name}#0/other")
        y = grid(chip, f"./{name}#0/output")
        q_a, q_b = random_integers(shapes[0], 1), random_integers(shapes[1], 2)
        emulated = integers(module(real(q_a, a), real(q_b, b)), y)
    program = litert.binary_model(
        kernel, spec(shapes[0], a), spec(shapes[1], b), spec(emulated.shape, y)
    )
    check(program, [q_a, q_b], emulated)


@pytest.mark.parametrize(("name", "output"), [("sigmoid", SIGMOID_OUTPUT), ("tanh", TANH_OUTPUT)])
@pytest.mark.parametrize("span", [0.3, 3.0, 40.0])
def test_table(name: str, output: QParams, span: float) -> None:
    module = {"sigmoid": nn.Sigmoid(), "tanh": nn.Tanh()}[name]
    with emulate(module, "litert-int8") as chip:
        with chip.observing():
            module(torch.linspace(-span, 0.8 * span, 100))
        x = grid(chip, f"./{name}#0/input")
        q_x = np.arange(-128, 128, dtype=np.int8)
        emulated = integers(module(real(q_x, x)), output)
    kernel = {"sigmoid": "LOGISTIC", "tanh": "TANH"}[name]
    check(litert.unary_model(kernel, spec((256,), x), spec((256,), output)), [q_x], emulated)


def test_relu() -> None:
    module = nn.ReLU()
    with emulate(module, "litert-int8") as chip:
        with chip.observing():
            module(torch.linspace(-2, 3, 100))
        x = grid(chip, "./relu#0/input")
        q_x = np.arange(-128, 128, dtype=np.int8)
        emulated = integers(module(real(q_x, x)), x)
    check(litert.unary_model("RELU", spec((256,), x), spec((256,), x)), [q_x], emulated)


def test_quantize_from_float() -> None:
    """Values on, beside and beyond the grid; the first operator's operand is what LiteRT gives."""
    module = Binary(lambda a, _: torch.relu(a))
    x = torch.cat([torch.linspace(-5, 5, 20_000), torch.tensor([1e4, -1e4, 0.0])])
    with emulate(module, "litert-int8") as chip:
        with chip.observing():
            module(torch.linspace(-4, 4.1, 50), None)
        q = grid(chip, "./relu#0/input")
        emulated = integers(module(x, None), q)
    (expected,) = litert.run_model(
        litert.unary_model("QUANTIZE", TensorSpec((len(x),), "float32"), spec((len(x),), q)),
        [x.numpy()],
    )
    np.testing.assert_array_equal(emulated, np.maximum(expected, q.zero_point))


def test_concatenation_requantizes_each_part() -> None:
    module = Binary(lambda a, b: torch.cat([torch.relu(a), torch.tanh(b)], -1))
    torch.manual_seed(1)
    with emulate(module, "litert-int8") as chip:
        with chip.observing():
            module(2 * torch.randn(100, 60), 0.4 * torch.randn(100, 70) + 0.2)
        a, b = grid(chip, "./relu#0/input"), grid(chip, "./tanh#0/input")
        y = grid(chip, "./concatenation#0/output")
        q_a, q_b = random_integers((100, 60), 1), random_integers((100, 70), 2)
        emulated = integers(module(real(q_a, a), real(q_b, b)), y)
    (tanh,) = litert.run_model(
        litert.unary_model("TANH", spec(q_b.shape, b), spec(q_b.shape, TANH_OUTPUT)), [q_b]
    )
    parts = [(np.maximum(q_a, a.zero_point).astype(np.int8), a), (tanh, TANH_OUTPUT)]
    moved = [
        litert.run_model(litert.unary_model("QUANTIZE", spec(q.shape, old), spec(q.shape, y)), [q])[
            0
        ]
        for q, old in parts
    ]
    np.testing.assert_array_equal(emulated, np.concatenate(moved, -1))


def test_embedding() -> None:
    table = nn.Embedding(30, 16)
    index = torch.arange(30)
    with emulate(table, "litert-int8") as chip:
        with chip.observing():
            table(index)
        emulated = table(index)
        weight = chip.state.weight(table.weight, 30)
    stored = TensorSpec.constant(weight.integers.numpy().astype(np.int8), float(weight.scales[0]))
    y = TensorSpec((30, 16), "int8", float(weight.scales[0]))
    program = litert.gather_model(stored, TensorSpec((30,), "int32"), y)
    q = QParams(float(weight.scales[0]), 0, -127, 127)
    check(program, [index.numpy().astype(np.int32)], integers(emulated, q))
