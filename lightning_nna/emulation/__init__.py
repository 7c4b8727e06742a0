"""Emulate an accelerator: its arithmetic, under the torch functions that a module calls."""

from lightning_nna.emulation.attachment import bake, calibrate, emulate, strip
from lightning_nna.emulation.coverage import Coverage, coverage
from lightning_nna.emulation.emulator import Emulator
from lightning_nna.emulation.operators.record import (
    Kernel,
    Operator,
    kernels,
    register_operator,
    registered,
)
from lightning_nna.emulation.spec import NNASpec

__all__ = [
    "Coverage",
    "Emulator",
    "Kernel",
    "NNASpec",
    "Operator",
    "bake",
    "calibrate",
    "coverage",
    "emulate",
    "kernels",
    "register_operator",
    "registered",
    "strip",
]
