"""Programs keep the order of their convolutions: nothing is transposed between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_nna import calibrate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.deploy.element_order import Arrangement, Operand, in_order_of_operand
from lightning_nna.deploy.flatbuffer import TensorSpec
from lightning_nna.deploy.layout import codes_of
from lightning_nna.testing.tiny_networks import TINY_NETWORKS, visual_wake_words
from tests.deploy.networks import FunctionNetwork

pytestmark = pytest.mark.exactness

PRESETS = ("litert-int8", "litert-int16x8", "ethos-u")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", TINY_NETWORKS)
def test_a_tiny_network_transposes_its_input_alone(name: str, preset: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = visual_wake_words(32) if name == "visual_wake_words" else TINY_NETWORKS[name]()
    batch = torch.randn(4, *x.shape[1:])
    net.train()(batch)
    calibrate(net.eval(), [batch], spec=preset)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    colored = x.dim() == 4 and x.shape[1] > 1
    assert model.operators.get("TRANSPOSE", 0) == int(colored)
    assert model.operators.get("RESHAPE", 0) <= 2
    assert verify(net, model.path, [x]) == 1.0


#: Functions of an image between two convolutions, which change its channels to the number given.
BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "activations": (lambda x: torch.sigmoid(x) * nn.functional.silu(x), 6),
    "a number": (lambda x: 2 * x - 1, 6),
    "a mean": (lambda x: x - x.mean((2, 3), keepdim=True), 6),
    "a mean of channels": (lambda x: x * x.mean(1, keepdim=True), 6),
    "extremes": (lambda x: x + x.amax(2, keepdim=True) - x.amin((1, 3), keepdim=True), 6),
    "channels joined": (lambda x: torch.cat([torch.tanh(x), x], 1), 12),
    "rows joined": (lambda x: torch.cat([torch.tanh(x), x], 2), 6),
    "halves": (lambda x: torch.sigmoid(x[:, :3]) * x[:, 3:], 3),
    "a constant a channel": (lambda x: x * torch.arange(1.0, 7).view(6, 1, 1), 6),
    "a constant a row": (lambda x: x + torch.arange(5.0).view(5, 1), 6),
    "a constant an element": (lambda x: x + torch.arange(180.0).view(6, 5, 6) / 90, 6),
    "slopes": (lambda x: nn.functional.prelu(x, torch.arange(6.0) / 6), 6),
    "extrema of two": (lambda x: torch.maximum(x, x.flip(1)), 6),
    "a linear layer of channels": (
        lambda x: nn.functional.linear(x.permute(0, 2, 3, 1), torch.eye(6)).permute(0, 3, 1, 2),
        6,
    ),
    "a softmax of channels": (lambda x: torch.softmax(x, 1), 6),
    "flattened and back": (lambda x: torch.tanh(x.flatten(2)).unflatten(2, (5, 6)), 6),
}


@pytest.mark.parametrize("preset", PRESETS[:2])
@pytest.mark.parametrize("name", BETWEEN)
def test_nothing_is_transposed_between_convolutions(name: str, preset: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    function, channels = BETWEEN[name]
    convolutions = nn.Conv2d(1, 6, 3), nn.Conv2d(channels, 1, 2)
    net = FunctionNetwork(lambda x, first, second: second(function(first(x))), *convolutions)
    x = torch.randn(1, 1, 7, 8)
    calibrate(net, [torch.cat([x, -x])], spec=preset)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0
    assert "TRANSPOSE" not in model.operators
    assert "GATHER" not in model.operators


@pytest.mark.parametrize("preset", [*PRESETS, "tflm-int16x8"])
def test_tables_between_convolutions_are_read_in_their_order(preset: str, tmp_path: Path) -> None:
    """TFLite-Micro transposes no integers of 32 bits, as the indices into a table are."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Mish(), nn.GELU(), nn.Conv2d(6, 1, 2))
    x = torch.randn(1, 1, 7, 8)
    calibrate(net, [torch.cat([x, -x])], spec=preset)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0
    assert "GATHER" in model.operators
    assert "TRANSPOSE" not in model.operators


