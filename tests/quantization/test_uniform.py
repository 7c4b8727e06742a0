"""Uniform centroids with a fixed and with a learned distance, as weight methods: the contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_nna.quantization.uniform import UniformQuantization
from lightning_nna.testing.contract import CHECKS, module, trainer


@pytest.mark.parametrize("learned", [False, True], ids=["straight_through", "lsq"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[..., None], learned: bool, tmp_path: Path) -> None:
    check(lambda: UniformQuantization(3, learned=learned), tmp_path)


def test_another_module_begins_with_its_own_distances() -> None:
    callback = UniformQuantization(3, learned=True)
    trainer(callback, steps=3).fit(module())
    trained = callback.state_dict()
    other = UniformQuantization(3, learned=True)
    other.load_state_dict(trained)
    first, second = module(), module()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(100)
    largest = {name: float(x.detach().abs().max()) for name, x in second.named_parameters()}
    trainer(other, steps=1).fit(first)
    trainer(other, steps=1).fit(second)
    for name in other.selected:
        grid = other.transforms()[name].grid
        assert grid is not None
        assert largest[name] / 400 < grid.scales.max() < largest[name] / 50
