"""Resizing passes the oracle with all conventions of PyTorch that a kernel has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.testing.operator_oracle import (
    CHECKS,
    Check,
    Example,
    check_operator,
    is_exported,
)
from lightning_nna.testing.replay import replays
from tests.emulation.modules import Function

pytestmark = pytest.mark.exactness

SPECS = ["litert-int8", "litert-int16x8"]
EXAMPLES = [
    Example(lambda: nn.Upsample(scale_factor=2), ((4, 5, 12, 12),)),
    Example(lambda: nn.Upsample(scale_factor=2, mode="bilinear"), ((4, 5, 12, 12),)),
    Example(lambda: nn.Upsample(scale_factor=2, mode="linear"), ((8, 10, 64),)),
]
#: Sizes that are products, whose instructions are those of a convolution.
PRODUCTS = [
    Example(
        lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        ((4, 5, 12, 12),),
    ),
    Example(lambda: nn.Upsample(size=100, mode="linear"), ((4, 30, 40),)),
    Example(lambda: nn.Upsample(size=(23, 31)), ((4, 5, 16, 16),)),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", EXAMPLES)
def test_oracle(example: Example, check: Check) -> None:
    check_operator("interpolate", [example], checks=[check], runtime="litert")


@pytest.mark.parametrize(
    "check",
    [check for check in CHECKS if check is not is_exported],
    ids=lambda check: check.__name__,
)
@pytest.mark.parametrize("example", PRODUCTS)
def test_oracle_of_products(example: Example, check: Check) -> None:
    check_operator("interpolate", [example], checks=[check], runtime="litert")


_IMAGES: list[dict[str, Any]] = [
    {"size": (14, 9)},
    {"size": 5, "mode": "nearest-exact"},
    {"scale_factor": 3},
    {"scale_factor": 1.5},
    {"scale_factor": (2.3, 0.6)},
    {"scale_factor": 1.5, "recompute_scale_factor": True},
    {"scale_factor": 2, "mode": "bilinear"},
    {"scale_factor": 4, "mode": "bilinear", "align_corners": False},
    {"size": (13, 12), "mode": "bilinear", "align_corners": True},
    {"size": (23, 31), "mode": "bilinear"},
    {"size": (3, 4), "mode": "bilinear"},
    {"size": 1, "mode": "bilinear", "align_corners": True},
    {"scale_factor": 1.7, "mode": "bilinear", "align_corners": True},
    {"scale_factor": 1.7, "mode": "bilinear", "recompute_scale_factor": True},
    {"size": (7, 3), "mode": "area"},
    {"scale_factor": 2, "mode": "area"},
]
_SEQUENCES: list[dict[str, Any]] = [
    {"size": 17},
    {"scale_factor": 2.5},
    {"size": 23, "mode": "linear"},
    {"scale_factor": 2, "mode": "linear", "align_corners": True},
    {"size": 3, "mode": "area"},
]
_CASES = [((2, 3, 7, 6), form) for form in _IMAGES] + [((2, 3, 10), form) for form in _SEQUENCES]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("shape", "form"), _CASES)
def test_every_convention(
    spec: str, shape: tuple[int, ...], form: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x = Function(lambda x: F.interpolate(x, **form)), torch.randn(shape)
    assert not coverage(net, x, spec=spec).fallbacks
    replays(net, x, spec=spec)
    calibrate(net, [x], spec=spec)
    leaf = x.clone().requires_grad_()
    expected = net(leaf)
    slope = torch.autograd.grad(expected.square().sum(), leaf)[0]
    with emulate(net, spec):
        result = net(leaf)
        emulated = torch.autograd.grad(result.square().sum(), leaf)[0]
    torch.testing.assert_close(result, expected, atol=0.05, rtol=0)
    # At an end of the range an input may be clipped.
    assert float(F.cosine_similarity(emulated.flatten(), slope.flatten(), dim=0)) > 0.95
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_all_sizes_have_the_positions_of_the_kernel(spec: str, corners: bool) -> None:
    x = torch.randn(1, 1, 11, 37)
    for size in (1, 2, 5, 30, 31, 100, 333):
        form: dict[str, Any] = {"size": (7, size), "mode": "bilinear", "align_corners": corners}
        replays(Function(lambda x, form=form: F.interpolate(x, **form)), x, spec=spec)
        nearest = {"size": (7, size), "mode": "nearest-exact" if corners else "nearest"}
        replays(Function(lambda x, form=nearest: F.interpolate(x, **form)), x, spec=spec)


@pytest.mark.parametrize(
    "form",
    [
        {"size": (5, 5), "mode": "bicubic"},
        {"size": (5, 5), "mode": "bilinear", "antialias": True},
        # PyTorch has positions by the factor 1.7, the kernel by 11 / 7.
        {"scale_factor": 1.7, "mode": "bilinear"},
    ],
)
def test_what_no_kernel_has_runs_in_float(form: dict[str, Any]) -> None:
    net = Function(lambda x: F.interpolate(x, **form))
    assert coverage(net, torch.randn(1, 2, 7, 6)).fallbacks
