"""Normalisations on the chip."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_nna import emulate


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


NORMS = [nn.LayerNorm(64), nn.LayerNorm((4, 16), bias=False), nn.RMSNorm(64)]


def varied(module: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    """A module with gains of its own, and rows of different loudness."""
    torch.manual_seed(0)
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 1, 0.3)
    x = torch.randn(2000, *module.normalized_shape) + 0.3  # type: ignore[misc]
    return module, x * torch.rand(2000, *[1] * (x.dim() - 1)) ** 3


@pytest.mark.parametrize("module", NORMS, ids=str)
def test_fast_differs_in_less_than_a_thousandth_of_the_outputs(module: nn.Module) -> None:
    module, x = varied(module)
    with emulate(module) as chip, torch.no_grad():
        with chip.observing():
            module(x)
        exact = module(1.1 * x)
        chip.fidelity = "fast"
        differing = (module(1.1 * x) != exact).float().mean()
    assert float(differing) < 1e-3


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
@pytest.mark.parametrize("module", NORMS, ids=str)
def test_the_gradient_is_the_float_functions_where_nothing_is_clipped(
    module: nn.Module, fidelity: str
) -> None:
    module, x = varied(module)
    with emulate(module, fidelity=fidelity) as chip:  # type: ignore[arg-type]
        with chip.observing():
            module(x)
        given = x.clone().requires_grad_()
        result = module(given)
        grad = torch.randn_like(result)
        result.backward(grad)
        found = [given.grad, *(p.grad for p in module.parameters())]
        (site,) = (key for key in chip.ranges.ranges if key.endswith("norm#0/input"))
        step = chip.ranges[site].maximum - chip.ranges[site].minimum
    module.zero_grad()
    # The operand as the chip has it; the calibration's own data are not clipped.
    low = min(float(x.min()), 0.0)
    scale = step / 255
    on_grid = ((x / scale).round() * scale).clamp(low).requires_grad_()
    module(on_grid).backward(grad)
    expected = [on_grid.grad, *(p.grad for p in module.parameters())]
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        assert b is not None
        assert float((a - b).norm() / b.norm()) < 0.02
