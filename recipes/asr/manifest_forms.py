"""The forms in which people keep a corpus, read to utterances.

======================  ========================================================================
JSON lines              ``audio_filepath``, ``text``, and optional ``duration``, ``offset``,
                        ``speaker``, ``id`` (NeMo's form)
table between tabs      a header with ``path``, ``text``, and optional ``duration``, ``offset``,
                        ``speaker``, ``id``
Lhotse cuts             ``.jsonl`` or ``.jsonl.gz``, one supervision a cut
Lhotse Shar             a folder of ``cuts.*.jsonl.gz`` and ``recording.*.tar``, or its URL
Kaldi folder            ``wav.scp``, ``text``, and optional ``segments``, ``utt2spk``
Hugging Face dataset    a folder of ``save_to_disk`` with columns ``audio``, ``text``, and optional
                        ``speaker`` or ``speaker_id``, ``id``
======================  ========================================================================

The form is found from the path and its content. A relative path in any of them is relative to the
folder of the manifest.
"""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import soundfile
from tqdm import tqdm

from lightning_nna.files import whole_file
from recipes import require_extra
from recipes.asr.atomic import complete_folder
from recipes.asr.audio import CorpusError
from recipes.asr.corpora import Utterance, read_lines
from recipes.asr.manifest_cache import digest

FORMS = (
    "JSON lines with audio_filepath and text",
    "a table between tabs whose first line names the columns path and text",
    "Lhotse cuts (.jsonl or .jsonl.gz)",
    "a folder or a URL of Lhotse Shar (cuts.*.jsonl.gz and recording.*.tar)",
    "a Kaldi folder (wav.scp and text)",
    "a folder that save_to_disk of a Hugging Face dataset has written",
)
"""Names of the forms, for messages and docs."""


class Form(NamedTuple):
    """A form that was found, with the files that it is read from."""

    files: tuple[Path, ...]
    """Files whose size and time of change tell whether the manifest is still the same."""
    read: Callable[[Path], list[Utterance]]
    """Function of a path for audio that lies in no file of its own; returns the utterances."""


def find_form(source: str, *, setting: str, cache_dir: Path) -> Form:
    """Find the form of a manifest.

    Args:
        source: Path of a file or a folder, or URL of a folder.
        setting: Name of the setting that has it, such as ``data.train``, for messages.
        cache_dir: Folder for shards from an object store.

    Raises:
        CorpusError: If there is nothing, or nothing in a form that is read.
    """
    if "://" in source:
        return _shar(_fetched(source, cache_dir))
    path = Path(os.path.abspath(source))
    if path.is_dir():
        form = _form_of_folder(path, setting)
    elif path.is_file():
        form = _form_of_file(path)
    else:
        raise CorpusError(
            f"{setting}={source} is neither a file nor a folder (relative to {Path.cwd()})"
        )
    if form is None:
        raise CorpusError(f"{setting}={source} has none of the known forms: {'; '.join(FORMS)}")
    return form


def _form_of_folder(path: Path, setting: str) -> Form | None:
    if (path / "wav.scp").is_file():
        names = ("wav.scp", "text", "segments", "utt2spk")
        files = tuple(path / name for name in names if (path / name).is_file())
        return Form(files, lambda _: _read_kaldi(path))
    if (path / "dataset_dict.json").is_file():
        parts = sorted(one.name for one in path.iterdir() if one.is_dir())
        raise CorpusError(
            f"{setting}={path} has several datasets of Hugging Face: choose one of {parts}, as "
            f"{setting}={path / (parts[0] if parts else 'train')}"
        )
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        files = tuple(sorted(one for one in path.iterdir() if one.is_file()))
        return Form(files, lambda pack: _read_hugging_face(path, pack))
    if any(path.glob("cuts.*jsonl*")):
        return _shar(path)
    return None


def _form_of_file(path: Path) -> Form | None:
    _, line = next(read_lines(path), (0, ""))
    if line.lstrip().startswith("{"):
        row = _json_object(line, f"{path}, line 1")
        if "audio_filepath" in row:
            return Form((path,), lambda _: _read_jsonread_lines(path))
        if "supervisions" in row:
            return Form((path,), lambda _: _read_cuts(path))
    elif {"path", "text"} <= set(line.split("\t")):
        return Form((path,), lambda _: _read_table(path))
    return None


def _read_jsonread_lines(path: Path) -> list[Utterance]:
    rows = (
        (where, _json_object(line, where))
        for number, line in read_lines(path)
        for where in [f"{path}, line {number}"]
    )
    return _utterances(rows, audio="audio_filepath", folder=path.parent)


