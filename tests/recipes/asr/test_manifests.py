"""A corpus of one's own: every form gives the same batches, and what is wrong is named."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import soundfile
import torch

from recipes.asr import audio, manifest_cache
from recipes.asr.audio import CorpusError, read_audio
from recipes.asr.corpora import Splits
from recipes.asr.data import manifest
from recipes.asr.manifests import Manifest
from tests.recipes.asr.manifest_files import (
    WRITERS,
    Rows,
    cuts_of,
    write_audio,
    write_cuts,
    write_json_lines,
    write_kaldi,
    write_shar,
    write_table,
)

RATE_HZ = 16000


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return write_audio(tmp_path / "audio")


def load(
    path: Path | str, tmp_path: Path, *, max_bad_fraction: float = 0.0, **settings: Any
) -> Splits:
    """Load one manifest as all parts, with the cache in the test's folder."""
    parts = {"train": path, "validation": path, "test": path, **settings}
    options = {key: parts.pop(key) for key in ("resample", "mono") if key in parts}
    return Manifest(**parts).load(
        cache_dir=tmp_path / "cache",
        audio_format=audio.AudioFormat(sample_rate_hz=RATE_HZ, **options),
        max_bad_fraction=max_bad_fraction,
    )


def batches(path: Path | str, tmp_path: Path, **settings: Any) -> list[Any]:
    """All training and test batches."""
    everything: dict[str, Any] = {
        "num_mels": 20,
        "batch_seconds": 3.0,
        "num_buckets": 2,
        "speeds": (0.9, 1.0),
        "cache_dir": tmp_path / "cache",
        **settings,
    }
    data = manifest(train=path, validation=path, test=path, **everything)
    data.setup()
    return [*data.train_dataloader(), *data.test_dataloader()]


def append(path: Path, line: str) -> None:
    path.write_text(path.read_text() + line + "\n")


