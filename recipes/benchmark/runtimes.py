"""Compare every operator's instructions with the runtimes, under each preset.

    python -m recipes.benchmark.runtimes

Runs the examples of the operators' tests and writes a row for each, preset and runtime, to
``docs/results/runtimes.jsonl``, and the page ``docs/results/runtimes.md``; rows that are there
already are kept.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_nna.deploy.runtimes import UnsupportedProgramError, runtime_of
from lightning_nna.emulation import coverage, emulate
from lightning_nna.emulation.operators.record import Operator
from lightning_nna.emulation.program import Instruction
from lightning_nna.emulation.spec import PRESETS
from lightning_nna.files import whole_file
from lightning_nna.testing import operator_oracle
from lightning_nna.testing.operator_oracle import Example
from lightning_nna.testing.replay import on_runtime
from recipes.benchmark.report import Fields, line, render, ruled
from recipes.benchmark.rows import Row, append_row, has_row, read_rows

#: Pairs of a preset and a runtime that are compared.
PAIRS = (
    ("litert-int8", "litert"),
    ("litert-int8", "tflm"),
    ("litert-int8", "tosa"),
    ("litert-int16x8", "litert"),
    ("litert-int16x8", "tflm"),
    ("tflm-int8", "tflm"),
    ("tosa-int8", "tosa"),
    ("tflm-int16x8", "tflm"),
    ("litert-int16x8", "tosa"),
    ("tosa-int16x8", "tosa"),
)
RESULTS = Path("docs/results/runtimes.jsonl")
PAGE = Path("docs/results/runtimes.md")
# Stands for all kernels of an operator that runs in float.
_OPERATOR = "the operator"
_TESTS = ("tests/emulation/operators", "tests/emulation/test_every_operator.py")


def compare_operator(
    operator: Operator,
    example: Example,
    spec: str,
    *,
    test: str,
    path: Path = RESULTS,
    pairs: Sequence[tuple[str, str]] = PAIRS,
) -> None:
    """Compare an example's instructions, and append a row for each pair that has none yet.

    Args:
        operator: Record of the operator.
        example: Network that consists of it.
        spec: Preset; those of its width of activations are compared.
        test: Name of the example.
        path: File of the rows.
        pairs: Pairs of a preset and a runtime.
    """
    known, bits = read_rows(path), PRESETS[spec].activation_bits
    for preset, runtime in pairs:
        key = {"operator": operator.name, "test": test, "preset": preset, "runtime": runtime}
        if PRESETS[preset].activation_bits != bits or has_row(known, **key):
            continue
        # What a preset leaves to the CPU records nothing there.
        if coverage(example.build(), *example.inputs(), spec=preset).fallbacks:
            counts = {"outputs": 0, "equal": 0, "missing": [_OPERATOR], "differing": {}}
        else:
            counts = compared(instructions_of(example, preset), runtime)
        append_row(path, {**key, "version": runtime_of(runtime).version(), **counts})


def instructions_of(example: Example, preset: str) -> list[Instruction]:
    """Record the instructions of an example, some of whose inputs are beyond the ranges."""
    torch.manual_seed(0)
    module, inputs = example.build(), example.inputs()
    recorded: list[Instruction] = []
    with emulate(module, preset) as chip, torch.no_grad():
        with chip.observing():
            module(*inputs)
        with chip.running(recorder=recorded.append):
            module(*(x if example.rows else 1.5 * x for x in inputs))
    return recorded


def compared(instructions: Iterable[Instruction], runtime: str) -> dict[str, Any]:
    """Count outputs, equal ones, and kernels that the runtime lacks."""
    outputs, equal, missing, differing = 0, 0, set(), Counter[str]()
    for each in instructions:
        first = next(x.dtype for x in each.inputs if x is not None)
        try:
            references = on_runtime(each, runtime)
        except UnsupportedProgramError:
            missing.add(f"{each.operator} {first}")
            continue
        for output, reference in zip(each.outputs, references, strict=True):
            same = int((output.integers.numpy() == reference).sum())
            outputs, equal = outputs + reference.size, equal + same
            if same < reference.size:
                differing[f"{each.operator} {first}"] += reference.size - same
    return {
        "outputs": outputs,
        "equal": equal,
        "missing": sorted(missing),
        "differing": dict(differing),
    }


def report(rows: Sequence[Row]) -> Fields:
    """Summarize the rows by preset and runtime."""
    table = ruled(["preset", "runtime", "version", "operators equal", "outputs", "equal"])
    lacking, unequal = [], []
    pairs = dict.fromkeys((row["preset"], row["runtime"]) for row in rows)
    for preset, runtime in pairs:
        of_pair = [r for r in rows if (r["preset"], r["runtime"]) == (preset, runtime)]
        names: defaultdict[str, list[Row]] = defaultdict(list)
        for row in of_pair:
            names[row["operator"]].append(row)
        alike = [name for name, own in names.items() if all(map(_is_equal, own))]
        outputs, equal = (sum(row[key] for row in of_pair) for key in ("outputs", "equal"))
        versions = " and ".join(sorted({row["version"] for row in of_pair}))
        share = "all" if equal == outputs else f"{100 * equal / outputs:.4f} %"
        title = runtime_of(runtime).title
        count = f"{len(alike)} of {len(names)}"
        table.append(line(f"`{preset}`", title, versions, count, f"{outputs:,}", share))
        lacks = sorted(
            {
                f"`{row['operator']}`" if kernel == _OPERATOR else kernel
                for row in of_pair
                for kernel in row["missing"]
            }
        )
        if lacks:
            lacking.append(f"- `{preset}` on {title}: {', '.join(lacks)}.")
        differs: Counter[str] = Counter()
        for row in of_pair:
            differs.update(row["differing"])
        if differs:
            found = ", ".join(f"{count:,} of {name}" for name, count in sorted(differs.items()))
            unequal.append(f"- `{preset}` on {title}: {found}.")
    return {"table": table, "lacking": lacking or ["- none"], "unequal": unequal or ["- none"]}


def _is_equal(row: Row) -> bool:
    return row["outputs"] > 0 and row["equal"] == row["outputs"] and not row["missing"]


def main() -> None:
    """Compare the examples whose rows are missing, and write the page."""
    import pytest

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", type=Path, default=RESULTS, help="file of the rows")
    parser.add_argument("--page-only", action="store_true", help="write the page, run nothing")
    settings = parser.parse_args()
    if settings.page_only:
        write_page(settings.path)
        return

    def runtime_rows(operator: Operator, example: Example, spec: str) -> None:
        test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]
        compare_operator(operator, example, spec, test=test, path=settings.path)

    # The tests of the oracle take its checks by this name.
    operator_oracle.CHECKS = (runtime_rows,)
    # This process has imported more than pytest expects.
    warning = "ignore::pytest.PytestAssertRewriteWarning"
    status = pytest.main([*_TESTS, "-q", "-k", "runtime_rows", "-W", warning])
    if not status:
        write_page(settings.path)
    raise SystemExit(status)


def write_page(path: Path) -> None:
    """Write the page of the rows in a file, beside it."""
    with whole_file(path.with_suffix(".md")) as unfinished:
        unfinished.write_text(render("runtimes", report(read_rows(path))))


if __name__ == "__main__":
    main()
