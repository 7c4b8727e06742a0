"""Kernels of TFLite-Micro whose arithmetic differs from LiteRT's, at many quantization parameters.

The tests of the operators compare large tensors at a few of them; here tensors are small.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.testing.operator_oracle import SPECS_OF
from lightning_nna.testing.replay import replays
from tests.emulation.operators.examples import Calling

pytestmark = pytest.mark.exactness

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "LOGISTIC": torch.sigmoid,
    "TANH": torch.tanh,
    "LEAKY_RELU": lambda x: F.leaky_relu(x, 0.13),
    "HARD_SWISH": F.hardswish,
    "ABS": torch.abs,
    "PRELU": lambda x: F.prelu(x, torch.full((1,), 0.3)),
    "MUL": lambda x: x * x,
    "BATCH_MATMUL": lambda x: x[..., None, :] @ x[..., :, None],
    "RSQRT": lambda x: x.abs().rsqrt(),
    "SOFTMAX": lambda x: x.softmax(-1),
    "ELU": F.elu,
    "LOG_SOFTMAX": lambda x: x.log_softmax(-1),
}
NARROW = ("HARD_SWISH", "ELU", "LOG_SOFTMAX")
EACH = [(name, bits) for name in FUNCTIONS for bits in (8, 16) if bits == 8 or name not in NARROW]


@pytest.mark.parametrize(("kernel", "bits"), EACH)
def test_many_scales(kernel: str, bits: int) -> None:
    torch.manual_seed(0)
    scales = random.Random(0)
    compared = 0
    for _ in range(30):
        scale = 10 ** scales.uniform(-4, 2)
        x = scale * (torch.randn(16, 24) + scales.uniform(-2, 2))
        network: nn.Module = Calling(FUNCTIONS[kernel])
        compared += replays(network, x, inputs=[1.2 * x], spec=SPECS_OF["tflm"][bits])[kernel]
    assert compared >= 30 * 16


@pytest.mark.parametrize("spec", SPECS_OF["tflm"].values())
def test_numbers_without_axes(spec: str) -> None:
    assert replays(Calling(lambda x: x.mean() * x.mean()), torch.randn(8), spec=spec)["MUL"] == 1


@pytest.mark.parametrize("spec", SPECS_OF["tflm"].values())
def test_slices_have_four_axes(spec: str, tmp_path: Path) -> None:
    """Elements of patches at regular places would be a slice of five axes."""
    network = Calling(lambda x: F.fold(F.unfold(x[:, None], (2, 1)), (6, 5), (2, 1))[:, 0])
    x = torch.randn(3, 6, 5)
    calibrate(network, [x], spec=spec)
    path = export_tflite(network, [x], tmp_path / "network.tflite").path
    assert verify(network, path, [x]) == 1.0
    network = Calling(lambda x: x[:, ::2, 1:3, ::3, 1:] * 2)
    x = torch.randn(2, 4, 4, 6, 3)
    calibrate(network, [x], spec=spec)
    model = export_tflite(network, [x], tmp_path / "network.tflite")
    assert verify(network, model.path, [x]) == 1.0


class Turned(nn.Module):
    """Outputs of a cell, step by step, whose last axis is the time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(state)
        return torch.tanh(torch.stack(outputs, 1).transpose(1, 2).reshape(len(x), -1))


@pytest.mark.parametrize("spec", SPECS_OF["tflm"].values())
def test_steps_are_joined_before_they_are_transposed(spec: str, tmp_path: Path) -> None:
    """Else each element would be gathered, which the kernel has no 16 bits for."""
    torch.manual_seed(0)
    network, x = Turned(), torch.randn(3, 6, 5)
    calibrate(network, [x], spec=spec)
    model = export_tflite(network, [x], tmp_path / "network.tflite")
    assert "GATHER" not in model.operators
    assert verify(network, model.path, [x]) == 1.0