class TestForms:
    def test_the_same_audio_gives_the_same_batches(self, rows: Rows, tmp_path: Path) -> None:
        by_form = {
            name: batches(write(rows, tmp_path), tmp_path) for name, write in WRITERS.items()
        }
        assert len(by_form["json"]) >= 10
        for name in by_form:
            for one, other in zip(by_form[name], by_form["json"], strict=True):
                assert (one.ids, one.texts) == (other.ids, other.texts), name
                assert torch.equal(one.features, other.features), name
                assert torch.equal(one.targets, other.targets), name

    @pytest.mark.parametrize("form", sorted(WRITERS))
    def test_speakers_and_texts(self, rows: Rows, tmp_path: Path, form: str) -> None:
        cuts = load(WRITERS[form](rows, tmp_path), tmp_path).train
        assert [
            (cut.id, cut.supervisions[0].speaker, cut.supervisions[0].text) for cut in cuts
        ] == [(row.id, row.speaker, row.text) for row in rows]
        assert [cut.duration for cut in cuts] == [cut.duration for cut in cuts_of(rows)]

    def test_paths_are_relative_to_the_manifest(self, rows: Rows, tmp_path: Path) -> None:
        (tmp_path / "a.tsv").write_text("path\ttext\naudio/u001.flac\tA\n")
        [cut] = load(tmp_path / "a.tsv", tmp_path).test
        assert cut.recording.sources[0].source == str(tmp_path / "audio" / "u001.flac")

    def test_names_come_from_the_paths_that_differ(self, tmp_path: Path) -> None:
        for folder in ("x/one", "x/two"):
            write_audio(tmp_path / folder, speakers=1, per_speaker=1)
        (tmp_path / "a.tsv").write_text("path\ttext\nx/one/u000.flac\tA\nx/two/u000.flac\tA\n")
        assert [cut.id for cut in load(tmp_path / "a.tsv", tmp_path).test] == [
            "one/u000",
            "two/u000",
        ]

    def test_several_manifests_make_one_part(self, rows: Rows, tmp_path: Path) -> None:
        one, other = write_table(rows[:2], tmp_path), write_json_lines(rows[2:5], tmp_path)
        splits = load(one, tmp_path, train=[str(one), str(other)])
        assert [len(cuts) for cuts in splits] == [5, 2, 2]

    def test_a_shard_in_an_object_store(self, rows: Rows, tmp_path: Path) -> None:
        shar = write_shar(rows, tmp_path)
        store = fsspec.filesystem("memory")
        store.put(f"{shar}/", "/bucket/part/", recursive=True)
        there = batches("memory://bucket/part", tmp_path)
        here = batches(shar, tmp_path)
        assert all(
            torch.equal(one.features, other.features)
            for one, other in zip(there, here, strict=True)
        )
        store.rm("/bucket", recursive=True)
        with pytest.raises(CorpusError, match=r"^memory://bucket/part cannot be listed"):
            load("memory://bucket/part", tmp_path)

    @pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed")
    def test_a_dataset_of_hugging_face(self, rows: Rows, tmp_path: Path) -> None:
        import datasets

        table = {
            "id": [row.id for row in rows],
            "audio": [str(row.path) for row in rows],
            "text": [row.text for row in rows],
            "speaker_id": [row.speaker for row in rows],
        }
        dataset = datasets.Dataset.from_dict(table).cast_column(
            "audio", datasets.Audio(decode=False)
        )
        dataset.save_to_disk(tmp_path / "table")
        expected = batches(write_table(rows, tmp_path), tmp_path)
        for one, other in zip(batches(tmp_path / "table", tmp_path), expected, strict=True):
            assert (one.ids, one.texts) == (other.ids, other.texts)
            assert torch.equal(one.features, other.features)

    @pytest.mark.skipif(find_spec("datasets") is not None, reason="datasets is installed")
    def test_the_package_for_hugging_face_is_named(self, tmp_path: Path) -> None:
        for name in ("state.json", "dataset_info.json"):
            (tmp_path / name).write_text("{}")
        with pytest.raises(ImportError, match=r"^datasets is not .* pip install .*\[huggingface\]"):
            load(tmp_path, tmp_path)

    def test_one_of_several_datasets_is_asked_for(self, tmp_path: Path) -> None:
        (tmp_path / "train").mkdir()
        (tmp_path / "dataset_dict.json").write_text("{}")
        with pytest.raises(
            CorpusError, match=r"choose one of \['train'\], as data\.train=.*/train"
        ):
            load(tmp_path, tmp_path)


