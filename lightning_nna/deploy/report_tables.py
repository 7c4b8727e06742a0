"""The tables of a deployment report that have a row a system, program, operator or call site."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields

from lightning_nna.deploy.activations import ActivationMetrics
from lightning_nna.deploy.deployment import Deployment, DeviceTotals, ExportedProgram
from lightning_nna.deploy.vela import VelaReport
from lightning_nna.html_page import (
    Bar,
    Cell,
    Column,
    Html,
    histogram,
    joined,
    paragraph,
    percent,
    table,
)
from lightning_nna.weights.layers import decibels

#: Cell without a number.
NONE = "-"


def activations_csv(rows: Sequence[ActivationMetrics]) -> str:
    """Return the table of the activations with a head, one line a call site; no histograms.

    Example:
        >>> row = ActivationMetrics("a#0", "relu", "emulated", 1, 4, 8, 0.5, 1.0, 20.0, 0.0, (1,))
        >>> print(activations_csv([row]).splitlines()[1])
        a#0,relu,emulated,1,4,8,0.5,1.0,20.0,0.0,
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(ActivationMetrics) if field.name != "histogram"]
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    return text.getvalue()


def missing(text: str) -> Html:
    """Return a paragraph on what is not in the report.

    Args:
        text: What is missing, and why, without a full stop.
    """
    return paragraph(text[:1].lower() + text[1:] + ".", "missing")


def significant(number: float) -> str:
    """Format a number with four digits, or all those of a large one.

    Example:
        >>> significant(0.123456), significant(1234567.0)
        ('0.1235', '1,234,567')
    """
    return f"{number:,.4g}" if abs(number) < 10_000 else f"{number:,.0f}"


def device_section(deployment: Deployment, notes: Sequence[str]) -> Html:
    """Return the section on memory, cycles and time of devices.

    Args:
        deployment: What was measured.
        notes: Lines for reports that belong to no program.
    """
    if not deployment.systems:
        reason = deployment.problems.get("systems", "no estimate of Vela was given")
        if notes:
            return joined(paragraph(note) for note in notes)
        return missing(f"Memory, cycles and time of a device: {reason}")
    unit = deployment.unit
    columns = [
        Column("system", "Accelerator, system configuration and memory mode", is_text=True),
        Column("weights, bytes", "Weights of all programs as Vela's encoder compresses them"),
        Column("SRAM, bytes", "Working memory of the program that needs most"),
        Column("memory, bytes", "All memories of all programs, added up"),
        Column(f"cycles per {unit}", "Calls of each program times its cycles"),
        Column(f"ms per {unit}", "The same in time, without operators on the CPU"),
        Column("ms per call", "Time of one call of each program", is_text=True),
        Column(
            "bound by",
            "Whether computation or the bandwidth of the memories decides the time of a program",
            is_text=True,
        ),
        Column("on the CPU", "Kinds of operators that the NPU leaves to the CPU", is_text=True),
    ]
    totals = deployment.totals
    most_cycles = max(each.cycles for each in totals) or 1.0
    rows = [_system(each, most_cycles) for each in totals]
    parts = [paragraph("Estimates of Arm's compiler Vela, not measurements."), table(columns, rows)]
    for reports in deployment.systems:
        for name, report in reports.items():
            if report.slowed:
                slowed = ", ".join(map(str, report.slowed))
                parts.append(
                    paragraph(
                        f"{name} on {report.accelerator}: slower than with dense weights: {slowed}."
                    )
                )
    return joined(parts)


def _system(totals: DeviceTotals, most_cycles: float) -> list[Cell]:
    return [
        f"{totals.accelerator}, {totals.system}, {totals.memory_mode}",
        *(f"{totals.encoded_bytes:,}", f"{totals.sram_bytes:,}", f"{totals.memory_bytes:,}"),
        Bar(f"{totals.cycles:,.0f}", totals.cycles / most_cycles),
        significant(totals.inference_ms),
        _listed({name: significant(ms) for name, ms in totals.part_ms.items()}),
        _listed(totals.bound),
        _listed({kind: str(count) for kind, count in Counter(totals.cpu_operators).items()})
        or "none",
    ]


