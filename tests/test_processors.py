"""The same ranges and weights give the same bytes on every processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processors

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processors") / "states.pt"
    processors.prepare(path)
    return path


@pytest.fixture(scope="module")
def here(states: Path) -> dict[str, list[str]]:
    return processors.digests(states)


@pytest.mark.parametrize(
    "setting", processors.SETTINGS, ids=lambda setting: setting["ATEN_CPU_CAPABILITY"]
)
def test_programs_and_outputs_are_the_same_bytes(
    setting: dict[str, str], states: Path, here: dict[str, list[str]]
) -> None:
    command = [sys.executable, "-m", "tests.processors", str(states)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | setting, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == here