class TestParts:
    def test_offsets_read_a_part_of_a_file(self, rows: Rows, tmp_path: Path) -> None:
        path, file = tmp_path / "a.json", str(rows[3].path)
        lines = [
            {"audio_filepath": file, "offset": 0.1, "duration": 0.25, "text": "A"},
            {"audio_filepath": file, "offset": 0.2, "text": "B"},
        ]
        path.write_text("\n".join(map(json.dumps, lines)))
        first, second = load(path, tmp_path).test
        assert (first.id, first.start, first.duration) == ("u003@0.1", 0.1, 0.25)
        assert second.duration == pytest.approx(0.3 + 0.21 - 0.2)
        samples = read_audio(file)
        assert np.array_equal(read_audio(audio.clip_of(first)), samples[1600:5600])
        assert np.array_equal(read_audio(audio.clip_of(second)), samples[3200:])

    def test_segments_of_kaldi(self, rows: Rows, tmp_path: Path) -> None:
        folder = write_kaldi(rows[:1], tmp_path)
        (folder / "segments").write_text("a u000 0.0 0.1\nb u000 0.05 -1\n")
        (folder / "text").write_text("a A\nb B\n")
        (folder / "utt2spk").write_text("a x\nb y\n")
        cuts = load(folder, tmp_path).test
        assert [(cut.id, round(cut.duration, 4)) for cut in cuts] == [("a", 0.1), ("b", 0.25)]

    def test_a_part_beyond_the_end_is_named(self, rows: Rows, tmp_path: Path) -> None:
        line = {"audio_filepath": str(rows[0].path), "offset": 0.1, "duration": 5, "text": "A"}
        (tmp_path / "a.json").write_text(json.dumps(line))
        with pytest.raises(CorpusError, match=r"u000\.flac .*lasts 0\.30 s .*0\.10 s to 5\.10 s"):
            batches(tmp_path / "a.json", tmp_path)

    def test_a_wrong_duration_is_named_when_audio_is_decoded(
        self, rows: Rows, tmp_path: Path
    ) -> None:
        path = write_json_lines(rows, tmp_path)
        path.write_text(path.read_text().replace('"duration": 0.37', '"duration": 2.5'))
        assert len(load(path, tmp_path).train) == 12  # No file was opened.
        with pytest.raises(CorpusError, match=r"lasts 0\.37 s and its manifest says 2\.50 s; corr"):
            batches(path, tmp_path)
        with pytest.warns(UserWarning, match="2 of 12 files of Manifest"):
            remaining = batches(path, tmp_path, max_bad_fraction=0.2)
        assert "u001" not in {name for batch in remaining for name in batch.ids}

    def test_speakers_are_held_out(self, rows: Rows, tmp_path: Path) -> None:
        settings = {"validation_fraction": 0.2, "test_fraction": 0.3}
        path = write_table(rows, tmp_path)
        splits = load(path, tmp_path, validation=None, test=None, **settings)
        speakers = [{cut.supervisions[0].speaker for cut in cuts} for cuts in splits]
        assert [len(one) for one in speakers] == [1, 1, 2]
        assert len(set.union(*speakers)) == 4
        again = load(path, tmp_path, validation=None, test=None, **settings)
        assert [[cut.id for cut in cuts] for cuts in again] == [
            [cut.id for cut in cuts] for cuts in splits
        ]

    def test_a_file_beside_held_out_speakers(self, rows: Rows, tmp_path: Path) -> None:
        path = write_table(rows, tmp_path)
        splits = load(path, tmp_path, validation=None, validation_fraction=0.2)
        assert [len(cuts) for cuts in splits] == [9, 3, 12]

    def test_holding_out_needs_speakers(self, rows: Rows, tmp_path: Path) -> None:
        path = write_json_lines(rows, tmp_path)
        path.write_text(path.read_text().replace('"speaker": "s1"', '"speaker": null'))
        with pytest.raises(
            CorpusError,
            match=r"validation_fraction .* 3 of 12 .*'u003' first.* or set data\.validation=PATH",
        ):
            load(path, tmp_path, validation=None, validation_fraction=0.2)

    def test_all_speakers_cannot_be_held_out(self, rows: Rows, tmp_path: Path) -> None:
        path = write_table(rows[:3], tmp_path)
        with pytest.raises(CorpusError, match=r"all 1 speakers; lower data\.test_fraction"):
            load(path, tmp_path, test=None, test_fraction=0.2)

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            ({"test": "a"}, r"nothing for validation: set data\.validation=PATH, or .*_fraction"),
            ({"validation": "a", "test_fraction": 0.0}, r"data\.test_fraction is .*, got 0\.0"),
            ({"validation_fraction": 0.5, "test_fraction": 0.5}, r"hold out 1 of data\.train"),
        ],
    )
    def test_settings_are_validated_at_once(self, settings: dict[str, Any], complaint: str) -> None:
        with pytest.raises(ValueError, match=complaint):
            manifest(train="a", **settings)


