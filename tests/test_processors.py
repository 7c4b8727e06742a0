"""The same ranges and weights give the same bytes on every processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests import processors

ROOT = Path(__file__).parents[1]


def test_programs_and_outputs_are_the_same_bytes(tmp_path: Path) -> None:
    """Here, and in a process for which PyTorch and oneDNN do without vector instructions."""
    torch.manual_seed(0)
    states = tmp_path / "states.pt"
    processors.prepare(states)
    # With the shape checks of this process, whose frames are part of call sites.
    script = "import conftest; from tests.processors import main; main()"
    command = [sys.executable, "-c", script, str(states)]
    environment = os.environ | processors.PLAINEST
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as plainest:
        here = processors.digests(states)
        told, _ = plainest.communicate()
    assert plainest.returncode == 0
    assert json.loads(told) == here
