"""Normalisations on the chip."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_nna import emulate
from tests.emulator.replay import replays


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8", "ethos-u", "shift"])
@pytest.mark.parametrize(
    "module", [nn.LayerNorm(31), nn.LayerNorm((3, 9), bias=False), nn.RMSNorm((5, 7))], ids=str
)
def test_the_integers_are_the_same_whether_somebody_listens_or_not(
    module: nn.Module, spec: str
) -> None:
    torch.manual_seed(0)
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    shape = (900, *module.normalized_shape)  # type: ignore[misc]
    x = (torch.randn(shape) + 0.3) * torch.rand(900, *[1] * (len(shape) - 1))
    with emulate(module, spec) as chip, torch.no_grad():
        with chip.observing():
            module(x)
        at_once = module(1.3 * x)
        chip.recorder = [].append  # type: ignore[assignment]
        assert torch.equal(module(1.3 * x), at_once)


@pytest.mark.exactness
@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_what_is_normalised_already_equals_litert(spec: str) -> None:
    """The range of its mean is float noise; a grid for that would overflow the multiplier."""
    torch.manual_seed(0)
    twice = nn.Sequential(nn.LayerNorm(24), nn.LayerNorm(24))
    assert replays(twice, torch.randn(50, 24), spec=spec)["MEAN"] == 200
