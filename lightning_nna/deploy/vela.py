"""Estimate memory, cycles and time of a program on an Ethos-U with Arm's compiler Vela.

Vela compresses weights (a tensor of at most 32 values comes down to its entropy), so that the bytes
which it reports, and on a system that reads weights from flash the time as well, are those of the
compressed network. On an Ethos-U85 zeros make a layer faster if they are 2 of 4 along the input
channel; convolutions whose weights are compressed in any other way, by zeros or by few values, may
take longer than dense ones, and a warning names those that do. Times are estimates of
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
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_nna.deploy.dense_twin import dense_twin
from lightning_nna.files import write_whole
from lightning_nna.settings_files import read_json

#: System whose weights are in flash, and its memory mode, by the family of the accelerator.
_DEFAULTS = {
    "ethos-u55": ("Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "ethos-u65": ("Ethos_U65_Embedded", "Shared_Sram"),
    "ethos-u85": ("Ethos_U85_SYS_Flash_High", "Shared_Sram"),
}
#: Multiply-accumulates a cycle, by the family of the accelerator: the ends of the names.
_SIZES = {
    "ethos-u55": (32, 64, 128, 256),
    "ethos-u65": (256, 512),
    "ethos-u85": (128, 256, 512, 1024, 2048),
}
_CONFIGURATION = "Arm/vela.ini"
_LONGEST_SECONDS = 600
# Of the files of a cache.
_CACHE_FORMAT = 1
# The family that computes layers in another way if their weights are compressed, and the factor
# from which on an operator is slower.
_CHANGES_ITS_WAY = "ethos-u85"
_SLOWER = 1.05
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
class SlowedOperator:
    """An operator that takes longer because its weights are compressed.

    Args:
        name: Name of the operator, see :class:`VelaOperator`.
        cycles: Cycles of it.
        dense_cycles: Cycles of it with as many weights that cannot be compressed.
    """

    name: str
    cycles: int
    dense_cycles: int

    def __str__(self) -> str:
        return f"{self.name} ({self.dense_cycles} -> {self.cycles} cycles)"


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
        slowed: Operators that take longer than with dense weights, if they were compared.
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
    slowed: tuple[SlowedOperator, ...] = ()

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
        slowed = ", ".join(map(str, self.slowed))
        slower = f"; slower than with dense weights: {slowed}" if slowed else ""
        return (
            f"{self.accelerator}, {self.system}, {self.memory_mode}: {self.inference_ms:.3f} ms, "
            f"bound by {bound}; weights {self.weight_bytes} -> {self.encoded_bytes} bytes, memory "
            f"{self.memory_bytes} bytes; {self.npu_operators} operators on the NPU, on the CPU: "
            f"{cpu}{slower}"
        )


def vela_report(
    path: str | Path,
    *,
    accelerator: str = "ethos-u55-128",
    system: str | None = None,
    memory_mode: str | None = None,
    cache: str | Path | None = None,
    compare_dense: bool = True,
) -> VelaReport:
    """Compile a .tflite program with Vela and return its estimate.

    For an Ethos-U85 a program with zeros or few values among its weights is compiled again with
    weights that cannot be compressed; operators that these make faster are in a warning.

    Args:
        path: Path of the program.
        accelerator: Name of the accelerator, Vela's ``--accelerator-config``.
        system: Name of the system, Vela's ``--system-config``, in its ``Arm/vela.ini``; None for
            the family's system with weights in flash.
        memory_mode: Name of the memory mode, Vela's ``--memory-mode``; None for weights in flash
            and the rest in SRAM.
        cache: Folder of estimates, one file for each program, target and version of Vela; one that
            is there is read instead of compiling again. None for no folder.
        compare_dense: Whether to look for operators that compressed weights slow down.

    Returns:
        Vela's estimate.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such accelerator; lists them.
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
    target = _Target.of(accelerator, system, memory_mode)
    path, entry = Path(path), None
    if cache is not None and path.is_file() and find_spec("ethosu") is not None:
        contents = path.read_bytes() + repr((_CACHE_FORMAT, target)).encode()
        contents += version("ethos-u-vela").encode()
        entry = Path(cache) / f"{hashlib.sha256(contents).hexdigest()}.json"
    if entry is not None and entry.exists():
        report = _from_json(read_json(entry))
    else:
        with tempfile.TemporaryDirectory() as folder:
            report = _compiled(path, Path(folder), target).report
        if entry is not None:
            write_whole(entry, json.dumps(asdict(report)) + "\n")
    return _compared(report, path, target, cache) if compare_dense else report


