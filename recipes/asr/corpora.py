"""Speech corpora as Lhotse manifests.

A corpus is an object with one method, ``load``, which returns `Splits`: three `lhotse.CutSet`,
one cut per utterance, each with one supervision that holds transcript and speaker. Only headers
are read here; `recipes.asr.features` decodes the audio.

One bad file among thousands must not stop a run of days, and a wrong corpus must not start one. So
problems are collected: up to a fraction of the files they cause one warning, above it an error.
Both name the files.
"""

from __future__ import annotations

import gzip
import random
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource

from recipes.asr.audio import AudioFormat, Clip, CorpusError, Header, read_header, read_headers
from recipes.asr.manifest_cache import known_headers, lasting_objects
from recipes.asr.vocabulary import normalize_text


class Splits(NamedTuple):
    """The three parts of a corpus."""

    train: CutSet
    validation: CutSet
    test: CutSet


class Corpus(Protocol):
    """A corpus, as `recipes.asr.data.SpeechDataModule` uses it."""

    def load(
        self,
        *,
        cache_dir: Path,
        audio_format: AudioFormat,
        max_bad_fraction: float,
    ) -> Splits:
        """Load the manifests of the three parts.

        Args:
            cache_dir: Folder for files that the corpus creates.
            audio_format: Format of the audio; what it converts is converted later, with the
                features.
            max_bad_fraction: Largest fraction of unusable utterances that causes a warning and no
                error, in [0, 1].

        Raises:
            CorpusError: If the corpus is missing, or if a larger fraction is unusable.
        """
        ...


class Utterance(NamedTuple):
    """One line of a corpus's transcripts, with the place of its audio."""

    id: str
    speaker: str
    text: str
    path: Path | str
    source: str = ""
    """File and line of the transcript, for messages."""
    start_s: float | None = None
    """Start in the recording, in seconds; None if the utterance is the entire recording."""
    duration_s: float | None = None
    """Duration that a manifest tells, in seconds; None reads the header of the audio."""
    rate_hz: int | None = None
    """Sample rate that a manifest tells, in Hz; None for the required one."""
    channels: int | None = None
    """Number of channels that a manifest tells; None for one."""
    packed: tuple[int, int] | None = None
    """First byte and number of bytes of the audio in the archive ``path``."""

    @property
    def clip(self) -> Clip:
        """Place of the audio."""
        return Clip(str(self.path), self.start_s, self.duration_s, self.packed)


@dataclass
class BadFiles:
    """A list of unusable files, reported at the end in one warning or one error.

    Args:
        of: Name of the part that the files belong to, for the message.
        max_fraction: Largest fraction of bad files that causes a warning and no error, in [0, 1].

    Example:
        >>> bad = BadFiles(of="corpus", max_fraction=0.01)
        >>> bad.add("a.flac", "is empty")
        >>> bad.report(total=10)
        Traceback (most recent call last):
        recipes.asr.audio.CorpusError: 1 of 10 files of corpus (10.0 %) cannot be used...
    """

    of: str
    max_fraction: float
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.max_fraction <= 1:
            raise ValueError(
                f"data.max_bad_fraction is a fraction in [0, 1], got {self.max_fraction}"
            )

    def add(self, name: str, reason: str) -> None:
        """Note that the file ``name`` cannot be used because it ``reason``."""
        while name in self.reasons:  # A file may be listed more than once.
            name = f"{name} (again)"
        self.reasons[name] = reason

    def report(self, total: int) -> None:
        """Warn once about the bad files among ``total``, or raise if there are too many.

        Args:
            total: Number of all files.

        Raises:
            CorpusError: If the fraction of bad files is above ``max_fraction``.
        """
        if not self.reasons:
            return
        fraction = len(self.reasons) / max(total, 1)
        shown = [f"{name} {reason}" for name, reason in list(self.reasons.items())[:3]]
        if len(self.reasons) > len(shown):
            shown.append("…")
        message = (
            f"{len(self.reasons)} of {total} files of {self.of} ({fraction:.1%}) cannot be used: "
        ).replace("%", " %") + "; ".join(shown)
        if fraction > self.max_fraction:
            raise CorpusError(
                f"{message}. Repair or remove them, or raise data.max_bad_fraction "
                f"(now {self.max_fraction})"
            )
        warnings.warn(f"{message}. They are left out", stacklevel=2)


