"""Branches of a GPU, of compiled kernels and of a processor without them give the same bits."""

from __future__ import annotations

import copy
import itertools
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
from lightning_nna.emulation.kernels.library import without_compiled_kernels
from lightning_nna.emulation.operators.batch_norm import _statistics


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


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "spec", ["tflm-int8", "litert-int8", "tflm-int16x8", "litert-int16x8", "tosa-int8"]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_all_branches_give_the_same_bits(name: str, spec: str, training: bool) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    module, x = make().train(training), torch.randn(shape)
    # A range that leaves values out: some are clipped.
    calibrate(module, [0.7 * x], spec=spec)
    state = copy.deepcopy(module.state_dict())
    scopes: tuple[AbstractContextManager[None], ...] = (
        without_compiled_kernels(),
        nullcontext(),
        as_on_a_device(),
    )
    every = []
    for scope in scopes:
        module.load_state_dict(state)
        with scope:
            every.append([*_values(module, x), *(each.clone() for each in module.buffers())])
    for plain, compiled, on_a_device in zip(*every, strict=True):
        assert torch.equal(compiled, plain)
        assert torch.equal(on_a_device, plain)


@pytest.mark.parametrize("spec", ["tflm-int8", "litert-int8", "tflm-int16x8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_threads_give_the_same_bits(name: str, spec: str) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    # So much that compiled kernels share it among threads.
    module, x = make(), torch.randn(12 * shape[0], *shape[1:])
    calibrate(module, [0.7 * x], spec=spec)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with torch.no_grad(), emulate(module.eval()):
                results.append(module(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_statistics_of_channels_are_those_of_torch() -> None:
    torch.manual_seed(0)
    shapes = ((32, 200, 125), (3, 501, 7), (16, 401), (8, 99, 3, 5), (1, 20, 64), (64, 100, 1))
    for shape, (scale, offset) in itertools.product(shapes, ((1, 0), (3, 100), (1e-3, 1))):
        x = (torch.randn(shape) * 40).round() * scale + offset
        norm = nn.BatchNorm1d(shape[1], momentum=1.0)
        call = x.flatten(2) if x.dim() > 2 else x
        with without_compiled_kernels():
            expected = _statistics(call, norm.running_mean, norm.running_var, True, 1.0)
        computed = _statistics(call, norm.running_mean, norm.running_var, True, 1.0)
        for one, other in zip(computed, expected, strict=True):
            assert torch.equal(one, other)


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