def _read_table(path: Path) -> list[Utterance]:
    lines = read_lines(path)
    columns = next(lines)[1].split("\t")

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for number, line in lines:
            where, fields = f"{path}, line {number}", line.split("\t")
            if len(fields) != len(columns):
                raise CorpusError(
                    f"{where} has {len(fields)} fields between tabs, and the header has "
                    f"{len(columns)}: {line!r}"
                )
            yield where, dict(zip(columns, fields, strict=True))

    return _utterances(rows(), audio="path", folder=path.parent)


def _utterances(
    rows: Iterable[tuple[str, dict[str, Any]]], *, audio: str, folder: Path
) -> list[Utterance]:
    """Convert rows of a manifest, with the file and line of each, to utterances."""
    utterances = []
    for where, row in rows:
        text, duration_s = row.get("text") or "", _seconds(row, "duration", where)
        if not isinstance(text, str):
            raise CorpusError(f"{where}: the text is a string, got {text!r}")
        if duration_s == 0:
            raise CorpusError(f"{where}: the duration is 0; correct it, or remove it")
        utterances.append(
            Utterance(
                id=_name(row.get("id")),
                speaker=_name(row.get("speaker")),
                text=text,
                path=_joined(folder, row.get(audio), where, audio),
                source=where,
                start_s=_seconds(row, "offset", where),
                duration_s=duration_s,
            )
        )
    return _with_ids(utterances)


def _with_ids(utterances: list[Utterance]) -> list[Utterance]:
    """Name the utterances that have no id by their paths below the folder that all share."""
    if not utterances:
        return utterances
    shared = os.path.commonpath({os.path.dirname(one.path) for one in utterances})
    skipped = len(shared.rstrip("/")) + 1
    named = []
    for one in utterances:
        if one.id:
            named.append(one)
            continue
        start = "" if one.start_s is None else f"@{one.start_s:g}"
        named.append(one._replace(id=os.path.splitext(str(one.path)[skipped:])[0] + start))
    return named


def _read_cuts(path: Path) -> list[Utterance]:
    utterances = []
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        cut = _json_object(line, where)
        recording = cut.get("recording")
        if not isinstance(recording, dict):
            raise CorpusError(f"{where}: the cut {cut.get('id')!r} has no recording")
        utterance = _of_cut(cut, recording, where, kind="file")
        file = _joined(path.parent, utterance.path, where, "the source of the recording")
        utterances.append(utterance._replace(path=file))
    return utterances


def _of_cut(cut: dict[str, Any], recording: dict[str, Any], where: str, *, kind: str) -> Utterance:
    """Convert a cut of Lhotse and its recording from the JSON of both."""
    try:
        return _of_valid_cut(cut, recording, where, kind=kind)
    except KeyError as error:
        raise CorpusError(f"{where}: the cut {cut.get('id')!r} lacks {error}") from error


def _of_valid_cut(
    cut: dict[str, Any], recording: dict[str, Any], where: str, *, kind: str
) -> Utterance:
    name = f"{where}: the cut {cut.get('id')!r}"
    if cut.get("type", "MonoCut") not in ("MonoCut", "MultiCut"):
        raise CorpusError(
            f"{name} is a {cut['type']}, and plain cuts are read; save its audio with "
            "CutSet.save_audios"
        )
    supervisions = cut.get("supervisions") or []
    if len(supervisions) != 1:
        raise CorpusError(
            f"{name} has {len(supervisions)} supervisions, and an utterance has one; divide it "
            "with CutSet.trim_to_supervisions"
        )
    if recording.get("transforms"):
        raise CorpusError(
            f"{name} has transforms of its audio, which are not applied; save its audio with "
            "CutSet.save_audios (data.speeds perturbs the speed, data.resample resamples)"
        )
    sources = recording.get("sources") or []
    if [source.get("type") for source in sources] != [kind]:
        raise CorpusError(
            f"{name} has audio of type {[source.get('type') for source in sources]}, and one "
            f"{kind} is read; save its audio with CutSet.save_audios"
        )
    channels, channel = sources[0]["channels"], cut.get("channel", 0)
    if sorted(channels) != sorted(channel if isinstance(channel, list) else [channel]):
        raise CorpusError(
            f"{name} has channel {channel} of the channels {channels}; save its audio with "
            "CutSet.save_audios"
        )
    rate_hz, num_samples = recording["sampling_rate"], recording["num_samples"]
    start_s, duration_s = cut.get("start", 0.0), cut["duration"]
    is_whole = start_s == 0 and abs(duration_s - num_samples / rate_hz) * rate_hz < 1
    [supervision] = supervisions
    return Utterance(
        id=_name(cut.get("id")),
        speaker=_name(supervision.get("speaker")),
        text=supervision.get("text") or "",
        path=sources[0]["source"],
        source=where,
        start_s=None if is_whole else start_s,
        duration_s=num_samples / rate_hz if is_whole else duration_s,
        rate_hz=rate_hz,
        channels=len(channels),
    )


