"""Estimate memory, cycles and time of a program on an Ethos-U with Arm's compiler Vela.

Vela compresses weights (a tensor of at most 32 values comes down to its entropy), so that the bytes
which it reports, and on a system that reads weights from flash the time as well, are those of the
compressed network. On an Ethos-U85 zeros make a layer faster if they are 2 of 4 along the input
channel; convolutions with zeros elsewhere may take longer than dense ones. Times are estimates of
operators on the NPU; there are none for those on the CPU, which are counted apart.

Reference:
    Arm, ``ethos-u-vela`` and the system configurations of its ``Arm/vela.ini``.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_nna.files import write_whole
from lightning_nna.settings_files import read_json

#: System whose weights are in flash, and its memory mode, by the family of the accelerator.
_DEFAULTS = {
    "ethos-u55": ("Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "ethos-u65": ("Ethos_U65_Embedded", "Shared_Sram"),
    "ethos-u85": ("Ethos_U85_SYS_Flash_High", "Shared_Sram"),
}
_CONFIGURATION = "Arm/vela.ini"
_LONGEST_SECONDS = 600
# Of the files of a cache.
_CACHE_FORMAT = 1
_MEMORIES = ("sram", "dram", "on_chip_flash", "off_chip_flash")


class VelaError(RuntimeError):
    """Vela is missing or rejects a program; the message has Vela's own."""


@dataclass(frozen=True)
class VelaOperator:
    """One operator of the compiled program.

    Args:
        name: Name of its output; a call site, or Vela's name for a part of one.
        operator: Kind of operator in the program that was compiled.
        on_npu: Whether the NPU runs it.
        cycles: Cycles of the slowest of computation and memories; 0 on the CPU.
        compute_cycles: Cycles of the computation alone.
        macs: Number of products that are summed.
    """

    name: str
    operator: str
    on_npu: bool
    cycles: int
    compute_cycles: int
    macs: int


@dataclass(frozen=True)
class VelaReport:
    """Vela's estimate for one inference.

    Args:
        accelerator: Name of the accelerator, as ``"ethos-u55-128"``.
        system: Name of the system configuration: clock, memories and their bandwidths.
        memory_mode: Name of the mapping of weights and activations to memories.
        operators: Operators, in the order in which they run.
        weight_bytes: Bytes of the weights of the operators on the NPU, uncompressed.
        encoded_bytes: Bytes of the same weights, compressed.
        sram_bytes: Bytes of SRAM used.
        dram_bytes: Bytes of DRAM used.
        flash_bytes: Bytes of flash used, on-chip and off-chip.
        cycles: Cycles of one inference.
        compute_cycles: Cycles of its computation alone.
        memory_cycles: Cycles of the busiest memory.
        inference_ms: Milliseconds of one inference, without operators on the CPU.
    """

    accelerator: str
    system: str
    memory_mode: str
    operators: tuple[VelaOperator, ...]
    weight_bytes: int
    encoded_bytes: int
    sram_bytes: int
    dram_bytes: int
    flash_bytes: int
    cycles: int
    compute_cycles: int
    memory_cycles: int
    inference_ms: float

    @property
    def npu_operators(self) -> int:
        """Count the operators on the NPU."""
        return sum(operator.on_npu for operator in self.operators)

    @property
    def cpu_operators(self) -> tuple[str, ...]:
        """List the kinds of the operators on the CPU."""
        return tuple(operator.operator for operator in self.operators if not operator.on_npu)

    @property
    def memory_bytes(self) -> int:
        """Return the bytes of all memory used."""
        return self.sram_bytes + self.dram_bytes + self.flash_bytes

    @property
    def is_bandwidth_bound(self) -> bool:
        """Tell if reading and writing takes longer than computing."""
        return self.memory_cycles > self.compute_cycles

    def __str__(self) -> str:
        cpu = ", ".join(self.cpu_operators) or "none"
        bound = "bandwidth" if self.is_bandwidth_bound else "computation"
        return (
            f"{self.accelerator}, {self.system}, {self.memory_mode}: {self.inference_ms:.3f} ms, "
            f"bound by {bound}; weights {self.weight_bytes} -> {self.encoded_bytes} bytes, memory "
            f"{self.memory_bytes} bytes; {self.npu_operators} operators on the NPU, on the CPU: "
            f"{cpu}"
        )


def vela_report(
    path: str | Path,
    *,
    accelerator: str = "ethos-u55-128",
    system: str | None = None,
    memory_mode: str | None = None,
    cache: str | Path | None = None,
) -> VelaReport:
    """Compile a .tflite program with Vela and return its estimate.

    Args:
        path: Path of the program.
        accelerator: Name of the accelerator, Vela's ``--accelerator-config``.
        system: Name of the system, Vela's ``--system-config``, in its ``Arm/vela.ini``; None for
            the family's system with weights in flash.
        memory_mode: Name of the memory mode, Vela's ``--memory-mode``; None for weights in flash
            and the rest in SRAM.
        cache: Folder of estimates, one file for each program, target and version of Vela; one that
            is there is read instead of compiling again. None for no folder.

    Returns:
        Vela's estimate.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the accelerator is of no family that is known.
        VelaError: If Vela is missing, or rejects the program or the system.

    Example:
        >>> import tempfile, torch
        >>> from lightning_nna import calibrate
        >>> from lightning_nna.deploy import export_tflite
        >>> net, x = torch.nn.Linear(64, 64), torch.randn(1, 64)
        >>> emulator = calibrate(net, [x])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = export_tflite(net, [x], f"{folder}/net.tflite")
        ...     report = vela_report(model.path)
        >>> report.system, report.cpu_operators, report.is_bandwidth_bound
        ('Ethos_U55_High_End_Embedded', (), True)
    """
    path, entry = Path(path), None
    if cache is not None and path.is_file() and find_spec("ethosu") is not None:
        target = (accelerator, system, memory_mode, version("ethos-u-vela"))
        contents = path.read_bytes() + json.dumps([_CACHE_FORMAT, *target]).encode()
        entry = Path(cache) / f"{hashlib.sha256(contents).hexdigest()}.json"
        if entry.exists():
            return _from_json(read_json(entry))
    with tempfile.TemporaryDirectory() as folder:
        report = compile_with_vela(
            path, folder, accelerator=accelerator, system=system, memory_mode=memory_mode
        ).report
    if entry is not None:
        write_whole(entry, json.dumps(asdict(report)) + "\n")
    return report


