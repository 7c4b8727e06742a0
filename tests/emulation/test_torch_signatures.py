"""Forms of torch functions that few networks use: other signatures, no elements, no axes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna.deploy import export_tflite, verify
from lightning_nna.emulation import calibrate, emulate
from lightning_nna.testing.operator_oracle import SPECS
from lightning_nna.testing.replay import replays

pytestmark = pytest.mark.exactness


class Applying(nn.Module):
    """Applies a function to activations, and keeps these."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.slope = nn.Parameter(torch.ones(3))
        self.activations: list[Tensor] = []

    def forward(self, *inputs: Tensor) -> Tensor:
        F.linear(torch.ones(1, 3), self.slope[None])  # An operator whose input is not empty.
        activations = [x * 1.0 for x in inputs]
        self.activations = [x.detach().clone() for x in activations]
        return self.function(*activations)


def differences(function: Callable[..., Tensor], *inputs: Tensor, bits: int) -> Tensor:
    """Return the emulated result less that of float at the same activations, in its shape."""
    module = Applying(function)
    with emulate(module, SPECS[bits]) as chip, torch.no_grad():
        with chip.observing():
            module(*inputs)
        result = module(*inputs)
    expected = function(*module.activations)
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    return result - expected


MASK = torch.arange(12).reshape(3, 4) % 3 == 0
FORMS: dict[str, Callable[..., Tensor]] = {
    "method where": lambda x, y: x.where(MASK, y),
    "method where by name": lambda x, y: x.where(condition=MASK, other=y),
    "where by name": lambda x, y: torch.where(MASK, input=x, other=y),
    "infinite fill": lambda x, y: (
        torch.where(MASK, x, torch.tensor(float("inf"))).amin(1) + y[:, 0]
    ),
    "slice_scatter": lambda x, y: torch.slice_scatter(x, y[:, :2], dim=1, start=1, end=3),
    "select_scatter": lambda x, y: x.select_scatter(y[:, 0], dim=1, index=2),
    "diagonal_scatter": lambda x, y: x.diagonal_scatter(y[:2, 0], offset=2),
    "as_strided_scatter": lambda x, y: torch.as_strided_scatter(
        x, y[:2, :2], (2, 2), (1, 2), storage_offset=1
    ),
    "index_fill": lambda x, y: torch.index_fill(x, 1, index=torch.tensor([1]), value=0.5) + y,
}
EMPTY: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda x: torch.softmax(x, -1),
    "masked softmax": lambda x: torch.softmax(x.masked_fill(x.new_zeros(x.shape) > 0, -1e9), -1),
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "hardsigmoid": F.hardsigmoid,
}


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("form", FORMS)
def test_a_signature_computes_what_torch_does(form: str, bits: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    tolerance = {8: 0.05, 16: 0.0005}[bits]
    assert differences(FORMS[form], x, y, bits=bits).abs().max() < tolerance


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_input_has_an_empty_result(name: str, bits: int) -> None:
    assert differences(EMPTY[name], torch.randn(0, 4), bits=bits).numel() == 0


@pytest.mark.parametrize("bits", SPECS)
def test_a_cosine_of_numbers(bits: int) -> None:
    x, y = torch.tensor(2.0), torch.tensor(-3.0)
    assert differences(lambda x, y: F.cosine_similarity(x, y, dim=0), x, y, bits=bits).abs() < 0.01


def fill_zeros(x: Tensor, y: Tensor) -> Tensor:
    """Fill a tensor of zeros by slices."""
    result = torch.zeros(3, 4)
    result[:, :2] = x[:, :2]
    result[:, 2:] = y[:, 2:]
    return result


def fill_with_others(x: Tensor, y: Tensor) -> Tensor:
    """Fill an empty tensor, and compute in the place of a part of it."""
    result = x.new_empty(3, 4)
    result[:, ::2] = 3 * x[:, ::2]
    result[:, 1::2] = y[:, 1::2]
    result[0] += y[1]
    return result.relu_()


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("function", [fill_zeros, fill_with_others])
def test_training_computes_what_evaluation_does(function: Callable[..., Tensor], bits: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(3, 4), torch.randn(3, 4)
    module = Applying(function)
    with emulate(module, SPECS[bits]) as chip:
        with chip.observing(), torch.no_grad():
            module(*inputs)
        leaves = [x.clone().requires_grad_() for x in inputs]
        result = module(*leaves)
        result.sum().backward()
        with torch.no_grad():
            assert torch.equal(result, module(*inputs))
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("bits", SPECS)
def test_an_argument_without_axes_is_exported(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(3, 4), torch.tensor(0.7)]
    module = Applying(lambda x, scale: torch.sigmoid(x * scale) + scale).eval()
    calibrate(module, [inputs], lambda network, batch: network(*batch), SPECS[bits])
    model = export_tflite(module, inputs, tmp_path / "scaled.tflite")
    assert verify(module, model.path, inputs) == 1.0


class AfterRecurrence(nn.Module):
    """Applies a function to 8-bit outputs that 16 bits hold by way of a longer scale."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.lstm(x)[0], x @ torch.ones(4, 8).div(40))


WIDENED: dict[str, Callable[..., Tensor]] = {
    "clamp": lambda h, x: torch.cat([h.clamp(-i / 97, i / 67) for i in range(1, 24)], 1),
    "maximum of constants": lambda h, x: torch.maximum(h, torch.linspace(-0.3, 0.3, 48).view(6, 8)),
    "select": lambda h, x: torch.where(x > 0, h, x),
    "assignment": lambda h, x: torch.select_scatter(h, x[:, 0], 1, 2),
    "comparison": lambda h, x: torch.where(h > x, 1.0, 0.0),
}


@pytest.mark.parametrize("name", WIDENED)
def test_widened_outputs(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 6, 4)
    compared = replays(AfterRecurrence(WIDENED[name]), x, inputs=[1.5 * x], spec=SPECS[16])
    assert sum(compared.values()) > 1_000
