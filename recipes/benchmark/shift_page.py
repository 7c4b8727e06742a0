"""The page of ``recipes.benchmark.shift``: tables, verdicts and figure, from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean, mean

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_nna.files import whole_file
from recipes.benchmark import (
    shift_detection,
    shift_latest,
    shift_learning,
    shift_streaming,
)
from recipes.benchmark import shift_sections as sections
from recipes.benchmark.rows import Row, select

#: A cell of the first table: case, noise, whether it is known.
Cell = tuple[str, float, bool]
_ORACLE_FACTOR, _FIRST_SHARE = 1.5, 0.8


def page(rows: Sequence[Row]) -> str:
    """The page as Markdown."""
    parts = [sections.HEAD, *verdicts(rows)]
    for heading, lines in (
        (sections.LATEST, latest_lines(rows)),
        (sections.DETECTION, detection_lines(rows)),
        (sections.LEARNING, learning_lines(rows)),
        (sections.STREAMING, streaming_lines(rows)),
        (sections.RATE, rate_lines(rows)),
    ):
        parts += [heading, *lines] if lines else []
    commands = dict.fromkeys(str(row["command"]) for row in rows)
    return "\n".join([*parts, "\n## Commands\n\n```bash", *commands, "```", ""])


def errors_by_cell(rows: Sequence[Row]) -> dict[Cell, dict[str, Row]]:
    """The rows of the first table, by cell and method."""
    cells: dict[Cell, dict[str, Row]] = {}
    for row in select(rows, table="latest"):
        key = (row["case"], row["sigma"], row["sigma_known"])
        cells.setdefault(key, {})[row["method"]] = row
    return cells


def is_first(mine: Row, rival: Row) -> bool:
    """Whether an error is less than another's, or not surely more: within one standard error."""
    error = (mine["mse_error"] ** 2 + rival["mse_error"] ** 2) ** 0.5
    return bool(mine["mse"] - rival["mse"] <= error)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Each target, and whether it is met on the rows that are there."""
    lines = []
    cells = errors_by_cell(rows)
    if cells:
        family = [name for name, method in shift_latest.METHODS.items() if method.ours]
        for label, names in (
            ("the best of ours in each cell", family),
            ("the mixture", ["mixture"]),
        ):
            lines += _latest_verdicts(cells, label, names)
    lines += _detection_verdicts(rows)
    lines += _learning_verdicts(rows)
    return lines


def _latest_verdicts(cells: dict[Cell, dict[str, Row]], label: str, names: list[str]) -> list[str]:
    first, worst = 0, 0.0
    for found in cells.values():
        mine = min((found[name] for name in names), key=lambda row: row["mse"])
        others = [
            row
            for name, row in found.items()
            if name != "oracle" and not shift_latest.METHODS[name].ours
        ]
        first += is_first(mine, min(others, key=lambda row: row["mse"]))
        worst = max(worst, mine["mse"] / found["oracle"]["mse"])
    share = first / len(cells)
    return [
        f"- Newest value, {label}: first or tied in {first} of {len(cells)} cells "
        f"({share:.0%}; target {_FIRST_SHARE:.0%}, {_word(share >= _FIRST_SHARE)}); at worst "
        f"{worst:.2f} times the best fixed window of the cell (target {_ORACLE_FACTOR}, "
        f"{_word(worst <= _ORACLE_FACTOR)})."
    ]


def _detection_verdicts(rows: Sequence[Row]) -> list[str]:
    found = {row["case"]: row for row in select(rows, table="detection", method="ours")}
    if not found.keys() >= {"step", "flat", "falling"}:
        return []
    detected = found["step"]["detected"]
    lines = [
        f"- Drift of a short series: {detected:.1%} of the steps detected within "
        f"{shift_detection.IN_TIME} epochs (target 95 %, {_word(detected >= 0.95)})."
    ]
    for case in ("flat", "falling"):
        alarms = found[case]["false_alarm"]
        lines.append(
            f"- False alarms on {case} runs: {alarms:.1%} (target 5 %, {_word(alarms <= 0.05)})."
        )
    return lines


def _learning_verdicts(rows: Sequence[Row]) -> list[str]:
    lines = []
    for case in shift_learning.SEEDS:
        for model in shift_learning.MODELS:
            here = {
                name: select(learned(rows), case=case, model=model, method=name)
                for name in ("risk", "arw")
            }
            if all(here.values()):
                mine = mean(row["error"] for row in here["risk"])
                rival = mean(row["error"] for row in here["arw"])
                lines.append(
                    f"- Learning on {case}, {model}: {mine:.2%} errors with one training, "
                    f"{rival:.2%} with a window chosen by ARW ({_word(mine <= rival)})."
                )
    return lines


def latest_lines(rows: Sequence[Row]) -> list[str]:
    """One line a method: its error over the best fixed window's, by noise."""
    cells = errors_by_cell(rows)
    lines = []
    for name, method in shift_latest.METHODS.items():
        columns = []
        for known in (True, False):
            for sigma in shift_latest.SIGMAS:
                ratios = _ratios(cells, name, sigma=sigma, known=known)
                columns.append(f"{geometric_mean(ratios):.2f}" if ratios else "-")
        every = [
            ratio
            for known in (True, False)
            for sigma in shift_latest.SIGMAS
            for ratio in _ratios(cells, name, sigma=sigma, known=known)
        ]
        if every:
            title = f"**{method.title}**" if method.ours else method.title
            lines.append(
                f"| {title} | {' | '.join(columns)} | {geometric_mean(every):.2f} | "
                f"{max(every):.2f} |"
            )
    return [*lines, *_by_case(cells)] if lines else []


