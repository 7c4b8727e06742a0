"""Compare the runs of a sweep: a table, the same as CSV and Markdown, and errors over bytes.

    python -m recipes.sweep_table runs/digits
    python -m recipes.sweep_table runs/digits runs/commands --output runs/both

A row is a run below the folders, read from its ``summary.json``. Runs without one are listed as
unfinished. Cycles on an accelerator are those of ``recipes.deploy`` with the checkpoint of the run,
wherever below the folders it wrote them, as with ``hydra.run.dir=RUN/deploy``.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from lightning_nna.files import whole_file, write_whole
from recipes.debug import FOLDER as DEBUG_FOLDER
from recipes.program import short_errors
from recipes.run_name import INDIFFERENT

_TITLES = {
    "method": "method",
    "bits": "mean bits",
    "sparsity": "sparsity",
    "packed_bytes": "packed bytes",
    "cycles": "cycles",
}
"""Titles of the columns after those of the settings; the results of the test come after them."""
_LAST_TITLES = {"train_seconds": "training, s"}
_ENDS = ("_low", "_high")
"""Ends of the names of an interval's bounds."""

FILES = ("sweep.csv", "sweep.md", "sweep.png")


@dataclass(frozen=True)
class Run:
    """A run of a sweep.

    Args:
        name: Its folder, relative to the folder of the sweep.
        settings: Overrides of its command by key.
        metrics: Metrics by name; None for a run that is unfinished.
        titles: Titles of the results of its test, the first of them first.
        unit: What its cycles are for.
    """

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] | None = None
    titles: Mapping[str, str] = field(default_factory=dict)
    unit: str | None = None

    @property
    def result(self) -> float:
        """First result of its test; infinite without a number."""
        name = next(iter(self.titles), "")
        value = float((self.metrics or {}).get(name, math.inf))
        return math.inf if math.isnan(value) else value


@dataclass(frozen=True)
class Table:
    """A row a run.

    Args:
        rows: Values by column, with the bounds of intervals in columns of their own.
        titles: Titles of the columns of metrics, in order.
    """

    rows: Sequence[Mapping[str, Any]]
    titles: Mapping[str, str]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs, print their table, and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders of sweeps or runs")
    parser.add_argument("--output", type=Path, help="folder to write to; by default the first one")
    options = parser.parse_args(arguments)
    with short_errors("sweep_table"):
        runs = [run for folder in options.folders for run in read_runs(folder)]
        output = options.output or options.folders[0]
        compared = table(runs)
        print(as_text(compared))
        write_whole(output / "sweep.csv", as_csv(compared))
        write_whole(output / "sweep.md", as_markdown(compared))
        with whole_file(output / "sweep.png") as unfinished:
            draw(runs).savefig(unfinished, dpi=150, format="png", metadata={"Software": None})
        print("\n" + " ".join(str(output / name) for name in FILES) + " written")


def read_runs(folder: Path) -> list[Run]:
    """Read every run in a folder and below.

    Args:
        folder: Folder of a sweep or of a run.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If a summary is damaged.
    """
    summaries = {path.parent: _read(path) for path in sorted(folder.rglob("summary.json"))}
    paths = {path for path, summary in summaries.items() if "train_seconds" in summary}
    paths |= {path.parent for path in folder.rglob("config.yaml")}
    # Debug runs are no results, unless their own folder is given.
    paths = {path for path in paths if DEBUG_FOLDER not in path.relative_to(folder).parts}
    deployments = {
        _run_of(path, summary, paths): summary
        for path, summary in summaries.items()
        if "systems" in summary
    }
    runs = [
        _run(path, folder, summaries.get(path), deployments.get(path.resolve()))
        for path in sorted(paths)
    ]
    if not runs:
        raise FileNotFoundError(
            f"{folder} has no run: give the folder of a sweep, as runs/digits, after "
            "python -m recipes.train sweep=grid compression=gq,codebook bits=4,2"
        )
    return runs


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it, and start its run again"
        ) from error
    return dict(content)


