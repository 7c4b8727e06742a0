"""A ReLU after an operator becomes the fused activation of it, with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.deploy.capture import capture
from tests.deploy.networks import SPECS, FunctionNetwork

pytestmark = pytest.mark.exactness

#: Producers of an activation: a function of the input and layers, and those layers.
PRODUCERS: dict[str, tuple[Callable[..., Tensor], tuple[nn.Module, ...]]] = {
    "CONV_2D": (lambda x, conv: conv(x), (nn.Conv2d(4, 6, 3),)),
    "DEPTHWISE_CONV_2D": (lambda x, conv: conv(x), (nn.Conv2d(4, 8, 3, groups=4),)),
    "FULLY_CONNECTED": (lambda x, linear: linear(x), (nn.Linear(8, 6),)),
    "ADD": (lambda x: x + x.flip(0), ()),
    "SUB": (lambda x: x - x.flip(0), ()),
    "MUL": (lambda x: x * x.flip(0), ()),
    "AVERAGE_POOL_2D": (lambda x: F.avg_pool2d(x, 2), ()),
    "MAX_POOL_2D": (lambda x: F.max_pool2d(x, 2), ()),
}


def exported(function: Any, layers: Any, bits: int, path: Path) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    net, x = FunctionNetwork(function, *layers), 4 * torch.randn(2, 4, 8, 8)
    calibrate(net, [x], spec=SPECS[bits])
    return net, x, export_tflite(net, [x], path / "net.tflite")


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", PRODUCERS)
@pytest.mark.parametrize("activation", [F.relu, F.relu6])
def test_an_activation_is_fused(name: str, activation: Any, bits: int, tmp_path: Path) -> None:
    function, layers = PRODUCERS[name]

    def forward(x: Tensor, *layers: nn.Module) -> Tensor:
        result = function(x, *layers)
        torch.tanh(result)  # Needs values below 0, and is no part of the program.
        return activation(result)

    net, x, model = exported(forward, layers, bits, tmp_path)
    assert not {"RELU", "RELU6"} & set(model.operators)
    assert verify(net, model.path, [x]) == 1.0
    fused = [each.options for each in capture(net, [x]).operators if each.name == name]
    assert all(options.fusedActivationFunction for options in fused)


@pytest.mark.parametrize("bits", SPECS)
def test_what_something_else_reads_is_not_clipped(bits: int, tmp_path: Path) -> None:
    def forward(x: Tensor, linear: nn.Module) -> Any:
        y = linear(x)
        return torch.tanh(y), torch.relu(y)

    net, x, model = exported(forward, (nn.Linear(8, 6),), bits, tmp_path)
    assert model.operators["RELU"] == 1
    assert verify(net, model.path, [x]) == 1.0


def test_what_clips_nothing_is_dropped(tmp_path: Path) -> None:
    net, x, model = exported(lambda x: torch.relu(torch.relu(torch.sigmoid(x))), (), 8, tmp_path)
    assert model.operators == {"LOGISTIC": 1}
    assert verify(net, model.path, [x]) == 1.0


def test_the_activation_of_an_argument_stays(tmp_path: Path) -> None:
    net, x, model = exported(torch.relu, (), 8, tmp_path)
    assert model.operators == {"RELU": 1}
    assert verify(net, model.path, [x]) == 1.0


def test_a_second_activation_stays(tmp_path: Path) -> None:
    def forward(x: Tensor, linear: nn.Module) -> Tensor:
        y = linear(x)
        torch.tanh(y)
        return F.relu6(torch.relu(y))

    net, x, model = exported(forward, (nn.Linear(8, 6),), 16, tmp_path)
    assert model.operators == {"FULLY_CONNECTED": 1, "RELU6": 1}
    assert verify(net, model.path, [x]) == 1.0
