"""Peak memory of a training step.

What libraries load and compile at their first use is no part of it: the step is made and run once
before, and let go.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"


def peak_bytes(make: Callable[[], Callable[[], None]], device: torch.device) -> int:
    """Most memory that a step and what it needs take, above what the process had before.

    Args:
        make: Makes the step: the network, its batch and what else is kept.
        device: Where it runs: a GPU's allocator is asked, else Linux for the process's memory.

    Returns:
        Bytes.

    Raises:
        OSError: If the system is not Linux and the device is a CPU.
    """
    make()()
    _let_go()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        step = make()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    before = _kilobytes("VmRSS")
    step = make()
    _let_go()
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    step()
    return (_kilobytes("VmHWM") - before) * 1024


def peak_in_process(module: str, *arguments: str) -> int:
    """What a module prints last, run as a program: the peak of :func:`peak_bytes`, alone.

    Freed blocks go back to the system at once there, so that the peak is of what is in use.

    Raises:
        subprocess.CalledProcessError: If the program fails.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.split()[-1])


def _let_go() -> None:
    """Give what is free back to the system, so that it does not hide what a step takes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _kilobytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no line {name}")