def _ratios(
    cells: dict[Cell, dict[str, Row]], name: str, *, sigma: float, known: bool
) -> list[float]:
    return [
        found[name]["mse"] / found["oracle"]["mse"]
        for (_, s, k), found in cells.items()
        if (s, k) == (sigma, known) and name in found and "oracle" in found
    ]


def _by_case(cells: dict[Cell, dict[str, Row]]) -> list[str]:
    """The errors themselves where the noise is known, of a few methods."""
    names = [
        name
        for name in ("mixture", "haar_hard", "db2", "window", "exponential", "arw", "doubling")
        if any(name in found for found in cells.values())
    ]
    titles = [shift_latest.METHODS[name].title for name in [*names, "aligator"]]
    lines = [
        f"\nMean squared error with known noise:\n\n| series | noise | {' | '.join(titles)} | best "
        f"fixed window |\n|---|---|{'---|' * (len(titles) + 1)}"
    ]
    for (case, sigma, known), found in cells.items():
        if known:
            values = [f"{found[name]['mse']:.4f}" for name in [*names, "aligator"] if name in found]
            oracle = found["oracle"]
            lines.append(
                f"| {case} | {sigma} | {' | '.join(values)} | {oracle['mse']:.4f} "
                f"({oracle['window']}) |"
            )
    return lines


def detection_lines(rows: Sequence[Row]) -> list[str]:
    """One line a detector."""
    lines = []
    for name, method in shift_detection.METHODS.items():
        here = {row["case"]: row for row in select(rows, table="detection", method=name)}
        if here.keys() >= shift_detection.ONSETS.keys():
            step, ramp = here["step"], here["slow ramp"]
            columns = [
                f"{step['detected']:.1%}",
                _number(step["delay"]),
                f"{step['false_alarm']:.1%}",
                f"{ramp['detected']:.1%}",
                _number(ramp["delay"]),
                f"{here['flat']['false_alarm']:.1%}",
                f"{here['falling']['false_alarm']:.1%}",
                f"{here['step, ten times']['detected']:.1%}",
                f"{here['flat, ten times']['false_alarm']:.1%}",
            ]
            lines.append(f"| {method.title} | {' | '.join(columns)} |")
    return lines


