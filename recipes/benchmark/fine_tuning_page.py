"""What the pages of few bits and of zeros share: statistics by seed, their words, the figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lightning_nna.files import write_whole
from recipes.benchmark.rows import Row, read_rows, spread

Titles = Mapping[str, str]
Pairs = Sequence[tuple[float, float]]

VERDICTS = """What the project asked of itself, on the seeds that are in the table. Two methods are
*tied* where their mean difference by seed is within its standard error.
"""
INTERVALS = "The interval of each run is the 95 % bootstrap over utterances."


def write_page(
    rows_path: Path,
    titles: Titles,
    page: Callable[[Sequence[Row], Titles], str],
    draw: Callable[[Sequence[Row], Titles, Path], None],
) -> None:
    """Generate a page and its figure beside its rows.

    Args:
        rows_path: The rows.
        titles: What tables call each method, in their order.
        page: Makes the page as Markdown.
        draw: Makes the figure.
    """
    rows = read_rows(rows_path)
    draw(rows, titles, rows_path.with_suffix(".png"))
    write_whole(rows_path.with_suffix(".md"), page(rows, titles))


def commands(rows: Sequence[Row]) -> list[str]:
    """The commands of the rows, as the end of a page."""
    heading = "\nThe commands, in the order in which they finished:\n\n```bash"
    return [heading, *(row["command"] for row in rows), "```", ""]


def mean_loss(rows: Sequence[Row]) -> float:
    """Mean of the loss per token.

    Example:
        >>> mean_loss([{"loss_per_token": 1.0}, {"loss_per_token": 3.0}])
        2.0
    """
    return spread(row["loss_per_token"] for row in rows)[0]


def paired(
    mine: Sequence[Row], theirs: Sequence[Row], figure: str = "loss_per_token"
) -> list[tuple[float, float]]:
    """A figure of two methods by seed; what was not trained stands beside every seed.

    Example:
        >>> paired([{"seed": 1, "loss_per_token": 2.0}, {"seed": 2, "loss_per_token": 3.0}],
        ...     [{"seed": 1, "loss_per_token": 4.0, "train_seconds": 60.0}])
        [(2.0, 4.0)]
    """
    return [(row[figure], other[figure]) for row, other in same_seed(mine, theirs)]


def same_seed(mine: Sequence[Row], theirs: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of the same seed; what was not trained is of every seed."""
    untrained = next((row for row in theirs if row["train_seconds"] is None), None)
    reference = {row["seed"]: row for row in theirs}
    found = [(row, reference.get(row["seed"], untrained)) for row in mine]
    return [(row, other) for row, other in found if other is not None]


def difference(pairs: Pairs) -> tuple[float, float]:
    """Mean of the differences by seed, and its standard error; 0 for a single seed.

    Example:
        >>> difference([(1.0, 2.0), (2.0, 1.0)])
        (0.0, 1.0)
    """
    differences = [mine - theirs for mine, theirs in pairs]
    error = stdev(differences) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0
    return fmean(differences), error


def relative(pairs: Pairs) -> float:
    """Mean of the one over that of the other, less 1.

    Example:
        >>> relative([(1.0, 2.0), (2.0, 2.0)])
        -0.25
    """
    return sum(mine for mine, _ in pairs) / sum(theirs for _, theirs in pairs) - 1


def against(mine: Sequence[Row], theirs: Sequence[Row]) -> str:
    """The relative difference of the losses in a table, or a dash."""
    if mine == theirs or not (pairs := paired(mine, theirs)):
        return "-"
    return f"{relative(pairs):+.1%}"


def hardest_rival(others: Mapping[str, Pairs]) -> str:
    """Whom it is hardest to beat, of those with the most seeds."""
    seeds = max(len(pairs) for pairs in others.values())
    of_all = [method for method, pairs in others.items() if len(pairs) == seeds]
    return max(of_all, key=lambda method: difference(others[method])[0])


def verdict(change: float, error: float = 0.0) -> str:
    """The word for an increase that ought not to be one.

    Example:
        >>> verdict(-1.0), verdict(0.5, error=0.6), verdict(0.5)
        ('met', 'tied', 'missed')
    """
    return "met" if change <= 0 else "tied" if change <= error else "missed"


def draw_losses(
    path: Path,
    *,
    lines: Mapping[str, Sequence[tuple[float, Row]]],
    levels: Mapping[str, Sequence[Row]],
    label: str,
    places: Sequence[float],
) -> None:
    """Plot losses: lines are means over seeds, dots the seeds, levels go from side to side.

    Args:
        path: Of the figure.
        lines: By title: places and rows.
        levels: By title: rows of what has no place; the first is drawn whole, others dashed.
        label: Of the axis of places.
        places: That the axis names.
    """
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for title, points in lines.items():
            own = sorted({place for place, _ in points})
            means = [mean_loss([row for at, row in points if at == place]) for place in own]
            (line,) = axes.plot(own, means, marker="o", ms=4, label=title)
            at = [place for place, _ in points]
            losses = [row["loss_per_token"] for _, row in points]
            axes.scatter(at, losses, color=line.get_color(), s=6, alpha=0.5)
        for (title, rows), style in zip(levels.items(), ("-", "--", ":"), strict=False):
            axes.axhline(mean_loss(rows), color="black", lw=1, ls=style, label=title)
        axes.set_xlabel(label)
        axes.set_ylabel("nats per label on AN4 test")
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        shown = "123456789" if high < 10 * low else "1235"  # Else they run into each other.
        for each in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            each(FuncFormatter(lambda x, _: f"{x:.3g}" if f"{x:e}"[0] in shown else ""))
        axes.legend(frameon=False, fontsize=8, ncols=2)
        axes.set_xticks(list(places))
        figure.savefig(path, dpi=150, metadata={"Software": None})
