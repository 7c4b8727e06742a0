"""Time and peak memory of training steps.

Times are ratios of steps that are timed one right after the other. Memory is the peak of a process
of its own (``python -m recipes.benchmark.timing`` measures it); what libraries load and compile at
their first use is no part of it: the step is made and run once before, and released.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

from recipes.benchmark.rows import Row

# Float steps are repeated until a timed stretch takes this long.
_STRETCH_SECONDS = 0.15
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"
#: Environment of a process in which freed blocks go back to the system at once.
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}

#: One training step: forward, backward and the optimizer's step.
Step = Callable[[], None]


def machine(device: torch.device) -> str:
    """Name the processor that a device is."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    byte_products = ", products of bytes" if torch.cpu._is_vnni_supported() else ""
    compiled = ", compiled kernels" if find_spec("numba") else ""
    return f"CPU: {names[0] if names else platform.machine()}{byte_products}{compiled}"


def time_ratios(
    steps: dict[str, Step],
    device: torch.device,
    pairs: int,
    *,
    stretch_seconds: float = _STRETCH_SECONDS,
) -> tuple[dict[str, list[float]], float]:
    """Time every step right after the float step.

    Args:
        steps: Steps by name; ``"float"`` is among them.
        device: Device that they run on.
        pairs: Number of ratios of each step.
        stretch_seconds: Least time for which the float step is repeated in one measurement.

    Returns:
        Ratios of the times by name, and the median time of the float step in milliseconds.
    """
    repeats = max(1, int(stretch_seconds / seconds(steps["float"], 3, device)))
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    float_ms = []
    for _ in range(pairs):
        for name, step in steps.items():
            base = seconds(steps["float"], repeats, device)
            ratios[name].append(seconds(step, repeats, device) / base)
            float_ms.append(1e3 * base)
    return ratios, median(float_ms)


def ratio_columns(ratios: list[float]) -> dict[str, float]:
    """Summarize ratios of times in the columns of a row."""
    return {
        "time_ratio": round(median(ratios), 3),
        "time_ratio_low": round(min(ratios), 3),
        "time_ratio_high": round(max(ratios), 3),
    }


def time_with_range(row: Row) -> str:
    """Format the ratio of times of a row, and its range."""
    return f"{row['time_ratio']:.2f} ({row['time_ratio_low']:.2f}-{row['time_ratio_high']:.2f})"


def seconds(step: Step, repeats: int, device: torch.device) -> float:
    """Measure the wall time of one step, the mean over ``repeats``."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def peak_bytes(make: Callable[[], Step], device: torch.device) -> int:
    """Measure the peak memory of a step, above what the process had before it was made.

    Args:
        make: Function that makes the step: the network, its batch and what else stays alive.
        device: Device that it runs on: a GPU's allocator is asked, else Linux for the process.

    Raises:
        OSError: If the system is not Linux and the device is a CPU.
    """
    make()()
    _release()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        step = make()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    before = resident_bytes()
    step = make()
    reset_peak()
    step()
    return peak_resident_bytes() - before


def peak_in_process(module: str, *arguments: str, device: torch.device, threads: int | None) -> int:
    """Measure the peak memory of a step in a process of its own; see :func:`peaks_in_process`."""
    return peaks_in_process(module, [arguments], device=device, threads=threads)[0]


def peaks_in_process(
    module: str, steps: Sequence[Sequence[str]], *, device: torch.device, threads: int | None
) -> list[int]:
    """Measure the peak memory of steps, one after the other, in a process of their own.

    Freed blocks go back to the system at once there, so that the peak is of what is in use.

    Args:
        module: Module whose ``training_step(*names, device=device)`` makes a step.
        steps: Names that say which step, for each of them.
        device: Device that they run on.
        threads: Number of CPU threads.

    Returns:
        Bytes, for each step.

    Raises:
        subprocess.CalledProcessError: If the process fails.
    """
    command = [sys.executable, "-m", "recipes.benchmark.timing", device.type, str(threads or 1)]
    result = subprocess.run(
        [*command, module, json.dumps(steps)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | FREED_AT_ONCE,
    )
    peaks: list[int] = json.loads(result.stdout.splitlines()[-1])
    return peaks


def main() -> None:
    """Print the peak memory of steps: device, threads, module, and a list of lists of names."""
    device, threads, module, steps = sys.argv[1:]
    torch.set_num_threads(int(threads))
    training_step = importlib.import_module(module).training_step
    torch_device = torch.device(device)
    make = partial(training_step, device=torch_device)
    print([peak_bytes(partial(make, *names), torch_device) for names in json.loads(steps)])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak() -> None:
    """Begin a new peak of this process's memory, from what is in use now."""
    _release()
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)


def resident_bytes() -> int:
    """Return the memory that this process has."""
    return _kilobytes("VmRSS") * 1024


def peak_resident_bytes() -> int:
    """Return the greatest memory that this process has had since :func:`reset_peak`."""
    return _kilobytes("VmHWM") * 1024


def _release() -> None:
    """Give free memory back to the system, so that it does not hide what a step takes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _kilobytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no line {name}")


if __name__ == "__main__":
    main()
