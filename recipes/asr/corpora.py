"""Speech corpora as Lhotse manifests.

A corpus is an object with one method, ``load``, which returns `Splits`: three `lhotse.CutSet`,
one cut per utterance, each with one supervision that holds transcript and speaker. Only headers
are read here; `recipes.asr.features` decodes the audio.

One bad file among thousands must not stop a run of days, and a corpus that is wrong as a whole
must not start one. So problems are collected: up to a share they end in one warning, above it in
an error. Both name the files.
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
    """What `recipes.asr.data.SpeechDataModule` asks of a corpus."""

    def load(self, *, cache_dir: Path, sample_rate_hz: int, max_bad_share: float) -> Splits:
        """Manifests of the three parts.

        Args:
            cache_dir: Folder for what the corpus has to make itself.
            sample_rate_hz: The rate that every recording must have.
            max_bad_share: Largest share of unusable utterances that is only warned of.

        Raises:
            CorpusError: If the corpus is missing, or if more of it is unusable.
        """
        ...


class Utterance(NamedTuple):
    """One line of a corpus's transcripts, and where its audio should be."""

    id: str
    speaker: str
    text: str
    path: Path
    source: str = ""
    """File and line of the transcript, for messages."""


@dataclass
class BadFiles:
    """A tally of unusable files, settled at the end by one warning or one error.

    Args:
        of: What the files belong to, for the message.
        max_share: Largest share of bad files, in [0, 1], that is only warned of.

    Example:
        >>> bad = BadFiles(of="corpus", max_share=0.01)
        >>> bad.add("a.flac", "is empty")
        >>> bad.settle(total=10)
        Traceback (most recent call last):
        recipes.asr.corpora.CorpusError: 1 of 10 files of corpus (10.0 %) cannot be used...
    """

    of: str
    max_share: float
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.max_share <= 1:
            raise ValueError(f"data.max_bad_share is a share in [0, 1], got {self.max_share}")

    def add(self, name: str, reason: str) -> None:
        """Note that the file ``name`` cannot be used because it ``reason``."""
        while name in self.reasons:  # A file may be listed more than once.
            name = f"{name} (again)"
        self.reasons[name] = reason

    def settle(self, total: int) -> None:
        """Warn once about the bad files among ``total``, or raise if there are too many.

        Raises:
            CorpusError: If their share is above ``max_share``.
        """
        if not self.reasons:
            return
        share = len(self.reasons) / max(total, 1)
        shown = [f"{name} {reason}" for name, reason in list(self.reasons.items())[:3]]
        if len(self.reasons) > len(shown):
            shown.append("…")
        message = (
            f"{len(self.reasons)} of {total} files of {self.of} ({share:.1%}) cannot be used: "
        ).replace("%", " %") + "; ".join(shown)
        if share > self.max_share:
            raise CorpusError(
                f"{message}. Repair or remove them, or raise data.max_bad_share "
                f"(now {self.max_share})"
            )
        warnings.warn(f"{message}. They are left out", stacklevel=2)


def read_audio(path: str | Path) -> np.ndarray:
    """Decode a mono recording to float32 samples in [-1, 1].

    Raises:
        CorpusError: If the file is missing, unreadable or truncated, or if it holds samples that
            are no sound: NaN, infinite, or far beyond full scale. One of them would spoil the
            normalization of the whole corpus. The message names the file.
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
        (where,) = np.nonzero(~np.isfinite(samples.reshape(len(samples), -1)).all(axis=1))
        raise CorpusError(
            f"{path} holds {len(where)} samples that are NaN or infinite, the first at {where[0]}"
        )
    if samples.size and (peak := float(np.abs(samples).max())) > LOUDEST:
        raise CorpusError(
            f"{path} reaches {peak:g}, and full scale is 1: divide its samples by their full scale"
        )
    return samples


def make_cut(utterance: Utterance, *, sample_rate_hz: int) -> MonoCut:
    """The manifest of one utterance, from its file's header.

    Args:
        utterance: Transcript, speaker and path.
        sample_rate_hz: The rate that the file must have.

    Returns:
        A cut over the whole recording with one supervision; all three ids are the utterance's.

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
        raise CorpusError(f"{name} holds no audio")
    text = normalize_text(utterance.text)
    if not text:
        raise CorpusError(f"{name} has an empty transcript")
    return _whole_recording(utterance._replace(text=text), sample_rate_hz, header.frames)


