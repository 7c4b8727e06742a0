"""The page of a deployment: what an engineer brings to a review."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_nna.deploy.deployment import (
    Deployment,
    Metric,
    RuntimeCheck,
)
from lightning_nna.deploy.report_tables import (
    NONE,
    activations_section,
    device_section,
    firmware_section,
    missing,
    operators_section,
    programs_section,
    significant,
)
from lightning_nna.html_page import (
    Cell,
    Column,
    Html,
    cards,
    joined,
    page,
    paragraph,
    percent,
    preformatted,
    section,
    table,
)
from lightning_nna.weights.layers import LayerMetrics, weight_table


def report_page(
    deployment: Deployment, rows: Sequence[LayerMetrics], *, title: str, notes: Sequence[str] = ()
) -> str:
    """Return the page of a deployment as one document.

    Args:
        deployment: What was measured.
        rows: Metrics of the weights.
        title: Name of the module.
        notes: Lines about the device, for reports that belong to no program.
    """
    return page(
        f"{title}: deployment report",
        paragraph(_subtitle(deployment)),
        cards(_cards(deployment)),
        section("Metrics", _metrics(deployment.metrics)),
        section("Compared with float", _compared(deployment)),
        section("Equality with the emulation", _equality(deployment.checks)),
        section("Device", device_section(deployment, notes)),
        section("Programs", programs_section(deployment)),
        section("Operators", operators_section(deployment)),
        section("Firmware", firmware_section(deployment.firmware)),
        section("Weights", weight_table(rows)),
        section("Activations", activations_section(deployment.activations.rows)),
        section("Origin", _origin(deployment)),
    )


def _subtitle(deployment: Deployment) -> str:
    specs = ", ".join(dict.fromkeys(each.model.spec for each in deployment.programs))
    origin = deployment.origin
    parts = [f"Emulated on {specs}" if specs else "", origin.date if origin else ""]
    parts.append(f"commit {origin.commit[:12]}" if origin and origin.commit else "")
    return "; ".join(part for part in parts if part)


def _cards(deployment: Deployment) -> list[tuple[str, str, str]]:
    entries = []
    for metric in deployment.metrics[:1]:
        note = f"float {_value(metric, metric.float_value)}"
        entries.append((metric.name, _value(metric, metric.deployed), note))
    compared = [each for each in deployment.checks if each.outputs and each.is_promised]
    if compared:
        outputs = sum(each.outputs for each in compared)
        differing = outputs - sum(each.equal_outputs for each in compared)
        where = ", ".join(dict.fromkeys(each.runtime for each in compared))
        entries.append(("outputs that differ", f"{differing:,}", f"of {outputs:,} on {where}"))
    if deployment.programs:
        size = sum(each.model.size_bytes for each in deployment.programs)
        ratio = size / deployment.float_bytes if deployment.float_bytes else None
        entries.append(("programs, bytes", f"{size:,}", f"{_ratio(ratio)} of float32"))
    for totals in deployment.totals[:1]:
        note = f"weights {totals.encoded_bytes:,}; {totals.accelerator}, estimated"
        entries.append(("memory, bytes", f"{totals.memory_bytes:,}", note))
        note = f"per {deployment.unit}, {totals.accelerator}, estimated"
        entries.append(("time, ms", significant(totals.inference_ms), note))
        kinds = ", ".join(dict.fromkeys(totals.cpu_operators)) or "all on the NPU"
        entries.append(("operators on the CPU", f"{len(totals.cpu_operators)}", kinds))
    return entries


def _metrics(metrics: Sequence[Metric]) -> Html:
    if not metrics:
        return missing("No metric was given, so nothing is known of the accuracy")
    columns = [
        Column("metric", "Name", is_text=True),
        Column("float", "Value of the same weights in float32; - where it was not measured"),
        Column(
            "interval of float",
            f"Confidence interval ({percent(metrics[0].confidence, 0)}); - where it is unknown",
        ),
        Column("deployed", "Value of the deployed programs"),
        Column("interval", "Confidence interval of it, as for float"),
        Column("deployed / float", "Ratio of both values"),
    ]
    rows = [
        [
            each.name,
            _value(each, each.float_value),
            _interval(each, each.float_interval),
            _value(each, each.deployed),
            _interval(each, each.interval),
            _ratio(each.ratio),
        ]
        for each in metrics
    ]
    parts = [table(columns, rows)]
    if all(each.float_value is None for each in metrics):
        parts.append(missing("The float module was not scored, so no metric has a baseline"))
    if all(each.interval is None for each in metrics):
        parts.append(missing("No metric has a confidence interval"))
    return joined(parts)


def _compared(deployment: Deployment) -> Html:
    rows: list[list[Cell]] = []
    programs = sum(each.model.size_bytes for each in deployment.programs)
    if deployment.float_bytes and programs:
        pair = f"{deployment.float_bytes:,}", f"{programs:,}"
        rows.append(["size, bytes", *pair, _ratio(programs / deployment.float_bytes)])
    timing = deployment.timing
    if timing is not None and timing.float_ms is not None:
        name = f"time on this CPU, ms per {deployment.unit}"
        pair = significant(timing.float_ms), significant(timing.program_ms)
        rows.append([name, *pair, _ratio(timing.program_ms / timing.float_ms)])
    columns = [
        Column("quantity", "Name and unit", is_text=True),
        Column(
            "float",
            "Parameters of the emulated networks with four bytes each; time of PyTorch, call by "
            "call with the inputs of each program's example",
        ),
        Column("deployed", "Files of all programs; time of the programs with the same inputs"),
        Column("deployed / float", "Ratio of both; metrics have theirs above"),
    ]
    parts = [table(columns, rows)] if rows else []
    if timing is not None:
        parts.append(
            paragraph(
                f"Programs were timed on {timing.runtime}, both with {timing.threads} thread"
                f"{'s' if timing.threads != 1 else ''}, as the median of several calls. This is "
                "the time of the processor that wrote the report, not of a device."
            )
        )
    else:
        reason = deployment.problems.get("timing", "no program was timed")
        parts.append(missing(f"The time on this CPU: {reason}"))
    if not (deployment.float_bytes and programs):
        parts.append(missing("The size compared with float: there is no program"))
    return joined(parts)


def _equality(checks: Sequence[RuntimeCheck]) -> Html:
    if not checks:
        return missing("No program was run, so no output was compared")
    columns = [
        Column("runtime", "Interpreter that ran the programs", is_text=True),
        Column("version", "Version of its package", is_text=True),
        Column("programs", "Programs that it ran", is_text=True),
        Column("inputs", "Inputs of the comparison", is_text=True),
        Column("outputs", "Number of outputs that were compared with the emulated module's"),
        Column("differing", "Number of these that are not equal in every bit"),
        Column("equal", "Fraction that is equal"),
        Column(
            "promised",
            "Whether the spec is exact for this runtime; on another one, outputs may differ",
            is_text=True,
        ),
    ]
    rows = [
        [
            *(each.runtime, each.version or NONE, ", ".join(each.programs), each.inputs),
            *(f"{each.outputs:,}", f"{each.outputs - each.equal_outputs:,}"),
            percent(each.equal_outputs / each.outputs, 4),
            "yes" if each.is_promised else "no",
        ]
        for each in checks
        if each.outputs
    ]
    parts = [table(columns, rows)] if rows else []
    parts += [
        missing(f"A comparison of {', '.join(each.programs)} on {each.runtime}: {each.problem}")
        for each in checks
        if each.problem
    ]
    return joined(parts)


def _origin(deployment: Deployment) -> Html:
    origin, parts = deployment.origin, []
    if origin is None:
        parts.append(missing("Date, command, commit and versions were not recorded"))
    else:
        commit = origin.commit or "not known: the command did not run in a checkout"
        changed = ", with uncommitted changes" if origin.is_changed else ""
        columns = [
            Column("entry", "Name", is_text=True),
            Column("value", "Value when the report was written", is_text=True),
        ]
        rows: list[list[Cell]] = [
            ["date", origin.date],
            ["command", origin.command],
            ["commit", f"{commit}{changed}"],
            ["machine", origin.machine],
            ["versions", ", ".join(f"{name} {v}" for name, v in origin.versions.items())],
        ]
        parts.append(table(columns, rows))
    if deployment.configuration:
        parts += [paragraph("Configuration:"), preformatted(deployment.configuration)]
    else:
        parts.append(missing("The configuration was not recorded"))
    return joined(parts)


def _value(metric: Metric, value: float | None) -> str:
    if value is None:
        return NONE
    return f"{100 * value:.2f} %" if metric.is_fraction else significant(value)


def _interval(metric: Metric, interval: tuple[float, float] | None) -> str:
    if interval is None:
        return NONE
    low, high = interval
    if metric.is_fraction:
        return f"{100 * low:.2f} to {100 * high:.2f} %"
    return f"{significant(low)} to {significant(high)}"


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return NONE
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:#.3g}"
