"""Build pages of one file: text, tables and histograms that no other file or host is needed for.

Every function takes plain text, which it escapes, and returns :class:`Html`. A page has no script,
and its policy forbids the browser to load anything, so that names from outside cannot do harm.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Html(str):
    """Text that is markup already, and is not escaped again."""

    __slots__ = ()


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        title: Head of the column.
        meaning: One sentence, without its full stop, on what the numbers are and their unit.
        is_text: Whether cells are text, on the left, and not numbers, on the right.
    """

    title: str
    meaning: str
    is_text: bool = False


@dataclass(frozen=True)
class Bar:
    """A number in a cell with a bar behind it.

    Args:
        text: Number as it is written.
        fraction: Length of the bar as a fraction of the cell, 0 to 1.
    """

    text: str
    fraction: float


#: Content of a cell: plain text, markup, or a number with a bar.
Cell = str | Html | Bar


def escaped(text: str) -> Html:
    """Return text as markup; what is markup already stays.

    Args:
        text: Plain text, or markup.

    Example:
        >>> escaped('<script> "a"')
        '&lt;script&gt; &quot;a&quot;'
    """
    return text if isinstance(text, Html) else Html(html.escape(text))


def paragraph(text: str, kind: str = "") -> Html:
    """Return a paragraph.

    Args:
        text: Plain text, or markup.
        kind: Class of the style: ``"missing"``, ``"legend"``, or none.
    """
    return Html(f'<p class="{kind}">{escaped(text)}</p>' if kind else f"<p>{escaped(text)}</p>")


def section(title: str, *parts: Html) -> Html:
    """Return a section with a heading.

    Args:
        title: Heading.
        parts: Contents.
    """
    return Html(f"<section><h2>{escaped(title)}</h2>\n{joined(parts)}\n</section>")


def preformatted(text: str) -> Html:
    """Return text with its line breaks, in a fixed width."""
    return Html(f"<pre>{escaped(text)}</pre>")


def cards(entries: Iterable[tuple[str, str, str]]) -> Html:
    """Return the numbers that a reader looks for first.

    Args:
        entries: Label, number, and a note on each.
    """
    boxes = (
        f"<div><dt>{escaped(label)}</dt><dd>{escaped(number)}</dd><dd>{escaped(note)}</dd></div>"
        for label, number, note in entries
    )
    return Html(f'<dl class="cards">{"".join(boxes)}</dl>')


def table(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]], total: Sequence[Cell] | None = None
) -> Html:
    """Return a table, and a paragraph that explains each of its columns.

    Args:
        columns: Columns.
        rows: Cells of each row, one a column.
        total: Cells of a last row, set apart; None for none.

    Raises:
        ValueError: If a row has another number of cells than there are columns.

    Example:
        >>> table([Column("bits", "Bits of a weight")], [["8"]]).endswith(
        ...     '<p class="legend"><b>bits</b>: Bits of a weight.</p>')
        True
    """
    lines = [*rows, *([total] if total is not None else [])]
    if uneven := [len(row) for row in lines if len(row) != len(columns)]:
        raise ValueError(f"a row has {uneven[0]} cells, and the table {len(columns)} columns")
    head = "".join(
        f'<th{_kind(column)} scope="col">{escaped(column.title)}</th>' for column in columns
    )
    body = "\n".join(_row(columns, row) for row in rows)
    foot = f"<tfoot>{_row(columns, total)}</tfoot>" if total is not None else ""
    legend = Html(" ".join(f"<b>{escaped(c.title)}</b>: {escaped(c.meaning)}." for c in columns))
    return Html(
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>'
        f"{foot}</table></div>\n{paragraph(legend, 'legend')}"
    )


def histogram(counts: Sequence[int], label: str) -> Html:
    """Draw counts as bars whose heights are the square roots: few values dwarf the rest otherwise.

    Args:
        counts: Counts of equal bins, from the left to the right; none for no drawing.
        label: Description for readers who do not see it.

    Example:
        >>> histogram([0, 4, 1], "of a").partition("<path ")[2]
        'd="M0 16v0h1v0zM1 16v-16h1v16zM2 16v-8h1v8z"/></svg>'
    """
    if not counts or not max(counts):
        return Html("-")
    tallest = math.sqrt(max(counts))
    heights = [f"{16 * math.sqrt(count) / tallest:.1f}".removesuffix(".0") for count in counts]
    bars = "".join(
        f"M{left} 16v{'-' if height != '0' else ''}{height}h1v{height}z"
        for left, height in enumerate(heights)
    )
    return Html(
        f'<svg viewBox="0 0 {len(counts)} 16" preserveAspectRatio="none" role="img" '
        f'aria-label="{escaped(label)}"><path d="{bars}"/></svg>'
    )


