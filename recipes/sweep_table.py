"""Compare the runs of a sweep: a table, the same as CSV and Markdown, and word errors over bytes.

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
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from lightning_nna.files import whole_file, write_whole
from recipes.program import short_errors
from recipes.run_name import INDIFFERENT

METRICS = (
    *("method", "bits", "sparsity", "packed_bytes", "cycles", "wer", "wer_low", "wer_high"),
    *("loss_per_token", "train_seconds"),
)
"""Columns of the table after those of the settings; cycles are those of a second of speech."""

FILES = ("sweep.csv", "sweep.md", "sweep.png")


@dataclass(frozen=True)
class Run:
    """A run of a sweep.

    Args:
        name: Its folder, relative to the folder of the sweep.
        settings: Overrides of its command by key.
        metrics: Metrics by column; None for a run that is unfinished.
    """

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] | None = None


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
        rows = table(runs)
        print(as_text(rows))
        write_whole(output / "sweep.csv", as_csv(rows))
        write_whole(output / "sweep.md", as_markdown(rows))
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
    metrics = {key: summary[key] for key in METRICS if key in summary}
    if deployment is not None and deployment["systems"]:
        metrics["cycles"] = deployment["systems"][0].get("cycles")
    return Run(name, settings, metrics)


def table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row a run: its name, the settings that differ among the runs, and its metrics.

    Args:
        runs: Runs; those that are unfinished come last, with ``unfinished`` for their method.

    Example:
        >>> runs = [Run("b", {"bits": "2"}, {"wer": 0.2}), Run("a", {"bits": "4"}, {"wer": 0.1})]
        >>> rows = table([*runs, Run("c")])
        >>> [(row["run"], row["setting bits"], row.get("wer")) for row in rows]
        [('a', '4', 0.1), ('b', '2', 0.2), ('c', None, None)]
    """
    keys = swept_keys(runs)
    rows = []
    for run in sorted(runs, key=_rank):
        row = {"run": run.name, **{f"setting {key}": run.settings.get(key) for key in keys}}
        if run.metrics is None:
            row["method"] = "unfinished"
        else:
            row |= {key: run.metrics[key] for key in METRICS if key in run.metrics}
        rows.append(row)
    return rows


def swept_keys(runs: Sequence[Run]) -> list[str]:
    """Return the overrides that differ among finished runs, except those that change no result."""
    finished = [run for run in runs if run.metrics is not None]
    keys = dict.fromkeys(key for run in finished for key in run.settings)
    keys = {key: None for key in keys if key not in {*INDIFFERENT, "sweep"}}
    return [key for key in keys if len({run.settings.get(key) for run in finished}) > 1]


def _rank(run: Run) -> tuple[bool, float, str]:
    metrics = run.metrics or {}
    return run.metrics is None, metrics.get("wer", float("inf")), run.name


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
    """Plot word error rates over packed bytes; runs that no other beats are marked and labeled.

    Args:
        runs: Runs; those without both metrics are left out.
    """
    keys = swept_keys(runs)
    shown = [run for run in runs if run.metrics and {"wer", "packed_bytes"} <= run.metrics.keys()]
    metrics = [dict(run.metrics or {}) for run in shown]
    sizes = [each["packed_bytes"] / 1000 for each in metrics]
    rates = [100 * each["wer"] for each in metrics]
    below = [100 * (each["wer"] - each["wer_low"]) for each in metrics]
    above = [100 * (each["wer_high"] - each["wer"]) for each in metrics]
    best = front(list(zip(sizes, rates, strict=True)))
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.errorbar(sizes, rates, yerr=[below, above], fmt="o", color="#9aa7b4", capsize=3)
        on_front = [sizes[index] for index in best], [rates[index] for index in best]
        axes.plot(*on_front, "o-", color="#b8442c", label="no other run beats it", zorder=3)
        for index in best:
            label = ", ".join(str(shown[index].settings.get(key, "")) for key in keys)
            axes.annotate(
                label or shown[index].name,
                (sizes[index], rates[index]),
                xytext=(6, 6),
                textcoords="offset points",
            )
        axes.set_xlabel("packed size, kB")
        axes.set_ylabel("word error rate, %")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.12)
        if best:
            axes.legend(frameon=False)
    return figure


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as CSV, with all digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as a table in Markdown."""
    heads, *lines = _cells(rows)
    rule = ["---"] * len(heads)
    return "".join(f"| {' | '.join(line)} |\n" for line in (heads, rule, *lines))


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows for a terminal."""
    lines = list(_cells(rows))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns that any row has: the settings first, then the metrics in order."""
    present = dict.fromkeys(key for row in rows for key in row)
    return [
        *(key for key in present if key not in METRICS),
        *(key for key in METRICS if key in present),
    ]


def _cells(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yield the head and the rows of a table for readers: rates in percent with their interval."""
    columns = [key for key in _columns(rows) if key not in ("wer_low", "wer_high")]
    yield [_HEADS.get(key, key.removeprefix("setting ")) for key in columns]
    for row in rows:
        yield [_cell(key, row) for key in columns]


_HEADS = {
    "bits": "mean bits",
    "packed_bytes": "packed bytes",
    "cycles": "cycles per second of speech",
    "wer": "WER, %",
    "loss_per_token": "loss per token",
    "train_seconds": "training, s",
}


def _cell(key: str, row: Mapping[str, Any]) -> str:
    """Format an entry of a table for readers."""
    value = row.get(key)
    if value is None:
        return ""
    if key == "wer":
        low, high = 100 * row["wer_low"], 100 * row["wer_high"]
        return f"{100 * value:.2f} ({low:.2f} - {high:.2f})"
    formats = {"bits": ".3g", "sparsity": ".3f", "loss_per_token": ".4f", "train_seconds": ".0f"}
    formats |= {"packed_bytes": "d", "cycles": ".4g"}
    return format(value, formats[key]) if key in formats else str(value)


if __name__ == "__main__":
    main()
