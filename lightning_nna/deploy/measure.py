"""Measure a deployment: equality on every runtime, cost on devices, time, and activations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
import yaml
from torch import nn

from lightning_nna.deploy.activations import Activations, activation_metrics
from lightning_nna.deploy.capture import emulator_of, forward_of
from lightning_nna.deploy.deployment import (
    Deployment,
    ExportedProgram,
    Metric,
    RuntimeCheck,
    Timing,
)
from lightning_nna.deploy.origin import Origin
from lightning_nna.deploy.program import Program
from lightning_nna.deploy.runtimes import (
    MissingRuntimeError,
    UnsupportedProgramError,
    runtime_of,
)
from lightning_nna.deploy.vela import VelaReport, vela_report
from lightning_nna.deploy.verification import verify
from lightning_nna.emulation.emulator import Emulator
from lightning_nna.emulation.sites import ROOT

#: Runtimes that programs are compared on, unless others are asked for.
COMPARED_RUNTIMES = ("litert", "tflm", "tosa")
#: Name of an accelerator, of a system and of a memory mode; None for Vela's choice of this project.
System = tuple[str, str | None, str | None]
_DEFAULT_SYSTEM: System = ("ethos-u55-128", None, None)
_FAST_RUNTIME = "litert-xnnpack"
_RANDOM_INPUTS = 4
# A time is the median of so many calls, after one that is not counted.
_REPEATS = 5


def measure_deployment(
    module: nn.Module,
    programs: Sequence[ExportedProgram],
    *,
    metrics: Sequence[Metric] = (),
    runtimes: Sequence[str] = COMPARED_RUNTIMES,
    systems: Sequence[System] | None = None,
    unit: str = "call",
    run: Callable[[], Any] | None = None,
    checks: Sequence[RuntimeCheck] = (),
    configuration: str | None = None,
    origin: Origin | None = None,
) -> Deployment:
    """Measure what a report of a deployment says beyond the weights.

    Args:
        module: Emulated module that the programs were exported from.
        programs: Programs.
        metrics: Metrics of the deployed module, and of the float one; they are not measured here.
        runtimes: Names of the runtimes on which the programs are compared with the module, see
            :func:`.verify`. One that is missing, or that has no form of a program, is noted.
        systems: Systems for which Vela estimates memory and time; none for no estimate; None for
            an Ethos-U55 with its weights in flash, if Vela is installed.
        unit: Unit of work that the calls of the programs are for.
        run: Function that runs the module on typical data, for the activations; None for one call
            with the inputs of each program.
        checks: Comparisons that were made before, as those of a test set; they come first.
        configuration: Settings as text; None for the fields of the spec.
        origin: Origin of the numbers; None for this process, now.

    Returns:
        What was measured, and the reasons why something was not.

    Raises:
        CaptureError: If the module is not emulated or not calibrated.
        VelaError: If a system was asked for and Vela is missing, or rejects a program.

    Example:
        >>> import tempfile
        >>> from lightning_nna import calibrate
        >>> from lightning_nna.deploy import export_tflite, write_report
        >>> net, x = nn.Linear(8, 4), torch.randn(1, 8)
        >>> emulator = calibrate(net, [x])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = export_tflite(net, [x], f"{folder}/net.tflite")
        ...     program = ExportedProgram("net", model, [x])
        ...     deployment = measure_deployment(net, [program], runtimes=["litert"], systems=[])
        ...     rows = write_report(net, folder, deployment=deployment)
        >>> deployment.checks[0].outputs, deployment.problems["systems"]
        (20, 'no system was named for an estimate of Vela')
    """
    emulator = emulator_of(module)
    problems: dict[str, str] = {}
    reports = _vela_reports(programs, systems, problems)
    first = list(reports[0].values()) if reports else []
    return Deployment(
        programs=tuple(programs),
        metrics=tuple(metrics),
        checks=(*checks, *check_runtimes(module, programs, runtimes)),
        systems=reports,
        timing=_timing(module, programs, problems),
        activations=_activations(module, programs, run, first),
        float_bytes=_float_bytes(module, emulator),
        problems=problems,
        unit=unit,
        origin=origin if origin is not None else Origin.of_process(),
        configuration=_described(emulator) if configuration is None else configuration,
    )


def check_runtimes(
    module: nn.Module, programs: Sequence[ExportedProgram], runtimes: Sequence[str]
) -> list[RuntimeCheck]:
    """Compare programs with the module that they were exported from, on several runtimes.

    Args:
        module: Emulated module.
        programs: Programs.
        runtimes: Names of the runtimes, see :func:`.runtime_of`.

    Returns:
        One comparison a runtime; and one for each program that a runtime cannot run.

    Raises:
        ValueError: If there is no runtime of a name.
    """
    exact_for = emulator_of(module).spec.runtime
    checks = []
    for runtime in map(runtime_of, runtimes):
        outputs = equal = 0
        compared: list[str] = []
        problems: list[tuple[str, str]] = []
        for program in programs:
            try:
                version = runtime.version()
                agreement = verify(
                    module,
                    program.model.path,
                    program.inputs,
                    forward=program.forward,
                    runtime=runtime,
                    random_inputs=_RANDOM_INPUTS,
                )
            except (MissingRuntimeError, UnsupportedProgramError) as error:
                problems.append((program.name, str(error)))
                continue
            compared.append(program.name)
            outputs += agreement.outputs
            equal += agreement.outputs - agreement.differing
        is_promised = runtime.name == exact_for
        inputs = f"its example and {_RANDOM_INPUTS} random inputs of each program"
        if compared:
            names = tuple(compared)
            checks.append(
                RuntimeCheck(runtime.title, version, names, inputs, outputs, equal, is_promised)
            )
        checks += [
            RuntimeCheck(runtime.title, None, (name,), inputs, 0, 0, is_promised, problem)
            for name, problem in problems
        ]
    return checks


def _vela_reports(
    programs: Sequence[ExportedProgram],
    systems: Sequence[System] | None,
    problems: dict[str, str],
) -> tuple[dict[str, VelaReport], ...]:
    """Return the reports of each system by the name of the program."""
    if systems is None:
        systems = [_DEFAULT_SYSTEM] if find_spec("ethosu") else []
        if not systems:
            problems["systems"] = "Vela is not installed, so there are no estimates of a device"
    elif not systems:
        problems["systems"] = "no system was named for an estimate of Vela"
    return tuple(
        {
            program.name: vela_report(
                program.model.path, accelerator=accelerator, system=system, memory_mode=mode
            )
            for program in programs
        }
        for accelerator, system, mode in systems
    )


def _timing(
    module: nn.Module, programs: Sequence[ExportedProgram], problems: dict[str, str]
) -> Timing | None:
    """Time the programs and the float module on their examples, call by call."""
    runtime = runtime_of(_FAST_RUNTIME)
    program_ms = float_ms = 0.0
    with _evaluation(module), _one_thread(), torch.no_grad():
        for each in programs:
            try:
                loaded = Program(each.model.path, runtime=runtime)
                milliseconds = _milliseconds(lambda x=each, p=loaded: p(x.inputs))  # type: ignore[misc]
            except (MissingRuntimeError, UnsupportedProgramError) as error:
                problems["timing"] = f"{runtime.title} does not run {each.name}: {error}"
                return None
            forward = forward_of(module, each.forward)
            program_ms += each.calls * milliseconds
            float_ms += each.calls * _milliseconds(lambda x=each, f=forward: f(*x.inputs))  # type: ignore[misc]
    if not programs:
        problems["timing"] = "there is no program to time"
        return None
    return Timing(program_ms, runtime.title, float_ms, threads=1)


def _milliseconds(call: Callable[[], Any]) -> float:
    """Return the median time of a call."""
    call()
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    return median(times)


def _activations(
    module: nn.Module,
    programs: Sequence[ExportedProgram],
    run: Callable[[], Any] | None,
    reports: Sequence[VelaReport],
) -> Activations:
    """Measure activations on data; their sizes are those in the programs."""

    def run_programs() -> None:
        for program in programs:
            forward_of(module, program.forward)(*program.inputs)

    in_programs = activation_metrics(module, run_programs, reports)
    if run is None:
        return in_programs
    elements = {row.site: row.elements for row in in_programs.rows}
    activations = activation_metrics(module, run, reports)
    rows = (replace(row, elements=elements.get(row.site, row.elements)) for row in activations.rows)
    return replace(activations, rows=tuple(rows))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch use one thread, as the runtime does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode; afterwards it is unchanged."""
    training = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in training:
            each.training = mode


def _float_bytes(module: nn.Module, emulator: Emulator) -> int:
    """Return the bytes of the parameters of the emulated networks in float32."""
    scope = emulator.paths_in_scope
    return sum(
        4 * parameter.numel()
        for name, parameter in module.named_parameters()
        if (name.rpartition(".")[0] or ROOT) in scope
    )


def _described(emulator: Emulator) -> str:
    """Return the fields of the spec as text."""
    fields = {"spec": emulator.spec.name, **emulator.spec.arithmetic}
    if emulator.spec.operators is None:  # Every registered one.
        del fields["operators"]
    return yaml.safe_dump(fields, sort_keys=False)
