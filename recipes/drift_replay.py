"""Score a stored sequence with the detector of ``DriftMonitor``, and plot it.

    python -m recipes.drift_replay runs/an4_rnnt/2026-01-01_12-00-00 --column val/wer
    python -m recipes.drift_replay accuracy.csv --mode max --plot accuracy.png

The sequence is a column of a CSV file, or of the metrics in a run folder. Rows without a value are
skipped. Prints the first position of every drift, and writes the plot and, in the same folder, all
readings as JSON.
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
from recipes.program import short_errors


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, score, print and plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a CSV file or a run folder")
    parser.add_argument("--column", help="name of the sequence; optional if there is one")
    parser.add_argument("--wavelet", default="haar")
    parser.add_argument("--mode", default="min", choices=["min", "max"])
    parser.add_argument("--constant", type=float, default=0.45)
    parser.add_argument("--delta", type=float, default=0.2)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--min-delta", type=float, default=0.0)
    parser.add_argument("--plot", type=Path, help="PNG to write; by default next to the source")
    options = parser.parse_args(arguments)
    with short_errors("drift_replay"):
        _replay_and_write(options)


def _replay_and_write(options: argparse.Namespace) -> None:
    """Score the sequence that the command names, and write plot and readings."""
    column, values = read_column(options.source, options.column)
    detector = DriftDetector(
        wavelet=options.wavelet,
        mode=options.mode,
        constant=options.constant,
        delta=options.delta,
        warmup=options.warmup,
        min_delta=options.min_delta,
    )
    positions, readings = replay(detector, values)
    if not readings:
        raise ValueError(f"column {column!r} of {options.source} has no finite value")
    for line in report(column, positions, readings, left_out=len(values) - len(readings)):
        print(line)
    folder = options.source if options.source.is_dir() else options.source.parent
    path = options.plot or folder / f"drift_{column.replace('/', '_')}.png"
    with whole_file(path) as unfinished:
        figure = draw(readings, positions, title=column, xlabel="value")
        figure.savefig(unfinished, dpi=150, format="png", metadata={"Software": None})
    rows = [
        {"position": position, **{k: _as_json(v) for k, v in asdict(reading).items()}}
        for position, reading in zip(positions, readings, strict=True)
    ]
    write_whole(path.with_suffix(".json"), json.dumps(rows, indent=1) + "\n")
    print(f"{path} and {path.with_suffix('.json').name} written")


def read_column(source: Path, column: str | None) -> tuple[str, list[float]]:
    """Read a column of a CSV file.

    Args:
        source: CSV file with a header, or folder with one ``metrics.csv`` in it or below.
        column: Name of the column; None if there is only one.

    Returns:
        Name of the column, and its values in the order of rows.

    Raises:
        FileNotFoundError: If a folder has no metrics.
        ValueError: If the column is missing, not named or there twice, if a value is no number, or
            if a folder has several logs; the message names the file and the line.
    """
    if source.is_dir():
        logs = sorted(source.rglob("metrics.csv"))
        if not logs:
            raise FileNotFoundError(f"{source} has no metrics.csv in it")
        if len(logs) > 1:
            names = ", ".join(str(path.relative_to(source)) for path in logs)
            raise ValueError(f"{source} has a log for every start of its run; name one: {names}")
        source = logs[0]
    # Spreadsheets begin a file with a byte-order mark.
    with source.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows = [(reader.line_num, row) for row in reader]
    columns = list(reader.fieldnames or []) if rows else []
    if column is None and len(columns) == 1:
        column = columns[0]
    if column not in columns:
        raise ValueError(f"{source} has no column {column!r}; name one of {columns} by --column")
    assert column is not None, "it is one of the names"
    if columns.count(column) > 1:
        raise ValueError(f"{source} has {columns.count(column)} columns {column!r}")
    return column, [_number(row[column], source, line) for line, row in rows if row[column]]


def _number(text: str, source: Path, line: int) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{source}, line {line}: {text!r} is no number") from error


def replay(
    detector: DriftDetector, values: Sequence[float]
) -> tuple[list[int], list[DriftReading]]:
    """Score the finite values of a sequence.

    Args:
        detector: Detector, updated here.
        values: Sequence, finite or not.

    Returns:
        Positions of the finite values in the sequence, and a reading of each.

    Example:
        >>> positions, readings = replay(DriftDetector(), [0.1, float("nan"), 0.2])
        >>> positions, len(readings)
        ([0, 2], 2)
    """
    positions = [position for position, value in enumerate(values) if math.isfinite(value)]
    return positions, [detector.update(values[position]) for position in positions]


def report(
    column: str, positions: Sequence[int], readings: Sequence[DriftReading], *, left_out: int
) -> list[str]:
    """Describe the beginnings of drifts, and the end of the sequence."""
    lines = [f"{column}: {len(readings)} values, {left_out} not finite and left out"]
    was_drift = False
    for position, reading in zip(positions, readings, strict=True):
        if reading.drift and not was_drift:
            lines.append(
                f"drift at {position}: {reading.value:.4g} ± {reading.radius:.2g}, the best before "
                f"was {reading.reference:.4g} ± {reading.reference_radius:.2g}"
            )
        was_drift = reading.drift
    last = readings[-1]
    lines.append(
        f"at the end {last.value:.4g} ± {last.radius:.2g} over {last.effective_window:.1f} values, "
        f"{'drifted' if last.drift else 'no drift'}"
    )
    return lines


def _as_json(value: float) -> float | None:
    """Replace infinity and NaN, which JSON lacks, by None."""
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main()
