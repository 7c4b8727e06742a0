"""Runtimes: what runs programs, each behind the same small interface.

runtime = runtime_of("tflm")
loaded = runtime.load(contents)  # bytes of a .tflite file
(results,) = loaded.run([[integers]])  # one call with one input
"""

from lightning_nna.deploy.runtimes.interface import (
    LoadedProgram,
    MissingRuntimeError,
    Runtime,
    UnsupportedProgramError,
)
from lightning_nna.deploy.runtimes.registry import RUNTIMES, runtime_of

__all__ = [
    "RUNTIMES",
    "LoadedProgram",
    "MissingRuntimeError",
    "Runtime",
    "UnsupportedProgramError",
    "runtime_of",
]
