"""espeak-ng as a process that reads jobs and writes samples.

espeak-ng has state from one utterance to the next: breath noise from a random generator, the phase
of the flutter, the pitch at the end. The same text is therefore never the same audio twice in one
process; a new process with a fixed seed and a fixed order always gives the same audio. So this file
is also a program: it reads jobs as JSON from its standard input and writes samples to its standard
output. It imports nothing of the recipes, so it starts fast.

`synthesize` runs it and yields the samples as they arrive.
"""

from __future__ import annotations

import ctypes
import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import espeakng_loader
import numpy as np

SAMPLE_RATE_HZ = 22050
"""Sample rate of espeak-ng's output, in Hz."""

# espeak-ng truncates the name of its data folder at 160 characters.
LONGEST_PATH = 120

# From espeak-ng's speak_lib.h.
# Returns after the last sample; the asynchronous mode waits 20 ms for every utterance.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_CHARS_UTF8 = 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_SYNTH_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Speech(NamedTuple):
    """An utterance to synthesize."""

    text: str
    voice: str
    """Language and voice variant, such as ``en-us+f2``."""
    rate: int = 175
    """Rate in words per minute, 80 to 450."""
    pitch: int = 50
    """Pitch, 0 to 100."""
    pitch_range: int = 50
    """Range of the pitch, 0 (monotonous) to 100."""


def synthesize(jobs: Sequence[Speech], *, seed: int) -> Iterator[np.ndarray]:
    """Synthesize jobs in their order, in a new process.

    Args:
        jobs: Utterances to synthesize.
        seed: Seed of espeak-ng's own noise, from 1 to 2**31 - 1.

    Yields:
        Samples of each job, int16, shape ``(samples,)``, at `SAMPLE_RATE_HZ`. The same jobs and
        seed give the same samples.

    Raises:
        RuntimeError: If espeak-ng fails, for instance because it lacks a voice; the message
            has espeak-ng's own error.

    Example:
        >>> [samples] = synthesize([Speech("one two", "en-us+m3")], seed=1)
        >>> samples.dtype, len(samples) > SAMPLE_RATE_HZ // 2
        (dtype('int16'), True)
    """
    request = json.dumps({"seed": seed, "jobs": jobs}).encode()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(request)
        process.stdin.close()
        for job in jobs:
            samples = _read_samples(process.stdout)
            if samples is None:
                process.wait()
                errors.seek(0)
                raise RuntimeError(
                    f"espeak-ng failed at {job}: {errors.read().decode(errors='replace')}"
                )
            yield samples


def _read_samples(stream: IO[bytes]) -> np.ndarray | None:
    header = stream.read(4)
    if len(header) < 4:
        return None
    (count,) = struct.unpack("<I", header)
    samples = stream.read(2 * count)
    return np.frombuffer(samples, dtype="<i2") if len(samples) == 2 * count else None


class _Synthesizer:
    """A caller of espeak-ng's library through ctypes, with one voice at a time."""

    def __init__(self, data_path: Path, *, seed: int) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._chunks: list[np.ndarray] = []
        # The library stores the pointer: the object must live as long as the library.
        self._callback = _SYNTH_CALLBACK(self._collect)
        sample_rate_hz = self._library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, str(data_path).encode(), 0
        )
        if sample_rate_hz != SAMPLE_RATE_HZ:
            raise RuntimeError(
                f"espeak-ng speaks at {sample_rate_hz} Hz, not {SAMPLE_RATE_HZ} Hz; its data is "
                f"read from {data_path}"
            )
        self._variants = {path.name for path in (data_path / "voices" / "!v").iterdir()}
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))

    def speak(self, job: Speech) -> np.ndarray:
        self._chunks.clear()
        # With an unknown variant the library would use the language without it.
        _, _, variant = job.voice.partition("+")
        has_variant = not variant or variant in self._variants
        if not has_variant or self._library.espeak_SetVoiceByName(job.voice.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {job.voice!r}")
        settings = {_RATE: job.rate, _VOLUME: 100, _PITCH: job.pitch, _RANGE: job.pitch_range}
        for parameter, value in settings.items():
            self._library.espeak_SetParameter(parameter, value, 0)
        text = job.text.encode()
        status = self._library.espeak_Synth(
            text, ctypes.c_size_t(len(text) + 1), 0, 1, 0, _CHARS_UTF8, None, None
        )
        if status != 0 or not self._chunks:
            raise RuntimeError(f"espeak-ng could not speak {job}")
        return np.concatenate(self._chunks)

    def _collect(self, samples: ctypes._Pointer[ctypes.c_short], count: int, _: int) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0


def _main() -> None:
    request = json.load(sys.stdin)
    data_path = Path(espeakng_loader.get_data_path())
    with tempfile.TemporaryDirectory() as folder:
        if len(str(data_path)) > LONGEST_PATH:
            short = Path(folder) / "espeak-ng-data"
            short.symlink_to(data_path)
            data_path = short
        synthesizer = _Synthesizer(data_path, seed=request["seed"])
        for fields in request["jobs"]:
            samples = synthesizer.speak(Speech(*fields))
            header = struct.pack("<I", len(samples))
            sys.stdout.buffer.write(header + samples.astype("<i2").tobytes())


if __name__ == "__main__":
    _main()
