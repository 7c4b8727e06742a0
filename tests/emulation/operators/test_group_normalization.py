"""Group and instance normalization pass the oracle, and follow statistics as in float."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.deploy.vela import vela_report
from lightning_nna.testing.operator_oracle import CHECKS, Check, Example, check_operator

pytestmark = pytest.mark.exactness
SPECS = {8: "litert-int8", 16: "litert-int16x8"}


def with_gains(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A layer with gains and shifts unlike those at the start."""

    def build() -> nn.Module:
        module = make()
        generator = torch.Generator().manual_seed(3)
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        return module

    return build


IMAGES = ((6, 12, 14, 12),)
GROUPS = {
    "images": Example(with_gains(lambda: nn.GroupNorm(3, 12)), IMAGES),
    "one group": Example(with_gains(lambda: nn.GroupNorm(1, 12)), IMAGES),
    "one channel a group": Example(with_gains(lambda: nn.GroupNorm(12, 12)), IMAGES),
    "no positions": Example(with_gains(lambda: nn.GroupNorm(5, 100)), ((120, 100),)),
    "plain": Example(lambda: nn.GroupNorm(2, 6, affine=False), ((10, 6, 200),)),
}
INSTANCES = {
    "images": Example(with_gains(lambda: nn.InstanceNorm2d(12, affine=True)), IMAGES),
    "sequences": Example(lambda: nn.InstanceNorm1d(6), ((10, 6, 200),)),
    "evaluation": Example(
        lambda: nn.InstanceNorm2d(12, affine=True, track_running_stats=True).eval(), IMAGES
    ),
    "volumes": Example(lambda: nn.InstanceNorm3d(4), ((5, 4, 8, 8, 8),)),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", GROUPS)
def test_group_norm(name: str, check: Check) -> None:
    check_operator("group_norm", [GROUPS[name]], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", INSTANCES)
def test_instance_norm(name: str, check: Check) -> None:
    check_operator("instance_norm", [INSTANCES[name]], checks=[check], runtime="litert")


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8", "ethos-u", "shift"])
@pytest.mark.parametrize("name", GROUPS)
def test_the_integers_are_the_same_with_and_without_a_recorder(name: str, spec: str) -> None:
    torch.manual_seed(0)
    module, (x,) = GROUPS[name].build(), GROUPS[name].inputs()
    x = x * torch.exp2(-8 * torch.rand(len(x), *[1] * (x.dim() - 1)))
    with emulate(module, spec) as chip, torch.no_grad():
        with chip.observing():
            module(x)
        at_once = module(1.3 * x)
        with chip.running(recorder=[].append):
            assert torch.equal(module(1.3 * x), at_once)


@pytest.mark.parametrize("bits", SPECS)
def test_results_are_near_those_of_float(bits: int) -> None:
    for example in (*GROUPS.values(), *INSTANCES.values()):
        torch.manual_seed(0)
        module, (x,) = example.build(), example.inputs()
        with torch.no_grad():
            expected = module(x)
            with emulate(module, SPECS[bits]) as chip:
                with chip.observing():
                    module(x)
                error = (module(x) - expected).abs().max() / expected.abs().max()
        assert float(error) < {8: 0.02, 16: 0.001}[bits]


def test_running_statistics_follow_as_in_float() -> None:
    torch.manual_seed(0)
    module = nn.InstanceNorm1d(6, track_running_stats=True)
    reference, x = copy.deepcopy(module), torch.randn(8, 6, 20) + 1
    with emulate(module) as chip:
        with chip.observing():
            module(x)
        module(x)
    for _ in range(2):
        reference(x)
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, reference.get_buffer(name))


class Residual(nn.Module):
    """A block as in networks of images, with a norm of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.instance = nn.GroupNorm(4, 8), nn.InstanceNorm2d(8, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        result: Tensor = y + self.instance(self.second(y))
        return result


def test_a_block_is_exported_and_runs_on_the_npu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Residual().eval(), torch.randn(1, 3, 16, 16)
    calibrate(net, [x])
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0
    assert vela_report(model.path).cpu_operators == ()
