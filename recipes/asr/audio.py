"""Places of audio, and the only functions that open it.

An utterance is a file, a part of a longer file, or a file inside an archive (`Clip`). Headers of
many files are read once, by several threads, and are known again as long as size and time of a file
are the same. Samples are decoded where features are computed; what a manifest says about its audio
is compared with the file there.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio
from lhotse import MonoCut
from tqdm import tqdm

# A recording in floating point may pass full scale by a little; beyond this it has another unit.
LOUDEST = 8.0

# Manifests round durations, and headers of MP3 count what encoders add. The longest such difference
# changes no batch: a hundredth of a typical utterance.
TOLERANCE_S = 0.1

# Headers wait for the disk or the network, not for the processor.
_THREADS = 16
_PATHS_AT_ONCE = 64


class CorpusError(ValueError):
    """A corpus, or a file of it, cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True, kw_only=True)
class AudioFormat:
    """The audio that a recognizer takes, and what is converted to it.

    Args:
        sample_rate_hz: Sample rate, in Hz.
        resample: True to resample recordings of another rate; False makes them an error.
        mono: True to average the channels of a recording; False makes several an error.

    Example:
        >>> AudioFormat(mono=True).check("a.wav", rate_hz=16000, channels=2)
        >>> AudioFormat().check("a.wav", rate_hz=16000, channels=2)
        Traceback (most recent call last):
        recipes.asr.audio.CorpusError: a.wav has 2 channels, not one; set data.mono=true to
        average them, or mix it down
    """

    sample_rate_hz: int = 16000
    resample: bool = False
    mono: bool = False

    def check(self, name: str, *, rate_hz: int, channels: int) -> None:
        """Validate the format of a recording.

        Args:
            name: Name of the recording, for the message.
            rate_hz: Its sample rate, in Hz.
            channels: Its number of channels.

        Raises:
            CorpusError: If it has another rate or several channels, and conversion is off.
        """
        if rate_hz != self.sample_rate_hz and not self.resample:
            raise CorpusError(
                f"{name} has a sample rate of {rate_hz} Hz, not {self.sample_rate_hz} Hz; "
                "set data.resample=true, resample it or set data.sample_rate_hz"
            )
        if channels != 1 and not self.mono:
            raise CorpusError(
                f"{name} has {channels} channels, not one; set data.mono=true to average them, or "
                "mix it down"
            )


class Clip(NamedTuple):
    """The place of an utterance's audio."""

    path: str
    """Path of an audio file, or of an archive without compression."""
    start_s: float | None = None
    """Start in the recording, in seconds; None if the utterance is the entire recording."""
    duration_s: float | None = None
    """Duration as a manifest has it, in seconds; None if it comes from the header."""
    packed: tuple[int, int] | None = None
    """First byte and number of bytes of the audio file in an archive; None for a plain file."""

    @property
    def name(self) -> str:
        """Name of this audio in messages."""
        packed = "" if self.packed is None else f" (at byte {self.packed[0]})"
        start = "" if self.start_s is None else f" (from {self.start_s:g} s)"
        return f"{self.path}{packed}{start}"

    def span(self, *, rate_hz: int, frames: int) -> tuple[int, int]:
        """Return the first sample and the number of samples in the recording.

        Args:
            rate_hz: Sample rate of the recording, in Hz.
            frames: Number of samples of the recording.

        Raises:
            CorpusError: If the recording differs from the manifest by more than `TOLERANCE_S`.

        Example:
            >>> Clip("a.wav", start_s=1.5, duration_s=2.0).span(rate_hz=8000, frames=80000)
            (12000, 16000)
        """
        seconds = frames / rate_hz
        if self.start_s is None:
            if self.duration_s is not None and abs(seconds - self.duration_s) > TOLERANCE_S:
                raise CorpusError(
                    f"{self.name} lasts {seconds:.2f} s and its manifest says "
                    f"{self.duration_s:.2f} s; correct the duration, or remove it"
                )
            return 0, frames
        first = round(self.start_s * rate_hz)
        last = frames if self.duration_s is None else first + round(self.duration_s * rate_hz)
        if first >= frames or last > frames + TOLERANCE_S * rate_hz:
            raise CorpusError(
                f"{self.name} lasts {seconds:.2f} s and its manifest asks for "
                f"{self.start_s:.2f} s to {last / rate_hz:.2f} s"
            )
        return first, min(last, frames) - first


class Header(NamedTuple):
    """The header of an audio file, with the stamp of the file that it was read from."""

    size_bytes: int
    modified_ns: int
    rate_hz: int
    channels: int
    frames: int


def clip_of(cut: MonoCut) -> Clip:
    """Return the place of a cut's audio."""
    clip = (cut.custom or {}).get("clip")
    return clip if isinstance(clip, Clip) else Clip(str(cut.recording.sources[0].source))


