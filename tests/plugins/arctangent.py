"""Arctangent as an operator from outside of the package: a table of 256 entries."""

from __future__ import annotations

import torch

from lightning_nna.emulation.operators.tabulated import tabulated

#: For ``register_operator``. float64 hides what differs from processor to processor.
ARCTANGENT = tabulated(
    "atan", torch.atan, lambda x: torch.atan(x.double()).float(), torch=("atan", "arctan")
)