def make_cuts(utterances: Sequence[Utterance], *, sample_rate_hz: int, bad: BadFiles) -> CutSet:
    """The manifest of many utterances; unusable ones are noted in ``bad`` and left out.

    Of several utterances with one id the first is taken and the others are noted.
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
    bad.settle(len(utterances))
    return CutSet.from_cuts(cuts)


@dataclass(frozen=True, kw_only=True)
class AN4:
    """CMU AN4: people spell names, addresses and numbers; 16 kHz.

    The folder holds ``train.tsv`` and ``test.tsv`` (utterance, speaker, transcript between tabs)
    and the audio as ``<train|test>/<speaker>/<utterance>.flac``. AN4 has no validation part: whole
    speakers are held out from the training part.

    Args:
        root: The folder.
        validation_share: Share of the training utterances to hold out, at least; in (0, 1).
        split_seed: Seed of the choice of speakers.

    Reference:
        Acero, "Acoustical and environmental robustness in automatic speech recognition",
        Carnegie Mellon University, 1990.
    """

    root: str | Path
    validation_share: float = 0.05
    split_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"data.validation_share is a share in (0, 1), got {self.validation_share}"
            )

    def load(self, *, cache_dir: Path, sample_rate_hz: int, max_bad_share: float) -> Splits:
        """Manifests of the three parts; see `Corpus.load`."""
        root = _existing_folder(self.root, of="AN4")
        parts = {}
        for part in ("train", "test"):
            bad = BadFiles(of=f"AN4 {part}", max_share=max_bad_share)
            utterances = list(_read_tsv(root / f"{part}.tsv", audio=root / part))
            parts[part] = make_cuts(utterances, sample_rate_hz=sample_rate_hz, bad=bad)
        train, validation = hold_out_speakers(
            parts["train"], share=self.validation_share, seed=self.split_seed
        )
        return Splits(train, validation, parts["test"])


@dataclass(frozen=True, kw_only=True)
class LibriSpeech:
    """LibriSpeech, or any corpus in its layout: read English books, 16 kHz.

    The folder holds subsets; in each ``<speaker>/<chapter>/`` lie ``<utterance>.flac`` and one
    ``<speaker>-<chapter>.trans.txt`` with an utterance id and its transcript per line.

    Args:
        root: The folder that holds the subsets.
        train: Name or names of subsets to train on, such as ``train-clean-100``.
        validation: The same for validation.
        test: The same for the test.

    Reference:
        Panayotov et al., "Librispeech: an ASR corpus based on public domain audio books",
        ICASSP 2015.
    """

    root: str | Path
    train: str | Sequence[str] = "train-clean-100"
    validation: str | Sequence[str] = "dev-clean"
    test: str | Sequence[str] = "test-clean"

    def load(self, *, cache_dir: Path, sample_rate_hz: int, max_bad_share: float) -> Splits:
        """Manifests of the three parts; see `Corpus.load`."""
        root = _existing_folder(self.root, of="LibriSpeech")
        parts = []
        for subsets in (self.train, self.validation, self.test):
            names = [subsets] if isinstance(subsets, str) else list(subsets)
            utterances = [u for name in names for u in _read_subset(root, name)]
            bad = BadFiles(of=f"LibriSpeech {' '.join(names)}", max_share=max_bad_share)
            parts.append(make_cuts(utterances, sample_rate_hz=sample_rate_hz, bad=bad))
        return Splits(*parts)


def hold_out_speakers(cuts: CutSet, *, share: float, seed: int) -> tuple[CutSet, CutSet]:
    """Split utterances in two without a speaker in both.

    Args:
        cuts: Utterances of at least two speakers.
        share: Share of the utterances to hold out; whole speakers are added until it is reached.
        seed: Seed of the order in which speakers are taken.

    Returns:
        The larger part and the held-out part, each in the order of ``cuts``.

    Raises:
        CorpusError: If holding out leaves no speaker to train on.
    """
    sizes = Counter(cut.supervisions[0].speaker for cut in cuts)
    speakers = sorted(sizes)
    random.Random(seed).shuffle(speakers)
    held_out: set[str] = set()
    while sum(sizes[speaker] for speaker in held_out) < share * sum(sizes.values()):
        held_out.add(speakers.pop())
    if not speakers:
        raise CorpusError(
            f"holding out {share:.0%} of the utterances by whole speakers takes all "
            f"{len(sizes)} speakers; lower data.validation_share"
        )
    kept: list[MonoCut] = []
    taken: list[MonoCut] = []
    for cut in cuts:
        (taken if cut.supervisions[0].speaker in held_out else kept).append(cut)
    return CutSet.from_cuts(kept), CutSet.from_cuts(taken)


def _whole_recording(utterance: Utterance, sample_rate_hz: int, num_samples: int) -> MonoCut:
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
            f"there is no folder {folder} (seen from {Path.cwd()}); set data.root to the folder "
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
        found = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise CorpusError(f"there is no subset {subset}; {root} holds the folders {found}")
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
        raise CorpusError(f"{subset} holds neither *.trans.txt nor *.flac")
    return sorted(utterances, key=lambda utterance: utterance.path)


def _require_plain(name: str, what: str) -> None:
    """Raise unless a name that becomes a part of a path is one: no folder, no way out of one."""
    if name in (".", "..") or any(mark in name for mark in "/\\\0"):
        raise CorpusError(f"{what} {name!r} is not the name of a file: it may not hold / or \\")
