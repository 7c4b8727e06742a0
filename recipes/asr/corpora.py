"""Speech corpora as Lhotse manifests.

A corpus is an object with one method, ``load``, which returns `Splits`: three `lhotse.CutSet`,
one cut per utterance, each with one supervision that holds transcript and speaker. Only headers
are read here; `recipes.asr.features` decodes the audio.

One bad file among thousands must not stop a run of days, and a wrong corpus must not start one. So
problems are collected: up to a fraction of the files they cause one warning, above it an error.
Both name the files.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import soundfile
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from tqdm import tqdm

from recipes.asr.vocabulary import normalize_text

# A recording in floating point may pass full scale by a little; beyond this it has another unit.
LOUDEST = 8.0


class CorpusError(ValueError):
    """A corpus, or a file of it, cannot be used; the message names the file and the remedy."""


class Splits(NamedTuple):
    """The three parts of a corpus."""

    train: CutSet
    validation: CutSet
    test: CutSet


class Corpus(Protocol):
    """A corpus, as `recipes.asr.data.SpeechDataModule` uses it."""

    def load(self, *, cache_dir: Path, sample_rate_hz: int, max_bad_fraction: float) -> Splits:
        """Load the manifests of the three parts.

        Args:
            cache_dir: Folder for files that the corpus creates.
            sample_rate_hz: Sample rate of every recording, in Hz.
            max_bad_fraction: Largest fraction of unusable utterances that causes a warning and no
                error, in [0, 1].

        Raises:
            CorpusError: If the corpus is missing, or if a larger fraction is unusable.
        """
        ...


class Utterance(NamedTuple):
    """One line of a corpus's transcripts, with the path of its audio."""

    id: str
    speaker: str
    text: str
    path: Path
    source: str = ""
    """File and line of the transcript, for messages."""


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
        recipes.asr.corpora.CorpusError: 1 of 10 files of corpus (10.0 %) cannot be used...
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


def read_audio(path: str | Path) -> np.ndarray:
    """Decode a mono recording to float32 samples in [-1, 1].

    Raises:
        CorpusError: If the file is missing, unreadable or truncated, or if samples are NaN,
            infinite or far above full scale. One of them would damage the normalization of the
            entire corpus. The message names the file.
    """
    if not Path(path).is_file():
        raise CorpusError(f"{path} is missing")
    try:
        with soundfile.SoundFile(path) as file:
            expected = file.frames
            samples = file.read(dtype="float32")
    except (soundfile.LibsndfileError, OSError) as error:
        raise CorpusError(f"{path} is unreadable or truncated ({error})") from error
    if len(samples) != expected:
        raise CorpusError(
            f"{path} is unreadable or truncated (its header tells of {expected} samples, "
            f"{len(samples)} are there)"
        )
    if not np.isfinite(samples).all():
        (positions,) = np.nonzero(~np.isfinite(samples.reshape(len(samples), -1)).all(axis=1))
        raise CorpusError(
            f"{path} has {len(positions)} samples that are NaN or infinite, the first at "
            f"{positions[0]}"
        )
    if samples.size and (peak := float(np.abs(samples).max())) > LOUDEST:
        raise CorpusError(
            f"{path} reaches {peak:g}, and full scale is 1: divide its samples by their full scale"
        )
    return samples


def make_cut(utterance: Utterance, *, sample_rate_hz: int) -> MonoCut:
    """Create the manifest of one utterance from its file's header.

    Args:
        utterance: Transcript, speaker and path.
        sample_rate_hz: Required sample rate, in Hz.

    Returns:
        A cut over the entire recording with one supervision; all three ids are the utterance's.

    Raises:
        CorpusError: If the file is missing, is unreadable, has another rate or more than one
            channel, is empty, or if the transcript is.
    """
    name = str(utterance.path)
    if not utterance.path.is_file():
        raise CorpusError(f"{name} is missing")
    try:
        header = soundfile.info(name)
    except soundfile.LibsndfileError as error:
        raise CorpusError(f"{name} is unreadable or truncated ({error})") from error
    if header.samplerate != sample_rate_hz:
        raise CorpusError(
            f"{name} has a sample rate of {header.samplerate} Hz, not {sample_rate_hz} Hz; "
            "resample it or set data.sample_rate_hz"
        )
    if header.channels != 1:
        raise CorpusError(f"{name} has {header.channels} channels, not one; mix it down")
    if header.frames == 0:
        raise CorpusError(f"{name} has no audio")
    text = normalize_text(utterance.text)
    if not text:
        raise CorpusError(f"{name} has an empty transcript")
    return _recording_cut(utterance._replace(text=text), sample_rate_hz, header.frames)