class TestConversion:
    @pytest.fixture
    def other(self, tmp_path: Path) -> Path:
        """A table of one stereo file of 8 kHz: a tone on the left, silence on the right."""
        tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
        soundfile.write(tmp_path / "a.wav", np.stack([tone, 0 * tone], axis=1), 8000)
        (tmp_path / "a.tsv").write_text("path\ttext\na.wav\tA\n")
        return tmp_path / "a.tsv"

    def test_it_has_to_be_asked_for(self, other: Path, tmp_path: Path) -> None:
        with pytest.raises(CorpusError, match=r"of 8000 Hz, not 16000 Hz; set data\.resample=true"):
            load(other, tmp_path)
        with pytest.raises(CorpusError, match=r"has 2 channels, not one; set data\.mono=true"):
            load(other, tmp_path, resample=True)

    def test_a_rate_that_only_the_file_tells_has_to_be_asked_for(
        self, other: Path, tmp_path: Path
    ) -> None:
        line = {"audio_filepath": "a.wav", "duration": 1.0, "text": "A"}
        (tmp_path / "a.json").write_text(json.dumps(line))
        with pytest.raises(CorpusError, match=r"a\.wav has a sample rate of 8000 Hz, not 16000 Hz"):
            batches(tmp_path / "a.json", tmp_path)
        [*_, batch] = batches(tmp_path / "a.json", tmp_path, resample=True, mono=True)
        assert batch.feature_lengths.tolist() == [97]

    def test_a_tone_stays_that_tone(self, other: Path, tmp_path: Path) -> None:
        [cut] = load(other, tmp_path, resample=True, mono=True).test
        assert cut.duration == 1.0
        wanted = audio.AudioFormat(sample_rate_hz=RATE_HZ, resample=True, mono=True)
        samples = read_audio(audio.clip_of(cut), wanted)
        expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(RATE_HZ) / RATE_HZ)
        assert samples.shape == expected.shape
        assert np.abs(samples - expected)[200:-200].max() < 0.005

    def test_features_are_of_the_converted_audio(self, other: Path, tmp_path: Path) -> None:
        [*_, batch] = batches(other, tmp_path, resample=True, mono=True)
        assert batch.features.shape == (1, 97, 20)


