"""Adaptive pooling passes the oracle with even and uneven windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.testing.operator_oracle import (
    CHECKS,
    Check,
    Example,
    check_operator,
    scale_is_learned,
)
from lightning_nna.testing.replay import replays
from tests.emulation.modules import Function

pytestmark = pytest.mark.exactness

SPECS = ["litert-int8", "litert-int16x8"]
MEANS = [
    Example(lambda: nn.AdaptiveAvgPool2d(1), ((100, 101, 3, 5),)),
    Example(lambda: nn.AdaptiveAvgPool1d(1), ((100, 101, 7),)),
]
AVERAGES = [Example(lambda: nn.AdaptiveAvgPool2d((13, None)), ((4, 8, 26, 25),))]
MAXIMA = [Example(lambda: nn.AdaptiveMaxPool2d((13, None)), ((4, 8, 26, 25),))]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", MEANS)
def test_means_pass_the_oracle(example: Example, check: Check) -> None:
    check_operator("adaptive_average_pool", [example], checks=[check], runtime="litert")


@pytest.mark.parametrize(
    "check", [c for c in CHECKS if c != scale_is_learned], ids=lambda check: check.__name__
)
@pytest.mark.parametrize("example", AVERAGES)
def test_averages_pass_the_oracle(example: Example, check: Check) -> None:
    # The average of a window has the scale of the input, which is none of its own.
    check_operator("adaptive_average_pool", [example], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", MAXIMA)
def test_maxima_pass_the_oracle(example: Example, check: Check) -> None:
    check_operator("adaptive_max_pool", [example], checks=[check], runtime="litert")


_FUNCTIONS = [
    lambda x: F.adaptive_avg_pool2d(x, 1),
    lambda x: F.adaptive_avg_pool2d(x, (1, 3)),
    lambda x: F.adaptive_avg_pool2d(x[0], (4, None)),
    lambda x: F.adaptive_avg_pool2d(input=x, output_size=(4, 7)),
    lambda x: F.adaptive_avg_pool2d(x, (20, 3)),
    lambda x: torch.adaptive_avg_pool1d(x[0], 5),
    lambda x: F.adaptive_avg_pool1d(x[0, 0], 1),
    lambda x: F.adaptive_max_pool2d(x, 1),
    lambda x: F.adaptive_max_pool2d(x, (4, 7)),
    lambda x: F.adaptive_max_pool2d(x[0], (None, 3)),
    lambda x: F.adaptive_max_pool1d(x[0], [5]),
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("function", _FUNCTIONS)
def test_functions_and_their_windows(
    spec: str, function: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x = Function(function), torch.randn(2, 3, 10, 9)
    assert not coverage(net, x, spec=spec).fallbacks
    replays(net, x, spec=spec)
    calibrate(net, [x], spec=spec)
    with torch.no_grad():
        expected = net(x)
        with emulate(net, spec):
            result = net(x)
    torch.testing.assert_close(result, expected, atol=0.05, rtol=0)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0


def test_the_mean_of_an_image_is_one_instruction_over_its_axes(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)), torch.randn(2, 3, 8, 8)
    calibrate(net, [x])
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert model.operators["MEAN"] == 1


def test_windows_of_too_many_parts_run_in_float() -> None:
    net = nn.AdaptiveAvgPool2d(31)
    assert coverage(net, torch.randn(1, 2, 47, 47)).fallbacks


def test_indices_run_in_float() -> None:
    net = Function(lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[0])
    assert coverage(net, torch.randn(1, 2, 4, 4)).fallbacks
