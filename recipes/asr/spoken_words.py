"""Connected words, synthesized by espeak-ng: the corpora that need no download.

Every utterance is a string of random words of a vocabulary (digits or commands) in one of many
voices (an accent of English and a variant of the vocal tract), with random rate, pitch, pitch range
and level, in noise of random color. Training, validation and test have different voices. A corpus
is synthesized once, as FLAC files with Lhotse manifests, and the same seed gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import soundfile
import torch
from lhotse import CutSet, MonoCut
from tqdm import tqdm

from recipes.asr.atomic import check_folder, complete_folder
from recipes.asr.audio import AudioFormat, resampler
from recipes.asr.corpora import Splits, Utterance, file_cut, make_cut
from recipes.asr.espeak import Speech, synthesize
from recipes.asr.manifest_cache import lasting_objects

DIGITS = ("ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE")

COMMANDS = (
    *DIGITS,
    *("ON", "OFF", "UP", "DOWN", "LEFT", "RIGHT", "OPEN", "CLOSE", "START", "STOP", "GO", "NO"),
    *("YES", "LIGHT", "NIGHT", "HEAT", "SEAT", "WHITE", "RED", "BED", "BATH", "PATH", "DOOR"),
    *("FLOOR", "MORE", "LESS", "LOW", "SLOW", "HIGH", "DRY", "COLD", "HOLD", "FAN", "PAN", "LOCK"),
    *("CLOCK", "ROOM", "MOON", "PLAY", "DAY"),
)
"""Words of a home's controls; many differ in one sound."""

Vocabulary = Literal["digits", "commands"]
VOCABULARIES: dict[Vocabulary, tuple[str, ...]] = {"digits": DIGITS, "commands": COMMANDS}
"""Words that utterances are drawn from, by the name of the vocabulary."""

ACCENTS = ("en-us", "en")
"""Accents of all parts; the parts differ in the variants."""

# Variants that differ in a detail (Gene and Gene2, belinda and linda) are in the same part.
VARIANTS = {
    "train": (
        *("m1", "m3", "m4", "m6", "m8", "f1", "f3", "f4", "Alex", "Alicia", "Andrea", "Annie"),
        *("AnxiousAndy", "Denis", "Lee", "grandma", "travis"),
        *("Diogo", "Henrique", "Hugo", "Jacky", "Marco", "Mario", "Michael", "Mike", "Reed"),
        *("Nguyen", "adam", "anika", "antonio", "aunty", "benjamin", "boris", "david", "ed"),
        *("edward", "edward2", "grandpa", "gustave", "ian", "iven", "iven2", "iven3", "john"),
        *("klatt", "klatt2", "klatt3", "klatt4", "klatt5", "klatt6", "marcelo", "michel"),
        *("miguel", "mike2", "norbert", "pablo", "paul", "pedro", "rob", "robert", "steph"),
        *("steph2", "steph3", "victor", "zac"),
    ),
    "validation": ("m5", "f2", "Gene", "Gene2", "max", "Storm", "shelby"),
    "test": (*("m2", "m7", "f5", "Andy", "belinda", "linda", "quincy"),),
}

# Increased with every change of the synthesis, so that an old cache is not used.
_FORMAT = 6


class Take(NamedTuple):
    """All random settings of one utterance."""

    id: str
    words: tuple[str, ...]
    speech: Speech
    level_db: float
    """Root mean square of the speech, relative to full scale."""
    snr_db: float
    played_hz: int
    """Rate at which espeak-ng's samples are played: a higher one is a smaller speaker."""
    noise_slope: float
    """Exponent of the fall of the noise's power with frequency: 0 is white, 1 is pink."""
    pauses_s: tuple[float, float]
    """Pauses before and after the speech, in seconds."""
    noise_seed: int