def programs_section(deployment: Deployment) -> Html:
    """Return the section on the files.

    Args:
        deployment: What was measured.
    """
    if not deployment.programs:
        return missing("No program was given")
    columns = [
        Column("program", "Name", is_text=True),
        Column("file, bytes", "Size of the .tflite file"),
        Column("constants, bytes", "Weights, biases and tables in it, each counted once"),
        Column(f"calls per {deployment.unit}", "Calls of the program for a unit of work"),
        Column("inputs", "Shapes of the inputs", is_text=True),
        Column("outputs", "Shapes of the outputs", is_text=True),
        Column("SHA-256", "First digits of the checksum of the file", is_text=True),
    ]
    rows: list[list[Cell]] = [
        [
            each.name,
            *(f"{each.model.size_bytes:,}", f"{each.model.weight_bytes:,}"),
            f"{each.calls:,.4g}",
            _shapes([port.shape for port in each.model.inputs]),
            _shapes([port.shape for port in each.model.outputs]),
            _checksum(each),
        ]
        for each in deployment.programs
    ]
    total = sum(each.model.size_bytes for each in deployment.programs)
    constants = sum(each.model.weight_bytes for each in deployment.programs)
    last: list[Cell] = ["all", f"{total:,}", f"{constants:,}", "", "", "", ""]
    return table(columns, rows, last if len(rows) > 1 else None)


def operators_section(deployment: Deployment) -> Html:
    """Return the section on operators of the NPU and of the CPU.

    Args:
        deployment: What was measured.
    """
    if not deployment.systems:
        if not deployment.programs:
            return missing("Operators: no program was given")
        columns = [
            Column("program", "Name", is_text=True),
            Column("operator", "Kind of the instruction", is_text=True),
            Column("count", "Number of instructions of this kind"),
        ]
        counts: list[list[Cell]] = [
            [each.name, kind, f"{count}"]
            for each in deployment.programs
            for kind, count in each.model.operators.items()
        ]
        return joined(
            [table(columns, counts), missing("Operators on the NPU: there is no estimate of Vela")]
        )
    first = next(iter(deployment.systems[0].values()))
    columns = [
        Column("program", "Name", is_text=True),
        Column(
            "operator",
            "Kind of operator as Vela names it; it merges and splits instructions of the program",
            is_text=True,
        ),
        Column("runs on", "NPU, or CPU for what the NPU does not have", is_text=True),
        Column("count", "Number of operators of this kind"),
        Column("products", "Number of products that one call sums up"),
        Column("cycles", "Cycles of one call; - on the CPU, for which there is no estimate"),
        Column("of the program", "Fraction of the cycles of the program"),
    ]
    rows = [row for name, report in deployment.systems[0].items() for row in _kinds(name, report)]
    return joined([paragraph(f"On {first.accelerator}, {first.system}."), table(columns, rows)])


def _kinds(program: str, report: VelaReport) -> list[list[Cell]]:
    """Return a row for each kind of operator, in the order in which they first run."""
    total = sum(operator.cycles for operator in report.operators) or 1
    kinds = dict.fromkeys((each.operator, each.on_npu) for each in report.operators)
    rows: list[list[Cell]] = []
    for kind, on_npu in kinds:
        same = [e for e in report.operators if (e.operator, e.on_npu) == (kind, on_npu)]
        cycles = sum(each.cycles for each in same)
        rows.append(
            [
                *(program, kind, "NPU" if on_npu else "CPU"),
                *(f"{len({each.name for each in same})}", f"{sum(e.macs for e in same):,}"),
                Bar(f"{cycles:,}", cycles / total) if on_npu else NONE,
                percent(cycles / total) if on_npu else NONE,
            ]
        )
    return rows


