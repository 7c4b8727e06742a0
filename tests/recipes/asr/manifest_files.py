"""The same audio in every form of a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from lhotse import CutSet
from lhotse.shar import SharWriter

from recipes.asr.audio import AudioFormat
from recipes.asr.corpora import Utterance, make_cut
from tests.recipes.asr.small_corpus import write_noise

Rows = list[Utterance]


def write_audio(folder: Path, *, speakers: int = 4, per_speaker: int = 3) -> Rows:
    """FLAC files of noise with transcripts in the letters A to D."""
    rows = []
    for i in range(speakers * per_speaker):
        speaker, name = f"s{i // per_speaker}", f"u{i:03d}"
        path = folder / f"{name}.flac"
        write_noise(path, seconds=0.3 + 0.07 * (i % 7), seed=i)
        rows.append(Utterance(name, speaker, f"{'ABCD'[i % 4]} {'DCBA'[i % 3]}B", path))
    return rows


def cuts_of(rows: Rows) -> CutSet:
    """The cuts of Lhotse."""
    audio_format = AudioFormat(resample=True, mono=True)
    return CutSet.from_cuts([make_cut(row, audio_format) for row in rows])


def write_json_lines(rows: Rows, folder: Path) -> Path:
    path = folder / "part.json"
    lines = [
        json.dumps(
            {
                "audio_filepath": str(row.path),
                "duration": cut.duration,
                "text": row.text,
                "speaker": row.speaker,
            }
        )
        for row, cut in zip(rows, cuts_of(rows), strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_table(rows: Rows, folder: Path) -> Path:
    path = folder / "part.tsv"
    lines = [f"{row.speaker}\t{row.path}\t{row.text}\n" for row in rows]
    path.write_text("speaker\tpath\ttext\n" + "".join(lines))
    return path


def write_cuts(rows: Rows, folder: Path) -> Path:
    path = folder / "cuts.jsonl.gz"
    cuts_of(rows).to_file(path)
    return path


def write_shar(rows: Rows, folder: Path) -> Path:
    target = folder / "shar"
    target.mkdir()
    with SharWriter(target, fields={"recording": "flac"}, shard_size=5) as writer:
        for cut in cuts_of(rows):
            writer.write(cut)
    return target


def write_kaldi(rows: Rows, folder: Path) -> Path:
    target = folder / "kaldi"
    target.mkdir()
    files = {
        "wav.scp": [f"{row.id} {row.path}" for row in rows],
        "text": [f"{row.id} {row.text}" for row in rows],
        "utt2spk": [f"{row.id} {row.speaker}" for row in rows],
    }
    for name, lines in files.items():
        (target / name).write_text("\n".join(lines) + "\n")
    return target


WRITERS: dict[str, Callable[[Rows, Path], Path]] = {
    "json": write_json_lines,
    "table": write_table,
    "cuts": write_cuts,
    "shar": write_shar,
    "kaldi": write_kaldi,
}