def page(title: str, *parts: Html) -> str:
    """Return the document.

    Args:
        title: Title of the window, and first heading.
        parts: Contents below the heading.
    """
    return _PAGE.format(title=escaped(title), style=_STYLE, contents=joined(parts))


def percent(fraction: float, digits: int = 1) -> str:
    """Format a fraction in percent; one that is not all or nothing does not read as if it were.

    Args:
        fraction: Fraction, 0 to 1.
        digits: Number of digits behind the point.

    Example:
        >>> percent(0.125), percent(1.0, 4), percent(0.9999999)
        ('12.5 %', '100 %', '99.9 %')
    """
    if fraction == 1.0:
        return "100 %"
    text = f"{100 * fraction:.{digits}f}"
    if float(text) == 100.0 and fraction < 1.0:
        text = f"{100 - 10.0**-digits:.{digits}f}"
    return f"{text} %"


def joined(parts: Iterable[Html]) -> Html:
    """Join markup, one part a line."""
    return Html("\n".join(parts))


def _row(columns: Sequence[Column], cells: Sequence[Cell]) -> str:
    pairs = zip(columns, cells, strict=True)
    return f"<tr>{''.join(_cell(column, cell) for column, cell in pairs)}</tr>"


def _cell(column: Column, cell: Cell) -> str:
    if isinstance(cell, Bar):
        share = f"{100 * min(max(cell.fraction, 0.0), 1.0):.1f}%"
        return f'<td class="bar" style="--share: {share}">{escaped(cell.text)}</td>'
    return f"<td{_kind(column)}>{escaped(cell)}</td>"


def _kind(column: Column) -> str:
    return ' class="text"' if column.is_text else ""


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --faint: #5b6675; --line: #d5dbe3;
  --paper: #fff; --box: #f3f6f9; --bar: #cfdeee; --mark: #3f74a8; --warn: #8a4b00 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ef; --faint: #9aa7b6; --line: #38424f; --paper: #14181e; --box: #1d232b;
    --bar: #27415c; --mark: #7fb2e2; --warn: #f0b469 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto;
  padding: 1.5rem 1rem 3rem; color: var(--ink); background: var(--paper) }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem;
  border-bottom: 1px solid var(--line); break-after: avoid }
p { margin: .5rem 0; max-width: 60rem; overflow-wrap: anywhere }
.legend, .cards dt, .cards dd + dd { color: var(--faint); font-size: .82rem }
.legend b { color: var(--ink); font-weight: 600 }
.missing { color: var(--warn) }
.missing::before { content: "Not in this report: "; font-weight: 600 }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr));
  gap: .7rem; margin: 1rem 0 }
.cards div { background: var(--box); border-radius: 6px; padding: .6rem .8rem;
  break-inside: avoid }
.cards dd { margin: 0; font-size: 1.35rem; font-weight: 600; line-height: 1.3 }
.cards dd + dd { font-weight: 400; line-height: 1.4 }
.wide { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums;
  line-height: 1.35 }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap }
th { color: var(--faint); font-weight: 600; vertical-align: bottom; white-space: normal }
.text { text-align: left }
td.text { white-space: normal; overflow-wrap: break-word; min-width: 7rem; max-width: 26rem }
td.text:last-child { overflow-wrap: anywhere }
tfoot td { font-weight: 600; border-bottom: 0 }
td.bar { background: linear-gradient(to left, var(--bar) var(--share), transparent 0) }
td svg { width: 7rem; height: 1.4rem; fill: var(--mark); vertical-align: top }
pre { background: var(--box); border-radius: 6px; padding: .7rem .9rem; font-size: .78rem;
  line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere }
@page { margin: 14mm 12mm }
@media print {
  :root { color-scheme: light; --ink: #000; --faint: #444; --line: #bbb; --paper: #fff;
    --box: #f3f6f9; --bar: #cfdeee; --mark: #3f74a8; --warn: #8a4b00 }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  body { font-size: 9.5pt; max-width: none; padding: 0 }
  .wide { overflow: visible }
  table { width: 100%; font-size: 7.5pt }
  th, td { padding: .12rem .3rem }
  td.text { min-width: 5.4rem; overflow-wrap: anywhere }
  td.text:first-child { min-width: 8rem }
  td svg { width: 4rem; height: 1rem }
  tr { break-inside: avoid }
  h2 + p { break-after: avoid }
  thead { display: table-header-group }
  tfoot { display: table-row-group }
  .legend { font-size: 7.5pt }
  pre { font-size: 7pt }
}
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style></head>
<body>
<h1>{title}</h1>
{contents}
</body></html>
"""
