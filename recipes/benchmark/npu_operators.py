"""Compile every operator with Vela: does it run on the NPU, on the CPU, or not at all?

    python -m recipes.benchmark.npu_operators           # compile what is missing

The networks are the examples of the oracle's tests, so it runs in a checkout. A row of
``docs/results/npu_operators.jsonl`` is one operator at one width on one accelerator. The table of
operators in the documentation reads them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_nna.deploy import CaptureError, VelaError, export_tflite, vela_report
from lightning_nna.emulation import calibrate
from lightning_nna.emulation.operators.record import Operator
from lightning_nna.emulation.spec import PRESETS
from lightning_nna.testing import operator_oracle
from lightning_nna.testing.operator_oracle import SPECS, Example
from recipes.benchmark.rows import Row, append_row, has_row, read_rows

#: Configurations that are compiled for.
ACCELERATORS = ("ethos-u55-128", "ethos-u65-256", "ethos-u85-256")
RESULTS = Path("docs/results/npu_operators.jsonl")
_TESTS = ("tests/emulation/operators", "tests/emulation/test_every_operator.py")


def compile_operator(
    operator: Operator,
    example: Example,
    bits: int,
    *,
    path: Path = RESULTS,
    accelerators: Sequence[str] = ACCELERATORS,
) -> None:
    """Compile an operator's example and append a row for each accelerator that has none yet.

    Args:
        operator: Record of the operator.
        example: Network that consists of it; the first one that is seen counts.
        bits: Bits of activations.
        path: File of the rows.
        accelerators: Configurations to compile for.
    """
    known = read_rows(path)
    keys = [{"operator": operator.name, "bits": bits, "accelerator": a} for a in accelerators]
    missing = [key for key in keys if not has_row(known, **key)]
    if not missing or not example.exported:
        return
    module, inputs = example.build().eval(), example.inputs()
    calibrate(module, [inputs], forward=lambda net, x: net(*x), spec=SPECS[bits])
    with TemporaryDirectory() as folder:
        program = Path(folder) / "network.tflite"
        try:
            export_tflite(module, inputs, program)
        except CaptureError as error:
            for key in missing:
                append_row(path, {**key, "error": str(error)})
            return
        for key in missing:
            append_row(path, {**key, **_target(program, str(key["accelerator"]))})


def _target(program: Path, accelerator: str) -> Row:
    """Return the kinds of operators on the NPU and on the CPU, or why there is no program."""
    try:
        report = vela_report(program, accelerator=accelerator)
    except VelaError as error:
        return {"error": str(error).replace(str(program), "the program")}
    npu = {each.operator for each in report.operators if each.on_npu}
    return {"npu": sorted(npu), "cpu": sorted(set(report.cpu_operators)), "cycles": report.cycles}


def main() -> None:
    """Compile the examples of all operators whose rows are missing."""
    import pytest

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", type=Path, default=RESULTS, help="file of the rows")
    parser.add_argument("--accelerators", nargs="+", default=list(ACCELERATORS))
    settings = parser.parse_args()

    def npu_target(operator: Operator, example: Example, spec: str) -> None:
        bits = PRESETS[spec].activation_bits
        compile_operator(
            operator, example, bits, path=settings.path, accelerators=settings.accelerators
        )

    # The tests of the oracle take its checks by this name.
    operator_oracle.CHECKS = (npu_target,)
    # This process has imported more than pytest expects.
    warning = "ignore::pytest.PytestAssertRewriteWarning"
    raise SystemExit(pytest.main([*_TESTS, "-q", "-k", "npu_target", "-W", warning]))


if __name__ == "__main__":
    main()
