"""A table gives what clipping and scaling its entries gives, element by element."""

from __future__ import annotations

import pytest
import torch

from lightning_nna.emulation.clipping import clip, inside
from lightning_nna.emulation.operators.tables import LookedUp, Table
from lightning_nna.emulation.program import Activation
from lightning_nna.emulation.ranges import QParams

GRIDS = (QParams(0.25, 5), QParams(0.25, -128), QParams(2.0**-12, 0, -(2**15), 2**15 - 1))


@pytest.mark.parametrize("fused_relu", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("reach", [3.0, 300.0, 70000.0])
def test_entries_are_clipped_once(grid: QParams, reach: float, fused_relu: bool) -> None:
    y = QParams(grid.scale, grid.zero_point, grid.low, grid.high, fused_relu)
    entries = torch.linspace(-reach, reach, 256).round()
    index, x = torch.randint(256, (5, 7)), QParams(0.5, 3)
    operand = Activation((index + x.bounds[0]) * x.scale, x)
    centered, clipped = clip(entries[index], y, keep=True)
    values, where = LookedUp(Table(entries, y), (operand,)).clipped(y, keep=True)
    assert torch.equal(values, centered * y.scale)
    grad = torch.randn(5, 7)
    assert torch.equal(inside(grad, where), inside(grad, clipped))
    assert LookedUp(Table(entries, y), (operand,)).clipped(y, keep=False)[1] is None
