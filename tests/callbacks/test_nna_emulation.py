from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_nna import bake, calibrate, coverage, emulate, strip
from lightning_nna.callbacks import NNAEmulation
from lightning_nna.testing import SmallRecurrentModule
from lightning_nna.testing.contract import CHECKS, assert_same, is_unhooked, module, trainer


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[..., None], fidelity: str, tmp_path: Path) -> None:
    check(lambda: NNAEmulation(calibration_steps=2, fidelity=fidelity), tmp_path)
