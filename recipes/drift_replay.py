"""Score a stored sequence as ``DriftMonitor`` would have, and draw it.

    python -m recipes.drift_replay runs/an4_rnnt/2026-01-01_12-00-00 --column val/wer
    python -m recipes.drift_replay accuracy.csv --mode max --figure accuracy.png

The sequence is a column of a CSV file, or of the metrics in a run folder. Rows that leave it empty
are passed over. Prints where drifts begin, and writes the figure and, beside it, every reading as
JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lightning_nna.drift.detector import DriftDetector, DriftReading
from lightning_nna.drift.plot import draw
from lightning_nna.files import whole_file, write_whole


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, score, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a CSV file or a run folder")
    parser.add_argument("--column", help="name of the sequence; may be left out if there is one")
    parser.add_argument("--wavelet", default="haar")
    parser.add_argument("--mode", default="min", choices=["min", "max"])
    parser.add_argument("--constant", type=float, default=0.45)
    parser.add_argument("--delta", type=float, default=0.2)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--min-delta", type=float, default=0.0)
    parser.add_argument("--figure", type=Path, help="PNG to write; beside the source if left out")
    options = parser.parse_args(arguments)
    column, values = read_column(options.source, options.column)
    detector = DriftDetector(
        wavelet=options.wavelet,
        mode=options.mode,
        constant=options.constant,
        delta=options.delta,
        warmup=options.warmup,
        min_delta=options.min_delta,
    )
    places, readings = replay(detector, values)
    if not readings:
        raise ValueError(f"column {column!r} of {options.source} has no finite value")
    for line in report(column, places, readings, left_out=len(values) - len(readings)):
        print(line)
    beside = options.source if options.source.is_dir() else options.source.parent
    path = options.figure or beside / f"drift_{column.replace('/', '_')}.png"
    with whole_file(path) as unfinished:
        figure = draw(readings, places, title=column, xlabel="value")
        figure.savefig(unfinished, dpi=150, format="png", metadata={"Software": None})
    rows = [
        {"place": place, **{k: _as_json(v) for k, v in asdict(reading).items()}}
        for place, reading in zip(places, readings, strict=True)
    ]
    write_whole(path.with_suffix(".json"), json.dumps(rows, indent=1) + "\n")
    print(f"{path} and {path.with_suffix('.json').name} written")


def read_column(source: Path, column: str | None) -> tuple[str, list[float]]:
    """The values of a column in the order of rows, and its name.

    Args:
        source: A CSV file with a head, or a folder with one ``metrics.csv`` in it or below.
        column: Its name; None if there is only one.

    Raises:
        FileNotFoundError: If a folder has no metrics.
        ValueError: If the column is missing, not named or there twice, if a value is no number, or
            if a folder holds several logs; the message names the file and the line.
    """
    if source.is_dir():
        found = sorted(source.rglob("metrics.csv"))
        if not found:
            raise FileNotFoundError(f"{source} has no metrics.csv in it")
        if len(found) > 1:
            logs = ", ".join(str(path.relative_to(source)) for path in found)
            raise ValueError(f"{source} holds a log for every start of its run; name one: {logs}")
        source = found[0]
    # Spreadsheets begin a file with a byte-order mark.
    with source.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows = [(reader.line_num, row) for row in reader]
    names = list(reader.fieldnames or []) if rows else []
    if column is None and len(names) == 1:
        column = names[0]
    if column not in names:
        raise ValueError(f"{source} has no column {column!r}; name one of {names} by --column")
    assert column is not None, "it is one of the names"
    if names.count(column) > 1:
        raise ValueError(f"{source} has {names.count(column)} columns {column!r}")
    return column, [_number(row[column], source, line) for line, row in rows if row[column]]


def _number(text: str, source: Path, line: int) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{source}, line {line}: {text!r} is no number") from error


def replay(
    detector: DriftDetector, values: Sequence[float]
) -> tuple[list[int], list[DriftReading]]:
    """Readings of the finite values, and their places.

    Example:
        >>> places, readings = replay(DriftDetector(), [0.1, float("nan"), 0.2])
        >>> places, len(readings)
        ([0, 2], 2)
    """
    places = [place for place, value in enumerate(values) if math.isfinite(value)]
    return places, [detector.update(values[place]) for place in places]


def report(
    column: str, places: Sequence[int], readings: Sequence[DriftReading], *, left_out: int
) -> list[str]:
    """Where drifts begin and how the sequence ends, in words."""
    lines = [f"{column}: {len(readings)} values, {left_out} not finite and left out"]
    before = False
    for place, reading in zip(places, readings, strict=True):
        if reading.drift and not before:
            lines.append(
                f"drift at {place}: {reading.value:.4g} ± {reading.radius:.2g}, the best before "
                f"was {reading.reference:.4g} ± {reading.reference_radius:.2g}"
            )
        before = reading.drift
    last = readings[-1]
    lines.append(
        f"at the end {last.value:.4g} ± {last.radius:.2g} over {last.effective_window:.1f} values, "
        f"{'drifted' if last.drift else 'no drift'}"
    )
    return lines


def _as_json(value: float) -> float | None:
    """JSON knows neither infinity nor what is not a number."""
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main()