def _run_of(path: Path, deployment: Mapping[str, Any], runs: Set[Path]) -> Path | None:
    """Return the folder of the run that a deployment is of; None if it is not known any more."""
    checkpoint = Path(deployment["ckpt"])
    if checkpoint.is_file():
        return checkpoint.resolve().parents[1]
    return next((parent.resolve() for parent in path.parents if parent in runs), None)


def _run(
    path: Path,
    folder: Path,
    summary: Mapping[str, Any] | None,
    deployment: Mapping[str, Any] | None,
) -> Run:
    name = str(path.relative_to(folder)) if path != folder else path.name
    if summary is None:
        return Run(name)
    settings = dict(
        override.lstrip("+").split("=", 1) if "=" in override else (override, "")
        for override in summary.get("overrides", [])
    )
    titles = summary.get("titles", {})
    results = [f"{key}{end}" for key in titles for end in ("", *_ENDS)]
    names = (*_TITLES, *results, *_LAST_TITLES)
    metrics = {key: summary[key] for key in names if key in summary}
    unit = None
    if deployment is not None and deployment["systems"]:
        metrics["cycles"], unit = deployment["systems"][0].get("cycles"), deployment.get("unit")
    return Run(name, settings, metrics, titles, unit)


def table(runs: Sequence[Run]) -> Table:
    """Compare runs: the name, the settings that differ among them, and the metrics of each.

    Args:
        runs: Runs; those that are unfinished come last, with ``unfinished`` for their method.

    Example:
        >>> titles = {"wer": "WER, %"}
        >>> runs = [Run("b", {"bits": "2"}, {"wer": 0.2}, titles), Run("c"),
        ...         Run("a", {"bits": "4"}, {"wer": 0.1}, titles)]
        >>> rows = table(runs).rows
        >>> [(row["run"], row["setting bits"], row.get("wer")) for row in rows]
        [('a', '4', 0.1), ('b', '2', 0.2), ('c', None, None)]
    """
    keys = swept_keys(runs)
    units = {run.unit for run in runs if run.unit is not None}
    titles = dict(_TITLES)
    if len(units) == 1:
        titles["cycles"] = f"cycles per {units.pop()}"
    for run in runs:
        titles |= run.titles
    titles |= _LAST_TITLES
    rows = []
    for run in sorted(runs, key=_rank):
        row = {"run": run.name, **{f"setting {key}": run.settings.get(key) for key in keys}}
        if run.metrics is None:
            row["method"] = "unfinished"
        else:
            row |= run.metrics
        rows.append(row)
    return Table(rows, titles)


def swept_keys(runs: Sequence[Run]) -> list[str]:
    """Return the overrides that differ among finished runs, except those that change no result."""
    finished = [run for run in runs if run.metrics is not None]
    keys = dict.fromkeys(key for run in finished for key in run.settings)
    keys = {key: None for key in keys if key not in {*INDIFFERENT, "sweep"}}
    return [key for key in keys if len({run.settings.get(key) for run in finished}) > 1]


