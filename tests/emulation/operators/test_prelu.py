"""PReLU passes the oracle, and its kernel is equal to LiteRT's at every input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.testing.operator_oracle import CHECKS, Check, Example, check_operator
from lightning_nna.testing.replay import replays

pytestmark = pytest.mark.exactness


class Slopes(nn.Module):
    """A PReLU with slopes of both signs, and beyond 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.prelu = nn.PReLU(channels)
        with torch.no_grad():
            self.prelu.weight.copy_(torch.linspace(-0.6, 1.3, channels))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.prelu(x)
        return result


EXAMPLES = [
    Example(nn.PReLU, ((120, 100),)),
    Example(lambda: Slopes(100), ((120, 100),)),
    Example(lambda: Slopes(30), ((20, 30, 20),)),
    Example(lambda: Slopes(6), ((20, 6, 10, 10),)),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", EXAMPLES)
def test_oracle(example: Example, check: Check) -> None:
    check_operator("prelu", [example], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", [EXAMPLES[0], EXAMPLES[2]])
def test_oracle_of_a_runtime_without_the_kernel_of_16_bits(example: Example, check: Check) -> None:
    check_operator("prelu", [example], runtime="tosa", checks=[check])


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_it_is_covered_exported_and_learns_its_scale(spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 6, 3), nn.PReLU(6), nn.Conv1d(6, 4, 3), nn.PReLU())
    x = torch.randn(16, 4, 12)
    rows = coverage(net, x, spec=spec).rows
    assert [row.operator for row in rows] == ["convolution", "prelu"] * 2
    calibrate(net, [x], spec=spec)
    with emulate(net, spec, learned_scales="all") as chip:
        net(x).square().sum().backward()
        assert {"1/prelu#0/output", "3/prelu#0/output"} <= set(chip.scales.activations)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert model.operators["PRELU"] == 2
    assert verify(net, model.path, [x]) == 1.0


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_gradients_of_input_and_slopes(spec: str) -> None:
    net = Slopes(3)
    x = torch.tensor([[-1.0, -1.0, -1.0], [2.0, 2.0, 2.0]], requires_grad=True)
    calibrate(net, [x], spec=spec)
    with emulate(net, spec):
        net(x).sum().backward()
    assert x.grad is not None
    assert net.prelu.weight.grad is not None
    slopes = net.prelu.weight.detach()
    torch.testing.assert_close(x.grad, torch.stack([slopes, torch.ones(3)]), atol=0.01, rtol=0)
    torch.testing.assert_close(net.prelu.weight.grad, -torch.ones(3), atol=0.01, rtol=0)


def test_more_axes_than_the_kernel_has_run_in_float() -> None:
    assert coverage(nn.PReLU(), torch.randn(2, 3, 2, 2, 2)).fallbacks


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_every_slope_with_256_inputs_through_the_range(spec: str) -> None:
    net = nn.PReLU(255)
    with torch.no_grad():
        net.weight.copy_(torch.arange(-127, 128) / 127)
    x = (torch.arange(-128, 128) / 128)[:, None].expand(256, 255).contiguous()
    assert replays(net, x, inputs=[x], spec=spec)["PRELU"] == 256 * 255
