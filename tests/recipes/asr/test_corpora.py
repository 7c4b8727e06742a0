"""Manifests of corpora on disk, and the messages about wrong files."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from recipes.asr.audio import AudioFormat, CorpusError, read_audio
from recipes.asr.corpora import (
    AN4,
    BadFiles,
    Corpus,
    LibriSpeech,
    Splits,
    hold_out_speakers,
)
from tests.recipes.asr.small_corpus import truncate, write_an4, write_noise


def load(corpus: Corpus, *, max_bad_fraction: float = 0.0) -> Splits:
    with TemporaryDirectory() as cache:
        return corpus.load(
            cache_dir=Path(cache), audio_format=AudioFormat(), max_bad_fraction=max_bad_fraction
        )


def speakers(cuts: CutSet) -> set[str]:
    return {cut.supervisions[0].speaker for cut in cuts}


def rewrite(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new, 1))


def write_librispeech(root: Path, subset: str) -> None:
    chapter = root / subset / "12" / "345"
    for i in range(3):
        write_noise(chapter / f"12-345-{i:04d}.flac", seconds=0.4, seed=i)
    lines = [f"12-345-{i:04d} LINE NUMBER {'AB'[i % 2]}\n" for i in range(3)]
    (chapter / "12-345.trans.txt").write_text("".join(lines))


class TestAN4:
    def test_one_cut_per_utterance_with_its_transcript(self, tmp_path: Path) -> None:
        write_an4(tmp_path)
        splits = load(AN4(root=tmp_path))
        assert [len(cuts) for cuts in splits] == [9, 3, 3]
        [cut] = [cut for cut in splits.test if cut.id == "test-001"]
        [supervision] = cut.supervisions
        assert (supervision.text, supervision.speaker) == ("B CB", "test0")
        assert cut.duration == pytest.approx(0.37)
        assert cut.load_audio().shape == (1, 5920)

    def test_no_speaker_is_in_two_parts(self, tmp_path: Path) -> None:
        write_an4(tmp_path, speakers=6)
        train, validation, test = (
            speakers(cuts) for cuts in load(AN4(root=tmp_path, validation_fraction=0.3))
        )
        assert len(validation) == 2
        assert len(train | validation | test) == len(train) + len(validation) + len(test)

    def test_the_split_follows_from_its_seed(self, tmp_path: Path) -> None:
        write_an4(tmp_path, speakers=8, per_speaker=1)
        held_out = [speakers(load(AN4(root=tmp_path, split_seed=s)).validation) for s in range(6)]
        again = [speakers(load(AN4(root=tmp_path, split_seed=s)).validation) for s in range(6)]
        assert held_out == again
        assert len(set.union(*held_out)) > 1

    @pytest.mark.data
    def test_the_real_corpus(self, shared_data: Path) -> None:
        splits = load(AN4(root=shared_data / "an4"))
        train, validation, test = splits
        assert len(train) + len(validation) == 948
        assert len(test) == 130
        assert 0.05 <= len(validation) / 948 < 0.07
        assert sum(len(cut.supervisions[0].text.split()) for cut in test) == 773
        assert len(speakers(train) | speakers(validation) | speakers(test)) == 84
        assert not speakers(train) & speakers(validation)


class TestLibriSpeech:
    def test_subsets_become_parts(self, tmp_path: Path) -> None:
        for subset in ("train-clean-100", "train-clean-360", "dev-clean", "test-clean"):
            write_librispeech(tmp_path, subset)
        shutil.move(tmp_path / "train-clean-360" / "12", tmp_path / "train-clean-360" / "other")
        for path in (tmp_path / "train-clean-360").rglob("12-345*"):
            path.rename(path.with_name(path.name.replace("12-345", "99-345")))
        transcripts = tmp_path / "train-clean-360" / "other" / "345" / "99-345.trans.txt"
        transcripts.write_text(transcripts.read_text().replace("12-345", "99-345"))
        splits = load(LibriSpeech(root=tmp_path, train=["train-clean-100", "train-clean-360"]))
        assert [len(cuts) for cuts in splits] == [6, 3, 3]
        assert speakers(splits.train) == {"12", "99"}
        assert splits.test[0].supervisions[0].text == "LINE NUMBER A"

    def test_headers_are_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_librispeech(tmp_path, "a")
        corpus = LibriSpeech(root=tmp_path, train="a", validation="a", test="a")
        settings = {"audio_format": AudioFormat(), "max_bad_fraction": 0.0}
        expected = corpus.load(cache_dir=tmp_path / "cache", **settings)
        monkeypatch.delattr("recipes.asr.audio.read_header")
        again = corpus.load(cache_dir=tmp_path / "cache", **settings)
        assert list(again.train) == list(expected.train)

    def test_a_missing_subset_is_named_with_those_that_are_there(self, tmp_path: Path) -> None:
        write_librispeech(tmp_path, "dev-clean")
        with pytest.raises(CorpusError, match=r"no subset .*train-clean-100; .*\['dev-clean'\]"):
            load(LibriSpeech(root=tmp_path))

    def test_a_recording_without_transcript_is_named(self, tmp_path: Path) -> None:
        write_librispeech(tmp_path, "a")
        rewrite(next(tmp_path.rglob("*.trans.txt")), "12-345-0001 LINE NUMBER B\n", "")
        with pytest.raises(CorpusError, match=r"12-345-0001\.flac has an empty transcript"):
            load(LibriSpeech(root=tmp_path, train="a", validation="a", test="a"))

    @pytest.mark.data
    def test_the_real_layout(self, shared_data: Path) -> None:
        root = shared_data / "librispeech_tiny" / "LibriSpeech"
        part = "test-other"
        splits = load(LibriSpeech(root=root, train=part, validation=part, test=part))
        assert len(splits.test) == 30
        assert len(speakers(splits.test)) == 10
        texts = {cut.id: cut.supervisions[0].text for cut in splits.test}
        assert texts["3005-163389-0002"] == "THE STILLNESS WAS AWFUL CREEPY AND UNCOMFORTABLE"


def _missing(path: Path) -> None:
    path.unlink()


def _no_audio_format(path: Path) -> None:
    path.write_bytes(b"this is text")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _other_rate(path: Path) -> None:
    write_noise(path, seconds=0.5, seed=0, rate_hz=8000)


def _stereo(path: Path) -> None:
    samples, rate_hz = soundfile.read(path)
    soundfile.write(path, [[s, s] for s in samples], rate_hz)


def _no_samples(path: Path) -> None:
    soundfile.write(path, [], 16000, format="WAV")


DAMAGES = [
    (_missing, "is missing"),
    (_no_audio_format, "is unreadable or truncated"),
    (_empty, "is unreadable or truncated"),
    (_other_rate, r"has a sample rate of 8000 Hz, not 16000 Hz; set data\.resample=true, resampl"),
    (_stereo, r"has 2 channels, not one; set data\.mono=true"),
    (_no_samples, "has no audio"),
]


class TestWrongFiles:
    @pytest.mark.parametrize(("damage", "complaint"), DAMAGES)
    def test_the_error_names_file_and_reason(
        self, tmp_path: Path, damage: Callable[[Path], None], complaint: str
    ) -> None:
        path = write_an4(tmp_path)[4]
        damage(path)
        with pytest.raises(CorpusError, match=rf"{path} {complaint}"):
            load(AN4(root=tmp_path))

    @pytest.mark.parametrize(("damage", "complaint"), DAMAGES)
    def test_one_among_many_is_warned_of_and_left_out(
        self, tmp_path: Path, damage: Callable[[Path], None], complaint: str
    ) -> None:
        path = write_an4(tmp_path)[4]
        damage(path)
        with pytest.warns(UserWarning, match=rf"^1 of 12 files .*8\.3 %.*{path} {complaint}"):
            splits = load(AN4(root=tmp_path), max_bad_fraction=0.1)
        assert path.stem not in {cut.id for cuts in splits for cut in cuts}
        assert len(splits.train) + len(splits.validation) == 11

    @pytest.mark.parametrize("text", ["", " ", None])
    def test_an_empty_transcript(self, tmp_path: Path, text: str | None) -> None:
        path = write_an4(tmp_path)[0]
        column = "" if text is None else f"\t{text}"
        rewrite(tmp_path / "train.tsv", "train-000\ttrain0\tA DB", f"train-000\ttrain0{column}")
        with pytest.raises(CorpusError, match=f"{path} has an empty transcript"):
            load(AN4(root=tmp_path))

    def test_a_line_without_columns(self, tmp_path: Path) -> None:
        write_an4(tmp_path)
        rewrite(tmp_path / "test.tsv", "test-001\ttest0\t", "test-001 test0 ")
        with pytest.raises(CorpusError, match=r"test\.tsv, line 2: .*'test-001 test0 B CB'"):
            load(AN4(root=tmp_path))

    def test_missing_transcripts(self, tmp_path: Path) -> None:
        write_an4(tmp_path)
        (tmp_path / "train.tsv").unlink()
        with pytest.raises(CorpusError, match=r"train\.tsv cannot be read"):
            load(AN4(root=tmp_path))

    @pytest.mark.parametrize("corpus", [AN4, LibriSpeech])
    def test_a_missing_folder(self, tmp_path: Path, corpus: type[AN4 | LibriSpeech]) -> None:
        with pytest.raises(CorpusError, match=r"no folder .*absent .*; set data\.root"):
            load(corpus(root=tmp_path / "absent"))

    def test_a_truncated_file_is_named_when_it_is_decoded(self, tmp_path: Path) -> None:
        path = write_an4(tmp_path)[0]
        truncate(path)
        with pytest.raises(CorpusError, match=f"^{path} is unreadable or truncated"):
            read_audio(path)


class TestBadFiles:
    def test_no_bad_file_causes_no_warning(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            BadFiles(of="it", max_fraction=0.0).report(total=10)

    def test_the_first_names_and_the_count(self) -> None:
        bad = BadFiles(of="it", max_fraction=0.5)
        for i in range(5):
            bad.add(f"{i}.flac", "is bad")
        with pytest.warns(UserWarning, match=r"5 of 10 .*0\.flac is bad; 1.*; 2\.flac is bad; …"):
            bad.report(total=10)
        with pytest.raises(CorpusError, match=r"raise data\.max_bad_fraction \(now 0\.5\)"):
            bad.report(total=9)

    @pytest.mark.parametrize("fraction", [-0.1, 1.1])
    def test_a_fraction_is_between_0_and_1(self, fraction: float) -> None:
        with pytest.raises(ValueError, match="max_bad_fraction"):
            BadFiles(of="it", max_fraction=fraction)


class TestHoldOut:
    def test_all_speakers_cannot_be_held_out(self, tmp_path: Path) -> None:
        write_an4(tmp_path, speakers=1)
        with pytest.raises(CorpusError, match="takes all 1 speakers"):
            load(AN4(root=tmp_path))

    def test_the_order_of_utterances_stays(self, tmp_path: Path) -> None:
        write_an4(tmp_path)
        cuts = load(AN4(root=tmp_path)).train
        for part in hold_out_speakers(cuts, fraction=0.5, seed=3):
            assert [cut.id for cut in part] == sorted(cut.id for cut in part)

    @pytest.mark.parametrize("fraction", [0.0, 1.0])
    def test_the_fraction_is_validated(self, fraction: float) -> None:
        with pytest.raises(ValueError, match="validation_fraction"):
            AN4(root=".", validation_fraction=fraction)


class TestWrongTranscripts:
    def test_an_id_that_occurs_twice_is_named_with_both_lines(self, tmp_path: Path) -> None:
        write_an4(tmp_path)
        tsv = tmp_path / "train.tsv"
        tsv.write_text(tsv.read_text() + "train-002\ttrain0\tA\ntrain-002\ttrain0\tB\n")
        where = rf"{tsv}, line 13 has the utterance id 'train-002' again, first in {tsv}, line 3"
        with pytest.raises(CorpusError, match=rf"^2 of 14 files .*{where}"):
            load(AN4(root=tmp_path))
        with pytest.warns(UserWarning, match=rf"^2 of 14 files .*{where}") as caught:
            splits = load(AN4(root=tmp_path), max_bad_fraction=0.2)
        assert len(caught) == 1
        [text] = [
            cut.supervisions[0].text for cuts in splits[:2] for cut in cuts if cut.id == "train-002"
        ]
        assert text == "C BB"  # The first of them, as before.

    def test_a_transcript_that_occurs_twice_in_librispeech(self, tmp_path: Path) -> None:
        write_librispeech(tmp_path, "a")
        transcripts = next(tmp_path.rglob("*.trans.txt"))
        transcripts.write_text(transcripts.read_text() + "12-345-0000 ANOTHER\n")
        corpus = LibriSpeech(root=tmp_path, train="a", validation="a", test="a")
        with pytest.raises(CorpusError, match=r"trans\.txt, line 4 has the utterance id '12-345-0"):
            load(corpus)
        with pytest.raises(CorpusError, match=r"^5 of 8 files .*12-345-0000"):
            load(LibriSpeech(root=tmp_path, train=["a", "a"], validation="a", test="a"))

    @pytest.mark.parametrize("name", ["../../secret", "a/b", "..", "/etc/passwd", "a\\b"])
    @pytest.mark.parametrize("row", ["{}\ttrain0\tA\n", "train-000\t{}\tA\n"])
    def test_a_name_with_a_path_is_an_error(self, tmp_path: Path, name: str, row: str) -> None:
        write_an4(tmp_path)
        tsv = tmp_path / "train.tsv"
        tsv.write_text(tsv.read_text() + row.format(name))
        with pytest.raises(CorpusError, match=rf"{tsv}, line 13: the .* is not the name of a file"):
            load(AN4(root=tmp_path))

    def test_a_name_with_a_path_in_librispeech_is_an_error(self, tmp_path: Path) -> None:
        write_librispeech(tmp_path, "a")
        rewrite(next(tmp_path.rglob("*.trans.txt")), "12-345-0001", "../0001")
        with pytest.raises(
            CorpusError, match=r"line 2: the utterance id '\.\./0001' is not the na"
        ):
            load(LibriSpeech(root=tmp_path, train="a", validation="a", test="a"))

    def test_a_byte_order_mark_is_no_part_of_an_id(self, tmp_path: Path) -> None:
        write_an4(tmp_path)
        before = {cut.id for cut in load(AN4(root=tmp_path)).test}
        tsv = tmp_path / "test.tsv"
        tsv.write_text(tsv.read_text(), encoding="utf-8-sig")
        assert tsv.read_bytes().startswith(b"\xef\xbb\xbf")
        assert {cut.id for cut in load(AN4(root=tmp_path)).test} == before

    def test_other_line_separators_belong_to_the_text(self, tmp_path: Path) -> None:
        write_an4(tmp_path)
        rewrite(tmp_path / "test.tsv", "A DB", "A\u2028DB")
        assert len(load(AN4(root=tmp_path)).test) == 3

    def test_another_encoding_is_named(self, tmp_path: Path) -> None:
        write_an4(tmp_path)
        tsv = tmp_path / "test.tsv"
        tsv.write_text(tsv.read_text(), encoding="utf-16")
        with pytest.raises(CorpusError, match=r"test\.tsv cannot be read"):
            load(AN4(root=tmp_path))


class TestSamples:
    @pytest.mark.parametrize(
        ("value", "complaint"),
        [
            (np.nan, r"has 1 samples that are NaN or infinite, the first at 7"),
            (np.inf, r"has 1 samples that are NaN or infinite, the first at 7"),
            (1e20, r"reaches 1e\+20, and full scale is 1"),
            (32767.0, r"reaches 32767, and full scale is 1"),
        ],
    )
    def test_what_is_no_sound_is_named(self, tmp_path: Path, value: float, complaint: str) -> None:
        samples = np.zeros(100, np.float32)
        samples[7] = value
        soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
        with pytest.raises(CorpusError, match=rf"a\.wav {complaint}"):
            read_audio(tmp_path / "a.wav")
