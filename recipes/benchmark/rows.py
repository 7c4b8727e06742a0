"""Rows of results: one JSON object per line, appended as each run finishes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

Row = Mapping[str, Any]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file; none if it does not exist yet.

    Raises:
        ValueError: If a line is not a JSON object; the message names the line.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"line {number} of {path} is not a JSON object: {error}") from error
    return rows


def append_row(path: Path, row: Row) -> None:
    """Add ``row`` to the file, in one write: several processes may append."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def select(rows: Iterable[Row], **key: Any) -> list[Row]:
    """Select the rows that have these values.

    Example:
        >>> select([{"seed": 1, "method": "float"}, {"seed": 2, "method": "chip"}], seed=2)
        [{'seed': 2, 'method': 'chip'}]
    """
    return [row for row in rows if all(row.get(name) == value for name, value in key.items())]


def has_row(rows: Iterable[Row], **key: Any) -> bool:
    """Return whether a row has these values.

    Example:
        >>> has_row([{"seed": 1, "method": "float"}], seed=1, method="chip")
        False
    """
    return bool(select(rows, **key))


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Compute mean, minimum and maximum.

    Example:
        >>> spread([1.0, 3.0])
        (2.0, 1.0, 3.0)
    """
    values = list(values)
    return mean(values), min(values), max(values)
