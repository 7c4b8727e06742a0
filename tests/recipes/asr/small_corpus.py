"""A corpus of a few seconds of noise in AN4's layout, for tests that need files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 16000


def write_noise(path: Path, *, seconds: float, seed: int, rate_hz: int = RATE_HZ) -> None:
    """A FLAC file of soft noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = 0.05 * np.random.default_rng(seed).standard_normal(round(seconds * rate_hz))
    soundfile.write(path, noise, rate_hz)


def write_an4(root: Path, *, speakers: int = 4, per_speaker: int = 3) -> list[Path]:
    """Training and test parts with transcripts in the letters A to D; the training files."""
    paths = []
    for part, count in (("train", speakers), ("test", 1)):
        lines = []
        for i in range(count * per_speaker):
            speaker, name = f"{part}{i // per_speaker}", f"{part}-{i:03d}"
            path = root / part / speaker / f"{name}.flac"
            write_noise(path, seconds=0.3 + 0.07 * (i % 7), seed=i)
            lines.append(f"{name}\t{speaker}\t{'ABCD'[i % 4]} {'DCBA'[i % 3]}B\n")
            paths.append(path)
        (root / f"{part}.tsv").write_text("".join(lines))
    return [path for path in paths if "train" in path.name]


def truncate(path: Path) -> None:
    """Cut a file in the middle, as a full disk does."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
