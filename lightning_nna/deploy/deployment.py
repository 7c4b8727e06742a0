"""The evidence of a deployment: metrics, equality, cost, activations and their origin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_nna.deploy.activations import Activations
from lightning_nna.deploy.origin import Origin
from lightning_nna.deploy.tflite import TFLiteModel
from lightning_nna.deploy.vela import VelaReport


@dataclass(frozen=True)
class ExportedProgram:
    """A program of a module, and how it was exported and is called.

    Args:
        name: Name.
        model: File of :func:`.export_tflite`.
        inputs: Arguments that it was exported with.
        forward: Function of the module and the arguments that it was exported with; None for the
            module's own forward.
        calls: Calls for a unit of work, such as a second of speech.
    """

    name: str
    model: TFLiteModel
    inputs: Sequence[Any]
    forward: Callable[..., Any] | None = None
    calls: float = 1.0


@dataclass(frozen=True)
class Metric:
    """A metric of the deployed module, and of the float module that it is compared with.

    Args:
        name: Name, as ``"WER"``.
        deployed: Value of the programs, or of the emulated module, whose outputs are the same.
        interval: Confidence interval of it; None if unknown.
        float_value: Value of the float module; None if it was not measured.
        float_interval: Confidence interval of it; None if unknown.
        is_fraction: Whether values are fractions, which are written in percent.
        confidence: Fraction of the confidence intervals.

    Example:
        >>> Metric("WER", 0.06, (0.05, 0.07), 0.05).ratio
        1.2
    """

    name: str
    deployed: float
    interval: tuple[float, float] | None = None
    float_value: float | None = None
    float_interval: tuple[float, float] | None = None
    is_fraction: bool = False
    confidence: float = 0.95

    @property
    def ratio(self) -> float | None:
        """Value of the deployed module over that of the float one; None if there is none."""
        return self.deployed / self.float_value if self.float_value else None


@dataclass(frozen=True)
class RuntimeCheck:
    """Outputs of programs on a runtime, compared with those of the emulated module.

    Args:
        runtime: Title of the runtime.
        version: Version of its package; None if unknown.
        programs: Names of the programs.
        inputs: Description of the inputs.
        outputs: Number of outputs that were compared.
        equal_outputs: Number of them that are equal in every bit.
        is_promised: Whether the spec is exact for this runtime.
        problem: Reason why nothing was compared; None if it was.
    """

    runtime: str
    version: str | None
    programs: tuple[str, ...]
    inputs: str
    outputs: int
    equal_outputs: int
    is_promised: bool
    problem: str | None = None


@dataclass(frozen=True)
class Timing:
    """Time on this CPU for a unit of work.

    Args:
        program_ms: Milliseconds of the programs.
        runtime: Title of the runtime that ran them.
        float_ms: Milliseconds of the float module in PyTorch; None if it was not measured.
        threads: Number of threads of both.
    """

    program_ms: float
    runtime: str
    float_ms: float | None = None
    threads: int = 1


@dataclass(frozen=True)
class DeviceTotals:
    """Vela's estimates of all programs for a unit of work, on one system.

    Args:
        accelerator: Name of the accelerator.
        system: Name of the system configuration.
        memory_mode: Name of the memory mode.
        encoded_bytes: Bytes of the compressed weights of all programs.
        memory_bytes: Bytes of all memory that the programs use, added up.
        sram_bytes: Bytes of SRAM of the program that needs most.
        cycles: Cycles for a unit.
        inference_ms: Milliseconds for a unit.
        part_ms: Milliseconds of one call of each program.
        bound: Whether ``"bandwidth"`` or ``"computation"`` decides the time, by program.
        cpu_operators: Kinds of the operators that are left to the CPU, which has no estimate.
    """

    accelerator: str
    system: str
    memory_mode: str
    encoded_bytes: int
    memory_bytes: int
    sram_bytes: int
    cycles: float
    inference_ms: float
    part_ms: Mapping[str, float]
    bound: Mapping[str, str]
    cpu_operators: Sequence[str]

    @classmethod
    def of(cls, reports: Mapping[str, VelaReport], calls: Mapping[str, float]) -> DeviceTotals:
        """Add up reports of one system.

        Args:
            reports: Vela's report of each program by its name; at least one.
            calls: Calls of each program for a unit, by its name.
        """
        every = reports.values()
        first = next(iter(every))
        return cls(
            accelerator=first.accelerator,
            system=first.system,
            memory_mode=first.memory_mode,
            encoded_bytes=sum(report.encoded_bytes for report in every),
            memory_bytes=sum(report.memory_bytes for report in every),
            sram_bytes=max(report.sram_bytes for report in every),
            cycles=sum(report.cycles * calls.get(p, 0.0) for p, report in reports.items()),
            inference_ms=sum(
                report.inference_ms * calls.get(p, 0.0) for p, report in reports.items()
            ),
            part_ms={p: report.inference_ms for p, report in reports.items()},
            bound={
                p: "bandwidth" if report.is_bandwidth_bound else "computation"
                for p, report in reports.items()
            },
            cpu_operators=sorted(name for report in every for name in report.cpu_operators),
        )


@dataclass(frozen=True)
class Deployment:
    """Everything that a report says beyond the weights; it says what is missing here, too.

    Args:
        programs: Programs.
        metrics: Metrics of the deployed module.
        checks: Comparisons with the runtimes.
        systems: Vela's reports of each system by the name of the program.
        timing: Time on this CPU; None if it was not measured.
        activations: Metrics of the activations.
        float_bytes: Bytes of the emulated parameters in float32; None if unknown.
        problems: Reasons why something was not measured, by the name of the field.
        unit: Unit of work that times, cycles and calls are for.
        firmware: Figures of the firmware of each program: flash, arena and the like, by name.
        origin: Origin of the numbers; None if unknown.
        configuration: Settings, as text.
    """

    programs: Sequence[ExportedProgram] = ()
    metrics: Sequence[Metric] = ()
    checks: Sequence[RuntimeCheck] = ()
    systems: Sequence[Mapping[str, VelaReport]] = ()
    timing: Timing | None = None
    activations: Activations = field(default_factory=Activations)
    float_bytes: int | None = None
    problems: Mapping[str, str] = field(default_factory=dict)
    unit: str = "call"
    firmware: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    origin: Origin | None = None
    configuration: str = ""

    @property
    def calls(self) -> dict[str, float]:
        """Calls of each program for a unit of work, by its name."""
        return {each.name: each.calls for each in self.programs}

    @property
    def totals(self) -> list[DeviceTotals]:
        """Vela's estimates for a unit of work, one a system."""
        return [DeviceTotals.of(reports, self.calls) for reports in self.systems]