def make_cut(
    utterance: Utterance, audio_format: AudioFormat, header: Header | None = None
) -> MonoCut:
    """Create the manifest of one utterance.

    Args:
        utterance: Transcript, speaker, and place of the audio.
        audio_format: Required format of the audio.
        header: Header of the file; None reads it, unless the utterance has a duration.

    Returns:
        A cut over the utterance with one supervision; all three ids are the utterance's.

    Raises:
        CorpusError: If the file is missing, is unreadable, has another rate or more than one
            channel, is empty, or if the transcript is.
    """
    clip = utterance.clip
    if utterance.duration_s is None:
        header = header or read_header(utterance.path)
        rate_hz, channels = header.rate_hz, header.channels
        first, num_samples = clip.span(rate_hz=rate_hz, frames=header.frames)
    else:
        # What is trusted here is compared with the file when that is decoded.
        rate_hz = utterance.rate_hz or audio_format.sample_rate_hz
        channels = utterance.channels or 1
        first = round((utterance.start_s or 0.0) * rate_hz)
        num_samples = round(utterance.duration_s * rate_hz)
    audio_format.check(clip.name, rate_hz=rate_hz, channels=channels)
    text = normalize_text(utterance.text)
    if not text:
        raise CorpusError(f"{clip.name} has an empty transcript")
    return file_cut(
        utterance._replace(text=text), rate_hz=rate_hz, num_samples=num_samples, first=first
    )


def make_cuts(
    utterances: Sequence[Utterance],
    audio_format: AudioFormat,
    *,
    bad: BadFiles,
    headers: dict[str, Header] | None = None,
) -> CutSet:
    """Create the manifest of many utterances; unusable ones are added to ``bad`` and left out.

    Of several utterances with one id the first is used and the others are added to ``bad``.

    Args:
        utterances: Utterances of one part.
        audio_format: Required format of the audio.
        bad: List of unusable files, extended and reported here.
        headers: Headers by path that were read before, replaced by those that are read now.
    """
    known = {} if headers is None else headers
    paths = (str(one.path) for one in utterances if one.duration_s is None)
    read = read_headers(paths, known, of=bad.of)
    known.clear()
    known.update((path, one) for path, one in read.items() if isinstance(one, Header))
    with lasting_objects():
        cuts = _usable_cuts(utterances, audio_format, read, bad)
    bad.report(len(utterances))
    return CutSet.from_cuts(cuts)


def _usable_cuts(
    utterances: Sequence[Utterance],
    audio_format: AudioFormat,
    headers: Mapping[str, Header | CorpusError],
    bad: BadFiles,
) -> list[MonoCut]:
    cuts = []
    sources: dict[str, str] = {}
    for utterance in utterances:
        path = str(utterance.path)
        source = utterance.source or path
        if utterance.id in sources:
            first = sources[utterance.id]
            bad.add(source, f"has the utterance id {utterance.id!r} again, first in {first}")
            continue
        sources[utterance.id] = source
        header = headers.get(path)
        try:
            if isinstance(header, CorpusError):
                raise header
            cuts.append(make_cut(utterance, audio_format, header))
        except CorpusError as error:
            bad.add(path, str(error).removeprefix(path).strip())
    return cuts


