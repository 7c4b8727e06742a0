"""The chip: its arithmetic, put under the torch functions that a module calls."""

from lightning_nna.emulator.attachment import bake, calibrate, emulate, strip
from lightning_nna.emulator.coverage import Coverage, coverage
from lightning_nna.emulator.engine import Emulator
from lightning_nna.emulator.spec import NNASpec

__all__ = ["Coverage", "Emulator", "NNASpec", "bake", "calibrate", "coverage", "emulate", "strip"]
