"""Validate that the packages of the extra ``deploy`` are installed."""

from __future__ import annotations

from importlib.util import find_spec

_MODULES = ("ai_edge_litert", "flatbuffers", "safetensors")


def require_extra() -> None:
    """Validate that the packages of the extra ``deploy`` are installed.

    Raises:
        ModuleNotFoundError: If one is missing; names it and the extra.
    """
    missing = [name for name in _MODULES if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"lightning_nna.deploy needs {', '.join(missing)}: install the extra, "
            "pip install 'lightning-nna[deploy]'",
            name=missing[0],
        )


require_extra()
