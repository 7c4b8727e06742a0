"""Estimation, detection and learning under temporal shift, compared with other methods.

    python -m recipes.benchmark.shift                      # run what is missing, then report
    python -m recipes.benchmark.shift --tables latest      # a part
    python -m recipes.benchmark.shift --tables learning --learners risk paper
    python -m recipes.benchmark.shift --page-only

Each table has a module of its own. Detectors of river come with the extra ``bench``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean

import torch
from matplotlib.axes import Axes

from recipes.benchmark import (
    shift_detection,
    shift_doppler,
    shift_latest,
    shift_learning,
    shift_streaming,
)
from recipes.benchmark.grid import Run, Study, axis
from recipes.benchmark.plots import saved_figure
from recipes.benchmark.report import Fields, line
from recipes.benchmark.rows import Row, select

#: Grids of the tables.
TABLES: dict[str, Callable[[], Sequence[Run]]] = {
    "latest": shift_latest.runs,
    "doppler": shift_doppler.runs,
    "detection": shift_detection.runs,
    "learning": shift_learning.runs,
    "streaming": shift_streaming.streaming_runs,
    "rate": shift_streaming.rate_runs,
}


def runs(
    *,
    tables: Sequence[str] = tuple(TABLES),
    learners: Sequence[str] = tuple(shift_learning.LEARNERS),
) -> list[Run]:
    """List the grids of some tables, of some learners; all are measured on one thread."""
    torch.set_num_threads(1)
    return [
        run
        for table in tables
        for run in TABLES[table]()
        if not isinstance(run, shift_learning.LearningRun) or run.method in learners
    ]


def report(rows: Sequence[Row]) -> Fields:
    """Make the fields of the report."""
    sigmas = shift_latest.SIGMAS
    cases = [f"{case}, {model}" for case in shift_learning.SEEDS for model in shift_learning.MODELS]
    lengths = [f"n = {n:,}" for n in shift_streaming.LENGTHS]
    return {
        "checks": checks(rows),
        "length": shift_latest.LENGTH,
        "latest_draws": len(shift_latest.SEEDS),
        "latest_head": _head(
            "method",
            *(f"noise {sigma}" for sigma in sigmas),
            *(f"{sigma}, measured" for sigma in sigmas),
            *("all", "worst"),
        ),
        "latest": shift_latest.method_lines(rows),
        "latest_cases": shift_latest.case_lines(rows),
        "doppler_sigmas": " / ".join(str(sigma) for sigma in shift_doppler.SIGMAS),
        "doppler_lengths": f"{shift_doppler.LENGTHS['newest'][0]} to "
        f"{shift_doppler.LENGTHS['newest'][-1]}",
        "doppler_draws": shift_doppler.DRAWS["newest"],
        "doppler_tolerance": f"{shift_doppler.TOLERANCE:.0%}",
        "doppler_single": shift_doppler.single_lines(rows),
        **{
            f"doppler_{method}_setting": shift_doppler.joint_setting(rows, method)
            for method in shift_doppler.TOGETHER
        },
        **{
            f"doppler_{method}": shift_doppler.joint_lines(rows, method)
            for method in shift_doppler.TOGETHER
        },
        "epochs": shift_detection.EPOCHS,
        "noise": shift_detection.NOISE,
        "trials": len(shift_detection.TRIALS),
        "step": shift_detection.STEP,
        "onset": shift_detection.ONSET,
        "slow_onset": shift_detection.SLOW_ONSET,
        "in_time": shift_detection.IN_TIME,
        "detection": shift_detection.lines(rows),
        **shift_learning.PERIODS,
        "learning_head": _head("training on", *cases, "trainings"),
        "learning": shift_learning.lines(rows),
        "streaming_head": _head("method", *lengths),
        "streaming": shift_streaming.streaming_lines(rows),
        "rate_draws": len(shift_streaming.RATE_SEEDS),
        "shortest": shift_streaming.RATE_LENGTHS[0],
        "longest": shift_streaming.RATE_LENGTHS[-1],
        "rate": shift_streaming.rate_lines(rows),
    }


def checks(rows: Sequence[Row]) -> list[str]:
    """Run every acceptance check on the rows that exist."""
    return [
        check
        for table in (shift_latest, shift_doppler, shift_detection, shift_learning)
        for check in table.checks(rows)
    ]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot the errors of the newest value and the rate of denoising."""
    with saved_figure(path, (11.0, 3.6), font_size=8.0) as figure:
        left, right = figure.subplots(1, 2)
        _plot_latest(left, rows)
        _plot_rate(right, rows)


def _plot_latest(axes: Axes, rows: Sequence[Row]) -> None:
    cases = shift_latest.rows_by_case(rows)
    methods = [name for name in shift_latest.METHODS if shift_latest.ratios(cases, name)]
    for y, name in enumerate(methods):
        ratios = list(shift_latest.ratios(cases, name).values())
        color = "tab:blue" if shift_latest.METHODS[name].ours else "0.5"
        axes.plot(ratios, [y] * len(ratios), "|", color=color, alpha=0.6)
        axes.plot(geometric_mean(ratios), y, "o", color=color, markersize=5)
    axes.axvline(1.0, color="0.8", linewidth=0.8, zorder=0)
    if methods:
        axes.set_xscale("log")
    axes.set(xlabel="squared error / best fixed window's (blue: ours; dot: mean)")
    axes.set_yticks(range(len(methods)), [shift_latest.METHODS[name].title for name in methods])
    axes.invert_yaxis()


def _plot_rate(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set(xlabel="values", ylabel="squared error, summed")
    curves = {}
    for name in shift_streaming.RATES:
        if selected := select(rows, table="rate", method=name):
            style = "o-" if name in shift_streaming.HAAR else "o--"
            n, errors = [row["n"] for row in selected], [row["error"] for row in selected]
            (curves[errors[-1], name],) = axes.plot(n, errors, style, markersize=3)
    if curves:  # Matplotlib warns of a scale without data.
        axes.loglog()
        order = sorted(curves, reverse=True)  # As the right ends of the curves.
        axes.legend(
            [curves[key] for key in order],
            [shift_streaming.RATES[name] for _, name in order],
            frameon=False,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )


def _head(*titles: str) -> str:
    """Head a table."""
    return f"{line(*titles)}\n|{'---|' * len(titles)}"


STUDY = Study(
    name="shift",
    runs=runs,
    report=report,
    plot=plot,
    options={"tables": axis(TABLES), "learners": axis(shift_learning.LEARNERS)},
)

if __name__ == "__main__":
    STUDY.main()
