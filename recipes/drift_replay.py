"""Score a stored sequence with the detector of ``DriftMonitor``, and plot it.

    python -m recipes.drift_replay runs/an4_rnnt/2026-01-01_12-00-00 column=val/wer
    python -m recipes.drift_replay accuracy.csv mode=max plot=accuracy.png

The sequence is a column of a CSV file, or of the metrics in a run folder. Rows without a value are
skipped. Arguments may be options, too (--column val/wer). Prints the first position of every drift,
and writes the plot and, in the same folder, all readings as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lightning_nna.drift.detector import DriftDetector, DriftReading
from lightning_nna.drift.plot import draw
from lightning_nna.files import whole_file, write_whole
from recipes.csv_column import Column, read_column
from recipes.program import short_errors


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, score, print and plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a CSV file or a run folder")
    parser.add_argument(
        "--column", help="name of the sequence; optional where only one is possible"
    )
    parser.add_argument("--wavelet", default="haar")
    parser.add_argument("--mode", default="min", choices=["min", "max"])
    parser.add_argument("--constant", type=float, default=0.45)
    parser.add_argument("--delta", type=float, default=0.2)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--min-delta", type=float, default=0.0)
    parser.add_argument("--plot", type=Path, help="PNG to write; by default next to the source")
    options = parser.parse_args(
        [_as_option(each) for each in (sys.argv[1:] if arguments is None else arguments)]
    )
    with short_errors("drift_replay"):
        _replay_and_write(options)


def _as_option(argument: str) -> str:
    """Return the option of an argument like ``column=val/wer``, as the other recipes have them."""
    match = re.match(r"(column|wavelet|mode|constant|delta|warmup|min[-_]delta|plot)=", argument)
    return (
        argument if match is None else f"--{match[1].replace('_', '-')}={argument[match.end() :]}"
    )


def _replay_and_write(options: argparse.Namespace) -> None:
    """Score the sequence that the command names, and write plot and readings."""
    column = read_column(options.source, options.column)
    detector = DriftDetector(
        wavelet=options.wavelet,
        mode=options.mode,
        constant=options.constant,
        delta=options.delta,
        warmup=options.warmup,
        min_delta=options.min_delta,
    )
    positions, readings = replay(detector, column.values)
    if not readings:
        raise ValueError(f"column {column.name!r} of {options.source} has no finite value")
    for line in report(column, positions, readings):
        print(line)
    folder = options.source if options.source.is_dir() else options.source.parent
    path = options.plot or folder / f"drift_{column.name.replace('/', '_')}.png"
    times = _times(column, positions)
    with whole_file(path) as unfinished:
        figure = draw(readings, times, title=column.name, xlabel=column.time_name)
        figure.savefig(unfinished, dpi=150, format="png", metadata={"Software": None})
    rows = [
        {
            "position": position,
            column.time_name: time,
            **{k: _as_json(v) for k, v in asdict(reading).items()},
        }
        for position, time, reading in zip(positions, times, readings, strict=True)
    ]
    write_whole(path.with_suffix(".json"), json.dumps(rows, indent=1) + "\n")
    print(f"{path} and {path.with_suffix('.json').name} written")


def _times(column: Column, positions: Sequence[int]) -> list[float]:
    """Return the times of the values at some positions; their own numbers without times."""
    return [position if column.times is None else column.times[position] for position in positions]


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


def report(column: Column, positions: Sequence[int], readings: Sequence[DriftReading]) -> list[str]:
    """Describe the beginnings of drifts, and the end of the sequence."""
    left_out = len(column.values) - len(readings)
    lines = [f"{column.name}: {_counted(len(readings))}, {left_out} not finite and left out"]
    if len(readings) == 1:
        return [*lines, f"{readings[0].raw:.4g} is the only value: nothing to compare with yet"]
    was_drift = False
    for position, reading in zip(positions, readings, strict=True):
        if reading.drift and not was_drift:
            time = "" if column.times is None else f" ({column.time_name} "
            time += "" if column.times is None else f"{column.times[position]:.10g})"
            lines.append(
                f"drift at {position}{time}: {reading.value:.4g} ± {reading.radius:.2g}, the best "
                f"before was {reading.reference:.4g} ± {reading.reference_radius:.2g}"
            )
        was_drift = reading.drift
    last = readings[-1]
    lines.append(
        f"at the end {last.value:.4g} ± {last.radius:.2g} over {last.effective_window:.1f} values, "
        f"{'drifted' if last.drift else 'no drift'}"
    )
    return lines


def _counted(count: int) -> str:
    return f"{count} value" if count == 1 else f"{count} values"


def _as_json(value: float) -> float | None:
    """Replace infinity and NaN, which JSON lacks, by None."""
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main()