@dataclass(frozen=True, kw_only=True)
class AN4:
    """CMU AN4: people spell names, addresses and numbers; 16 kHz.

    The folder has ``train.tsv`` and ``test.tsv`` (utterance, speaker, transcript between tabs)
    and the audio as ``<train|test>/<speaker>/<utterance>.flac``. AN4 has no validation part:
    entire speakers are held out from the training part.

    Args:
        root: Folder of the corpus.
        validation_fraction: Least fraction of the training utterances to hold out, in (0, 1).
        split_seed: Seed of the random order of speakers.

    Reference:
        Acero, "Acoustical and environmental robustness in automatic speech recognition",
        Carnegie Mellon University, 1990.
    """

    root: str | Path
    validation_fraction: float = 0.05
    split_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction is a fraction in (0, 1), got {self.validation_fraction}"
            )

    def load(
        self,
        *,
        cache_dir: Path,
        audio_format: AudioFormat,
        max_bad_fraction: float,
    ) -> Splits:
        """Load the manifests of the three parts; see `Corpus.load`."""
        root = _existing_folder(self.root, of="AN4")
        parts = {}
        for part in ("train", "test"):
            bad = BadFiles(of=f"AN4 {part}", max_fraction=max_bad_fraction)
            utterances = list(_read_tsv(root / f"{part}.tsv", audio=root / part))
            with known_headers(cache_dir, "AN4", root, part) as headers:
                parts[part] = make_cuts(utterances, audio_format, bad=bad, headers=headers)
        train, validation = hold_out_speakers(
            parts["train"], fraction=self.validation_fraction, seed=self.split_seed
        )
        return Splits(train, validation, parts["test"])


@dataclass(frozen=True, kw_only=True)
class LibriSpeech:
    """LibriSpeech, or any corpus in its layout: read English books, 16 kHz.

    The folder has subsets; each ``<speaker>/<chapter>/`` in them has ``<utterance>.flac`` and one
    ``<speaker>-<chapter>.trans.txt`` with an utterance id and its transcript per line.

    Args:
        root: Folder of the subsets.
        train: Name or names of training subsets, such as ``train-clean-100``.
        validation: Name or names of validation subsets.
        test: Name or names of test subsets.

    Reference:
        Panayotov et al., "Librispeech: an ASR corpus based on public domain audio books",
        ICASSP 2015.
    """

    root: str | Path
    train: str | Sequence[str] = "train-clean-100"
    validation: str | Sequence[str] = "dev-clean"
    test: str | Sequence[str] = "test-clean"

    def load(
        self,
        *,
        cache_dir: Path,
        audio_format: AudioFormat,
        max_bad_fraction: float,
    ) -> Splits:
        """Load the manifests of the three parts; see `Corpus.load`."""
        root = _existing_folder(self.root, of="LibriSpeech")
        parts = []
        for subsets in (self.train, self.validation, self.test):
            names = [subsets] if isinstance(subsets, str) else list(subsets)
            utterances = [u for name in names for u in _read_subset(root, name)]
            bad = BadFiles(of=f"LibriSpeech {' '.join(names)}", max_fraction=max_bad_fraction)
            with known_headers(cache_dir, "LibriSpeech", root, *names) as headers:
                parts.append(make_cuts(utterances, audio_format, bad=bad, headers=headers))
        return Splits(*parts)


def hold_out_speakers(
    cuts: CutSet, *, fraction: float, seed: int, setting: str = "data.validation_fraction"
) -> tuple[CutSet, CutSet]:
    """Split utterances in two without a speaker in both.

    Args:
        cuts: Utterances of at least two speakers.
        fraction: Least fraction of the utterances to hold out, in (0, 1); entire speakers are added
            until it is reached.
        seed: Seed of the random order of speakers.
        setting: Name of the setting that asks for it, for the message.

    Returns:
        The larger part and the held-out part, each in the order of ``cuts``.

    Raises:
        CorpusError: If holding out leaves no speaker to train on.
    """
    sizes = Counter(cut.supervisions[0].speaker for cut in cuts)
    speakers = sorted(sizes)
    random.Random(seed).shuffle(speakers)
    enough = fraction * sum(sizes.values())
    held_out: set[str] = set()
    size = 0
    while speakers and size < enough:
        speaker = speakers.pop()
        held_out.add(speaker)
        size += sizes[speaker]
    if not speakers:
        raise CorpusError(
            f"holding out {fraction:.0%} of the utterances by entire speakers takes all "
            f"{len(sizes)} speakers; lower {setting}"
        )
    training: list[MonoCut] = []
    validation: list[MonoCut] = []
    for cut in cuts:
        (validation if cut.supervisions[0].speaker in held_out else training).append(cut)
    return CutSet.from_cuts(training), CutSet.from_cuts(validation)