def _shar(folder: Path) -> Form:
    cuts = tuple(sorted(folder.glob("cuts.*jsonl*")))
    recordings = tuple(sorted(folder.glob("recording.*tar*")))
    if not cuts or len(cuts) != len(recordings):
        raise CorpusError(
            f"{folder} has {len(cuts)} shards cuts.*.jsonl.gz and {len(recordings)} shards "
            "recording.*.tar, and Lhotse Shar has one of each for a shard"
        )
    pairs = list(zip(cuts, recordings, strict=True))
    return Form(cuts + recordings, lambda _: [one for pair in pairs for one in _read_shard(*pair)])


def _read_shard(cuts: Path, recordings: Path) -> Iterator[Utterance]:
    members = _members(recordings)
    for number, line in read_lines(cuts):
        where = f"{cuts}, line {number}"
        cut = _json_object(line, where)
        name, packed, recording = next(members, ("", None, {}))
        if name != cut.get("id"):
            raise CorpusError(
                f"{where} has the cut {cut.get('id')!r}, and {recordings} has {name!r} there"
            )
        utterance = _of_cut(cut, recording, where, kind="shar")
        yield utterance._replace(path=str(recordings), packed=packed)


def _members(path: Path) -> Iterator[tuple[str, tuple[int, int], dict[str, Any]]]:
    """Yield the name, the bytes and the manifest of each recording in a shard."""
    try:
        with tarfile.open(path, "r:") as archive:
            while (audio := archive.next()) is not None:
                manifest = archive.next()
                content = None if manifest is None else archive.extractfile(manifest)
                if content is None or audio.name.endswith(".nodata"):
                    raise CorpusError(f"{path}: {audio.name} is no recording with its manifest")
                recording = _json_object(content.read().decode(), f"{path}, {audio.name}")
                packed = (audio.offset_data, audio.size)
                yield os.path.splitext(audio.name)[0], packed, recording
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} is no tar archive without compression ({error})") from error


def _fetched(url: str, cache_dir: Path) -> Path:
    """Return a folder with the shards of an object store, fetched if they are not there yet."""
    try:
        store, root = fsspec.core.url_to_fs(url)
        listed = {os.path.basename(one["name"]): one for one in store.ls(root, detail=True)}
    # Each kind of store has exceptions of its own; a missing package is one of them.
    except Exception as error:
        raise CorpusError(
            f"{url} cannot be listed ({type(error).__name__}: {error}); install the package that "
            "the message names, or copy the shards to a disk"
        ) from error
    shards = {
        name: one
        for name, one in sorted(listed.items())
        if name.startswith(("cuts.", "recording."))
    }
    if not shards:
        raise CorpusError(f"{url} has no shards of Lhotse Shar: cuts.*.jsonl.gz, recording.*.tar")
    stamps = [
        [name, *(str(one.get(key)) for key in ("size", "ETag", "LastModified", "mtime", "created"))]
        for name, one in shards.items()
    ]
    folder = cache_dir / "shards" / digest(url, stamps)
    if not folder.is_dir():
        with complete_folder(folder) as temporary:
            for name, one in tqdm(shards.items(), desc=f"fetching {url}", delay=2, mininterval=1):
                store.get_file(one["name"], str(temporary / name))
    return Path(os.path.abspath(folder))


def _read_kaldi(folder: Path) -> list[Utterance]:
    paths = {
        name: _kaldi_path(folder, value, where)
        for name, value, where in _kaldi_table(folder / "wav.scp")
    }
    spans: dict[str, tuple[str, float | None, float | None]] = {
        name: (name, None, None) for name in paths
    }
    if (folder / "segments").is_file():
        spans = {
            name: _kaldi_span(value, where)
            for name, value, where in _kaldi_table(folder / "segments")
        }
    speakers = {}
    if (folder / "utt2spk").is_file():
        speakers = {name: value for name, value, _ in _kaldi_table(folder / "utt2spk")}
    texts = list(_kaldi_table(folder / "text"))
    silent = spans.keys() - {name for name, _, _ in texts}
    # A recording without a transcript counts as one with an empty transcript.
    texts += [(name, "", f"{folder / 'text'} (without {name})") for name in sorted(silent)]
    utterances = []
    for name, text, where in texts:
        recording, start_s, duration_s = spans.get(name, ("", None, None))
        if recording not in paths:
            raise CorpusError(
                f"{where}: there is no audio of {name!r} in wav.scp or segments; Kaldi's "
                "utils/fix_data_dir.sh removes such lines"
            )
        speaker, path = speakers.get(name, ""), paths[recording]
        utterances.append(Utterance(name, speaker, text, path, where, start_s, duration_s))
    return utterances


