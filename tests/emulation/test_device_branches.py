"""Branches of a GPU, in place of a processor's short cuts, give the same bits; run here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nna import calibrate, emulate
from lightning_nna.emulation.arithmetic.on_host import as_on_a_device


class Recurrent(nn.Module):
    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.head = layer(6, 8, num_layers=2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


class Attending(nn.Module):
    """Attention, norms, a look-up of rows, products and sums."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.norm = nn.Embedding(5, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x + self.rows(torch.arange(x.shape[1]) % 5))
        attended, _ = self.attention(y, y, y, need_weights=False)
        return F.log_softmax((torch.sigmoid(attended) * self.scale - y).mean(1), -1)


def _convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 8, 3, groups=8), nn.Hardswish(), nn.MaxPool2d(2)),
        *(nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Tanh()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3), nn.Softmax(-1)),
    )


def _layers() -> nn.Module:
    # So wide that rows are rescaled in several blocks on a processor.
    first = nn.Sequential(nn.Linear(6, 2048), nn.GELU(), nn.Linear(2048, 8, bias=False))
    return nn.Sequential(first, nn.PReLU(8), nn.Linear(8, 3))


class Normalized(nn.Module):
    """Rows of very different loudness, which are normalized twice, groups and single channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.root = nn.LayerNorm(16), nn.RMSNorm(16)
        self.group, self.instance = nn.GroupNorm(2, 6), nn.InstanceNorm1d(6, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        loudness = torch.logspace(-3, 0, len(x)).view(-1, 1, 1)
        return self.instance(self.group(self.root(x) + self.layer(x * loudness))) * loudness


def _dead_channels() -> nn.Module:
    """Factors of a batch norm that vanish, or are tiny next to the shift."""
    norm = nn.BatchNorm1d(8)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.0, 1e-9, 1e-4, -1.0, 2.0, -1e-7, 1.0, 1e-30]))
        norm.bias.copy_(torch.tensor([1.0, 50.0, -900.0, 0.0, 3.0, 1e4, 0.0, -2.0]))
    return nn.Sequential(nn.Conv1d(3, 8, 3), norm, nn.ReLU(), nn.Conv1d(8, 2, 1))


def _large_biases() -> nn.Module:
    """Biases too large for their scales, in a weight of many integers and in one of few."""
    first, second = nn.Linear(6, 8), nn.Linear(8, 4)
    with torch.no_grad():
        first.weight[:3] *= torch.tensor([[1e-9], [1e-6], [0.0]])
        first.bias[:3] = torch.tensor([5.0, -7.0, 3.0])
        second.weight.copy_(second.weight.sign() * torch.tensor([[1.0], [1e-8], [0.3], [2e-9]]))
        second.bias[1:] = 9.0
    return nn.Sequential(first, nn.ReLU(), second)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layers": (_layers, (40, 6)),
    "convolutions": (_convolutions, (4, 3, 9, 9)),
    "attention": (Attending, (3, 7, 8)),
    "lstm": (lambda: Recurrent(nn.LSTM), (9, 4, 6)),
    "gru": (lambda: Recurrent(nn.GRU), (9, 4, 6)),
    "rnn": (lambda: Recurrent(nn.RNN), (9, 4, 6)),
    "normalizations": (Normalized, (20, 6, 16)),
    "dead channels": (_dead_channels, (5, 3, 9)),
    "large biases": (_large_biases, (30, 6)),
}


def _values(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Result, and gradients of the input and of all parameters."""
    leaf = x.clone().requires_grad_()
    module.zero_grad()
    with emulate(module):
        result = module(leaf)
    weights = torch.linspace(-1.0, 1.0, result.numel()).view(result.shape)
    (result * weights).sum().backward()
    yield result
    for tensor in (leaf, *module.parameters()):
        assert tensor.grad is not None
        yield tensor.grad.clone()


@pytest.mark.parametrize("spec", ["tflm-int8", "litert-int8", "tflm-int16x8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_branches_of_a_device_give_the_bits_of_a_processor(name: str, spec: str) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    module, x = make().eval(), torch.randn(shape)
    # A range that leaves values out: some are clipped.
    calibrate(module, [0.7 * x], spec=spec)
    scopes: tuple[AbstractContextManager[None], ...] = (nullcontext(), as_on_a_device())
    both = []
    for scope in scopes:
        with scope:
            both.append(list(_values(module, x)))
    for expected, computed in zip(*both, strict=True):
        assert torch.equal(computed, expected)


@pytest.mark.parametrize("inputs", [16, 256])
@pytest.mark.parametrize("spec", ["tflm-int8", "litert-int8", "tosa-int8"])
def test_a_fast_layer_rounds_as_often_as_the_kernel(spec: str, inputs: int) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(inputs, 512), torch.randn(400, inputs)
    calibrate(layer, [x], spec=spec)
    with emulate(layer):
        exact = layer(x)
    with emulate(layer, fidelity="fast"), as_on_a_device():
        fast = layer(x)
    assert float((fast != exact).float().mean()) < 1e-3


class Reads(TorchDispatchMode):
    """Count the values that Python reads."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", ["litert-int8", "tflm-int8", "tflm-int16x8"])
def test_a_plain_recurrent_layer_waits_for_no_value(spec: str) -> None:
    torch.manual_seed(0)
    module, x = Recurrent(nn.RNN), torch.randn(9, 4, 6, requires_grad=True)
    calibrate(module, [x.detach()], spec=spec)
    with as_on_a_device(), emulate(module):
        module(x).sum().backward()  # Ranges of sites, and tables.
        with Reads() as reads:
            module(x).sum().backward()
    assert reads.count == 0
