r"""List all weights: a CSV table for programs, one self-contained page for people.

With :math:`p_v` the fraction of the weights that have value :math:`v`, the entropy of a weight is

.. math:: H = -\sum_v p_v \log_2 p_v,

the bits a weight that a coder can reach which takes weights one by one.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_nna.html_page import (
    Bar,
    Cell,
    Column,
    Html,
    histogram,
    page,
    paragraph,
    percent,
    table,
)

#: Bins of a histogram.
HISTOGRAM_BINS = 48


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
        histogram: Numbers of weights in equal bins, symmetric around zero; empty if not counted.
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
    histogram: tuple[int, ...] = ()


def entropy_bits(x: Tensor) -> float:
    """Entropy of the elements of a tensor, in bits.

    Example:
        >>> import torch
        >>> entropy_bits(torch.tensor([0.0, 1.0, 0.0, 1.0]))
        1.0
    """
    return counts_entropy(x.unique(return_counts=True)[1]) if x.numel() else 0.0


def counts_entropy(counts: Tensor) -> float:
    """Entropy of values, in bits, of which there are so many of each.

    Args:
        counts: Number of each value, shape ``(values,)``.

    Example:
        >>> counts_entropy(torch.tensor([2, 0, 2]))
        1.0
    """
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log2()).sum()) + 0.0


def counts_around_zero(x: Tensor) -> tuple[int, ...]:
    """Count the elements of a tensor in equal bins from minus its largest magnitude to that.

    Args:
        x: Tensor, any shape.

    Returns:
        Counts of :data:`HISTOGRAM_BINS` bins.

    Example:
        >>> counts = counts_around_zero(torch.tensor([-1.0, 0.1, 1.0]))
        >>> counts[0], counts[26], counts[-1], sum(counts)
        (1, 1, 1, 3)
    """
    values = x.detach().float()
    largest = float(values.abs().max()) if values.numel() else 0.0
    reach = largest or 1.0
    return tuple(int(n) for n in torch.histc(values, HISTOGRAM_BINS, -reach, reach).tolist())


def as_csv(rows: Sequence[LayerMetrics]) -> str:
    """Return the table with a head, one line a weight; without histograms.

    Example:
        >>> print(as_csv([LayerMetrics("w", "gq", 1, 8, 2, 0.5, 1.0, 9, 20.0)]).splitlines()[1])
        w,gq,1,8,2,0.5,1.0,9,20.0,
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(LayerMetrics) if field.name != "histogram"]
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    return text.getvalue()


def as_html(rows: Sequence[LayerMetrics], *, title: str, notes: Sequence[str] = ()) -> str:
    """Return the table as one page that needs no other file.

    Args:
        rows: One a weight.
        title: Title of the page.
        notes: Lines beneath the title.
    """
    return page(title, *(paragraph(note) for note in notes), weight_table(rows))


def weight_table(rows: Sequence[LayerMetrics]) -> Html:
    """Return the table of all weights, and what its columns mean.

    Args:
        rows: One a weight.
    """
    most = _most(rows)
    return table(_COLUMNS, [_cells(row, most) for row in rows], _total(rows))


_COLUMNS = (
    Column("weight", "Name of the parameter", is_text=True),
    Column(
        "method",
        "Method that gave the weight its values; chip where the accelerator's own quantization did",
        is_text=True,
    ),
    Column("bits", "Bits of the index of a value"),
    Column("weights", "Number of weights"),
    Column("values", "Number of distinct values among them"),
    Column("zeros", "Fraction of the weights that are zero"),
    Column("entropy, bits", "Bits a weight that a coder can reach which takes weights one by one"),
    Column("bytes", "Bytes of the packed weight: indices, values and scales"),
    Column(
        "SQNR, dB",
        "Signal to quantization noise: the power of the trained weight over that of the difference "
        "of the deployed one; \u221e without a difference",
    ),
    Column(
        "cycles",
        "Estimated cycles of the weight's layer on the accelerator, for one call of each program; "
        "- where none is known",
    ),
    Column(
        "histogram",
        "Numbers of weights from minus the largest magnitude to that, heights as square roots",
        is_text=True,
    ),
)


def decibels(sqnr_db: float) -> str:
    """Format a ratio in decibels.

    Example:
        >>> decibels(31.04), decibels(math.inf)
        ('31.0', '\u221e')
    """
    return f"{sqnr_db:.1f}" if math.isfinite(sqnr_db) else "\u221e"


def _most(rows: Sequence[LayerMetrics]) -> tuple[float, float]:
    """Return the largest number of bytes and of cycles of a weight."""
    return (
        max((float(row.packed_bytes) for row in rows), default=0.0) or 1.0,
        max((float(row.cycles or 0) for row in rows), default=0.0) or 1.0,
    )


def _cells(row: LayerMetrics, most: tuple[float, float]) -> list[Cell]:
    most_bytes, most_cycles = most
    cycles: Cell = "-"
    if row.cycles is not None:
        cycles = Bar(f"{row.cycles:,}", row.cycles / most_cycles)
    return [
        *(row.name, row.method, f"{row.bits}", f"{row.weights:,}", f"{row.values}"),
        *(percent(row.zeros), f"{row.entropy_bits:.2f}"),
        *(Bar(f"{row.packed_bytes:,}", row.packed_bytes / most_bytes), decibels(row.sqnr_db)),
        *(cycles, histogram(row.histogram, f"histogram of {row.name}")),
    ]


def _total(rows: Sequence[LayerMetrics]) -> list[Cell]:
    """Return sums, and means over all weights."""
    weights = sum(row.weights for row in rows)

    def mean(metric: Callable[[LayerMetrics], float]) -> float:
        return sum(metric(row) * row.weights for row in rows) / max(weights, 1)

    cycles = [row.cycles for row in rows if row.cycles is not None]
    return [
        *("all", "", f"{mean(lambda row: row.bits):.2f}", f"{weights:,}", "-"),
        *(percent(mean(lambda row: row.zeros)), f"{mean(lambda row: row.entropy_bits):.2f}"),
        *(f"{sum(row.packed_bytes for row in rows):,}", "-"),
        *(f"{sum(cycles):,}" if cycles else "-", ""),
    ]
