"""Packages that deployment needs beyond this one."""

from __future__ import annotations

from importlib.util import find_spec

_MODULES = ("ai_edge_litert", "flatbuffers", "safetensors")


def demand_extra() -> None:
    """Demand the packages of the extra ``deploy``.

    Raises:
        ModuleNotFoundError: Names the extra and what is missing of it.
    """
    missing = [name for name in _MODULES if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"lightning_nna.deploy needs {', '.join(missing)}: install the extra, "
            "pip install 'lightning-nna[deploy]'",
            name=missing[0],
        )


demand_extra()
