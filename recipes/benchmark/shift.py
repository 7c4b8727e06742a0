"""Estimation, detection and learning under temporal shift, beside other methods.

    python -m recipes.benchmark.shift                      # what is missing, then the page
    python -m recipes.benchmark.shift --tables latest      # a part
    python -m recipes.benchmark.shift --page-only

A cell that is in ``docs/results/shift.jsonl`` is not measured again. Detectors of river come with
the extra ``bench``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_nna.files import write_whole
from recipes.benchmark import shift_detection, shift_latest, shift_learning, shift_streaming
from recipes.benchmark.rows import append_row, has_row, read_rows
from recipes.benchmark.shift_page import draw, page
from recipes.run_folder import command_line, git_commit

ROWS = Path("docs/results/shift.jsonl")
TABLES = ("latest", "detection", "learning", "streaming", "rate")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--tables", nargs="*", default=list(TABLES), choices=TABLES)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if not options.page_only:
        # Now: by the end the checkout may have moved on.
        origin = {"command": command_line(), "commit": git_commit()}
        for table in options.tables:
            for row in measure(table):
                append_row(ROWS, {"table": table, **origin, **row})
    rows = read_rows(ROWS)
    write_whole(ROWS.with_suffix(".md"), page(rows))
    draw(rows, ROWS.with_suffix(".png"))


def measure(table: str) -> Iterator[Mapping[str, Any]]:
    """Rows of a table that are missing, each as it is measured."""
    yield from {
        "latest": _latest,
        "detection": _detection,
        "learning": _learning,
        "streaming": _streaming,
        "rate": _rate,
    }[table]()


def _has(table: str, **key: Any) -> bool:
    return has_row(read_rows(ROWS), table=table, **key)


def _latest() -> Iterator[Mapping[str, Any]]:
    every = itertools.product(["oracle", *shift_latest.METHODS], shift_latest.SIGMAS, (True, False))
    for method, sigma, known in every:
        key = {"sigma": sigma, "sigma_known": known, "method": method}
        if not all(_has("latest", case=case, **key) for case in shift_latest.CASES):
            for row in shift_latest.measure(sigma, sigma_known=known, missing=[method]):
                if not _has("latest", case=row["case"], **key):
                    yield row


def _detection() -> Iterator[Mapping[str, Any]]:
    for case, method in itertools.product(shift_detection.ONSETS, shift_detection.METHODS):
        if not _has("detection", case=case, method=method):
            yield from shift_detection.measure(case, [method])


def _learning() -> Iterator[Mapping[str, Any]]:
    for case, seeds in shift_learning.SEEDS.items():
        for seed, model, method in itertools.product(
            seeds, shift_learning.MODELS, shift_learning.LEARNERS
        ):
            if not _has("learning", case=case, seed=seed, model=model, method=method):
                yield from shift_learning.measure(case, seed, [f"{method} {model}"])


def _streaming() -> Iterator[Mapping[str, Any]]:
    for n, method in itertools.product(shift_streaming.LENGTHS, shift_streaming.STREAMING):
        if not _has("streaming", n=n, method=method):
            yield from shift_streaming.streaming([(method, n)])


def _rate() -> Iterator[Mapping[str, Any]]:
    for n, method in itertools.product(shift_streaming.RATE_LENGTHS, shift_streaming.RATES):
        if not _has("rate", n=n, method=method):
            yield from shift_streaming.rate([(method, n)])


if __name__ == "__main__":
    main()
