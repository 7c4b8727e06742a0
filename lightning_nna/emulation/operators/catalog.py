"""The registry of operators with all of the package's own: every module of this folder is imported.

A new operator of the package is one module here, which enters its record; no list names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from lightning_nna.emulation.operators.record import (
    kernels,
    operator_of,
    operators,
    register_kernel,
    register_operator,
)

__all__ = ["kernels", "operator_of", "operators", "register_kernel", "register_operator"]

for _module in pkgutil.iter_modules([str(Path(__file__).parent)]):
    importlib.import_module(f"{__package__}.{_module.name}")
