"""Emulated normalizations: every instruction is LiteRT's, however much variances differ."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.testing.replay import check_instructions, replays

SPECS = {8: "litert-int8", 16: "litert-int16x8"}
LAYERS: dict[str, nn.Module] = {
    "layer": nn.LayerNorm(31),
    "layer, one value": nn.LayerNorm(1),
    "layer, two axes": nn.LayerNorm((3, 9), bias=False),
    "layer, large eps": nn.LayerNorm(64, eps=0.3),
    "layer, plain": nn.LayerNorm(256, eps=1e-12, elementwise_affine=False),
    "rms": nn.RMSNorm(40),
    "rms, two axes": nn.RMSNorm((5, 7), eps=1e-3),
    "rms, no eps": nn.RMSNorm(33, eps=0.0, elementwise_affine=False),
}
# How rows differ: their deviation is 2^-u, u uniform up to here. From 7 or so on a row is
# normalized twice.
SPREADS = [0.0, 3.0, 12.0]
ROWS = 1000


def layer_of(name: str) -> nn.Module:
    """A layer with a gain and a shift unlike those at the start."""
    module = copy.deepcopy(LAYERS[name])
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def batch(module: nn.Module, spread: float) -> Tensor:
    """Rows of many deviations and means, after a few of the worst kind."""
    shape = module.normalized_shape
    deviations = torch.exp2(-spread * torch.rand(ROWS, 1))
    rows = deviations * (torch.randn(ROWS, math.prod(shape)) + torch.randn(ROWS, 1))
    top = rows.abs().max()
    rows[:3] = torch.tensor([[0.0], [1.0], [-1.0]]) * top  # No variance at all.
    rows[3:8] = top * torch.randn(5, rows.shape[1]).sign()  # The largest there is.
    rows[8:11, 1:] = 0.0  # One value that stands out.
    rows[11] = 1e-3 * top
    return rows.view(ROWS, *shape)


@pytest.mark.exactness
@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_instruction_is_the_references(name: str, spread: float, bits: int) -> None:
    torch.manual_seed(0)
    module = layer_of(name)
    x = batch(module, spread)[8:]  # Calibration meets no row without variance: eps may be 0.
    compared = replays(module, x, inputs=[2 * batch(module, spread)], spec=SPECS[bits])
    assert {"MUL", "MEAN", "RSQRT"} <= set(compared)
    assert ("SUB" in compared) == isinstance(module, nn.LayerNorm)
    assert compared["MUL"] >= 2 * x.numel()


@pytest.mark.exactness
def test_ten_thousand_variances() -> None:
    """The inverse square root over its whole range, of the largest and smallest variances."""
    torch.manual_seed(1)
    module, x = nn.RMSNorm(3, eps=1e-7), torch.randn(12_000, 3)
    x *= torch.exp2(-14 * torch.rand(12_000, 1))
    x[:10] = 0.0
    assert replays(module, x, inputs=[1.1 * x], spec=SPECS[16])["RSQRT"] >= 12_000


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8", "ethos-u", "shift"])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_integers_are_the_same_whether_somebody_listens_or_not(
    name: str, spread: float, spec: str
) -> None:
    torch.manual_seed(0)
    module = layer_of(name)
    x = batch(module, spread)
    with emulate(module, spec) as chip, torch.no_grad():
        with chip.observing():
            module(x[8:])
        at_once = module(1.3 * x)
        with chip.running(recorder=[].append):
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
        with chip.running(fidelity="fast"):
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


@pytest.mark.exactness
@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_what_is_normalized_already_equals_litert(spec: str) -> None:
    """The range of its mean is float noise; a grid for that would overflow the multiplier."""
    torch.manual_seed(0)
    twice = nn.Sequential(nn.LayerNorm(24), nn.LayerNorm(24))
    assert replays(twice, torch.randn(50, 24), spec=spec)["MEAN"] == 200


@pytest.mark.exactness
@pytest.mark.parametrize("grid", ["layers_of_zeros", "raw_features"])
@pytest.mark.parametrize("module", [nn.LayerNorm(12), nn.RMSNorm(12)], ids=["layer", "rms"])
def test_an_input_in_steps_of_one(module: nn.Module, grid: str) -> None:
    """A real grid of scale 1 and zero point 0 is no absent one: it widens to 16 bits, too."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 12)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    integers = torch.randint(-127, 128, (40, 12)).float()
    integers[0, 0], integers[0, 1] = -128, 127
    net = {
        "layers_of_zeros": nn.Sequential(layer, module),
        "raw_features": nn.Sequential(module),
    }[grid]
    recorded: list = []
    with emulate(net) as chip:
        with chip.observing(), torch.no_grad():
            net(integers)
        with chip.running(recorder=recorded.append):
            first = net(integers)
        trained = net.train()(integers)
    assert {"MUL", "RSQRT"} <= set(check_instructions(recorded, chip.spec.runtime))
    assert all(x.dtype == "int16" for op in recorded if op.operator == "MUL" for x in op.inputs)
    torch.testing.assert_close(first, trained, rtol=0, atol=0)
    torch.testing.assert_close(first, module(net[:-1](integers)), rtol=0, atol=0.02)
