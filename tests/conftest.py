"""What tests share: the corpora beside the checkout, and skipping what a machine lacks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


_ADDRESS = ("MASTER_", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "GLOO_")
_LOGGERS = (
    *("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero"),
    *("lightning_nna", "lightning_nna.emulation", "recipes"),
)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """Fail the test that changes what later tests of its process depend on, and undo the change.

    What starts a process group belongs into ``lightning_nna.testing.contract.own_process_group``.
    """
    group, loggers, levels = _state_of_group(), _loggers(), _state_of_loggers(_loggers())
    yield
    left = {
        key: (old, new)
        for before, after in (
            (group, _state_of_group()),
            (levels, _state_of_loggers(loggers)),
        )
        for key in before | after
        if (old := before.get(key)) != (new := after.get(key))
    }
    if left:
        _undo(group, loggers, levels)
    assert not left, f"the test leaves other values behind (before, after): {left}"


def _state_of_group() -> dict[str, Any]:
    """Return what decides whether processes that a test starts find each other."""
    lightning = sys.modules.get("lightning_utilities.core.rank_zero")
    only = getattr(lightning, "rank_zero_only", None)
    return {
        **{name: value for name, value in os.environ.items() if name.startswith(_ADDRESS)},
        "rank": getattr(only, "rank", 0),
        "process group": torch.distributed.is_initialized(),
    }


def _loggers() -> dict[str, logging.Logger]:
    """Return the loggers that are set up; their packages do that when they are imported."""
    names = [name for name in _LOGGERS if name.split(".")[0] in sys.modules]
    return {"root": logging.getLogger(), **{name: logging.getLogger(name) for name in names}}


def _state_of_loggers(loggers: dict[str, logging.Logger]) -> dict[str, Any]:
    return {name: (one.level, one.propagate, one.disabled) for name, one in loggers.items()}


def _undo(group: dict[str, Any], loggers: dict[str, logging.Logger], levels: Any) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    if torch.distributed.is_initialized() and not group["process group"]:
        torch.distributed.destroy_process_group()
    rank_zero_only.rank = group["rank"]
    for name in [name for name in os.environ if name.startswith(_ADDRESS)]:
        del os.environ[name]
    os.environ.update({name: group[name] for name in group if name.startswith(_ADDRESS)})
    for name, logger in loggers.items():
        level, logger.propagate, logger.disabled = levels[name]
        logger.setLevel(level)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of corpora; a test that asks for it bears the marker ``data``."""
    return SHARED_DATA


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests whose corpora or device this machine does not have."""
    lacking = {
        "data": (SHARED_DATA.is_dir(), f"no corpora in {SHARED_DATA.name}/ beside the checkout"),
        "gpu": (torch.cuda.is_available(), "no CUDA device"),
    }
    for item in items:
        for marker, (present, reason) in lacking.items():
            if item.get_closest_marker(marker) and not present:
                item.add_marker(pytest.mark.skip(reason=reason))