def _from_json(content: Mapping[str, Any]) -> VelaReport:
    operators = tuple(VelaOperator(**operator) for operator in content["operators"])
    return VelaReport(**{**content, "operators": operators, "slowed": ()})


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
        ValueError: If there is no such accelerator; lists them.
        VelaError: If Vela is missing, or rejects the program or the system.
    """
    target = _Target.of(accelerator, system, memory_mode)
    program = _compiled(Path(path), Path(folder), target)
    return replace(program, report=_compared(program.report, Path(path), target, None))


def require_accelerator(name: str) -> None:
    """Raise unless Vela compiles for an accelerator.

    Args:
        name: Name of the accelerator.

    Raises:
        ValueError: If Vela has no such one; lists them.

    Example:
        >>> require_accelerator("ethos-u55-128")
    """
    names = [f"{family}-{size}" for family, sizes in _SIZES.items() for size in sizes]
    if name not in names:
        raise ValueError(f"accelerator must be one of {', '.join(names)}; got {name!r}")


@dataclass(frozen=True)
class _Target:
    """Accelerator, system and memory mode, by Vela's names."""

    accelerator: str
    system: str
    memory_mode: str

    @classmethod
    def of(cls, accelerator: str, system: str | None, memory_mode: str | None) -> _Target:
        require_accelerator(accelerator)
        default_system, default_mode = _DEFAULTS[accelerator.rpartition("-")[0]]
        return cls(accelerator, system or default_system, memory_mode or default_mode)


def _compiled(path: Path, folder: Path, target: _Target) -> VelaProgram:
    if not path.is_file():
        raise FileNotFoundError(f"there is no program {path}")
    if find_spec("ethosu") is None:
        raise VelaError(
            "ethos-u-vela is not installed: pip install 'lightning-nna[deploy]' (Python before "
            "3.14), or leave the report out"
        )
    options = ["--config", _CONFIGURATION, "--accelerator-config", target.accelerator]
    options += ["--system-config", target.system, "--memory-mode", target.memory_mode]
    _compile(path, folder, options)
    summary = _table(folder, "*_summary_*.csv")[-1]
    layers = _table(folder, "*_per-layer.csv")
    return VelaProgram(
        folder / f"{path.stem}_vela.tflite",
        shlex.join(["vela", path.name, *options]),
        _report(target, summary, layers),
    )


def _compared(
    report: VelaReport, path: Path, target: _Target, cache: str | Path | None
) -> VelaReport:
    """Return a report with the operators that compressed weights slow down, and warn of them."""
    if not target.accelerator.startswith(_CHANGES_ITS_WAY) or path.suffix != ".tflite":
        return report
    twin = dense_twin(path.read_bytes())
    if twin is None:
        return report
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "dense.tflite"
        other.write_bytes(twin)
        dense = vela_report(other, **asdict(target), cache=cache, compare_dense=False)
    dense_cycles = _cycles_by_name(dense)
    slowed = tuple(
        SlowedOperator(name, cycles, dense_cycles[name])
        for name, cycles in _cycles_by_name(report).items()
        if cycles > _SLOWER * dense_cycles.get(name, cycles)
    )
    if slowed:
        rank_zero_warn(
            f"compressed weights cost time on {target.accelerator}: {', '.join(map(str, slowed))}. "
            f"There only zeros of pattern '2:4' save time in a convolution: choose it, or leave "
            f"these layers dense and in 8 bits"
        )
    return replace(report, slowed=slowed)


def _cycles_by_name(report: VelaReport) -> dict[str, int]:
    """Add up the cycles of parts of one name."""
    cycles: dict[str, int] = {}
    for operator in report.operators:
        cycles[operator.name] = cycles.get(operator.name, 0) + operator.cycles
    return cycles


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
    target: _Target,
    summary: dict[str, str],
    layers: list[dict[str, str]],
) -> VelaReport:
    used = {name: round(1024 * float(summary[f"{name}_memory_used"])) for name in _MEMORIES}
    memory_cycles = (float(summary[f"cycles_{name}_access"]) for name in _MEMORIES)
    return VelaReport(
        **asdict(target),
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
