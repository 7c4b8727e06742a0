"""Grids of runs: a resumable runner, a command line, and the report that is written at the end.

A :class:`Study` has a name, a grid of :class:`Run` and a function that turns result rows into the
fields of its report. It reads and appends ``docs/results/<name>.jsonl``; the report is next to it.
A run whose rows are in that file is not run again, so that a stopped grid goes on when its command
is repeated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_nna.files import write_whole
from recipes.benchmark.report import Fields, render
from recipes.benchmark.rows import Row, append_row, has_row, read_rows
from recipes.parent import command_line, end_with
from recipes.run_folder import git_commit

RESULTS = Path("docs/results")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a grid.

    Positional fields of a subclass are the key of the run: they name its row among the results.
    Keyword-only fields say how it is run.

    Attributes:
        threads: Number of CPU threads; None leaves the recipe's own.
    """

    threads: int | None = 1

    @property
    def keys(self) -> list[dict[str, Any]]:
        """Values that identify the rows of this run, one mapping for each row."""
        return [{each.name: getattr(self, each.name) for each in fields(self) if not each.kw_only}]

    def missing_keys(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """List the keys that no row has yet."""
        return [key for key in self.keys if not has_row(rows, **key)]

    def prepare(self) -> None:
        """Do work that several runs share; called one run after another, before any is started."""

    def rows(self) -> Iterator[Row]:
        """Run, and yield each row as soon as it is measured."""
        raise NotImplementedError


@dataclass(frozen=True)
class Study:
    """A grid, and the report of its results.

    Attributes:
        name: Stem of the results, the report and the template.
        runs: Function from the options of the command line, by name, to the runs of the grid.
        report: Function from all rows to the fields of the template.
        plot: Function that writes the figure of the report, if it has one.
        options: Arguments of ``ArgumentParser.add_argument`` by name of an option of ``runs``.
        workers: Number of runs at a time, each in a process of its own; 0 runs in this process.
    """

    name: str
    runs: Callable[..., Iterable[Run]]
    report: Callable[[Sequence[Row]], Fields]
    plot: Callable[[Sequence[Row], Path], None] | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    workers: int = 0

    @property
    def results(self) -> Path:
        """File of the rows, one JSON object per line."""
        return RESULTS / f"{self.name}.jsonl"

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Run the missing part of the grid and write the report; the command line of a study."""
        parser = argparse.ArgumentParser(
            description=sys.modules[self.runs.__module__].__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument(
            "--page-only", action="store_true", help="write the report, run nothing"
        )
        parser.add_argument(
            *("--workers", "-j"), type=int, default=self.workers, help="runs at a time; 0: in here"
        )
        for name, settings in self.options.items():
            parser.add_argument(f"--{name.replace('_', '-')}", **settings)
        options = vars(parser.parse_args(arguments))
        page_only, workers = options.pop("page_only"), options.pop("workers")
        if not page_only:
            run_missing(list(self.runs(**options)), self.results, workers=workers)
        self.write_report(self.results)

    def write_report(self, results: Path) -> None:
        """Write the report, and its plot, next to the results."""
        rows = read_rows(results)
        if self.plot is not None:
            self.plot(rows, results.with_suffix(".png"))
        write_whole(results.with_suffix(".md"), self.render(rows))

    def render(self, rows: Sequence[Row]) -> str:
        """Render the report as Markdown."""
        commands = list(dict.fromkeys(str(row["command"]) for row in rows))
        return render(self.name, {"commands": commands, **self.report(rows)})


def axis(values: Iterable[Any], *, is_open: bool = False) -> dict[str, Any]:
    """Describe an option that takes some values of one axis of a grid; all by default.

    Args:
        values: Values of the axis, of one type.
        is_open: Whether other values may be given, too.
    """
    values = list(values)
    described = {"nargs": "*", "type": type(values[0]), "default": values}
    return described if is_open else {**described, "choices": values}


def threads_option(default: int | None = 1) -> dict[str, Any]:
    """Describe the option that sets the number of CPU threads."""
    return {"type": int, "default": default, "help": "CPU threads of each run"}


def run_missing(runs: Sequence[Run], results: Path, *, workers: int) -> None:
    """Run what has no rows yet.

    Args:
        runs: Runs of the grid, in the order in which they start.
        results: File that the rows are appended to.
        workers: Number of runs at a time, each in a process of its own that has the imports
            already; 0 runs in this process.

    Raises:
        Exception: The error of the first run that fails; runs that wait are not started.
        KeyboardInterrupt: At a SIGINT; runs end at once. They do so however this process ends.
    """
    # Taken now: by the end the checkout may have moved on.
    origin = {"command": command_line(), "commit": git_commit()}
    rows = read_rows(results)
    missing = [run for run in runs if run.missing_keys(rows)]
    for run in missing:
        run.prepare()
    if not workers:
        for run in missing:
            perform(run, results, origin)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recipes.train", "recipes.evaluate"])
    with ProcessPoolExecutor(
        workers, context, initializer=end_with, initargs=(os.getpid(),), max_tasks_per_child=1
    ) as pool:
        try:
            submitted = [pool.submit(perform, run, results, origin) for run in missing]
            for done in as_completed(submitted):
                if (error := done.exception()) is not None:
                    pool.shutdown(cancel_futures=True)
                    raise error
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():  # Else the pool waits for its runs.
                process.kill()
            raise


def perform(run: Run, results: Path, origin: Row) -> None:
    """Do one run and append the rows that are missing of it.

    Args:
        run: Run of a grid.
        results: File that the rows are appended to.
        origin: Command and commit of the rows that name none themselves.
    """
    missing = run.missing_keys(read_rows(results))
    if not missing:
        return
    for row in run.rows():
        if any(has_row([row], **key) for key in missing):
            append_row(results, {**origin, **row})
