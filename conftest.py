"""Set-up of every pytest run: shapes are checked, documents are executed, one thread."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

# Nothing that a test starts may ask the network or a terminal.
os.environ.setdefault("WANDB_MODE", "offline")

# From here on, every annotated shape in these packages is checked at every call.
install_import_hook(["lightning_nna", "recipes"], "tests.typechecker.check")

# Every Python block of README.md and docs/ runs, in one namespace per page.
pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["*.md"],
    excludes=["CHANGELOG.md"],
).pytest()


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _names_of_doctests(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace["torch"] = torch
