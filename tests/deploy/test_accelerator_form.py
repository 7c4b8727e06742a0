"""Instructions have a form that an Ethos-U computes, with equal outputs in every bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate
from lightning_nna.deploy import export_tflite, vela_report, verify
from lightning_nna.deploy.capture import capture
from tests.emulation.modules import Function

pytestmark = pytest.mark.exactness

HAS_VELA = importlib.util.find_spec("ethosu") is not None
SPECS = ["litert-int8", "litert-int16x8"]

#: Shape of the operand, axes, and shape and axes in the program.
FORMS = [
    ((2, 3, 4, 5), (3,), (1, 24, 5, 1), (2,)),
    ((2, 3, 4, 5), (2, 3), (1, 6, 20, 1), (2,)),
    ((2, 6, 5, 3), (1, 2), (1, 2, 30, 3), (2,)),
    ((4, 3, 10), (2,), (1, 12, 10, 1), (2,)),
    # An axis stays between two that are reduced.
    ((2, 3, 5, 4), (1, 3), (1, 10, 12, 1), (2,)),
    # More than 4,096 elements: 2 sums of 4,000, and 3 of 2,731.
    ((3, 8000), (1,), (1, 2, 4000, 3), (1, 2)),
    ((1, 8193, 2), (1,), (1, 3, 2731, 2), (1, 2)),
    ((2, 3, 1, 4, 5), (3, 4), (1, 6, 20, 1), (2,)),
    # More than 65,536 channels side by side: 2 rows of 35,000, and 70,001 of 1.
    ((4, 70000), (0,), (1, 4, 2, 35000), (1,)),
    ((1, 4, 70001), (1,), (1, 4, 70001, 1), (1,)),
    ((2, 3, 70000), (1,), (1, 3, 4, 35000), (1,)),
    # What is computed is unchanged, and 4,099 is a prime number.
    ((1, 6, 5, 3), (1, 2), (1, 6, 5, 3), (1, 2)),
    ((12, 100), (1,), (12, 100), (1,)),
    ((2, 4099), (1,), (2, 4099), (1,)),
]


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("shape", "axes", "form", "over"), FORMS)
def test_means_are_computed_in_a_form_of_the_accelerator(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    form: tuple[int, ...],
    over: tuple[int, ...],
    spec: str,
    keepdim: bool,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    net, x = Function(lambda x: torch.tanh(x).mean(axes, keepdim)), torch.randn(shape)
    calibrate(net, [x], spec=spec)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0
    program = capture(net, [x])
    (mean,) = (each for each in program.operators if each.name == "MEAN")
    operand, axis = (program.tensors[name] for name in mean.inputs)
    assert operand.shape == form
    assert axis.data is not None
    assert tuple(axis.data) == over


class _Images(nn.Module):
    """Averages and resizings of a batch and of large images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1)
        self.groups, self.instances = nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.instances(self.second(self.groups(self.first(x))))
        mean = torch.tanh(y.mean()) + F.adaptive_avg_pool2d(y, 1)
        nearest = F.interpolate(y, scale_factor=2) + F.interpolate(
            y, (128, 130), mode="nearest-exact"
        )
        larger = nearest + F.interpolate(y, scale_factor=2, mode="bilinear")
        corners = F.interpolate(y, (127, 129), mode="bilinear", align_corners=True)
        return larger.mean((2, 3)) + (corners + mean).mean((2, 3))


@pytest.mark.skipif(not HAS_VELA, reason="ethos-u-vela is not installed")
@pytest.mark.parametrize("channels", [65536, 70000, 70001])
@pytest.mark.parametrize("spec", SPECS)
def test_a_mean_over_many_channels_stays_on_the_accelerator(
    spec: str, channels: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x = Function(lambda x: torch.tanh(x).mean(0)), torch.randn(4, channels)
    calibrate(net, [x], spec=spec)
    assert vela_report(export_tflite(net, [x], tmp_path / "net.tflite").path).cpu_operators == ()


@pytest.mark.skipif(not HAS_VELA, reason="ethos-u-vela is not installed")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("spec", SPECS)
def test_averages_and_resizings_stay_on_the_accelerator(
    spec: str, batch: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x = _Images(), torch.randn(batch, 3, 66, 67)
    calibrate(net, [x], spec=spec)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x], random_inputs=1) == 1.0
    assert vela_report(model.path).cpu_operators == ()
