"""Emulated functions of one activation: LiteRT's integers forward, the derivative backward."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
from lightning_nna.emulation.program import Instruction
from lightning_nna.testing.replay import replays, tensor_spec
from tests import litert

MODULES: dict[str, tuple[nn.Module, set[str]]] = {
    "sigmoid": (nn.Sigmoid(), {"LOGISTIC"}),
    "tanh": (nn.Tanh(), {"TANH"}),
    "relu": (nn.ReLU(), {"RELU"}),
    "relu6": (nn.ReLU6(), {"RELU6"}),
    "leaky_relu": (nn.LeakyReLU(0.1), {"LEAKY_RELU"}),
    "elu": (nn.ELU(), {"ELU"}),
    "silu": (nn.SiLU(), {"LOGISTIC", "MUL"}),
    "gelu": (nn.GELU(), {"GELU"}),
    "gelu_tanh": (nn.GELU("tanh"), {"GELU"}),
    "hard_swish": (nn.Hardswish(), {"HARD_SWISH"}),
    "hard_sigmoid": (nn.Hardsigmoid(), {"ADD", "RELU6", "MUL"}),
    "glu": (nn.GLU(), {"LOGISTIC", "MUL"}),
}
#: Kernels in 16 bits, where they are others than in 8.
WIDE_KERNELS = {
    "elu": {"CAST", "ADD", "GATHER"},
    "gelu": {"MINIMUM", "MAXIMUM", "MUL", "ADD", "LOGISTIC"},
    "gelu_tanh": {"MINIMUM", "MAXIMUM", "MUL", "ADD", "LOGISTIC"},
    "hard_swish": {"ADD", "RELU6", "MUL"},
}
#: Decibels of 16 bits, and largest error in steps of the output, for inputs up to 1, 4 and 12.
ACCURACY = {
    "gelu": ([84, 89, 84], [2.8, 1.7, 1.6]),
    "gelu_tanh": ([88, 90, 84], [2.1, 1.5, 1.6]),
    "hard_swish": ([90, 90, 94], [2.1, 1.8, 1.6]),
    "elu": ([94, 93, 92], [1.0, 1.0, 1.0]),
}


@pytest.mark.exactness
@pytest.mark.parametrize("span", [0.4, 5.0, 60.0])
@pytest.mark.parametrize("name", MODULES)
def test_equals_litert(name: str, span: float) -> None:
    module, kernels = MODULES[name]
    x = span * torch.linspace(-1.0, 0.8, 40_000)[torch.randperm(40_000)].view(200, 200)
    compared = replays(nn.Sequential(module), x, spec="litert-int8")
    assert set(compared) == kernels | {"QUANTIZE"}
    assert min(compared.values()) >= 20_000


@pytest.mark.exactness
@pytest.mark.parametrize("span", [0.4, 5.0, 60.0])
@pytest.mark.parametrize("name", MODULES)
def test_equals_litert_in_sixteen_bits(name: str, span: float) -> None:
    module, kernels = MODULES[name]
    kernels = WIDE_KERNELS.get(name, kernels)
    # Bounds that no integer reaches are no instructions.
    kernels = kernels - ({"MINIMUM", "MAXIMUM"} if span < 4.5 else set())
    x = span * torch.linspace(-1.0, 0.8, 65_536).view(256, 256)
    compared = replays(nn.Sequential(module), x, spec="litert-int16x8")
    assert set(compared) == kernels | {"QUANTIZE"}
    assert min(compared.values()) >= 32_768


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("name", ACCURACY)
def test_sixteen_bits_are_nearly_float(name: str, position: int) -> None:
    net, span = nn.Sequential(MODULES[name][0]), (1.0, 4.0, 12.0)[position]
    x = span * torch.linspace(-1.0, 1.0, 50_001)
    calibrate(net, [x], spec="litert-int16x8")
    with emulate(net, "litert-int16x8") as chip, torch.no_grad():
        result = net(x)
        qparams = chip.state.qparams_of(result)
    expected = net(x.double())
    error = result - expected
    decibels = 10 * torch.log10(expected.square().sum() / error.square().sum())
    least, most = (numbers[position] for numbers in ACCURACY[name])
    assert qparams is not None
    assert decibels > least
    assert error.abs().max() < most * qparams.scale


@pytest.mark.exactness
@pytest.mark.parametrize("span", [0.1, 3.0, 30.0])
def test_elu_equals_the_only_kernel_that_litert_has(span: float) -> None:
    """There is none among the reference kernels; the other one is a table of 256 entries, too."""
    module, x = nn.Sequential(nn.ELU()), span * torch.linspace(-1.0, 1.0, 512).view(2, 256)
    recorded: list[Instruction] = []
    with emulate(module) as chip, torch.no_grad():
        with chip.observing():
            module(x)
        with chip.running(recorder=recorded.append):
            module(x)
    (elu,) = (each for each in recorded if each.operator == "ELU")
    with pytest.raises(ValueError, match="ELU"):
        litert.run_model(*elu_program(elu))
    (found,) = litert.run_model(*elu_program(elu), runtime="litert-optimized")
    assert len(set(found.flatten().tolist())) > 100
    torch.testing.assert_close(
        torch.from_numpy(found).long(), elu.outputs[0].integers, rtol=0, atol=0
    )


def elu_program(elu: Instruction) -> tuple[bytes, list[np.ndarray]]:
    """The instruction alone, and its input."""
    (x, values), (y, _) = tensor_spec(elu.inputs[0]), tensor_spec(elu.outputs[0])
    return litert.unary_model("ELU", x, y), [values]


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
@pytest.mark.parametrize("name", MODULES)
def test_the_gradient_is_the_derivative_at_the_quantized_input(name: str, spec: str) -> None:
    module = nn.Sequential(MODULES[name][0])
    torch.manual_seed(0)
    # On the grid from the start, and not where a function has a kink: -3, 0, 3 or 6.
    x = torch.randint(-19, 20, (50, 40)) * 0.375 + 0.125
    with emulate(module, spec) as chip:
        with chip.observing():
            # Nothing is clipped: all values, in both halves of a row, and their largest products.
            line = torch.linspace(-8, 8, 202) * (255 / 256)
            module(torch.stack([line, line.flip(0), torch.cat([line[::2], line[-1:].expand(101)])]))
        leaf = x.clone().requires_grad_()
        on_chip = module(leaf)
        direction = torch.randn_like(on_chip)
        (on_chip * direction).sum().backward()
    again = x.clone().requires_grad_()
    (module(again) * direction).sum().backward()
    found, expected = leaf.grad, again.grad
    assert found is not None
    assert expected is not None
    # Those of sigmoid and tanh are taken from the tabulated output, which is rounded.
    assert (found - expected).norm() < 0.03 * expected.norm()


class InPlace(nn.Module):
    """A function that writes into its operand."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        result = self.function(hidden)
        return hidden + result


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu(x, inplace=True),
        lambda x: F.silu(x, inplace=True),
        lambda x: F.leaky_relu(x, 0.1, inplace=True),
        lambda x: F.elu(x, inplace=True),
        lambda x: F.hardswish(x, inplace=True),
        lambda x: F.relu6(x, inplace=True),
        lambda x: x.sigmoid_(),
        lambda x: x.mul_(0.5),
    ],
)
def test_in_place_forms_change_their_operand(function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    module, x = InPlace(function), torch.randn(40, 6)
    with emulate(module) as chip, torch.no_grad():
        with chip.observing():
            module(x)
        on_chip = module(x)
    with torch.no_grad():
        assert (on_chip - module(x)).abs().max() < 0.1


def test_dropped_features_are_whole_channels() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Conv1d(3, 8, 1), nn.Dropout1d(0.5)).train(), torch.randn(30, 3, 20)
    with emulate(module) as chip:
        with chip.observing():
            module(x)
        on_chip = module(x)
    dropped = (on_chip == 0).all(-1)
    assert 0.3 < dropped.float().mean() < 0.7
    assert not bool(((on_chip == 0).float().mean(-1)[~dropped] > 0.3).any())
