r"""A table of all weights: CSV for programs, one self-contained page for people.

With :math:`p_v` the fraction of the weights that have value :math:`v`, the entropy of a weight is

.. math:: H = -\sum_v p_v \log_2 p_v,

the bits a weight that a coder can reach which takes weights one by one.
"""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields

from torch import Tensor


@dataclass(frozen=True)
class LayerMetrics:
    """One weight of the network.

    Args:
        name: Name of the parameter.
        method: Name of the method of its centroids.
        bits: Bits of an index.
        weights: Number of weights.
        values: Number of distinct weights.
        zeros: Fraction of weights that are zero.
        entropy_bits: Entropy in bits a weight.
        packed_bytes: Size of the packed weight in bytes.
        sqnr_db: Signal to quantization noise in decibels; infinite without error.
        cycles: Cycles of the accelerator; None if it was not compiled.
    """

    name: str
    method: str
    bits: int
    weights: int
    values: int
    zeros: float
    entropy_bits: float
    packed_bytes: int
    sqnr_db: float
    cycles: int | None = None


def entropy_bits(x: Tensor) -> float:
    """Entropy of the elements of a tensor, in bits.

    Example:
        >>> import torch
        >>> entropy_bits(torch.tensor([0.0, 1.0, 0.0, 1.0]))
        1.0
    """
    if not x.numel():
        return 0.0
    counts = x.unique(return_counts=True)[1].double()
    shares = counts / counts.sum()
    return float(-(shares * shares.log2()).sum()) + 0.0


def as_csv(rows: Sequence[LayerMetrics]) -> str:
    """The table with a head, one line a layer.

    Example:
        >>> print(as_csv([LayerMetrics("w", "gq", 1, 8, 2, 0.5, 1.0, 9, 20.0)]).splitlines()[1])
        w,gq,1,8,2,0.5,1.0,9,20.0,
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(LayerMetrics)])
    writer.writerows(astuple(row) for row in rows)
    return text.getvalue()


def as_html(rows: Sequence[LayerMetrics], *, title: str, notes: Sequence[str] = ()) -> str:
    """The table and its figures as one page that needs no other file.

    Args:
        rows: One a layer.
        title: Of the page.
        notes: Lines beneath the title.
    """
    figures = [
        _bars("Bits a weight: index (light) and entropy (dark)", rows, _BITS),
        _bars("Bytes, packed", rows, [("#4878a8", lambda row: float(row.packed_bytes))]),
        _bars("Signal to quantization noise, dB", rows, [("#6a9f58", _finite_sqnr)]),
    ]
    if any(row.cycles is not None for row in rows):
        figures.append(_bars("Cycles", rows, [("#a85c48", lambda row: float(row.cycles or 0))]))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in _HEADS)
    table = [*(_cells(row) for row in rows), _total(rows)]
    body = "\n".join(f"<tr>{''.join(line)}</tr>" for line in table)
    lines = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return _PAGE.format(
        title=html.escape(title), notes=lines, figures="\n".join(figures), head=head, body=body
    )


def _finite_sqnr(row: LayerMetrics) -> float:
    return row.sqnr_db if math.isfinite(row.sqnr_db) else 0.0


_BITS: list[tuple[str, Callable[[LayerMetrics], float]]] = [
    ("#b8cde0", lambda row: float(row.bits)),
    ("#4878a8", lambda row: row.entropy_bits),
]
_HEADS = (
    *("weight", "method", "bits", "weights", "values", "zeros", "entropy, bits", "bytes"),
    *("SQNR, dB", "cycles"),
)


def _cells(row: LayerMetrics) -> list[str]:
    sqnr = f"{row.sqnr_db:.1f}" if math.isfinite(row.sqnr_db) else "∞"
    cycles = "-" if row.cycles is None else f"{row.cycles:,}"
    return _line(
        *(row.name, row.method, f"{row.bits}", f"{row.weights:,}", f"{row.values}"),
        *(f"{row.zeros:.1%}", f"{row.entropy_bits:.2f}", f"{row.packed_bytes:,}", sqnr, cycles),
    )


def _total(rows: Sequence[LayerMetrics]) -> list[str]:
    """Sums, and means over all weights."""
    weights = sum(row.weights for row in rows)

    def mean(figure: Callable[[LayerMetrics], float]) -> float:
        return sum(figure(row) * row.weights for row in rows) / max(weights, 1)

    known = [row.cycles for row in rows if row.cycles is not None]
    return _line(
        *("all", "", f"{mean(lambda row: row.bits):.2f}", f"{weights:,}", "-"),
        *(f"{mean(lambda row: row.zeros):.1%}", f"{mean(lambda row: row.entropy_bits):.2f}"),
        *(f"{sum(row.packed_bytes for row in rows):,}", "-", f"{sum(known):,}" if known else "-"),
    )


def _line(name: str, method: str, *numbers: str) -> list[str]:
    texts = [f"<td class=t>{html.escape(text)}</td>" for text in (name, method)]
    return [*texts, *(f"<td>{number}</td>" for number in numbers)]


def _bars(
    title: str,
    rows: Sequence[LayerMetrics],
    series: Sequence[tuple[str, Callable[[LayerMetrics], float]]],
) -> str:
    """Horizontal bars, one a layer; several series lie on top of one another."""
    largest = max((figure(row) for row in rows for _, figure in series), default=0.0) or 1.0
    parts = [f'<svg viewBox="0 0 640 {24 + 18 * len(rows)}" role="img"><text x="0" y="14" ']
    parts.append(f'class="h">{html.escape(title)}</text>')
    for line, row in enumerate(rows):
        top = 24 + 18 * line
        parts.append(f'<text x="0" y="{top + 11}">{html.escape(row.name)}</text>')
        for color, figure in series:
            width = 320 * figure(row) / largest
            parts.append(
                f'<rect x="250" y="{top}" width="{width:.1f}" height="13" fill="{color}"/>'
            )
        label = " / ".join(f"{figure(row):,.6g}" for _, figure in series)
        end = 254 + 320 * max(figure(row) for _, figure in series) / largest
        parts.append(f'<text x="{end:.1f}" y="{top + 11}">{label}</text>')
    return "".join([*parts, "</svg>"])


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; color: #222 }}
table {{ border-collapse: collapse; font-size: 12px }}
th, td {{ padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right }}
td.t, th:nth-child(-n+2) {{ text-align: left }}
tr:last-child td {{ font-weight: 600 }}
svg {{ width: 100%; margin: .8rem 0; font: 10px system-ui, sans-serif }}
svg .h {{ font-size: 13px; font-weight: 600 }}
</style>
<h1>{title}</h1>
{notes}
<table><thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table>
{figures}
</html>
"""
