"""Lightning callbacks that train a network in the arithmetic of the chip that will run it."""

from lightning_nna.checkpoints import load_deployed
from lightning_nna.emulation import (
    Coverage,
    Emulator,
    NNASpec,
    bake,
    calibrate,
    coverage,
    emulate,
    strip,
)

__version__ = "0.1.0"

__all__ = [
    "Coverage",
    "Emulator",
    "NNASpec",
    "bake",
    "calibrate",
    "coverage",
    "emulate",
    "load_deployed",
    "strip",
]
