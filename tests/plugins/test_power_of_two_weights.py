"""A weight method from outside of the package passes the contract of those inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_nna import calibrate, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.testing.contract import CHECKS, module, trainer
from tests.plugins.power_of_two_weights import PowerOfTwoWeights, PowersOfTwo


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[..., None], tmp_path: Path) -> None:
    check(PowerOfTwoWeights, tmp_path)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_weight_takes_the_nearest_value(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 40)
    magnitudes = 2.0 ** -torch.arange(2 ** (bits - 1) - 1)
    values = torch.cat([-magnitudes, torch.zeros(1), magnitudes])
    nearest = (weight[..., None] - values).abs().min(-1).values
    rounded = PowersOfTwo(0, bits).apply(weight, hard=True)
    assert set(rounded.unique().tolist()) <= set(values.tolist())
    torch.testing.assert_close((rounded - weight).abs(), nearest, rtol=0, atol=0)


def test_a_trained_network_has_powers_of_two_that_learn() -> None:
    net = module()
    before = net.lstm.weight_hh_l0.detach().clone()
    callback = PowerOfTwoWeights(3)
    trainer(callback, steps=8).fit(net)
    weight = net.lstm.weight_hh_l0.detach()
    mantissas = torch.frexp(weight[weight != 0].abs())[0]
    assert set(mantissas.tolist()) == {0.5}
    assert len(weight.abs().unique()) <= 4
    top = callback.state_dict()["tops"]["lstm.weight_hh_l0"]
    assert not torch.equal(PowersOfTwo(top, 3).apply(before, hard=True), weight)


def test_with_softplus_it_is_exported_to_the_bit(tmp_path: Path) -> None:
    net = module()
    net.head = nn.Sequential(nn.Linear(8, 8), nn.Softplus(), nn.Linear(8, 2))
    x = torch.randn(5, 6, 4)
    trainer(PowerOfTwoWeights(), steps=8).fit(net)
    calibrate(net, [x])
    with emulate(net) as chip:
        weight = net.head[0].weight
        torch.testing.assert_close(chip.state.weight(weight, 1).values, weight, rtol=0, atol=0)
    model = export_tflite(net.eval(), [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0


def test_bits_are_validated() -> None:
    with pytest.raises(ValueError, match="bits must be 2 to 4, got 5"):
        PowerOfTwoWeights(5)
