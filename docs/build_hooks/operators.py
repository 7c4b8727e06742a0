"""Write the table of operators into a page while the site is built, from their records.

A page with the line ``<!-- table of operators -->`` gets the table there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_nna.emulation.operators.catalog import operators

MARK = "<!-- table of operators -->"
#: Rows of ``recipes.benchmark.npu_operators``.
NPU_ROWS = Path(__file__).parents[1] / "results" / "npu_operators.jsonl"
# Python writes these functions as operators; the others with underscores are in-place forms.
_SIGNS = {"__matmul__": "`@`"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark of a page (a hook of MkDocs)."""
    return markdown.replace(MARK, table())


def table() -> str:
    """Return the table of all operators in Markdown, a row each.

    Example:
        >>> [row] = [row for row in table().splitlines() if row.startswith("| `reduce_max`")]
        >>> row.rpartition(" | ")[0]
        '| `reduce_max` | 8, 16 | `amax`, `max` | chooses among the integers; `max` of one tensor'
    """
    head = "| operator | widths | torch functions | arithmetic | Ethos-U |"
    rows, targets = [head, "|---|---|---|---|---|"], npu_targets()
    for name, operator in operators().items():
        functions = [
            _SIGNS.get(function, f"`{function}`")
            for function in operator.functions
            if function in _SIGNS or not function.endswith("_")
        ]
        widths = ", ".join(map(str, operator.widths))
        cells = (f"`{name}`", widths, ", ".join(functions), operator.arithmetic, targets.get(name))
        rows.append(f"| {' | '.join(cell or 'not compiled' for cell in cells)} |")
    return "\n".join(rows)


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