def firmware_section(firmware: Mapping[str, Mapping[str, object]]) -> Html:
    """Return the section on the firmware.

    Args:
        firmware: Figures by the name of the program, see :class:`.Deployment`.
    """
    if not firmware:
        return missing("No firmware was written")
    columns = [
        Column("program", "Name", is_text=True),
        Column("flash, bytes", "Size of the program in flash"),
        Column("flash before compression, bytes", "The same without compressed constants"),
        Column("arena, bytes", "Memory in which TFLite-Micro runs it; - if it was not measured"),
        Column("arena before compression, bytes", "The same without compressed constants"),
        Column("tensors, bytes", "Vela's estimate of the working memory; - without an Ethos-U"),
        Column("equal test vectors", "Fraction of outputs that equal the emulation's"),
    ]
    keys = ("flash_bytes", "plain_flash_bytes", "arena_bytes", "plain_arena_bytes", "sram_bytes")
    rows: list[list[Cell]] = []
    for name, figures in firmware.items():
        numbers = [figures.get(key) for key in keys]
        equal = figures.get("equal_outputs")
        rows.append(
            [
                name,
                *(NONE if number is None else f"{number:,}" for number in numbers),
                percent(equal, 4) if isinstance(equal, float) else NONE,
            ]
        )
    return table(columns, rows)


def activations_section(rows: Sequence[ActivationMetrics]) -> Html:
    """Return the section on the activations.

    Args:
        rows: Metrics of the call sites.
    """
    if not rows:
        return missing("The activations: the module was not run for them")
    columns = [
        Column("call site", "Module and number of the call whose result it is", is_text=True),
        Column("function", "Name of the torch function", is_text=True),
        Column("calls", "Number of calls while activations were measured"),
        Column(
            "bits",
            "Bits of an element; 32 in float on the CPU; - where its readers decide",
        ),
        Column("elements", "Number of elements of one result in the program"),
        Column("zeros", "Fraction of the elements that are zero"),
        Column("entropy, bits", "Bits an element that a coder can reach, one by one"),
        Column("bytes", "Bytes of one result in the program"),
        Column(
            "SQNR, dB",
            "Power of the float result on the same quantized operands over that of the difference; "
            "∞ without a difference, - where it was not measured",
        ),
        Column("clipped", "Fraction of the float results outside of the range"),
        Column(
            "cycles",
            "Estimated cycles of the operators of this name, for one call of each program; - where "
            "the compiler merged or renamed them, as the parts of an LSTM, and on the CPU",
        ),
        Column(
            "histogram",
            "Numbers of elements over the range of the integers, heights as square roots",
            is_text=True,
        ),
    ]
    most_cycles = max((row.cycles or 0 for row in rows), default=0) or 1
    most_bytes = max((row.size_bytes or 0 for row in rows), default=0) or 1
    return table(columns, [_activation(row, most_bytes, most_cycles) for row in rows])


def _activation(row: ActivationMetrics, most_bytes: int, most_cycles: int) -> list[Cell]:
    is_counted, size = bool(row.histogram), row.size_bytes
    return [
        *(row.site, row.function, f"{row.calls}"),
        *(NONE if row.bits is None else f"{row.bits}", f"{row.elements:,}"),
        percent(row.zeros) if is_counted else NONE,
        f"{row.entropy_bits:.2f}" if is_counted else NONE,
        NONE if size is None else Bar(f"{size:,}", size / most_bytes),
        NONE if row.sqnr_db is None else decibels(row.sqnr_db),
        NONE if row.clip_rate is None else percent(row.clip_rate, 2),
        NONE if row.cycles is None else Bar(f"{row.cycles:,}", row.cycles / most_cycles),
        histogram(row.histogram, f"histogram of {row.site}"),
    ]


def _listed(entries: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in entries.items())


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(" x ".join(map(str, shape)) or "scalar" for shape in shapes)


def _checksum(program: ExportedProgram) -> str:
    path = program.model.path
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else NONE