def _rank(run: Run) -> tuple[bool, float, str]:
    return run.metrics is None, run.result, run.name


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other beats, in the order of their first number.

    Args:
        points: Pairs of numbers of which smaller ones are better.

    Example:
        >>> front([(4.0, 0.3), (2.0, 0.5), (3.0, 0.6), (8.0, 0.3)])
        [1, 0]
    """
    unbeaten: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if not unbeaten or points[index][1] < points[unbeaten[-1]][1]:
            unbeaten.append(index)
    return unbeaten


def draw(runs: Sequence[Run]) -> Figure:
    """Plot the first result of the test over packed bytes; runs that no other beats are marked.

    Args:
        runs: Runs; those without both metrics, with one that is not finite, or of another result
            than the first run's, are left out.
    """
    keys = swept_keys(runs)
    name, title = next((item for run in runs for item in run.titles.items()), ("", ""))
    shown = [
        run
        for run in runs
        if run.metrics
        and {name, "packed_bytes"} <= run.metrics.keys()
        and math.isfinite(run.metrics[name])
    ]
    metrics = [dict(run.metrics or {}) for run in shown]
    percent = 100 if _is_fraction(title) else 1
    sizes = [each["packed_bytes"] / 1000 for each in metrics]
    results = [percent * each[name] for each in metrics]
    low, high = ([percent * each.get(name + end, each[name]) for each in metrics] for end in _ENDS)
    below = [result - bound for result, bound in zip(results, low, strict=True)]
    above = [bound - result for result, bound in zip(results, high, strict=True)]
    best = front(list(zip(sizes, results, strict=True)))
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.errorbar(sizes, results, yerr=[below, above], fmt="o", color="#9aa7b4", capsize=3)
        on_front = [sizes[index] for index in best], [results[index] for index in best]
        axes.plot(*on_front, "o-", color="#b8442c", label="no other run beats it", zorder=3)
        for index in best:
            settings = shown[index].settings
            label = ", ".join(settings[key] for key in keys if settings.get(key))
            axes.annotate(
                label or shown[index].name,
                (sizes[index], results[index]),
                xytext=(6, 6),
                textcoords="offset points",
            )
        axes.set_xlabel("packed size, kB")
        axes.set_ylabel("word error rate, %" if name == "wer" else title)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.12)
        if best:
            axes.legend(frameon=False)
    return figure


def as_csv(compared: Table) -> str:
    """Format a table as CSV, with all digits."""
    columns = [
        name
        for column in _columns(compared)
        for name in (column, *(f"{column}{end}" for end in _ENDS))
        if name == column or any(name in row for row in compared.rows)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(compared.rows)
    return text.getvalue()


def as_markdown(compared: Table) -> str:
    """Format a table as Markdown."""
    heads, *lines = _cells(compared)
    rule = ["---"] * len(heads)
    return "".join(f"| {' | '.join(line)} |\n" for line in (heads, rule, *lines))


def as_text(compared: Table) -> str:
    """Format a table for a terminal."""
    lines = list(_cells(compared))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _columns(compared: Table) -> list[str]:
    """Return the columns that any row has, without bounds: settings first, then metrics."""
    present = dict.fromkeys(key for row in compared.rows for key in row)
    bounds = {f"{key}{end}" for key in compared.titles for end in _ENDS}
    return [
        *(key for key in present if key not in compared.titles and key not in bounds),
        *(key for key in compared.titles if key in present),
    ]


def _cells(compared: Table) -> Iterator[list[str]]:
    """Yield the head and the rows of a table for readers: rates in percent with their interval."""
    columns = _columns(compared)
    titles = compared.titles
    yield [titles.get(key, key.removeprefix("setting ")) for key in columns]
    for row in compared.rows:
        yield [_cell(key, titles.get(key, ""), row) for key in columns]


_FORMATS = {
    **{"bits": ".3g", "sparsity": ".3f", "train_seconds": ".0f"},
    **{"packed_bytes": "d", "cycles": ".4g"},
}


def _is_fraction(title: str) -> bool:
    """Tell whether a result is a fraction, whose title ends in its unit."""
    return title.endswith("%")


def _cell(key: str, title: str, row: Mapping[str, Any]) -> str:
    """Format an entry of a table for readers."""
    value = row.get(key)
    if value is None:
        return ""
    if _is_fraction(title):
        text = f"{100 * value:.2f}"
        low, high = (row.get(key + end) for end in _ENDS)
        if low is not None and high is not None:
            text += f" ({100 * low:.2f} - {100 * high:.2f})"
        return text
    shown = _FORMATS.get(key, ".4f" if isinstance(value, float) else "")
    return format(value, shown)


if __name__ == "__main__":
    main()