def _from_json(content: Mapping[str, Any]) -> VelaReport:
    operators = tuple(VelaOperator(**operator) for operator in content["operators"])
    return VelaReport(**{**content, "operators": operators})


@dataclass(frozen=True)
class VelaProgram:
    """A program that Vela has compiled.

    Args:
        path: Path of the compiled .tflite file, whose custom operator ``ethos-u`` the NPU runs.
        command: Command line that compiles it.
        report: Vela's estimate.
    """

    path: Path
    command: str
    report: VelaReport


def compile_with_vela(
    path: str | Path,
    folder: str | Path,
    *,
    accelerator: str,
    system: str | None = None,
    memory_mode: str | None = None,
) -> VelaProgram:
    """Compile a .tflite program with Vela.

    Args:
        path: Path of the program.
        folder: Folder of the compiled program and of Vela's tables.
        accelerator: See :func:`vela_report`.
        system: See :func:`vela_report`.
        memory_mode: See :func:`vela_report`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the accelerator is of no family that is known.
        VelaError: If Vela is missing, or rejects the program or the system.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no program {path}")
    if find_spec("ethosu") is None:
        raise VelaError(
            "ethos-u-vela is not installed: pip install 'lightning-nna[deploy]' (Python before "
            "3.14), or leave the report out"
        )
    family = "-".join(accelerator.split("-")[:2])
    if family not in _DEFAULTS:
        raise ValueError(
            f"accelerator must be of {', '.join(_DEFAULTS)}, as 'ethos-u55-128', got "
            f"{accelerator!r}"
        )
    system = system or _DEFAULTS[family][0]
    memory_mode = memory_mode or _DEFAULTS[family][1]
    folder, path = Path(folder), Path(path)
    options = ["--config", _CONFIGURATION, "--accelerator-config", accelerator]
    options += ["--system-config", system, "--memory-mode", memory_mode]
    _compile(path, folder, options)
    summary = _table(folder, "*_summary_*.csv")[-1]
    layers = _table(folder, "*_per-layer.csv")
    return VelaProgram(
        folder / f"{path.stem}_vela.tflite",
        shlex.join(["vela", path.name, *options]),
        _report(accelerator, system, memory_mode, summary, layers),
    )


def _compile(path: Path, folder: Path, options: Sequence[str]) -> None:
    """Run Vela in a process of its own."""
    command = [sys.executable, "-m", "ethosu.vela", str(path.resolve()), *options]
    command += ["--output-dir", str(folder), "--verbose-performance"]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_LONGEST_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise VelaError(f"Vela took more than {_LONGEST_SECONDS} s over {path}") from error
    if process.returncode != 0:
        lines = (process.stderr.strip() or process.stdout.strip()).splitlines()[-1:]
        raise VelaError(f"Vela rejects {path} for {', '.join(options[3::2])}: {' '.join(lines)}")


def _table(folder: Path, pattern: str) -> list[dict[str, str]]:
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise VelaError(f"Vela has written no {pattern}: is it another version than 5?")
    with paths[0].open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _report(
    accelerator: str,
    system: str,
    memory_mode: str,
    summary: dict[str, str],
    layers: list[dict[str, str]],
) -> VelaReport:
    used = {name: round(1024 * float(summary[f"{name}_memory_used"])) for name in _MEMORIES}
    memory_cycles = (float(summary[f"cycles_{name}_access"]) for name in _MEMORIES)
    return VelaReport(
        accelerator=accelerator,
        system=system,
        memory_mode=memory_mode,
        operators=tuple(
            VelaOperator(
                name=layer["Name"].strip(),
                operator=layer["Original Operator"].strip(),
                on_npu=layer["Target"].strip() == "NPU",
                cycles=int(float(layer["Op Cycles"])),
                compute_cycles=int(float(layer["NPU"])),
                macs=int(float(layer["MAC Count"])),
            )
            for layer in layers
        ),
        weight_bytes=int(float(summary["total_original_weights"])),
        encoded_bytes=int(float(summary["total_npu_encoded_weights"])),
        sram_bytes=used["sram"],
        dram_bytes=used["dram"],
        flash_bytes=used["on_chip_flash"] + used["off_chip_flash"],
        cycles=int(float(summary["cycles_total"])),
        compute_cycles=int(float(summary["cycles_npu"])),
        memory_cycles=int(max(memory_cycles)),
        inference_ms=1000 * float(summary["inference_time"]),
    )
