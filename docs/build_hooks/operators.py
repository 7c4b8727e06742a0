"""Write the table of operators into a page while the site is built, from their records.

A page with the line ``<!-- table of operators -->`` gets the table there.
"""

from __future__ import annotations

from typing import Any

from lightning_nna.emulation.operators.catalog import operators

MARK = "<!-- table of operators -->"
# Python writes these functions as operators; the others with underscores are in-place forms.
_SIGNS = {"__matmul__": "`@`"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark of a page (a hook of MkDocs)."""
    return markdown.replace(MARK, table())


def table() -> str:
    """Return the table of all operators in Markdown, a row each.

    Example:
        >>> [row] = [row for row in table().splitlines() if row.startswith("| `reduce_max`")]
        >>> row
        '| `reduce_max` | 8, 16 | `amax`, `max` | chooses among the integers; `max` of one tensor |'
    """
    rows = ["| operator | widths | torch functions | arithmetic |", "|---|---|---|---|"]
    for name, operator in operators().items():
        functions = [
            _SIGNS.get(function, f"`{function}`")
            for function in operator.functions
            if function in _SIGNS or not function.endswith("_")
        ]
        widths = ", ".join(map(str, operator.widths))
        rows.append(f"| `{name}` | {widths} | {', '.join(functions)} | {operator.arithmetic} |")
    return "\n".join(rows)
