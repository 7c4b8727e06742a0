"""What tests share: the corpora beside the checkout, and skipping what a machine lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


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