@dataclass(frozen=True, kw_only=True)
class SpokenWords:
    """A corpus of connected words.

    Args:
        vocabulary: Name of the vocabulary, a key of `VOCABULARIES`.
        train_size: Number of training utterances.
        validation_size: Number of validation utterances.
        test_size: Number of test utterances.
        max_words: Largest number of words in an utterance, positive.
        level_db: Lowest and highest root mean square of the speech, in dB of full scale. A wide
            range makes training of a small model slow: the features depend on the level.
        snr_db: Lowest and highest signal-to-noise ratio, in dB.
        corpus_seed: Seed of all random settings.
    """

    vocabulary: Vocabulary = "digits"
    train_size: int = 6000
    validation_size: int = 200
    test_size: int = 400
    max_words: int = 7
    level_db: tuple[float, float] = (-28.0, -20.0)
    snr_db: tuple[float, float] = (10.0, 30.0)
    corpus_seed: int = 0

    def __post_init__(self) -> None:
        if self.vocabulary not in VOCABULARIES:
            raise ValueError(
                f"data.vocabulary is one of {sorted(VOCABULARIES)}, got {self.vocabulary!r}"
            )
        if min(self.train_size, self.validation_size, self.test_size, self.max_words) < 1:
            raise ValueError(f"sizes and max_words must be at least 1, got {self}")
        for name in ("level_db", "snr_db"):
            lowest, highest = getattr(self, name)
            if lowest > highest:
                raise ValueError(f"data.{name} is (lowest, highest), got {getattr(self, name)}")

    def load(
        self,
        *,
        cache_dir: Path,
        audio_format: AudioFormat,
        max_bad_fraction: float,
    ) -> Splits:
        """Load the three manifests, synthesized first if missing; see `Corpus.load`."""
        sample_rate_hz = audio_format.sample_rate_hz
        folder = cache_dir / self.vocabulary / self._hash(sample_rate_hz)
        if not folder.is_dir():
            with complete_folder(folder) as temporary:
                self.make(temporary, sample_rate_hz=sample_rate_hz)
        check_folder(folder, *(f"{part}.jsonl" for part in Splits._fields))
        return Splits(*(_read_manifest(folder, part) for part in Splits._fields))

    def make(self, folder: Path, *, sample_rate_hz: int) -> None:
        """Synthesize the corpus into ``folder``: FLAC files and one manifest per part.

        Each part has its own process of espeak-ng, so that it does not depend on the sizes of the
        others.

        Args:
            folder: Folder to write into.
            sample_rate_hz: Sample rate of the files, in Hz.
        """
        total = self.train_size + self.validation_size + self.test_size
        with tqdm(
            total=total, desc=f"synthesizing {self.vocabulary}", delay=2, mininterval=1
        ) as progress:
            for part in Splits._fields:
                takes = self.takes(part)
                with CutSet.open_writer(folder / f"{part}.jsonl", overwrite=True) as manifest:
                    for cut in self._record(takes, folder, part, sample_rate_hz):
                        manifest.write(cut)
                        progress.update()

    def takes(self, part: str) -> list[Take]:
        """Draw the settings of all utterances of a part.

        Args:
            part: Name of the part, ``"train"``, ``"validation"`` or ``"test"``.

        Example:
            >>> takes = SpokenWords(train_size=2, corpus_seed=1).takes("train")
            >>> takes == SpokenWords(train_size=5, corpus_seed=1).takes("train")[:2]
            True
        """
        index = Splits._fields.index(part)
        size = getattr(self, f"{part}_size")
        return [
            self._draw(f"{part}-{i:05d}", part, np.random.default_rng([self.corpus_seed, index, i]))
            for i in range(size)
        ]

    def _draw(self, name: str, part: str, random: np.random.Generator) -> Take:
        vocabulary = VOCABULARIES[self.vocabulary]
        size = random.integers(1, self.max_words + 1)
        words = tuple(random.choice(vocabulary, size=size).tolist())
        return Take(
            id=name,
            words=words,
            speech=Speech(
                text=_punctuate(words, random),
                voice=f"{random.choice(ACCENTS)}+{random.choice(VARIANTS[part])}",
                rate=int(random.integers(120, 211)),
                pitch=int(random.integers(25, 76)),
                pitch_range=int(random.integers(20, 81)),
            ),
            level_db=float(random.uniform(*self.level_db)),
            snr_db=float(random.uniform(*self.snr_db)),
            # Within a tenth of 22050 Hz; multiples of 500 Hz are fast to resample.
            played_hz=500 * int(random.integers(40, 50)),
            noise_slope=float(random.uniform(0, 1.5)),
            pauses_s=(float(random.uniform(0.05, 0.3)), float(random.uniform(0.1, 0.4))),
            noise_seed=int(random.integers(2**31)),
        )

    def _record(
        self, takes: list[Take], folder: Path, part: str, sample_rate_hz: int
    ) -> Iterator[MonoCut]:
        spoken = synthesize([take.speech for take in takes], seed=self.corpus_seed + 1)
        for take, samples in zip(takes, spoken, strict=True):
            speaker = take.speech.voice
            path = folder / part / speaker / f"{take.id}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            speech = resample(samples, take.played_hz, sample_rate_hz)
            audio = mix(take, speech, sample_rate_hz)
            # Through memory: soundfile waits for the disk at every file that it closes.
            flac = io.BytesIO()
            soundfile.write(flac, audio, sample_rate_hz, format="FLAC", subtype="PCM_16")
            path.write_bytes(flac.getvalue())
            utterance = Utterance(take.id, speaker, " ".join(take.words), path)
            cut = make_cut(utterance, AudioFormat(sample_rate_hz=sample_rate_hz))
            # Relative, so that the manifest does not depend on the folder of the cache.
            cut.recording.sources[0].source = str(path.relative_to(folder))
            yield cut

    def _hash(self, sample_rate_hz: int) -> str:
        settings = {**asdict(self), "sample_rate_hz": sample_rate_hz, "format": _FORMAT}
        settings["espeak"] = version("espeakng-loader")
        text = json.dumps(settings, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _read_manifest(folder: Path, part: str) -> CutSet:
    """Read a manifest that `SpokenWords.make` has written, ten times as fast as Lhotse does."""
    cuts = []
    with lasting_objects(), (folder / f"{part}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            recording, [supervision] = row["recording"], row["supervisions"]
            path = f"{folder}/{recording['sources'][0]['source']}"
            utterance = Utterance(row["id"], supervision["speaker"], supervision["text"], path)
            rate_hz, num_samples = recording["sampling_rate"], recording["num_samples"]
            cuts.append(file_cut(utterance, rate_hz=rate_hz, num_samples=num_samples))
    return CutSet.from_cuts(cuts)


def resample(samples: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Resample 16-bit samples to floats in [-1, 1], without the silence around them.

    Args:
        samples: Samples, int16, shape ``(samples,)``.
        from_hz: Sample rate of ``samples``, in Hz.
        to_hz: Sample rate of the result, in Hz.
    """
    audio = resampler(from_hz, to_hz)(torch.from_numpy(samples / np.float32(2**15))).numpy()
    (loud,) = np.nonzero(np.abs(audio) > 0.01 * np.abs(audio).max())
    return audio[loud[0] : loud[-1] + 1]


def mix(take: Take, speech: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Bring speech to its level, put pauses around it, and add noise.

    Args:
        take: Level, pauses and noise of the utterance.
        speech: Samples in [-1, 1] without silence around them, shape ``(samples,)``.
        sample_rate_hz: Sample rate of ``speech``, in Hz.

    Returns:
        Samples in [-1, 1].
    """
    level = 10 ** (take.level_db / 20)
    before, after = (round(pause * sample_rate_hz) for pause in take.pauses_s)
    scaled = speech * (level / np.sqrt(np.mean(np.square(speech))))
    audio = np.pad(scaled, (before, after))
    audio += colored_noise(len(audio), take.noise_slope, take.noise_seed) * (
        level * 10 ** (-take.snr_db / 20)
    )
    return audio / max(1.0, np.abs(audio).max())


def colored_noise(num_samples: int, slope: float, seed: int) -> np.ndarray:
    """Generate noise of unit power whose power falls with frequency to the power ``slope``.

    Args:
        num_samples: Number of samples, positive.
        slope: Exponent of the fall; 0 is white, 1 is pink.
        seed: Seed of the noise.

    Example:
        >>> noise = colored_noise(16000, slope=1.0, seed=0)
        >>> bool(abs((noise**2).mean() - 1) < 1e-6)
        True
    """
    # A power of two: a transform of prime length would take longer than the speech.
    size = 1 << (num_samples - 1).bit_length()
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(size))
    # Constant below about 50 Hz, where noise is only a slow drift.
    frequencies = np.maximum(np.arange(len(spectrum)), size / 320)
    noise = np.fft.irfft(spectrum * frequencies ** (-slope / 2), size)[:num_samples]
    return noise / np.sqrt(np.mean(np.square(noise)))


def _punctuate(words: tuple[str, ...], random: np.random.Generator) -> str:
    """Write the words as a sentence; espeak-ng pauses at a comma."""
    pauses = random.random(len(words)) < 0.15
    spelt = (f"{word.lower()}{',' if p else ''}" for word, p in zip(words, pauses, strict=True))
    return " ".join(spelt).rstrip(",")
