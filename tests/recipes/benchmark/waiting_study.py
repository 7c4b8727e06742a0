"""A study whose runs wait for ever: ``python -m tests.recipes.benchmark.waiting_study FOLDER``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recipes.benchmark.grid import Run, run_missing
from recipes.benchmark.rows import Row


@dataclass(frozen=True)
class Waiting(Run):
    """A run that tells its process in a pipe, and keeps that open."""

    number: int
    pipe: Path

    def rows(self) -> Iterator[Row]:
        with self.pipe.open("w", buffering=1) as pipe:
            pipe.write(f"{os.getpid()}\n")
            signal.pause()
        yield {"number": self.number, "pipe": str(self.pipe)}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    runs = [Waiting(number, folder / "pipe") for number in (1, 2)]
    run_missing(runs, folder / "results.jsonl", workers=2)