def make_cuts(utterances: Sequence[Utterance], *, sample_rate_hz: int, bad: BadFiles) -> CutSet:
    """Create the manifest of many utterances; unusable ones are added to ``bad`` and left out.

    Of several utterances with one id the first is used and the others are added to ``bad``.

    Args:
        utterances: Utterances of one part.
        sample_rate_hz: Required sample rate, in Hz.
        bad: List of unusable files, extended and reported here.
    """
    cuts = []
    sources: dict[str, str] = {}
    for utterance in tqdm(utterances, desc=f"reading headers of {bad.of}", delay=2, mininterval=1):
        source = utterance.source or str(utterance.path)
        if utterance.id in sources:
            first = sources[utterance.id]
            bad.add(source, f"has the utterance id {utterance.id!r} again, first in {first}")
            continue
        sources[utterance.id] = source
        try:
            cuts.append(make_cut(utterance, sample_rate_hz=sample_rate_hz))
        except CorpusError as error:
            name = str(utterance.path)
            bad.add(name, str(error).removeprefix(name).strip())
    bad.report(len(utterances))
    return CutSet.from_cuts(cuts)


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

    def load(self, *, cache_dir: Path, sample_rate_hz: int, max_bad_fraction: float) -> Splits:
        """Load the manifests of the three parts; see `Corpus.load`."""
        root = _existing_folder(self.root, of="AN4")
        parts = {}
        for part in ("train", "test"):
            bad = BadFiles(of=f"AN4 {part}", max_fraction=max_bad_fraction)
            utterances = list(_read_tsv(root / f"{part}.tsv", audio=root / part))
            parts[part] = make_cuts(utterances, sample_rate_hz=sample_rate_hz, bad=bad)
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

    def load(self, *, cache_dir: Path, sample_rate_hz: int, max_bad_fraction: float) -> Splits:
        """Load the manifests of the three parts; see `Corpus.load`."""
        root = _existing_folder(self.root, of="LibriSpeech")
        parts = []
        for subsets in (self.train, self.validation, self.test):
            names = [subsets] if isinstance(subsets, str) else list(subsets)
            utterances = [u for name in names for u in _read_subset(root, name)]
            bad = BadFiles(of=f"LibriSpeech {' '.join(names)}", max_fraction=max_bad_fraction)
            parts.append(make_cuts(utterances, sample_rate_hz=sample_rate_hz, bad=bad))
        return Splits(*parts)


def hold_out_speakers(cuts: CutSet, *, fraction: float, seed: int) -> tuple[CutSet, CutSet]:
    """Split utterances in two without a speaker in both.

    Args:
        cuts: Utterances of at least two speakers.
        fraction: Least fraction of the utterances to hold out, in (0, 1); entire speakers are added
            until it is reached.
        seed: Seed of the random order of speakers.

    Returns:
        The larger part and the held-out part, each in the order of ``cuts``.

    Raises:
        CorpusError: If holding out leaves no speaker to train on.
    """
    sizes = Counter(cut.supervisions[0].speaker for cut in cuts)
    speakers = sorted(sizes)
    random.Random(seed).shuffle(speakers)
    held_out: set[str] = set()
    while sum(sizes[speaker] for speaker in held_out) < fraction * sum(sizes.values()):
        held_out.add(speakers.pop())
    if not speakers:
        raise CorpusError(
            f"holding out {fraction:.0%} of the utterances by entire speakers takes all "
            f"{len(sizes)} speakers; lower data.validation_fraction"
        )
    training: list[MonoCut] = []
    validation: list[MonoCut] = []
    for cut in cuts:
        (validation if cut.supervisions[0].speaker in held_out else training).append(cut)
    return CutSet.from_cuts(training), CutSet.from_cuts(validation)


def _recording_cut(utterance: Utterance, sample_rate_hz: int, num_samples: int) -> MonoCut:
    duration = num_samples / sample_rate_hz
    recording = Recording(
        id=utterance.id,
        sources=[AudioSource(type="file", channels=[0], source=str(utterance.path))],
        sampling_rate=sample_rate_hz,
        num_samples=num_samples,
        duration=duration,
    )
    supervision = SupervisionSegment(
        id=utterance.id,
        recording_id=utterance.id,
        start=0.0,
        duration=duration,
        text=utterance.text,
        speaker=utterance.speaker,
    )
    return MonoCut(
        id=utterance.id,
        start=0.0,
        duration=duration,
        channel=0,
        recording=recording,
        supervisions=[supervision],
    )


def _existing_folder(root: str | Path, *, of: str) -> Path:
    folder = Path(root)
    if not folder.is_dir():
        raise CorpusError(
            f"there is no folder {folder} (relative to {Path.cwd()}); set data.root to the folder "
            f"of {of}"
        )
    return folder


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        # Spreadsheets begin a file with a byte-order mark.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"the transcripts {path} cannot be read ({error})") from error
    # Not splitlines: that breaks a transcript at a form feed or a Unicode line separator, too.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _read_tsv(path: Path, *, audio: Path) -> Iterable[Utterance]:
    for number, line in _read_lines(path):
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
        for number, line in _read_lines(transcripts):
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