class TestWrongManifests:
    @pytest.mark.parametrize(
        "content", ["one two\n", '{"wav": "a"}\n', "[1]\n", "path,text\na,b\n", ""]
    )
    def test_an_unknown_form_lists_the_forms(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "a.txt").write_text(content)
        with pytest.raises(
            CorpusError, match=r"data\.train=.*a\.txt has none of .*audio_filepath.*Shar.*Kaldi"
        ):
            load(tmp_path / "a.txt", tmp_path)

    def test_an_unknown_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        with pytest.raises(CorpusError, match=r"data\.train=.*/a has none of the known forms"):
            load(tmp_path / "a", tmp_path)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(CorpusError, match=r"^data\.test=absent\.tsv is neither a file nor"):
            load(write_table(write_audio(tmp_path), tmp_path), tmp_path, test="absent.tsv")

    def test_no_utterances(self, tmp_path: Path) -> None:
        (tmp_path / "a.tsv").write_text("path\ttext\n")
        with pytest.raises(CorpusError, match=r"a\.tsv has no utterances"):
            load(tmp_path / "a.tsv", tmp_path)

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ("{", r"part\.json, line 13 is not JSON .*'\{'"),
            ("[]", r"line 13 is not a JSON object: '\[\]'"),
            ('{"text": "A"}', r"line 13: audio_filepath is the path of an audio file, got None"),
            ('{"audio_filepath": "a", "text": 3}', r"line 13: the text is a string, got 3"),
            ('{"audio_filepath": "a", "duration": -1}', r"the duration is a number .*, got -1"),
            ('{"audio_filepath": "a", "duration": 0}', r"line 13: the duration is 0"),
            ('{"audio_filepath": "a", "offset": "x"}', r"the offset is a number .*, got 'x'"),
            ('{"audio_filepath": "s3://a/b.wav"}', r"line 13: s3://a/b\.wav is a URL"),
        ],
    )
    def test_a_wrong_line_is_named(
        self, rows: Rows, tmp_path: Path, line: str, complaint: str
    ) -> None:
        path = write_json_lines(rows, tmp_path)
        append(path, line)
        with pytest.raises(CorpusError, match=complaint):
            load(path, tmp_path)

    def test_a_row_without_a_field(self, rows: Rows, tmp_path: Path) -> None:
        path = write_table(rows, tmp_path)
        append(path, "s0\taudio.flac")
        with pytest.raises(CorpusError, match=r"line 14 has 2 fields between tabs, .* has 3"):
            load(path, tmp_path)

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"supervisions": []}, r"'u001' has 0 supervisions, .*trim_to_supervisions"),
            ({"type": "MixedCut"}, r"'u001' is a MixedCut, .*save_audios"),
            ({"channel": 1}, r"'u001' has channel 1 of the channels \[0\]"),
            ({"recording": None}, r"'u001' has no recording"),
            ({"recording": {"transforms": [{"name": "Speed"}]}}, r"'u001' has transforms"),
            ({"recording": {"sources": []}}, r"'u001' has audio of type \[\], and one file is"),
            ({"recording": {"sources": [{"type": "file"}]}}, r"'u001' lacks 'channels'"),
        ],
    )
    def test_a_cut_that_is_not_read_is_named(
        self, rows: Rows, tmp_path: Path, change: dict[str, Any], complaint: str
    ) -> None:
        path = tmp_path / "cuts.jsonl"
        cuts_of(rows).to_file(path)
        lines = path.read_text().splitlines()
        lines[1] = json.dumps(json.loads(lines[1]) | change)
        path.write_text("\n".join(lines))
        with pytest.raises(CorpusError, match=rf"cuts\.jsonl, line 2: the cut {complaint}"):
            load(path, tmp_path)

    def test_a_piped_command_is_not_run(self, rows: Rows, tmp_path: Path) -> None:
        folder = write_kaldi(rows, tmp_path)
        append(folder / "wav.scp", f"x touch {tmp_path / 'run'} |")
        append(folder / "text", "x A")
        with pytest.raises(CorpusError, match=r"wav\.scp, line 13: 'touch .* is a piped command"):
            load(folder, tmp_path)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("segment", "complaint"),
        [
            ("a u000 0.2", r"segments, line 1: expected utterance, recording, start and end, got"),
            ("a u000 0.2 0.1", r"segments, line 1: the end is not after the start"),
            ("a u999 0.1 0.2", r"text, line 1: there is no audio of 'a'"),
            ("b u000 0.1 0.2", r"text, line 1: there is no audio of 'a'"),
        ],
    )
    def test_a_wrong_segment_is_named(
        self, rows: Rows, tmp_path: Path, segment: str, complaint: str
    ) -> None:
        folder = write_kaldi(rows, tmp_path)
        (folder / "segments").write_text(segment + "\n")
        (folder / "text").write_text("a A\n")
        with pytest.raises(CorpusError, match=complaint):
            load(folder, tmp_path)

    def test_shards_without_their_audio(self, rows: Rows, tmp_path: Path) -> None:
        shar = write_shar(rows, tmp_path)
        recordings = sorted(shar.glob("recording.*"))
        recordings[1].write_bytes(recordings[0].read_bytes())
        with pytest.raises(CorpusError, match=r"has the cut 'u005', and .*tar has 'u000' there"):
            load(shar, tmp_path)
        recordings[0].write_bytes(b"no archive")
        with pytest.raises(CorpusError, match=r"recording\.000000\.tar is no tar archive"):
            load(shar, tmp_path)
        recordings[0].unlink()
        with pytest.raises(CorpusError, match=r"has 3 shards cuts.* and 2 shards recording"):
            load(shar, tmp_path)

    @pytest.mark.parametrize("url", ["unknown://bucket/part", "s3://bucket/part"])
    def test_a_store_that_cannot_be_read_is_named(self, tmp_path: Path, url: str) -> None:
        with pytest.raises(CorpusError, match=rf"^{url} cannot be listed \(.*; install the packa"):
            load(url, tmp_path)

    def test_a_damaged_archive(self, rows: Rows, tmp_path: Path) -> None:
        path = write_cuts(rows, tmp_path)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(CorpusError, match=r"gz cannot be read \("):
            load(path, tmp_path)

    def test_missing_audio_is_one_of_the_unusable_files(self, rows: Rows, tmp_path: Path) -> None:
        path = write_table(rows, tmp_path)
        Path(rows[2].path).unlink()
        with pytest.raises(
            CorpusError, match=r"1 of 12 files of Manifest train .*u002\.flac is mi"
        ):
            load(path, tmp_path)
        with pytest.warns(UserWarning, match=r"1 of 12 files"):
            assert len(load(path, tmp_path, max_bad_fraction=0.1).train) == 11

    def test_a_line_that_occurs_twice(self, rows: Rows, tmp_path: Path) -> None:
        path = write_table(rows, tmp_path)
        append(path, f"s0\t{rows[0].path}\tB")
        with pytest.raises(
            CorpusError, match=r"line 14 has the utterance id 'u000' again, first in"
        ):
            load(path, tmp_path)


