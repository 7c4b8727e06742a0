"""Let wide tables scroll by themselves while the site is built, so that a page never does.

Every table gets a box that a keyboard can reach. A table of many columns is marked, so that its
style can keep the first column in sight.
"""

from __future__ import annotations

import re
from typing import Any

TABLE = re.compile(r"<table>(.*?)</table>", re.DOTALL)
HEAD = re.compile(r"<th\b")
# A number and its unit stay in one line.
UNIT = re.compile(r"(?<=\d) (?=(?:%|dB|[kKMG]i?B|bytes|m?s|min)(?!\w))")
#: From this number of columns on a table is wide.
WIDE = 6


def on_page_content(content: str, **_: Any) -> str:
    """Enclose every table of a page (a hook of MkDocs)."""
    return TABLE.sub(_boxed, content)


def _boxed(match: re.Match[str]) -> str:
    head = match[1].partition("</thead>")[0]
    columns = len(HEAD.findall(head))
    classes = "scrolling wide" if columns >= WIDE else "scrolling"
    table = UNIT.sub("\N{NO-BREAK SPACE}", match[0])
    return f'<div class="{classes}" tabindex="0" role="region" aria-label="Table">{table}</div>'
