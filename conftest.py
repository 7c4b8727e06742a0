"""Set-up of every pytest run: shapes are checked, documents are executed, one thread."""

from __future__ import annotations

import os
import random
import socket
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from tests import check_packages

# Nothing that a test starts may ask the network or a terminal.
os.environ.setdefault("WANDB_MODE", "offline")

# Two processes of a test meet on this machine, whatever its name resolves to.
for _loopback in {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback)

# From here on, every annotated shape in these packages is checked at every call.
check_packages(["lightning_nna", "recipes"])


def _enter_folder_of_page(namespace: dict[str, Any]) -> None:
    """Let a page's code blocks write where they like, and start from one seed."""
    _seed_everything()
    namespace["_start"], namespace["_folder"] = os.getcwd(), TemporaryDirectory()
    os.chdir(namespace["_folder"].name)


def _leave_folder_of_page(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["_start"])
    namespace["_folder"].cleanup()


# Every Python block of README.md and docs/ runs, in one namespace per page.
pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["*.md"],
    setup=_enter_folder_of_page,
    teardown=_leave_folder_of_page,
).pytest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: what begins last should not run long beside idle cores."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def _seed_everything() -> None:
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    _seed_everything()


@pytest.fixture(autouse=True)
def _names_of_doctests(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace["torch"] = torch
