"""Write what the records say of torch functions into pages: what is emulated, and what is not.

While the site is built, a page with the line ``<!-- table of operators -->`` or ``<!-- table of
other functions -->`` gets the table there. ``python docs/build_hooks/operators.py`` writes the list
of functions in the README, which has no build.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_nna.emulation.operators.catalog import operators
from lightning_nna.emulation.operators.layout import JOINS, MOVEMENTS
from lightning_nna.emulation.operators.record import Operator
from lightning_nna.emulation.remedies import REMEDIES
from lightning_nna.emulation.runtime_kernels import TITLES
from lightning_nna.emulation.runtime_kernels import table as runtime_table

MARK = "<!-- table of operators -->"
#: Rows of ``recipes.benchmark.npu_operators``.
NPU_ROWS = Path(__file__).parents[1] / "results" / "npu_operators.jsonl"
OTHERS_MARK = "<!-- table of other functions -->"
#: What is between these lines of the README is written from the records.
README_MARKS = ("<!-- functions, written from the records -->", "<!-- end of functions -->")
README = Path(__file__).resolve().parents[2] / "README.md"
# Python writes these functions as operators; the others with underscores are in-place forms.
_SIGNS = {"__matmul__": "`@`"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page (a hook of MkDocs)."""
    return markdown.replace(MARK, table()).replace(OTHERS_MARK, others())


def table() -> str:
    """Return the table of all operators in Markdown, a row each.

    Example:
        >>> [row] = [row for row in table().splitlines() if row.startswith("| `reduce_max`")]
        >>> row.split(" | ")[:3]
        ['| `reduce_max`', '8, 16', '`amax`, `max`']
    """
    runtimes = [name for name in runtime_table() if name != "litert"]
    titles = " | ".join(TITLES[name] for name in runtimes)
    head = f"| operator | widths | torch functions | arithmetic | Ethos-U | {titles} |"
    rows, targets = [head, "|---" * (5 + len(runtimes)) + "|"], npu_targets()
    for name, operator in operators().items():
        functions = [
            _SIGNS.get(function, f"`{function}`")
            for function in operator.functions
            if function in _SIGNS or not function.endswith("_")
        ]
        widths = ", ".join(map(str, operator.widths))
        cells = (f"`{name}`", widths, ", ".join(functions), operator.arithmetic, targets.get(name))
        written = [cell or "not compiled" for cell in cells]
        written += [lacking(runtime, operator) for runtime in runtimes]
        rows.append(f"| {' | '.join(written)} |")
    return "\n".join(rows)


def lacking(runtime: str, operator: Operator) -> str:
    """Return which kernels of an operator a runtime lacks, of those that LiteRT has.

    Example:
        >>> lacking("tflm", operators()["reduce_max"])
        'lacks `REDUCE_MAX` (int16)'
    """
    measured, parts = runtime_table(), []
    for kernel in operator.litert:
        types = measured["litert"].get(kernel.name, ())
        missing = [dtype for dtype in types if dtype not in measured[runtime][kernel.name]]
        if missing:
            parts.append(f"`{kernel.name}` ({', '.join(missing)})")
    return f"lacks {', '.join(parts)}" if parts else "all kernels"


def npu_targets() -> dict[str, str]:
    """Return where Vela runs the example of every operator: the NPU, or what on the CPU, and when.

    A part without a width and an accelerator holds for all of them.
    """
    results: dict[str, dict[str, list[str]]] = {}
    for line in NPU_ROWS.read_text(encoding="utf-8").splitlines() if NPU_ROWS.exists() else ():
        row = json.loads(line)
        family = row["accelerator"].split("-")[1].upper()
        target = "NPU"
        if "error" in row:
            target = "no program"
        elif row["cpu"]:
            target = f"CPU ({', '.join(f'`{kind}`' for kind in row['cpu'])})"
        cases = results.setdefault(row["operator"], {})
        cases.setdefault(target, []).append(f"{family} {row['bits']} bits")
    families = {
        when.split()[0] for cases in results.values() for each in cases.values() for when in each
    }
    return {
        name: "; ".join(
            target
            if len(cases) == 1 and families == {each.split()[0] for each in when}
            else f"{target}: {', '.join(when)}"
            for target, when in sorted(cases.items())
        )
        for name, cases in results.items()
    }


def others() -> str:
    """Return the table of functions that run in float, with what to write instead."""
    emulated = {name for each in operators().values() for name in each.functions}
    rows = ["| torch function | what to write instead |", "|---|---|"]
    by_text: dict[str, list[str]] = {}
    for name, text in sorted(REMEDIES.items()):
        if name not in emulated and name not in MOVEMENTS:
            by_text.setdefault(text, []).append(f"`{name}`")
    rows += [f"| {', '.join(names)} | {text} |" for text, names in by_text.items()]
    return "\n".join(rows)


def functions() -> str:
    """Return the torch functions that are emulated, and those that move data, as two paragraphs."""
    every = {name for each in operators().values() for name in each.functions}
    emulated = [_SIGNS.get(name, f"`{name}`") for name in sorted(every) if not _is_form(name)]
    moving = [f"`{name}`" for name in sorted((MOVEMENTS | JOINS) - every) if not _is_form(name)]
    return (
        f"Emulated ({len(emulated)}): {', '.join(emulated)}.\n\n"
        f"Data movement ({len(moving)}): {', '.join(moving)}."
    )


def with_functions(readme: str) -> str:
    """Return the README with the functions of the records between its marks."""
    first, last = README_MARKS
    before, rest = readme.split(first)
    _, after = rest.split(last)
    return f"{before}{first}\n{functions()}\n{last}{after}"


def _is_form(name: str) -> bool:
    """Tell whether a name is an in-place form, or a method that Python calls."""
    return name.startswith("_") or name.endswith("_")


if __name__ == "__main__":
    README.write_text(with_functions(README.read_text(encoding="utf-8")), encoding="utf-8")
