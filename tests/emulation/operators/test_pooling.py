"""Average and maximum pooling pass the oracle in every form that PyTorch has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.testing.operator_oracle import CHECKS, Check, Example, check_operator
from lightning_nna.testing.replay import replays
from tests.emulation.modules import Function

pytestmark = pytest.mark.exactness

SPECS = ["litert-int8", "litert-int16x8"]
IMAGE, SEQUENCE = (4, 16, 26, 26), (10, 25, 90)

AVERAGES = [
    Example(lambda: nn.AvgPool2d(2), (IMAGE,)),
    Example(lambda: nn.AvgPool2d(3, 2, 1), (IMAGE,)),
    Example(lambda: nn.AvgPool1d(2), (SEQUENCE,)),
]
MAXIMA = [
    Example(lambda: nn.MaxPool2d(2), (IMAGE,)),
    Example(lambda: nn.MaxPool2d(3, 2, 1), (IMAGE,)),
    Example(lambda: nn.MaxPool1d(2), (SEQUENCE,)),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", AVERAGES)
def test_averages_pass_the_oracle(example: Example, check: Check) -> None:
    check_operator("average_pool", [example], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", MAXIMA)
def test_maxima_pass_the_oracle(example: Example, check: Check) -> None:
    check_operator("max_pool", [example], checks=[check], runtime="litert")


# Kernel, stride, padding, ceil_mode: windows that the kernel has as SAME or VALID, and others.
_FORMS = [
    (3, 1, 1, False),
    (3, 2, 1, False),
    (2, 2, 0, True),
    (3, 2, 0, True),
    (3, 2, 1, True),
    ((2, 5), (1, 3), (1, 2), True),
    (4, None, 2, True),
    (1, 2, 0, False),
]
_SIZES = [(9, 12), (8, 7)]


def _emulated_and_float(
    net: nn.Module, x: Tensor, spec: str, tmp_path: Path
) -> tuple[Tensor, Tensor]:
    """Compare with LiteRT, export and verify; return the emulated and the float result."""
    assert not coverage(net, x, spec=spec).fallbacks
    replays(net, x, spec=spec)
    calibrate(net, [x], spec=spec)
    with torch.no_grad():
        expected = net(x)
        with emulate(net, spec):
            result = net(x)
    assert result.shape == expected.shape
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0
    return result, expected


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", _SIZES)
@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_every_form_of_an_average(
    spec: str, size: tuple[int, int], form: Any, count_include_pad: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    kernel, stride, padding, ceil = form
    net = nn.AvgPool2d(kernel, stride, padding, ceil, count_include_pad)
    x = torch.randn(2, 3, *size) + 0.3
    result, expected = _emulated_and_float(net, x, spec, tmp_path)
    # A step of the average, another of a product with up to 25 / 4.
    step = float(x.abs().max()) / (100 if spec == "litert-int8" else 30_000)
    assert float((result - expected).abs().max()) < 8 * step


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", _SIZES)
@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("dilation", [1, 2])
def test_every_form_of_a_maximum(
    spec: str, size: tuple[int, int], form: Any, dilation: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    kernel, stride, padding, ceil = form
    net = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil)
    x = torch.randn(2, 3, *size) - 0.5
    result, expected = _emulated_and_float(net, x, spec, tmp_path)
    step = float(x.abs().max()) / (100 if spec == "litert-int8" else 30_000)
    assert float((result - expected).abs().max()) < step


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.avg_pool2d(input=x, kernel_size=(2, 3), stride=1),
        lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=4),
        lambda x: F.avg_pool2d(x, 3, ceil_mode=True, divisor_override=1),
        lambda x: F.avg_pool1d(x[0], 3, 2, 1),
        lambda x: torch.avg_pool1d(x[0], kernel_size=(3,), ceil_mode=True),
        lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
        lambda x: torch.max_pool2d(input=x, kernel_size=[2, 3], ceil_mode=True),
        lambda x: F.max_pool1d(x[0], 3, 2, 1),
        lambda x: torch.max_pool1d(x[0], 2, dilation=3),
        lambda x: F.max_pool2d(F.relu(x), 3, 2, 1),
        lambda x: F.max_pool2d(x[0], 2),
        lambda x: F.avg_pool2d(x[0], 2) + F.avg_pool1d(x[0, 0, :4], 2),
    ],
)
def test_functions_and_their_arguments(
    spec: str, function: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 6)
    result, expected = _emulated_and_float(Function(function), x, spec, tmp_path)
    torch.testing.assert_close(result, expected, atol=0.12, rtol=0.05)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("form", _FORMS)
def test_gradients_are_those_of_float(spec: str, form: Any) -> None:
    kernel, stride, padding, ceil = form
    x = torch.randn(2, 3, 8, 9, requires_grad=True)
    net = nn.AvgPool2d(kernel, stride, padding, ceil)
    expected = torch.autograd.grad(net(x).square().sum(), x)[0]
    calibrate(net, [1.1 * x.detach()], spec=spec)
    with emulate(net, spec):
        result = torch.autograd.grad(net(x).square().sum(), x)[0]
    torch.testing.assert_close(result, expected, atol=0.05, rtol=0)


def test_all_windows_of_two_bytes_round_as_the_kernel_does() -> None:
    pairs = torch.cartesian_prod(torch.arange(-128, 128), torch.arange(-128, 128)).float() / 100
    for offset in (0.0, 0.37):
        x = pairs.reshape(1, 1, -1, 2) + offset
        assert replays(nn.AvgPool2d((1, 2)), x, spec="litert-int8")["AVERAGE_POOL_2D"] == 65536


def test_indices_run_in_float() -> None:
    net = Function(lambda x: F.max_pool2d(x, 2, return_indices=True)[0])
    assert coverage(net, torch.randn(1, 2, 4, 4)).fallbacks