@pytest.mark.parametrize("preset", PRESETS)
def test_a_flattened_image_moves_the_columns_of_a_weight(preset: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 3 * 5, 7)
    net, x = nn.Sequential(*layers), torch.randn(3, 1, 5, 7)
    calibrate(net, [x], spec=preset)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert set(model.operators) == {"RESHAPE", "CONV_2D", "FULLY_CONNECTED"}
    assert verify(net, model.path, [x], random_inputs=16) == 1.0


@pytest.mark.parametrize("bits", [8, 16])
def test_a_convolution_over_time(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (
        nn.Conv1d(1, 6, 3),
        nn.BatchNorm1d(6),
        nn.SiLU(),
        nn.Conv1d(6, 6, 3, groups=6),
        nn.PReLU(),
        nn.Conv1d(6, 4, 1),
    )
    net, x = nn.Sequential(*layers).eval(), torch.randn(2, 1, 20)
    calibrate(net, [x], spec={8: "litert-int8", 16: "litert-int16x8"}[bits])
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert model.operators["TRANSPOSE"] == 1  # The result is in PyTorch's order.
    assert verify(net, model.path, [x]) == 1.0


def operand(values: np.ndarray, tensor: int, elements: np.ndarray) -> Operand:
    spec = TensorSpec(values.shape, "int8", 0.5)
    return Operand(values, spec, "x", codes_of(tensor, elements))


def result(values: np.ndarray) -> Operand:
    ids = np.arange(values.size).reshape(values.shape)
    return Operand(values, TensorSpec(values.shape, "int8", 0.5), "y", ids=ids)


def test_a_constant_that_broadcasts_moves_along() -> None:
    image = np.arange(12).reshape(1, 2, 2, 3)
    x = operand(image.transpose(0, 3, 1, 2), 0, image.transpose(0, 3, 1, 2))
    factors = Operand(np.array([[[1]], [[2]], [[3]]]), TensorSpec((3, 1, 1), "int8", 1.0), "c")
    product = result(x.values * factors.values)
    instruction = Arrangement((x, factors), (product,), {})
    moved = in_order_of_operand("MUL", instruction, lambda number: (1, 2, 2, 3))
    a, b = moved.operands
    assert a is not None
    assert b is not None
    assert np.array_equal(a.values, image)
    assert b.values.shape == b.form.shape == (1, 1, 1, 3)
    assert np.array_equal(moved.results[0].values, image * [1, 2, 3])
    ids = moved.results[0].ids
    assert ids is not None
    assert ids[0, 0, 0].tolist() == [0, 4, 8]


def test_axes_of_a_reduction_are_renamed() -> None:
    image = np.arange(30).reshape(1, 5, 1, 6)
    x = operand(image.transpose(0, 3, 1, 2), 0, image.transpose(0, 3, 1, 2))
    axes = Operand(np.array([2, 3]), TensorSpec((2,), "int32"), "axes")
    total = result(x.values.sum((2, 3)))
    instruction = Arrangement((x, axes), (total,), {"keepDims": False})
    moved = in_order_of_operand("MEAN", instruction, lambda number: (1, 5, 1, 6))
    assert moved.operands[1] is not None
    assert moved.operands[1].values.tolist() == [1, 2]
    assert np.array_equal(moved.results[0].values, total.values)


def test_what_is_in_order_is_unchanged() -> None:
    x = operand(np.arange(6).reshape(2, 3), 0, np.arange(6).reshape(2, 3))
    instruction = Arrangement((x,), (result(x.values),), {})
    for kernel in ("TANH", "SOFTMAX", "RESHAPE"):
        assert in_order_of_operand(kernel, instruction, lambda number: (2, 3)) is instruction


@pytest.mark.parametrize("preset", ["litert-int16x8", "tflm-int16x8"])
def test_no_operator_takes_the_order_of_a_roll(preset: str, tmp_path: Path) -> None:
    """A mean of a network that did would have to be gathered, one element after the other."""
    torch.manual_seed(0)
    net = nn.Sequential(
        FunctionNetwork(lambda x: torch.lerp(x, x.roll(1, 1), 0.3)),
        nn.Linear(5, 12),
        FunctionNetwork(lambda x: nn.functional.group_norm(x.transpose(1, 2), 2)),
    )
    x = torch.randn(3, 6, 5)
    calibrate(net, [x], spec=preset)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert "GATHER" not in model.operators
    assert verify(net, model.path, [x]) == 1.0