def read_header(path: str | Path) -> Header:
    """Read the header of an audio file.

    Raises:
        CorpusError: If the file is missing, unreadable, or has no samples.
    """
    if not os.path.isfile(path):
        raise CorpusError(f"{path} is missing")
    # Before the file is opened: what is written to it meanwhile gives it another stamp.
    status = os.stat(path)
    try:
        with soundfile.SoundFile(path) as file:
            header = Header(
                status.st_size, status.st_mtime_ns, file.samplerate, file.channels, file.frames
            )
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise CorpusError(f"{path} is unreadable or truncated ({error})") from error
    if header.frames == 0:
        raise CorpusError(f"{path} has no audio")
    return header


def read_headers(
    paths: Iterable[str], known: Mapping[str, Header], *, of: str
) -> dict[str, Header | CorpusError]:
    """Read the headers of many files, by several threads.

    Args:
        paths: Paths of audio files.
        known: Headers that were read before; those of unchanged files are used again.
        of: Name of the files in the progress bar.

    Returns:
        The header of each path, or the reason that it has none.
    """

    def read(some: list[str]) -> list[Header | CorpusError]:
        return [_known_header(path, known.get(path)) for path in some]

    different = list(dict.fromkeys(paths))
    starts = range(0, len(different), _PATHS_AT_ONCE)
    groups = [different[start : start + _PATHS_AT_ONCE] for start in starts]
    headers: dict[str, Header | CorpusError] = {}
    pool = ThreadPoolExecutor(min(_THREADS, max(len(groups), 1)))
    progress = tqdm(total=len(different), desc=f"reading headers of {of}", delay=2, mininterval=1)
    try:
        for group, results in zip(groups, pool.map(read, groups), strict=True):
            headers.update(zip(group, results, strict=True))
            progress.update(len(group))
    finally:
        progress.close()
        pool.shutdown(cancel_futures=True)
    return headers


def read_audio(audio: str | Path | Clip, audio_format: AudioFormat | None = None) -> np.ndarray:
    """Decode a recording to float32 samples in [-1, 1].

    Args:
        audio: Path of a file, or the place of the audio.
        audio_format: Format of the result; None for samples as the file has them.

    Returns:
        Samples, float32, shape ``(samples,)``; several channels without a format are a second axis.

    Raises:
        CorpusError: If the file is missing, unreadable or truncated, if it differs from its
            manifest or its format, or if samples are NaN, infinite or far above full scale. One of
            them would damage the normalization of the entire corpus. The message names the file.
    """
    clip = audio if isinstance(audio, Clip) else Clip(str(audio))
    name = clip.name
    if not os.path.isfile(clip.path):
        raise CorpusError(f"{name} is missing")
    try:
        with soundfile.SoundFile(_opened(clip)) as file:
            rate_hz = file.samplerate
            if audio_format is not None:
                audio_format.check(name, rate_hz=rate_hz, channels=file.channels)
            first, expected = clip.span(rate_hz=rate_hz, frames=file.frames)
            if first:
                file.seek(first)
            samples = file.read(expected, dtype="float32")
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise CorpusError(f"{name} is unreadable or truncated ({error})") from error
    if len(samples) != expected:
        raise CorpusError(
            f"{name} is unreadable or truncated (its header tells of {expected} samples, "
            f"{len(samples)} are there)"
        )
    _check_samples(samples, name)
    return samples if audio_format is None else _converted(samples, rate_hz, audio_format)


def _opened(clip: Clip) -> str | io.BytesIO:
    if clip.packed is None:
        return clip.path
    first, size = clip.packed
    with open(clip.path, "rb") as archive:
        archive.seek(first)
        return io.BytesIO(archive.read(size))


def _check_samples(samples: np.ndarray, name: str) -> None:
    if not np.isfinite(samples).all():
        (positions,) = np.nonzero(~np.isfinite(samples.reshape(len(samples), -1)).all(axis=1))
        raise CorpusError(
            f"{name} has {len(positions)} samples that are NaN or infinite, the first at "
            f"{positions[0]}"
        )
    if samples.size and (peak := float(np.abs(samples).max())) > LOUDEST:
        raise CorpusError(
            f"{name} reaches {peak:g}, and full scale is 1: divide its samples by their full scale"
        )


def _converted(samples: np.ndarray, rate_hz: int, audio_format: AudioFormat) -> np.ndarray:
    if samples.ndim > 1:
        samples = samples.mean(axis=1)
    if rate_hz == audio_format.sample_rate_hz:
        return samples
    convert = resampler(rate_hz, audio_format.sample_rate_hz)
    return convert(torch.from_numpy(samples)).numpy()


@cache
def resampler(from_hz: int, to_hz: int) -> torch.nn.Module:
    """Return the module that converts samples between two rates, in Hz; made once a process."""
    return torchaudio.transforms.Resample(from_hz, to_hz)


def _known_header(path: str, known: Header | None) -> Header | CorpusError:
    try:
        if known is not None:
            status = os.stat(path)
            if (status.st_size, status.st_mtime_ns) == (known.size_bytes, known.modified_ns):
                return known
        return read_header(path)
    except OSError:
        return CorpusError(f"{path} is missing")
    except CorpusError as error:
        return error
