"""Emulated batch norm: folded into the layer before it, or a convolution of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.emulation.ranges import RangeTable
from lightning_nna.testing.replay import check_instructions, replays

BLOCKS = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(5, 8, 3), nn.BatchNorm1d(8)), (40, 5, 60)),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv1d(6, 6, 5, padding=2, groups=6), nn.BatchNorm1d(6)),
        (40, 6, 50),
    ),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(3, 7, 3, bias=False), nn.BatchNorm2d(7)),
        (10, 3, 14, 14),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20)), (600, 6)),
    "alone": (lambda: nn.BatchNorm1d(8), (30, 8, 50)),
    "alone, rows": (lambda: nn.BatchNorm1d(16), (700, 16)),
    "without parameters": (
        lambda: nn.Sequential(nn.Conv1d(5, 8, 3), nn.BatchNorm1d(8, affine=False)),
        (40, 5, 60),
    ),
}


def block(name: str) -> tuple[nn.Module, Tensor]:
    """A block whose norm has parameters and statistics unlike those at the start, and its input."""
    torch.manual_seed(0)
    module, shape = BLOCKS[name][0](), BLOCKS[name][1]
    x = torch.randn(shape) * 1.5 + 0.4
    with torch.no_grad():
        for norm in (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            for parameter in norm.parameters():
                parameter.uniform_(-1.5, 1.5)
        for _ in range(5):
            module(x + torch.randn_like(x))
    return module, x


@pytest.mark.exactness
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_equals_litert(name: str, training: bool) -> None:
    module, x = block(name)
    compared = replays(
        module.train(training), x, inputs=[x + 0.1 * torch.randn_like(x)], spec="litert-int8"
    )
    layers = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"} & set(compared)
    assert len(layers) == 1  # One instruction for the layer and its norm.
    assert set(compared) - layers == {"QUANTIZE"}
    assert compared[layers.pop()] >= 10_000


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_is_close_to_the_float_block(name: str, training: bool) -> None:
    module, x = block(name)
    module.train(training)
    with emulate(module) as chip:
        with chip.observing(), torch.no_grad():
            module(x)
        on_chip = module(x)
    expected = module(x)
    noise = (on_chip - expected).square().mean() / expected.square().mean()
    assert noise < 10**-3


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_follow_those_of_the_float_block(name: str) -> None:
    module, x = block(name)
    direction = torch.randn_like(module(x))
    grads = []
    for on_chip in (True, False):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        with emulate(module) as chip:
            chip.state.ranges = chip.ranges if chip.calibrated else RangeTable()
            with chip.observing(), torch.no_grad():
                module(x)
            with chip.running("emulate" if on_chip else "float"):
                (module(leaf) * direction).sum().backward()
        grads.append([leaf.grad, *(p.grad for p in module.parameters())])
    # A bias before a norm in training has the gradient 0: rounding noise on either side.
    scale = max(float(g.abs().max()) for g in grads[1])
    for found, expected in zip(*grads, strict=True):
        difference = (found - expected).norm()
        assert difference < 0.05 * expected.norm() + 1e-3 * scale


def test_running_statistics_follow_as_in_float() -> None:
    module, x = block("conv1d")
    norm = module[1]
    with emulate(module) as chip:
        with chip.observing(), torch.no_grad():
            module(x)
        before = [x.clone() for x in (norm.running_mean, norm.running_var)]
        count = int(norm.num_batches_tracked)
        module(x + 1)
        after = norm.running_mean.clone(), norm.running_var.clone()
    assert int(norm.num_batches_tracked) == count + 1
    norm.running_mean.copy_(before[0])
    norm.running_var.copy_(before[1])
    module(x + 1)
    torch.testing.assert_close(norm.running_mean, after[0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(norm.running_var, after[1], rtol=0.02, atol=0.02)


class Branching(nn.Module):
    """A convolution whose result goes to a norm and elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x)
        return self.norm(hidden) + torch.relu(hidden)


def test_a_layer_that_something_else_reads_is_not_folded() -> None:
    torch.manual_seed(0)
    module, x = Branching(), torch.randn(20, 4, 40)
    recorded = []
    with emulate(module) as chip:
        with chip.observing(), torch.no_grad():
            module(x)
        with chip.running(recorder=recorded.append):
            on_chip = module(x).detach()
    compared = check_instructions(recorded)
    assert {"CONV_2D", "DEPTHWISE_CONV_2D", "RELU", "ADD"} <= set(compared)
    assert (on_chip - module(x)).abs().max() < 0.2
