"""Masks that are part of a program are no condition in it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate
from lightning_nna.deploy import export_tflite, vela_report, verify
from tests.deploy.networks import SPECS

pytestmark = pytest.mark.exactness
TIME = 6
CAUSAL = torch.ones(TIME, TIME, dtype=torch.bool).tril()
HAS_VELA = importlib.util.find_spec("ethosu") is not None


class Attention(nn.Module):
    """Attend with arguments of ``F.scaled_dot_product_attention``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.projections, self.settings = nn.Linear(8, 24), settings

    def forward(self, x: Tensor) -> Tensor:
        heads = self.projections(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        joined = F.scaled_dot_product_attention(*heads.unbind(0), **self.settings)
        return joined.transpose(1, 2).flatten(2)


class Filled(nn.Module):
    """Fill scores before a softmax."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.scores, self.mask = nn.Linear(8, TIME), mask

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.scores(x).masked_fill(self.mask, -torch.inf), -1)


#: Functions that return a network with a mask, and how many instructions the mask is.
MASKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "causal": (lambda: Attention(is_causal=True), 1),
    "padding": (lambda: Attention(attn_mask=(torch.arange(TIME) < 4).view(1, 1, TIME)), 1),
    "with a bias": (
        lambda: Attention(attn_mask=torch.randn(TIME, TIME).masked_fill(~CAUSAL, -torch.inf)),
        1,
    ),
    "filled": (lambda: Filled(~CAUSAL), 1),
    "that keeps everything": (
        lambda: Attention(attn_mask=torch.ones(TIME, TIME, dtype=torch.bool)),
        0,
    ),
    "that fills nothing": (lambda: Filled(torch.zeros(TIME, TIME, dtype=torch.bool)), 0),
}


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_a_minimum_or_nothing(name: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, count = MASKS[name]
    net, x = build(), torch.randn(2, TIME, 8)
    calibrate(net, [x], spec=SPECS[bits])
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert "SELECT_V2" not in model.operators
    assert model.operators.get("MINIMUM", 0) == count
    assert verify(net, model.path, [x]) == 1.0


@pytest.mark.skipif(not HAS_VELA, reason="ethos-u-vela is not installed")
def test_a_masked_attention_stays_on_the_npu(tmp_path: Path) -> None:
    net, x = Attention(is_causal=True), torch.randn(1, TIME, 8)
    calibrate(net, [x])
    report = vela_report(export_tflite(net, [x], tmp_path / "net.tflite").path)
    assert report.cpu_operators == ()


def test_another_value_is_selected(tmp_path: Path) -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first = torch.tanh(x)
            return torch.where(CAUSAL[0], first, first.roll(1, 0))

    net, x = Chosen(), torch.randn(3, TIME)
    calibrate(net, [x])
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert model.operators["SELECT_V2"] == 1
    assert verify(net, model.path, [x]) == 1.0
