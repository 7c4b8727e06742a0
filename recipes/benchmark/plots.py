"""Plots of reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lightning_nna.files import whole_file
from recipes.benchmark.report import mean_loss
from recipes.benchmark.rows import Row


@contextmanager
def saved_figure(
    path: Path, size: tuple[float, float], *, font_size: float = 10.0
) -> Iterator[Figure]:
    """Yield a figure and save it to ``path``; the file appears once it is complete.

    Args:
        path: PNG file.
        size: Width and height in inches.
        font_size: Size of the text in points.
    """
    with mpl.rc_context(
        {"axes.spines.top": False, "axes.spines.right": False, "font.size": font_size}
    ):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, dpi=150, format="png", metadata={"Software": None})


def plot_losses(
    path: Path,
    *,
    curves: Mapping[str, Sequence[tuple[float, Row]]],
    baselines: Mapping[str, Sequence[Row]],
    label: str,
    ticks: Sequence[float],
) -> None:
    """Plot losses per token: curves are means over seeds, dots the seeds.

    Args:
        path: PNG file.
        curves: Positions on the x axis and rows, by title.
        baselines: Rows that have no position, by title; horizontal lines, the first one solid.
        label: Label of the x axis.
        ticks: Positions that the x axis names.
    """
    with saved_figure(path, (6.4, 4.0)) as figure:
        axes = figure.subplots()
        for title, points in curves.items():
            positions = sorted({x for x, _ in points})
            means = [mean_loss([row for x, row in points if x == each]) for each in positions]
            (curve,) = axes.plot(positions, means, marker="o", ms=4, label=title)
            losses = [row["loss_per_token"] for _, row in points]
            axes.scatter([x for x, _ in points], losses, color=curve.get_color(), s=6, alpha=0.5)
        for (title, rows), style in zip(baselines.items(), ("-", "--", ":"), strict=False):
            axes.axhline(mean_loss(rows), color="black", lw=1, ls=style, label=title)
        axes.set_xlabel(label)
        axes.set_ylabel("loss per token (nats) on AN4 test")
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        digits = "123456789" if high < 10 * low else "1235"  # More would run into each other.
        for each in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            each(FuncFormatter(lambda y, _: f"{y:.3g}" if f"{y:e}"[0] in digits else ""))
        axes.legend(frameon=False, fontsize=8, ncols=2)
        axes.set_xticks(list(ticks))