def _kaldi_table(path: Path) -> Iterator[tuple[str, str, str]]:
    for number, line in read_lines(path):
        name, *rest = line.split(maxsplit=1)
        yield name, (rest[0].strip() if rest else ""), f"{path}, line {number}"


def _kaldi_path(folder: Path, value: str, where: str) -> str:
    if value.endswith("|"):
        raise CorpusError(
            f"{where}: {value!r} is a piped command, and files alone are read: a command could do "
            "anything; write its output to a file and name that"
        )
    return _joined(folder, value, where, "path")


def _kaldi_span(value: str, where: str) -> tuple[str, float | None, float | None]:
    fields = value.split()
    if len(fields) != 3:
        raise CorpusError(f"{where}: expected utterance, recording, start and end, got {value!r}")
    recording, start, end = fields
    start_s = _seconds({"start": start}, "start", where) or 0.0
    if end in ("-1", "-1.0"):  # Kaldi's mark of the end of the recording.
        return recording, start_s, None
    end_s = _seconds({"end": end}, "end", where) or 0.0
    if end_s <= start_s:
        raise CorpusError(f"{where}: the end is not after the start: {value!r}")
    return recording, start_s, end_s - start_s


def _read_hugging_face(folder: Path, pack: Path) -> list[Utterance]:
    """Read a dataset; audio inside its tables is copied to the archive ``pack``."""
    require_extra("huggingface", "datasets")
    import datasets

    table = datasets.load_from_disk(str(folder))
    if missing := {"audio", "text"} - set(table.column_names):
        raise CorpusError(
            f"{folder} has the columns {table.column_names} and lacks {sorted(missing)}; rename "
            "columns with Dataset.rename_column"
        )
    speaker = next((one for one in ("speaker", "speaker_id") if one in table.column_names), None)
    # Encoded, as they lie there: decoding belongs to the features.
    table = table.cast_column("audio", datasets.Audio(decode=False))
    utterances: list[Utterance] = []
    with whole_file(pack) as unfinished, unfinished.open("wb") as archive:
        rows = tqdm(table, desc=f"reading {folder}", delay=2, mininterval=1)
        for number, row in enumerate(rows):
            where = f"{folder}, row {number}"
            audio = row["audio"] or {}
            utterance = Utterance(
                id=_name(row.get("id")) or f"{number:08d}",
                speaker=_name(row.get(speaker)) if speaker else "",
                text=row["text"] or "",
                path=str(pack),
                source=where,
            )
            data = audio.get("bytes")
            if data is None:
                path = _joined(folder, audio.get("path"), where, "audio")
                utterances.append(utterance._replace(path=path))
                continue
            utterances.append(_packed(utterance, data, archive.tell()))
            archive.write(data)
    return utterances


def _packed(utterance: Utterance, data: bytes, first: int) -> Utterance:
    """Add to an utterance what the header of its encoded audio says."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            return utterance._replace(
                packed=(first, len(data)),
                duration_s=file.frames / file.samplerate,
                rate_hz=file.samplerate,
                channels=file.channels,
            )
    except soundfile.LibsndfileError as error:
        raise CorpusError(f"{utterance.source} has unreadable audio ({error})") from error


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CorpusError(f"{where} is not JSON ({error}): {line[:80]!r}") from error
    if not isinstance(row, dict):
        raise CorpusError(f"{where} is not a JSON object: {line[:80]!r}")
    return row


def _seconds(row: dict[str, Any], key: str, where: str) -> float | None:
    value = row.get(key)
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise CorpusError(f"{where}: the {key} is a number of seconds from 0 on, got {value!r}")
    return seconds


def _name(value: Any) -> str:
    return "" if value is None else str(value)


def _joined(folder: Path, path: Any, where: str, key: str) -> str:
    if not isinstance(path, str) or not path:
        raise CorpusError(f"{where}: {key} is the path of an audio file, got {path!r}")
    if "://" in path:
        raise CorpusError(
            f"{where}: {path} is a URL, and audio is read from files; copy it to a disk, or write "
            "Lhotse Shar, which is read from a URL"
        )
    return os.path.normpath(os.path.join(folder, path))