def learned(rows: Sequence[Row]) -> list[Row]:
    """The rows of learning whose seed is one of the grid: a part of another is no comparison."""
    return [
        row
        for row in select(rows, table="learning")
        if row["seed"] in shift_learning.SEEDS[row["case"]]
    ]


def learning_lines(rows: Sequence[Row]) -> list[str]:
    """One line a learner: mean error over seeds, and trainings a period."""
    here = learned(rows)
    lines = []
    for name, (title, _) in shift_learning.LEARNERS.items():
        columns = []
        for case in shift_learning.SEEDS:
            for model in shift_learning.MODELS:
                found = select(here, case=case, model=model, method=name)
                columns.append(f"{mean(row['error'] for row in found):.2%}" if found else "-")
        found = select(here, method=name)
        if found:
            trainings = mean(row["trainings"] for row in found)
            lines.append(f"| {title} | {' | '.join(columns)} | {trainings:.1f} |")
    return lines


def streaming_lines(rows: Sequence[Row]) -> list[str]:
    """One line a method."""
    here = select(rows, table="streaming")
    lines = []
    for name, title in shift_streaming.STREAMING.items():
        found = [select(here, method=name, n=n) for n in shift_streaming.LENGTHS]
        columns = [f"{each[0]['update_us']:,.1f} µs" if each else "-" for each in found]
        lines += [f"| {title} | {' | '.join(columns)} |"] if any(found) else []
    return lines


def rate_lines(rows: Sequence[Row]) -> list[str]:
    """One line a method, with its slope."""
    lines = []
    for name, title in shift_streaming.RATES.items():
        found = select(rows, table="rate", method=name)
        if len(found) > 1:
            lengths, errors = zip(*((row["n"], row["error"]) for row in found), strict=True)
            ends = f"{errors[0]:.1f} | {errors[-1]:.1f}"
            lines.append(f"| {title} | {shift_streaming.slope(lengths, errors):.3f} | {ends} |")
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot the errors of the newest value and the rate of denoising."""
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 8.0}):
        figure = Figure(figsize=(11.0, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_latest(left, errors_by_cell(rows))
        _draw_rate(right, rows)
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, dpi=150, format="png", metadata={"Software": None})


def _draw_latest(axes: Axes, cells: dict[Cell, dict[str, Row]]) -> None:
    names = [
        name
        for name in shift_latest.METHODS
        if any(name in found and "oracle" in found for found in cells.values())
    ]
    for place, name in enumerate(names):
        ratios = [
            found[name]["mse"] / found["oracle"]["mse"]
            for found in cells.values()
            if name in found and "oracle" in found
        ]
        color = "tab:blue" if shift_latest.METHODS[name].ours else "0.5"
        axes.plot(ratios, [place] * len(ratios), "|", color=color, alpha=0.6)
        axes.plot(geometric_mean(ratios), place, "o", color=color, markersize=5)
    axes.axvline(1.0, color="0.8", linewidth=0.8, zorder=0)
    if names:
        axes.set_xscale("log")
    axes.set(xlabel="squared error / best fixed window's (blue: ours; dot: mean)")
    axes.set_yticks(range(len(names)), [shift_latest.METHODS[name].title for name in names])
    axes.invert_yaxis()


def _draw_rate(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set(xlabel="values", ylabel="squared error, summed")
    lines = {}
    for name in shift_streaming.RATES:
        found = select(rows, table="rate", method=name)
        if found:
            style = "o-" if name in shift_streaming.HAAR else "o--"
            n, errors = [row["n"] for row in found], [row["error"] for row in found]
            (lines[errors[-1], name],) = axes.plot(n, errors, style, markersize=3)
    if lines:  # Matplotlib warns of a scale without data.
        axes.loglog()
        # In the order of the lines' right ends.
        places = sorted(lines, reverse=True)
        axes.legend(
            [lines[place] for place in places],
            [shift_streaming.RATES[name] for _, name in places],
            frameon=False,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )


def _word(met: bool) -> str:
    return "met" if met else "missed"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
