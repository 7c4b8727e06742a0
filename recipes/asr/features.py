r"""Log-mel features: computed once, cached on disk, masked in training.

A frame is :math:`x_m = \ln \max(\sum_k M_{mk} |X_k|^2, \epsilon)` with :math:`X` the spectrum of
25 ms of audio and :math:`M` a bank of triangular mel filters. Frames are 10 ms apart and depend on
their own window alone, as on a device that streams.

`FeatureStore` has the frames of every utterance at every speed as one float16 memory map, so that
an epoch is read in almost no time. Normalization and `SpecAugment` happen on reading.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchaudio
from jaxtyping import Float
from lhotse import MonoCut
from torch import Tensor
from tqdm import tqdm

from recipes.asr.atomic import check_folder, complete_folder
from recipes.asr.audio import AudioFormat, Clip, CorpusError, clip_of, read_audio
from recipes.asr.corpora import BadFiles
from recipes.asr.manifest_cache import lasting_objects

# About the power of the rounding to 16-bit samples in a mel band: lower powers are no content of
# the recording, and digital silence gets a value near that of a quiet room.
POWER_FLOOR = 1e-8

# Increased with every change of features or their format, so that an old cache is not read.
_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class LogMel:
    """Logarithms of mel-band powers.

    Args:
        num_mels: Number of mel bands from 20 Hz to half the sample rate.
        sample_rate_hz: Sample rate of the audio, in Hz.
        window_ms: Length of the Hann window, in ms.
        hop_ms: Distance between frames, in ms.

    Example:
        >>> LogMel(num_mels=40)(torch.zeros(16000)).shape
        torch.Size([97, 40])
    """

    num_mels: int = 80
    sample_rate_hz: int = 16000
    window_ms: float = 25.0
    hop_ms: float = 10.0

    @property
    def window(self) -> int:
        """Window length in samples."""
        return round(self.window_ms * self.sample_rate_hz / 1000)

    @property
    def hop(self) -> int:
        """Distance between frames in samples."""
        return round(self.hop_ms * self.sample_rate_hz / 1000)

    @property
    def fft_size(self) -> int:
        """Samples per spectrum: the next power of two, the window in its middle."""
        return int(2 ** np.ceil(np.log2(self.window)))

    def __call__(self, samples: Float[Tensor, " samples"]) -> Float[Tensor, "frames mels"]:
        """Compute the features of one recording.

        Args:
            samples: Audio in [-1, 1], at least ``fft_size`` samples.

        Returns:
            Natural logarithms of ``1 + (samples - fft_size) // hop`` frames.

        Raises:
            ValueError: If there are fewer samples than one spectrum needs.
        """
        if samples.numel() < self.fft_size:
            raise ValueError(
                f"{samples.numel()} samples are less than one spectrum of {self.fft_size}"
            )
        return self._spectrogram(samples).clamp(min=POWER_FLOOR).log().T.contiguous()

    @cached_property
    def _spectrogram(self) -> torch.nn.Module:
        return torchaudio.transforms.MelSpectrogram(
            sample_rate=self.sample_rate_hz,
            n_fft=self.fft_size,
            win_length=self.window,
            hop_length=self.hop,
            f_min=20.0,
            n_mels=self.num_mels,
            center=False,
        )


@dataclass(frozen=True, eq=False)
class Normalization:
    """Shift and scale that give each mel band zero mean and unit variance.

    Args:
        mean: Mean of each band over all frames of the training part, float32.
        deviation: Standard deviation of each band over the same frames, float32, positive.
    """

    mean: Float[Tensor, " mels"]
    deviation: Float[Tensor, " mels"]

    def __call__(self, features: Float[Tensor, "frames mels"]) -> Float[Tensor, "frames mels"]:
        """Normalize features."""
        return (features - self.mean) / self.deviation

    def to_dict(self) -> dict[str, list[float]]:
        """Return a plain dictionary for checkpoints."""
        return {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}

    @classmethod
    def from_dict(cls, state: dict[str, Sequence[float]]) -> Normalization:
        """Build the normalization from the dictionary of `to_dict`."""
        return cls(torch.tensor(state["mean"]), torch.tensor(state["deviation"]))


@dataclass(frozen=True, kw_only=True)
class SpecAugment:
    """Mask random bands and spans of time by the mean, 0.

    Args:
        frequency_masks: Number of masked bands.
        frequency_width: Upper bound of a band's width, in mels.
        time_masks: Number of masked spans of time.
        time_width: Upper bound of a span's length, in frames.
        time_fraction: Upper bound of a span's length as a fraction of the utterance, in (0, 1).

    Example:
        >>> augment = SpecAugment(frequency_masks=1, frequency_width=8, time_masks=0)
        >>> masked = augment(torch.ones(5, 40), seed=1)
        >>> int((masked[0] == 0).sum()) <= 8
        True

    Reference:
        Park et al., "SpecAugment", Interspeech 2019. Time warping is left out.
    """

    frequency_masks: int = 2
    frequency_width: int = 15
    time_masks: int = 2
    time_width: int = 40
    time_fraction: float = 0.2

    def __call__(
        self, features: Float[Tensor, "frames mels"], *, seed: int
    ) -> Float[Tensor, "frames mels"]:
        """Mask features; the masks depend on ``seed`` and the shape alone."""
        spectrogram = features.T.unsqueeze(0)
        # torchaudio draws from torch's global generator, whose state training uses.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for _ in range(self.frequency_masks):
                spectrogram = self._mask_frequency(spectrogram)
            for _ in range(self.time_masks):
                spectrogram = self._mask_time(spectrogram)
        return spectrogram.squeeze(0).T

    @cached_property
    def _mask_frequency(self) -> torch.nn.Module:
        return torchaudio.transforms.FrequencyMasking(self.frequency_width)

    @cached_property
    def _mask_time(self) -> torch.nn.Module:
        return torchaudio.transforms.TimeMasking(self.time_width, p=self.time_fraction)


class Example(NamedTuple):
    """An utterance at one speed, with the position of its frames in the store."""

    utterance: str
    speed: float
    offset: int
    frames: int
    checksum: int
    """CRC-32 of the stored frames."""


class FeatureStore:
    """The features of many utterances at several speeds, read from disk.

    Args:
        folder: Folder that `FeatureStore.build` has written.

    Attributes:
        examples: All (utterance, speed) pairs, utterance by utterance.
        normalization: Mean and deviation over all frames of this store.
        reasons: Reason for every unusable file, by its name.

    Raises:
        CorpusError: If a file of the folder is missing, truncated or altered.
    """

    def __init__(self, folder: Path) -> None:
        check_folder(folder, "index.json")
        self._folder = folder
        index = json.loads((folder / "index.json").read_text())
        with lasting_objects():
            self.examples = [Example(*fields) for fields in index["examples"]]
        self.normalization = Normalization.from_dict(index["normalization"])
        self.reasons: dict[str, str] = index["reasons"]
        self._frames = np.memmap(folder / "frames.f16", dtype=np.float16, mode="r").reshape(
            -1, index["num_mels"]
        )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> Float[Tensor, "frames mels"]:
        """Read the features of example ``position`` in float32, not normalized.

        Raises:
            CorpusError: If they have changed since they were written.
        """
        example = self.examples[position]
        stored = self._frames[example.offset : example.offset + example.frames]
        if zlib.crc32(stored.data) != example.checksum:
            raise CorpusError(
                f"the features of {example.utterance} in {self._folder} have changed since they "
                f"were written: remove {self._folder}, then they are computed again"
            )
        return torch.from_numpy(stored.astype(np.float32))

    @classmethod
    def build(
        cls,
        cuts: Iterable[MonoCut],
        *,
        log_mel: LogMel,
        cache_dir: Path,
        speeds: Sequence[float] = (1.0,),
        tail_padding_ms: float = 0.0,
        max_bad_fraction: float = 0.0,
        name: str = "corpus",
        audio_format: AudioFormat | None = None,
    ) -> FeatureStore:
        """Open the store of these cuts and settings; compute it first if it does not exist.

        Args:
            cuts: Utterances, read once.
            log_mel: Settings of the features.
            cache_dir: Folder of all stores, which are named by a hash of cuts and settings.
            speeds: Factors of the speed of speech; 1.1 is ten percent faster and higher.
            tail_padding_ms: Length of digital silence to append, in ms; a delay for streaming
                models.
            max_bad_fraction: Largest fraction of undecodable files that causes a warning and no
                error, in [0, 1].
            name: Name of the cuts in the progress bar and in messages.
            audio_format: Format of the audio, of the sample rate of ``log_mel``; None converts
                nothing to it.

        Raises:
            CorpusError: If there are no cuts, or if too many files are undecodable, of another
                format, or shorter than one spectrum.
            OSError: If the disk has no room for the store.
        """
        check_speeds(speeds)
        cuts = list(cuts)
        clips = {cut.id: clip_of(cut) for cut in cuts}
        if not clips:
            raise CorpusError(f"{name} has no utterances")
        if len(clips) < len(cuts):
            raise CorpusError(f"{name} has {len(cuts)} utterances and {len(clips)} ids for them")
        audio_format = audio_format or AudioFormat(sample_rate_hz=log_mel.sample_rate_hz)
        padding = round(tail_padding_ms * log_mel.sample_rate_hz / 1000)
        settings = {
            "log_mel": asdict(log_mel),
            "speeds": list(speeds),
            "padding": padding,
            "format": _FORMAT,
        }
        # What is off by default is left out: a store of before has the same name.
        settings |= {key: True for key in ("resample", "mono") if getattr(audio_format, key)}
        folder = cache_dir / "features" / _hash(settings, clips)
        bad = BadFiles(of=name, max_fraction=max_bad_fraction)
        if not folder.is_dir():
            _check_room(cuts, log_mel, speeds, cache_dir)
            with complete_folder(folder) as temporary:
                writer = _Writer(temporary, log_mel, speeds, padding, audio_format)
                writer.write(
                    tqdm(clips.items(), desc=f"features of {name}", delay=2, mininterval=1), bad
                )
                bad.report(len(clips))
        store = cls(folder)
        # An existing store must warn like a new one.
        if not bad.reasons:
            bad.reasons = store.reasons
            bad.report(len(clips))
        return store


class _Writer:
    """Compute features utterance by utterance, and accumulate their moments."""

    def __init__(
        self,
        folder: Path,
        log_mel: LogMel,
        speeds: Sequence[float],
        padding: int,
        audio_format: AudioFormat,
    ) -> None:
        self.folder, self.log_mel, self.padding = folder, log_mel, padding
        self.audio_format = audio_format
        self.resamplers = {float(speed): _resampler(speed) for speed in speeds}
        self.examples: list[Example] = []
        self.num_frames = 0
        self.sums = np.zeros((2, log_mel.num_mels))

    def write(self, clips: Iterable[tuple[str, Clip]], bad: BadFiles) -> None:
        with (self.folder / "frames.f16").open("wb") as file:
            for utterance, clip in clips:
                try:
                    rows = self.features(clip)
                except CorpusError as error:
                    bad.add(clip.name, str(error).removeprefix(clip.name).strip())
                    continue
                for speed, row in zip(self.resamplers, rows, strict=True):
                    position = (self.num_frames, len(row), zlib.crc32(row.data))
                    self.append(Example(utterance, speed, *position), row)
                    file.write(row.tobytes())
        index = {
            "num_mels": self.log_mel.num_mels,
            "examples": self.examples,
            "normalization": self.normalization().to_dict(),
            "reasons": bad.reasons,
        }
        (self.folder / "index.json").write_text(json.dumps(index))

    def features(self, clip: Clip) -> list[np.ndarray]:
        samples = torch.from_numpy(read_audio(clip, self.audio_format))
        rows = []
        for resample in self.resamplers.values():
            audio = torch.nn.functional.pad(resample(samples), (0, self.padding))
            if audio.numel() < self.log_mel.fft_size:
                raise CorpusError(f"{clip.name} is too short ({samples.numel()} samples)")
            row = self.log_mel(audio).numpy().astype(np.float16)
            if not np.isfinite(row).all():
                raise CorpusError(f"{clip.name} has features that are NaN or infinite")
            rows.append(row)
        return rows

    def append(self, example: Example, row: np.ndarray) -> None:
        self.examples.append(example)
        self.num_frames += len(row)
        wide = row.astype(np.float64)
        self.sums += np.stack([wide.sum(axis=0), np.square(wide).sum(axis=0)])

    def normalization(self) -> Normalization:
        mean, square = self.sums / max(self.num_frames, 1)
        # A constant band has no information; the lower bound prevents a division by zero.
        deviation = np.sqrt(np.maximum(square - mean**2, 1e-4))
        return Normalization(torch.tensor(mean).float(), torch.tensor(deviation).float())


def check_speeds(speeds: Sequence[float]) -> None:
    """Validate factors of the speed of speech.

    Raises:
        ValueError: If there is none, if one occurs twice, or if one is not from 0.1 to 10.
    """
    if not speeds or len(set(speeds)) < len(speeds) or not all(0.1 <= s <= 10 for s in speeds):
        raise ValueError(
            f"data.speeds are different factors from 0.1 to 10, got {list(speeds)}; with [1.0] "
            "the speed is unchanged"
        )


def _resampler(speed: float) -> torch.nn.Module:
    # As a fraction: 1.15 x 16000 in floating point is not 18400, and a ratio without common factors
    # would need an enormous filter bank.
    ratio = Fraction(speed).limit_denominator(100)
    if ratio == 1:
        return torch.nn.Identity()
    return torchaudio.transforms.Resample(ratio.numerator, ratio.denominator)


def _hash(settings: dict[str, Any], clips: dict[str, Clip]) -> str:
    stamps: list[list[Any]] = []
    for utterance, clip in clips.items():
        path, *rest = clip
        part = [] if rest == [None, None, None] else [rest]
        try:
            status = os.stat(path)
            stamps.append([utterance, path, status.st_size, status.st_mtime_ns, *part])
        except OSError:  # A missing file is reported when it is decoded.
            stamps.append([utterance, path, *part])
    text = json.dumps([settings, stamps], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _check_room(
    cuts: Sequence[MonoCut], log_mel: LogMel, speeds: Sequence[float], cache_dir: Path
) -> None:
    seconds = sum(cut.duration for cut in cuts) * sum(1 / speed for speed in speeds)
    size_bytes = int(seconds * 1000 / log_mel.hop_ms) * log_mel.num_mels * 2
    cache_dir.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(cache_dir).free
    if size_bytes > free_bytes:
        raise OSError(
            f"the features need {size_bytes / 1e9:.1f} GB and {cache_dir} has "
            f"{free_bytes / 1e9:.1f} GB; set data.cache_dir elsewhere, or fewer data.speeds"
        )
