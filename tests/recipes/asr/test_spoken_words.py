"""The synthesized corpus: bytes that follow from the seed, separate voices, the set noise level."""

from __future__ import annotations

import shutil
from itertools import combinations
from pathlib import Path

import espeakng_loader
import numpy as np
import pytest

from recipes.asr.audio import AudioFormat, CorpusError, read_audio
from recipes.asr.corpora import Splits
from recipes.asr.espeak import Speech, synthesize
from recipes.asr.spoken_words import (
    ACCENTS,
    VARIANTS,
    VOCABULARIES,
    SpokenWords,
    Vocabulary,
    colored_noise,
    mix,
)

SMALL = SpokenWords(train_size=6, validation_size=2, test_size=3)


def load(corpus: SpokenWords, folder: Path) -> Splits:
    return corpus.load(cache_dir=folder, audio_format=AudioFormat(), max_bad_fraction=0.0)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    load(SMALL, folder)
    return folder


def test_the_same_seed_makes_the_same_bytes(made: Path, tmp_path: Path) -> None:
    load(SMALL, tmp_path)
    assert len(contents(made)) == 11 + 3 + 1  # recordings, manifests, checksums
    assert contents(tmp_path) == contents(made)


def test_another_seed_says_something_else() -> None:
    first, other = SMALL.takes("train"), SpokenWords(train_size=6, corpus_seed=1).takes("train")
    assert all(a.speech != b.speech for a, b in zip(first, other, strict=True))


def test_the_test_part_does_not_depend_on_the_size_of_training(made: Path, tmp_path: Path) -> None:
    load(SpokenWords(train_size=1, validation_size=1, test_size=3), tmp_path)
    [part], [expected] = made.glob("digits/*/test"), tmp_path.glob("digits/*/test")
    assert contents(part) == contents(expected)


def test_it_is_synthesized_once(made: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    load(SMALL, made)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == stamps


def test_manifests_have_the_spoken_words(made: Path) -> None:
    for part, cuts in load(SMALL, made)._asdict().items():
        for cut, take in zip(cuts, SMALL.takes(part), strict=True):
            [supervision] = cut.supervisions
            assert cut.id == take.id
            assert supervision.text == " ".join(take.words)
            assert supervision.speaker == take.speech.voice
            audio = read_audio(cut.recording.sources[0].source)
            assert len(audio) == round(cut.duration * 16000)
            # Even a fast voice needs a tenth of a second for a word.
            assert cut.duration > sum(take.pauses_s) + 0.1 * len(take.words)


def test_a_cache_can_be_moved(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    [source] = load(SMALL, tmp_path).train[0].recording.sources
    assert Path(source.source).is_relative_to(tmp_path)
    assert read_audio(source.source).any()


def test_a_truncated_cache_is_an_error(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    [manifest] = tmp_path.rglob("train.jsonl")
    complete = manifest.read_text()
    lines = complete.splitlines(keepends=True)
    for damaged in ("".join(lines[:-1]), complete.replace("ONE", "TWO"), complete[:-9]):
        manifest.write_text(damaged)
        with pytest.raises(
            CorpusError, match=r"train\.jsonl .*: remove .*then it is created again"
        ):
            load(SMALL, tmp_path)
    manifest.write_text(complete)
    [recording, *_] = tmp_path.rglob("*.flac")
    recording.unlink()
    with pytest.raises(CorpusError, match=rf"{recording.name} is missing: remove"):
        load(SMALL, tmp_path)


def test_no_voice_is_in_two_parts() -> None:
    for one, other in combinations(VARIANTS, 2):
        assert not set(VARIANTS[one]) & set(VARIANTS[other])
    assert tuple(VARIANTS) == Splits._fields


def test_no_voice_is_another_under_a_second_name() -> None:
    folder = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    shapes: dict[str, set[str]] = {}
    for part, variants in VARIANTS.items():
        for variant in variants:
            lines = (folder / variant).read_text(errors="replace").splitlines()
            shape = " ".join(line for line in lines if not line.startswith(("name", "language")))
            shapes.setdefault(" ".join(shape.split()), set()).add(part)
    assert max(len(parts) for parts in shapes.values()) == 1


def test_espeak_has_every_voice_and_they_differ() -> None:
    variants = [variant for part in VARIANTS.values() for variant in part]
    jobs = [Speech("five", f"{ACCENTS[0]}+{variant}") for variant in variants]
    jobs += [Speech("five", f"{accent}+m3") for accent in ACCENTS]
    spoken = list(synthesize(jobs, seed=1))
    assert min(np.abs(samples.astype(int)).max() for samples in spoken) > 1000


def test_an_unknown_voice_is_named() -> None:
    jobs = [Speech("one", "en-us+m3"), Speech("one", "en-us+nobody-of-this-name")]
    with pytest.raises(RuntimeError, match="nobody-of-this-name"):
        list(synthesize(jobs, seed=1))


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_strings_have_the_set_length(vocabulary: Vocabulary) -> None:
    takes = SpokenWords(vocabulary=vocabulary, train_size=300, max_words=3).takes("train")
    assert {len(take.words) for take in takes} == {1, 2, 3}
    assert {word for take in takes for word in take.words} == set(VOCABULARIES[vocabulary])


def test_no_word_is_in_a_vocabulary_twice() -> None:
    assert all(len(set(words)) == len(words) for words in VOCABULARIES.values())


@pytest.mark.parametrize("index", range(6))
def test_level_and_noise_are_as_drawn(index: int) -> None:
    take = SMALL.takes("train")[index]
    # Half a second of a tone as the speech.
    speech = np.sin(np.arange(8000) / 3)
    audio = mix(take, speech, 16000)
    before = round(take.pauses_s[0] * 16000)
    noise = colored_noise(len(audio), take.noise_slope, take.noise_seed)
    noise *= 10 ** ((take.level_db - take.snr_db) / 20)
    alone = audio - noise
    assert np.abs(alone[:before]).max() < 1e-12
    level_db = 10 * np.log10(np.mean(alone[before : before + 8000] ** 2))
    assert level_db == pytest.approx(take.level_db)
    assert SMALL.level_db[0] <= take.level_db <= SMALL.level_db[1]
    assert SMALL.snr_db[0] <= take.snr_db <= SMALL.snr_db[1]


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, 1.5])
def test_the_noise_has_the_set_slope(slope: float) -> None:
    noise = colored_noise(1 << 17, slope, seed=3)
    power = np.abs(np.fft.rfft(noise)) ** 2
    octaves = [power[1 << k : 2 << k].mean() for k in range(10, 16)]
    fitted = -np.polyfit(np.arange(6), np.log2(octaves), 1)[0]
    assert fitted == pytest.approx(slope, abs=0.05)
    assert np.mean(noise**2) == pytest.approx(1)


@pytest.mark.parametrize(
    "setting",
    [
        {"train_size": 0},
        {"vocabulary": "colors"},
        {"max_words": 0},
        {"snr_db": (9.0, 5.0)},
        {"level_db": (0.0, -9.0)},
    ],
)
def test_impossible_settings_are_an_error(setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="got"):
        SpokenWords(**setting)  # type: ignore[arg-type]


def test_a_stop_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Training voices that espeak-ng does not have end the making.
    monkeypatch.setitem(VARIANTS, "train", ("nobody-of-this-name",))
    with pytest.raises(RuntimeError, match="nobody-of-this-name"):
        load(SMALL, tmp_path)
    assert contents(tmp_path) == {}