def file_cut(utterance: Utterance, *, rate_hz: int, num_samples: int, first: int = 0) -> MonoCut:
    """Create the cut of an utterance whose audio is known; nothing is read.

    Args:
        utterance: Transcript, speaker, and place of the audio.
        rate_hz: Sample rate of the recording, in Hz.
        num_samples: Number of samples of the utterance.
        first: Index of its first sample in the recording.
    """
    duration = num_samples / rate_hz
    recording = Recording(
        id=utterance.id,
        # All channels, if there are several, are averaged when they are read.
        sources=[AudioSource(type="file", channels=[0], source=str(utterance.path))],
        sampling_rate=rate_hz,
        num_samples=first + num_samples,
        duration=(first + num_samples) / rate_hz,
    )
    supervision = SupervisionSegment(
        id=utterance.id,
        recording_id=utterance.id,
        start=0.0,
        duration=duration,
        text=utterance.text,
        speaker=utterance.speaker,
    )
    clip = utterance.clip
    is_plain = clip[1:] == (None, None, None)
    return MonoCut(
        id=utterance.id,
        start=first / rate_hz,
        duration=duration,
        channel=0,
        recording=recording,
        supervisions=[supervision],
        custom=None if is_plain else {"clip": clip},
    )


def _existing_folder(root: str | Path, *, of: str) -> Path:
    folder = Path(root)
    if not folder.is_dir():
        raise CorpusError(
            f"there is no folder {folder} (relative to {Path.cwd()}); set data.root to the folder "
            f"of {of}"
        )
    return folder


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text that are not empty, with their numbers.

    Args:
        path: Path of a file in UTF-8, compressed if it ends in ``.gz``.

    Raises:
        CorpusError: If the file cannot be read.
    """
    try:
        # Spreadsheets begin a file with a byte-order mark. A line ends at a line feed alone: a
        # transcript may have a form feed or a Unicode line separator, too.
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise CorpusError(f"the text {path} cannot be read ({error})") from error


def _read_tsv(path: Path, *, audio: Path) -> Iterable[Utterance]:
    for number, line in read_lines(path):
        fields = line.split("\t")
        if len(fields) not in (2, 3) or not all(fields[:2]):
            raise CorpusError(
                f"{path}, line {number}: expected utterance, speaker and transcript between "
                f"tabs, got {line!r}"
            )
        name, speaker, text = (*fields, "")[:3]
        source = f"{path}, line {number}"
        for kind, value in (("utterance id", name), ("speaker", speaker)):
            _require_plain(value, f"{source}: the {kind}")
        yield Utterance(name, speaker, text, audio / speaker / f"{name}.flac", source)


def _read_subset(root: Path, name: str) -> list[Utterance]:
    subset = root / name
    if not subset.is_dir():
        folders = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise CorpusError(f"there is no subset {subset}; {root} has the folders {folders}")
    utterances: list[Utterance] = []
    for transcripts in sorted(subset.rglob("*.trans.txt")):
        for number, line in read_lines(transcripts):
            name, _, text = line.partition(" ")
            source = f"{transcripts}, line {number}"
            _require_plain(name, f"{source}: the utterance id")
            path = transcripts.parent / f"{name}.flac"
            utterances.append(Utterance(name, name.split("-")[0], text, path, source))
    # A recording without a transcript counts as one with an empty transcript.
    silent = set(subset.rglob("*.flac")) - {utterance.path for utterance in utterances}
    utterances += [Utterance(path.stem, path.stem.split("-")[0], "", path) for path in silent]
    if not utterances:
        raise CorpusError(f"{subset} has neither *.trans.txt nor *.flac")
    return sorted(utterances, key=lambda utterance: utterance.path)


def _require_plain(name: str, kind: str) -> None:
    """Raise unless a name is a plain file name, without a folder."""
    if name in (".", "..") or any(mark in name for mark in "/\\\0"):
        raise CorpusError(f"{kind} {name!r} is not the name of a file: it may not contain / or \\")
