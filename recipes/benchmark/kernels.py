"""Find out which kernels the runtimes have: load and run programs of one instruction.

    python -m recipes.benchmark.kernels

Writes ``runtime_kernels.json``, which :mod:`.emulation.runtime_kernels` reads, from the
probes in ``kernel_probes.json``: an instruction of each kernel for each type of its first operand.
``--record`` first adds probes of kernels that have none, from the examples of the operators' tests.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_nna.deploy.runtimes import UnsupportedProgramError
from lightning_nna.emulation.operators.record import Operator
from lightning_nna.emulation.program import Instruction, Stored
from lightning_nna.emulation.runtime_kernels import PATH
from lightning_nna.files import whole_file
from lightning_nna.testing import operator_oracle
from lightning_nna.testing.operator_oracle import Example
from lightning_nna.testing.replay import on_runtime
from recipes.benchmark.runtimes import instructions_of

#: Runtimes that are asked.
MEASURED = ("litert", "tflm", "tosa")
PROBES = Path(__file__).with_name("kernel_probes.json")

Probe = dict[str, Any]


def runs(probe: Probe, runtime: str) -> bool:
    """Tell whether a runtime has the kernel of a probe, for the type of its first operand.

    Args:
        probe: Instruction as :func:`probe_of` writes it.
        runtime: Name of the runtime.

    Raises:
        MissingRuntimeError: If the runtime is not installed.
    """
    inputs = tuple(None if form is None else _stored(form) for form in probe["inputs"])
    outputs, intermediates = (
        tuple(map(_stored, probe[key])) for key in ("outputs", "intermediates")
    )
    instruction = Instruction(probe["kernel"], "", inputs, outputs, probe["options"], intermediates)
    try:
        on_runtime(instruction, runtime)
    except UnsupportedProgramError:
        return False
    return True


def kernel_types(probes: Sequence[Probe], runtime: str) -> dict[str, list[str]]:
    """Return the types of the first operand that a runtime has each kernel for, by its name.

    Args:
        probes: Instructions as :func:`probe_of` writes them.
        runtime: Name of the runtime.
    """
    found: dict[str, list[str]] = {probe["kernel"]: [] for probe in probes}
    for probe in probes:
        if runs(probe, runtime):
            found[probe["kernel"]].append(first_type(probe))
    return found


def probe_of(instruction: Instruction) -> Probe:
    """Return an instruction without the integers of its data, as a probe.

    Args:
        instruction: Instruction as a recorder receives it.
    """
    return {
        "kernel": instruction.operator,
        "inputs": list(map(_described, instruction.inputs)),
        "outputs": list(map(_described, instruction.outputs)),
        "intermediates": list(map(_described, instruction.intermediates)),
        "options": dict(instruction.options),
    }


def first_type(probe: Probe) -> str:
    """Return the type of the first operand of a probe."""
    return str(next(each["type"] for each in probe["inputs"] if each is not None))


def with_probes(probes: Sequence[Probe], instructions: Iterable[Instruction]) -> list[Probe]:
    """Return probes with those of further instructions, the smallest of each kernel and type.

    Args:
        probes: Probes that there are, which stay.
        instructions: Instructions as a recorder receives them.
    """
    known = {(each["kernel"], first_type(each)): each for each in probes}
    candidates = sorted(instructions, key=_elements)
    for probe in map(probe_of, candidates):
        known.setdefault((probe["kernel"], first_type(probe)), probe)
    return [probe for _, probe in sorted(known.items())]


def read_probes(path: Path = PROBES) -> list[Probe]:
    """Read the probes."""
    probes: list[Probe] = json.loads(path.read_text(encoding="utf-8"))
    return probes


def write_probes(probes: Sequence[Probe], path: Path = PROBES) -> None:
    """Write the probes, one a line."""
    lines = ",\n".join(json.dumps(probe) for probe in probes)
    with whole_file(path) as unfinished:
        unfinished.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def write_table(table: Mapping[str, Mapping[str, Sequence[str]]], path: Path = PATH) -> None:
    """Write the kernels of all runtimes, one kernel a line.

    Args:
        table: Types of the first operand by runtime and kernel.
        path: File.
    """
    parts = []
    for runtime, types in table.items():
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(types[k])}" for k in sorted(types))
        parts.append(f"{json.dumps(runtime)}: {{\n{lines}\n}}")
    with whole_file(path) as unfinished:
        unfinished.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def _elements(instruction: Instruction) -> int:
    return sum(x.integers.numel() for x in instruction.inputs if x is not None)


def _described(x: Stored | None) -> dict[str, Any] | None:
    """A tensor's form; of constants that are axes or shapes the numbers, too."""
    if x is None:
        return None
    scale = x.scale.tolist() if isinstance(x.scale, torch.Tensor) else x.scale
    described = {
        "shape": list(x.integers.shape),
        "type": x.dtype,
        "scale": scale,
        "zero_point": x.zero_point,
        "constant": x.constant,
        "channel_axis": x.channel_axis,
        "variable": x.variable,
    }
    return {**described, "values": x.integers.tolist()} if _says_where(x) else described


def _says_where(x: Stored) -> bool:
    return x.constant and x.dtype == "int32" and not isinstance(x.scale, torch.Tensor)


def _stored(form: dict[str, Any]) -> Stored:
    values, scale = form.get("values"), form["scale"]
    integers = torch.full(form["shape"], form["zero_point"]) if values is None else values
    return Stored(
        torch.as_tensor(integers, dtype=torch.int64).reshape(form["shape"]),
        form["type"],
        torch.tensor(scale) if isinstance(scale, list) else scale,
        form["zero_point"],
        form["constant"],
        form["channel_axis"],
        form["variable"],
    )


def _record() -> int:
    """Add probes from the examples of the operators' tests; returns the status of pytest."""
    import pytest

    def kernel_probes(operator: Operator, example: Example, spec: str) -> None:
        write_probes(with_probes(read_probes(), instructions_of(example, spec)))

    # The tests of the oracle take its checks by this name.
    operator_oracle.CHECKS = (kernel_probes,)
    tests = ("tests/emulation/operators", "tests/emulation/test_every_operator.py")
    return int(pytest.main([*tests, "-q", "-k", "kernel_probes"]))


def main() -> None:
    """Write the table of kernels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="add probes from the tests")
    if parser.parse_args().record and (status := _record()):
        raise SystemExit(status)
    probes = read_probes()
    write_table({name: kernel_types(probes, name) for name in MEASURED})


if __name__ == "__main__":
    main()
