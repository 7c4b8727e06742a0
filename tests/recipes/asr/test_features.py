"""Features against an independent computation, their store, and their masks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from lhotse import CutSet
from scipy.signal import get_window, stft

from recipes.asr.audio import AudioFormat, CorpusError
from recipes.asr.corpora import Utterance, make_cut
from recipes.asr.features import POWER_FLOOR, FeatureStore, LogMel, Normalization, SpecAugment
from tests.recipes.asr.small_corpus import truncate, write_noise


def cuts_of(folder: Path, count: int = 3) -> CutSet:
    cuts = []
    for i in range(count):
        path = folder / f"u{i}.flac"
        write_noise(path, seconds=0.5 + 0.1 * i, seed=i)
        cuts.append(make_cut(Utterance(f"u{i}", "s", "A", path), AudioFormat()))
    return CutSet.from_cuts(cuts)


Build = Callable[..., FeatureStore]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def build_store(cuts: CutSet, **settings: Any) -> FeatureStore:
        settings = {"log_mel": LogMel(num_mels=20), "cache_dir": tmp_path / "cache", **settings}
        return FeatureStore.build(cuts, **settings)

    return build_store


def mel_of(frequency: np.ndarray) -> np.ndarray:
    """O'Shaughnessy's formula, which HTK made the usual one."""
    return 1127 * np.log1p(frequency / 700)


class TestLogMel:
    @pytest.mark.parametrize("num_mels", [20, 40, 80])
    def test_it_equals_scipy_and_the_formula(self, num_mels: int) -> None:
        samples = 0.1 * np.random.default_rng(0).standard_normal(8000)
        # SciPy scales its spectrum by the sum of the window.
        window = np.pad(get_window("hann", 400), 56)
        frequency, _, spectrum = stft(
            samples, 16000, window, 512, 512 - 160, boundary=None, padded=False
        )
        power = np.abs(spectrum * window.sum()) ** 2
        corners = np.linspace(mel_of(np.float64(20)), mel_of(np.float64(8000)), num_mels + 2)
        corners_hz = 700 * np.expm1(corners / 1127)
        bank = [
            np.interp(frequency, corners_hz[i : i + 3], [0, 1, 0], left=0, right=0)
            for i in range(num_mels)
        ]
        expected = np.log(np.maximum(np.stack(bank) @ power, POWER_FLOOR)).T
        got = LogMel(num_mels=num_mels)(torch.from_numpy(samples).float())
        np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=2e-3)

    @pytest.mark.parametrize("num_mels", [20, 40, 64, 80])
    def test_no_band_is_empty(self, num_mels: int) -> None:
        noise = 0.1 * torch.randn(16000)
        assert (LogMel(num_mels=num_mels)(noise).mean(dim=0) > np.log(POWER_FLOOR) + 1).all()

    def test_a_frame_does_not_depend_on_what_follows(self) -> None:
        samples = 0.1 * torch.randn(16000)
        log_mel = LogMel(num_mels=40)
        complete, first = log_mel(samples), log_mel(samples[:8000])
        torch.testing.assert_close(complete[: len(first)], first)

    def test_silence_is_the_floor(self) -> None:
        silence = LogMel(num_mels=8)(torch.zeros(1000))
        torch.testing.assert_close(silence, torch.full((4, 8), np.log(POWER_FLOOR)).float())

    def test_too_short_audio_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="511 samples are less than one spectrum of 512"):
            LogMel()(torch.zeros(511))


class TestStore:
    def test_it_gives_the_features_to_half_precision(self, tmp_path: Path, build: Build) -> None:
        cuts = cuts_of(tmp_path)
        store = build(cuts)
        assert len(store) == 3
        for i, cut in enumerate(cuts):
            samples, _ = soundfile.read(cut.recording.sources[0].source, dtype="float32")
            expected = LogMel(num_mels=20)(torch.from_numpy(samples))
            assert store.examples[i][:2] == (cut.id, 1.0)
            # 11 significant bits of values below 32.
            torch.testing.assert_close(store[i], expected, rtol=2**-11, atol=0)

    def test_every_utterance_at_every_speed(self, tmp_path: Path, build: Build) -> None:
        speeds = (0.85, 1.0, 1.15)
        store = build(cuts_of(tmp_path, 2), speeds=speeds)
        assert [example[:2] for example in store.examples] == [
            (utterance, speed) for utterance in ("u0", "u1") for speed in speeds
        ]
        # 8000 samples at this speed, cut into windows of 512 every 160.
        assert [len(store[i]) for i in range(3)] == [
            1 + (round(8000 / speed) - 512) // 160 for speed in speeds
        ]

    def test_faster_is_higher(self, tmp_path: Path, build: Build) -> None:
        path = tmp_path / "tone.flac"
        soundfile.write(path, 0.1 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000), 16000)
        cut = make_cut(Utterance("tone", "s", "A", path), AudioFormat())
        store = build(CutSet.from_cuts([cut]), speeds=(0.5, 1.0, 2.0), log_mel=LogMel())
        corners = np.linspace(mel_of(np.float64(20)), mel_of(np.float64(8000)), 82)
        for i, frequency in enumerate((500.0, 1000.0, 2000.0)):
            # The band whose center, corner i + 1, is nearest to the tone.
            band = np.abs(corners[1:-1] - mel_of(np.float64(frequency))).argmin()
            assert abs(int(store[i].mean(dim=0).argmax()) - band) <= 1

    def test_normalized_frames_have_mean_0_and_variance_1(
        self, tmp_path: Path, build: Build
    ) -> None:
        store = build(cuts_of(tmp_path), speeds=(0.9, 1.1))
        frames = torch.cat([store.normalization(store[i]) for i in range(len(store))])
        torch.testing.assert_close(frames.mean(dim=0), torch.zeros(20), rtol=0, atol=1e-4)
        torch.testing.assert_close(
            frames.var(dim=0, correction=0), torch.ones(20), rtol=1e-3, atol=0
        )

    def test_padding_appends_silence(self, tmp_path: Path, build: Build) -> None:
        cuts = cuts_of(tmp_path, 1)
        plain, padded = build(cuts)[0], build(cuts, tail_padding_ms=100)[0]
        assert len(padded) == len(plain) + 10
        torch.testing.assert_close(padded[: len(plain)], plain)
        torch.testing.assert_close(
            padded[-5:], torch.full((5, 20), np.log(POWER_FLOOR)).float(), rtol=2**-11, atol=0
        )

    def test_it_is_computed_once(self, tmp_path: Path, build: Build) -> None:
        cuts = cuts_of(tmp_path)
        build(cuts)
        [frames] = (tmp_path / "cache").rglob("frames.f16")
        before = frames.stat()
        build(cuts)
        assert frames.stat() == before

    @pytest.mark.parametrize(
        "change",
        [{"speeds": (1.1,)}, {"tail_padding_ms": 10}, {"log_mel": LogMel(num_mels=21)}],
    )
    def test_other_settings_need_another_store(
        self, tmp_path: Path, build: Build, change: dict[str, Any]
    ) -> None:
        cuts = cuts_of(tmp_path)
        build(cuts)
        build(cuts, **change)
        assert len(list((tmp_path / "cache").rglob("frames.f16"))) == 2

    def test_other_audio_needs_another_store(self, tmp_path: Path, build: Build) -> None:
        cuts = cuts_of(tmp_path)
        before = build(cuts)[0]
        write_noise(tmp_path / "u0.flac", seconds=0.7, seed=9)
        assert len(build(cuts)[0]) > len(before)

    @pytest.mark.parametrize("damage", [truncate, Path.unlink])
    def test_a_bad_file_is_left_out_with_a_warning_every_time(
        self, tmp_path: Path, build: Build, damage: Callable[[Path], None]
    ) -> None:
        cuts = cuts_of(tmp_path)
        damage(tmp_path / "u1.flac")
        for _ in range(2):
            with pytest.warns(UserWarning, match=r"1 of 3 files of it .*u1\.flac is "):
                store = build(cuts, name="it", max_bad_fraction=0.5)
            assert [example.utterance for example in store.examples] == ["u0", "u2"]

    def test_too_many_bad_files_leave_nothing_behind(self, tmp_path: Path, build: Build) -> None:
        cuts = cuts_of(tmp_path)
        truncate(tmp_path / "u1.flac")
        with pytest.raises(CorpusError, match=r"u1\.flac is unreadable or truncated"):
            build(cuts, max_bad_fraction=0.1)
        assert list((tmp_path / "cache" / "features").iterdir()) == []

    def test_a_recording_shorter_than_a_window_is_bad(self, tmp_path: Path, build: Build) -> None:
        write_noise(tmp_path / "short.flac", seconds=0.02, seed=0)
        utterance = Utterance("short", "s", "A", tmp_path / "short.flac")
        cuts = CutSet.from_cuts([make_cut(utterance, AudioFormat())])
        with pytest.raises(CorpusError, match=r"short\.flac is too short \(320 samples\)"):
            build(cuts)

    @pytest.mark.parametrize("value", [np.nan, np.inf, 1e20])
    def test_a_sample_that_is_no_sound_spoils_nothing(
        self, tmp_path: Path, build: Build, value: float
    ) -> None:
        cuts = cuts_of(tmp_path)
        sound = build(CutSet.from_cuts([cuts[0], cuts[2]]))
        samples = np.zeros(8000, np.float32)
        samples[5] = value
        soundfile.write(tmp_path / "u1.flac", samples, 16000, format="WAV", subtype="FLOAT")
        with pytest.raises(CorpusError, match=r"u1\.flac (has 1 samples|reaches 1e\+20)"):
            build(cuts)
        assert len(list((tmp_path / "cache" / "features").iterdir())) == 1
        with pytest.warns(UserWarning, match=r"^1 of 3 files") as caught:
            store = build(cuts, max_bad_fraction=0.5)
        assert len(caught) == 1
        assert torch.equal(store.normalization.mean, sound.normalization.mean)
        assert torch.equal(store.normalization.deviation, sound.normalization.deviation)
        with pytest.warns(UserWarning, match=r"^1 of 3 files"):  # Also of the cache.
            build(cuts, max_bad_fraction=0.5)

    @pytest.mark.parametrize("name", ["frames.f16", "index.json", "contents.json"])
    @pytest.mark.parametrize("damage", [truncate, Path.unlink])
    def test_a_truncated_cache_is_an_error(
        self, tmp_path: Path, build: Build, name: str, damage: Callable[[Path], None]
    ) -> None:
        cuts = cuts_of(tmp_path)
        build(cuts)
        [path] = (tmp_path / "cache").rglob(name)
        damage(path)
        with pytest.raises(
            CorpusError, match=rf"{path} .*: remove {path.parent}, then it is created"
        ):
            build(cuts)

    def test_a_flipped_bit_is_noticed(self, tmp_path: Path, build: Build) -> None:
        cuts = cuts_of(tmp_path)
        build(cuts)
        [frames] = (tmp_path / "cache").rglob("frames.f16")
        [index] = (tmp_path / "cache").rglob("index.json")
        content = bytearray(frames.read_bytes())
        content[-3] ^= 1
        frames.write_bytes(content)
        store = build(cuts)
        assert store[0].isfinite().all()
        with pytest.raises(CorpusError, match=rf"features of u2 in {frames.parent} have changed"):
            store[2]
        index.write_text(index.read_text().replace('"u1"', '"u7"'))
        with pytest.raises(CorpusError, match=rf"{index} has changed since it was written"):
            build(cuts)

    def test_two_cuts_of_one_id_are_an_error(self, tmp_path: Path, build: Build) -> None:
        cuts = list(cuts_of(tmp_path))
        twice = CutSet([*cuts, cuts[0]])
        with pytest.raises(CorpusError, match="it has 4 utterances and 3 ids for them"):
            build(twice, name="it")

    def test_no_cuts_are_an_error(self, build: Build) -> None:
        with pytest.raises(CorpusError, match="it has no utterances"):
            build(CutSet.from_cuts([]), name="it")

    @pytest.mark.parametrize("speeds", [(0.0,), (-1.0,), (1.0, 20.0), (), (1.0, 1.0)])
    def test_impossible_speeds_are_an_error(
        self, tmp_path: Path, build: Build, speeds: tuple[float, ...]
    ) -> None:
        with pytest.raises(ValueError, match=r"data\.speeds .* got \["):
            build(cuts_of(tmp_path, 1), speeds=speeds)


class TestNormalization:
    def test_it_survives_a_plain_dictionary(self) -> None:
        normalization = Normalization(torch.randn(5), torch.rand(5) + 0.1)
        again = Normalization.from_dict(normalization.to_dict())
        assert torch.equal(again.mean, normalization.mean)
        assert torch.equal(again.deviation, normalization.deviation)


class TestSpecAugment:
    @given(seed=st.integers(0, 2**53), frames=st.integers(1, 60))
    def test_masks_follow_from_the_seed(self, seed: int, frames: int) -> None:
        augment = SpecAugment(frequency_width=6, time_width=10)
        features = torch.ones(frames, 20)
        assert torch.equal(augment(features, seed=seed), augment(features, seed=seed))

    def test_seeds_differ(self) -> None:
        masked = {
            tuple(SpecAugment()(torch.ones(99, 40), seed=s).flatten().tolist()) for s in range(9)
        }
        assert len(masked) == 9

    def test_the_training_generator_is_unchanged(self) -> None:
        before = torch.get_rng_state()
        SpecAugment()(torch.ones(50, 40), seed=5)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("seed", range(10))
    def test_masks_are_bands_within_their_width(self, seed: int) -> None:
        augment = SpecAugment(
            frequency_masks=1, frequency_width=7, time_masks=1, time_width=50, time_fraction=0.1
        )
        masked = augment(torch.ones(100, 40), seed=seed) == 0
        bands, stretches = masked.all(dim=0), masked.all(dim=1)
        assert int(bands.sum()) < 7
        assert int(stretches.sum()) < 10
        # Only entire bands and entire spans of time are masked.
        assert torch.equal(masked, bands[None, :] | stretches[:, None])

    def test_no_masks_change_nothing(self) -> None:
        features = torch.randn(10, 8)
        augment = SpecAugment(frequency_masks=0, time_masks=0)
        assert torch.equal(augment(features, seed=0), features)


def test_reading_warns_of_nothing(tmp_path: Path, build: Build) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(cuts_of(tmp_path))[0].add_(1)
