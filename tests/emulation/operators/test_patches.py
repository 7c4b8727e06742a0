"""Patches of images and shuffles of their elements are exact, and are exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
UNFOLD = Example(lambda: nn.Unfold(3, padding=1, stride=2), ((4, 5, 16, 16),))
FOLD = Example(lambda: nn.Fold((1, 66), (1, 4), stride=(1, 2)), ((20, 32, 32),))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_unfold_passes_the_oracle(check: Check) -> None:
    check_operator("unfold", [UNFOLD], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_fold_passes_the_oracle(check: Check) -> None:
    check_operator("fold", [FOLD], checks=[check], runtime="litert")


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "unfold": lambda x: F.unfold(x, 2),
    "unfold, all arguments": lambda x: F.unfold(x[0], (2, 3), dilation=2, padding=1, stride=(1, 2)),
    "unfold of one element": lambda x: F.unfold(input=x, kernel_size=1, stride=2),
    "fold": lambda x: F.fold(x.reshape(2, 16, 12), (6, 8), 2, stride=2),
    "fold, overlapping": lambda x: F.fold(x.reshape(2, 12, 16), (5, 5), 2),
    "fold, padded": lambda x: F.fold(x.reshape(2, 12, 16)[0], (6, 7), 2, padding=1, stride=2),
    "fold, dilated": lambda x: F.fold(x.reshape(2, 12, 16), (8, 4), (3, 1), (2, 1)),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel shuffle of 3": lambda x: F.pixel_shuffle(x[0].reshape(9, -1, 1, 4)[:, 0], 3),
    "pixel unshuffle": lambda x: torch.pixel_unshuffle(x, 2),
    "channel shuffle": lambda x: F.channel_shuffle(x, 2),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", _FUNCTIONS)
def test_functions_and_their_arguments(spec: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Tanh(), Function(_FUNCTIONS[name]), nn.Sigmoid())
    shape = (2, 9, 4, 4) if name.endswith("of 3") else (2, 4, 6, 8)
    x = torch.randn(shape)
    assert not coverage(net, x, spec=spec).fallbacks
    replays(net, x, spec=spec)
    calibrate(net, [x], spec=spec)
    leaf = x.clone().requires_grad_()
    expected = net(leaf)
    slope = torch.autograd.grad(expected.square().sum(), leaf)[0]
    with emulate(net, spec):
        result = net(leaf)
        emulated = torch.autograd.grad(result.square().sum(), leaf)[0]
    torch.testing.assert_close(result, expected, atol=0.03, rtol=0)
    torch.testing.assert_close(emulated, slope, atol=0.1, rtol=0.1)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0
    assert "GATHER" not in model.operators


def test_many_overlaps_run_in_float() -> None:
    net = Function(lambda x: F.fold(x, (9, 9), 5))
    (row,) = coverage(net, torch.randn(1, 50, 25)).fallbacks
    assert "25 patches overlap" in row.remedy


@pytest.mark.parametrize(
    ("function", "remedy"),
    [
        (lambda x: F.conv3d(x, torch.ones(1, 2, 1, 1, 1)), "three axes"),
        (lambda x: F.conv_transpose3d(x, torch.ones(2, 1, 1, 1, 1)), "three axes"),
        (lambda x: F.max_pool3d(x, 2), "three axes"),
        (lambda x: F.adaptive_avg_pool3d(x, 1), "three axes"),
        (lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), "one or two axes"),
        (lambda x: F.interpolate(x[0], scale_factor=2, mode="bicubic"), "nearest and bilinear"),
        (lambda x: F.max_pool2d(x[0], 2, return_indices=True)[0], "return_indices"),
        (lambda x: F.adaptive_max_pool2d(x[0], 2, return_indices=True)[0], "return_indices"),
    ],
)
def test_what_no_kernel_has_says_what_to_write(
    function: Callable[[Tensor], Tensor], remedy: str
) -> None:
    rows = coverage(Function(function), torch.randn(2, 2, 4, 4, 4)).fallbacks
    assert remedy in rows[-1].remedy