def _opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the audio files whose headers are read."""
    opened: list[str] = []
    read = audio.read_header

    def recorded(path: str) -> audio.Header:
        opened.append(Path(path).name)
        return read(path)

    monkeypatch.setattr(audio, "read_header", recorded)
    return opened


class TestCache:
    def test_headers_are_read_once(
        self, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_table(rows, tmp_path)
        opened = _opened(monkeypatch)
        expected = load(path, tmp_path)
        assert len(opened) == 12
        del opened[:]
        again = load(path, tmp_path)
        assert opened == []
        assert list(again.train) == list(expected.train)

    def test_a_changed_file_is_read_again(
        self, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_table(rows, tmp_path)
        load(path, tmp_path)
        soundfile.write(rows[4].path, np.zeros(8000), RATE_HZ)
        opened = _opened(monkeypatch)
        assert load(path, tmp_path).train[4].duration == 0.5
        assert opened == ["u004.flac"]

    def test_a_changed_manifest_is_read_again(
        self, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_table(rows[:-1], tmp_path)
        load(path, tmp_path)
        write_table(rows, tmp_path)
        opened = _opened(monkeypatch)
        assert len(load(path, tmp_path).train) == 12
        assert opened == ["u011.flac"]

    def test_a_repaired_file_is_noticed(self, rows: Rows, tmp_path: Path) -> None:
        path, lost = write_table(rows, tmp_path), Path(rows[2].path)
        content = lost.read_bytes()
        lost.unlink()
        with pytest.raises(CorpusError, match="is missing"):
            load(path, tmp_path)
        lost.write_bytes(content)
        assert len(load(path, tmp_path).train) == 12

    @pytest.mark.parametrize("folder", ["headers", "manifests"])
    def test_a_damaged_cache_is_named(self, rows: Rows, tmp_path: Path, folder: str) -> None:
        path = write_table(rows, tmp_path)
        load(path, tmp_path)
        [kept] = (tmp_path / "cache" / folder).iterdir()
        kept.write_bytes(kept.read_bytes().replace(b"u001", b"u00x"))
        with pytest.raises(CorpusError, match=rf"^{kept} has changed since .*: remove it"):
            load(path, tmp_path)

    def test_a_killed_write_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "kept.json"
        manifest_cache.write_checked(path, [1])
        child = os.fork()
        if child == 0:
            with manifest_cache.whole_file(path) as unfinished:
                unfinished.write_bytes(b"half")
                time.sleep(60)
            os._exit(0)
        while not list(tmp_path.glob(".kept.json.*")):
            time.sleep(0.01)
        os.kill(child, 9)
        os.waitpid(child, 0)
        assert manifest_cache.read_checked(path) == [1]

    def test_two_processes_fill_one_cache(self, rows: Rows, tmp_path: Path) -> None:
        path = write_table(rows, tmp_path)
        context = multiprocessing.get_context("fork")
        with context.Pool(2) as pool:
            ids = pool.starmap(_ids, [(path, tmp_path)] * 2, chunksize=1)
        assert ids[0] == ids[1] == [row.id for row in rows]
        folder = tmp_path / "cache"
        assert sorted(one.parent.name for one in folder.rglob("*.json")) == ["headers", "manifests"]
        assert [cut.id for cut in load(path, tmp_path).train] == ids[0]


def _ids(path: Path, tmp_path: Path) -> list[str]:
    return [cut.id for cut in load(path, tmp_path).train]


def test_nothing_is_said_of_a_good_corpus(rows: Rows, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load(write_table(rows, tmp_path), tmp_path).train) == 12
