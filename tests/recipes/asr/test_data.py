"""The data module: from files to batches, the same again whenever it matters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from recipes.asr.audio import CorpusError
from recipes.asr.batches import Batch, BatchLoader
from recipes.asr.data import SpeechDataModule, an4, librispeech, spoken_words
from recipes.asr.features import SpecAugment
from recipes.asr.pieces import PieceVocabulary
from recipes.asr.vocabulary import Vocabulary
from tests.recipes.asr.small_corpus import truncate, write_an4

CONF = Path(__file__).resolve().parents[3] / "recipes" / "conf" / "data"
SETTINGS = {
    "num_mels": 20,
    "batch_seconds": 3.0,
    "num_buckets": 2,
    "speeds": (0.9, 1.1),
    "spec_augment": SpecAugment(frequency_width=6, time_width=10),
}

Make = Callable[..., SpeechDataModule]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_an4(tmp_path / "an4", speakers=8)
    return tmp_path / "an4"


@pytest.fixture
def make(corpus: Path, tmp_path: Path) -> Make:
    def made(**settings: Any) -> SpeechDataModule:
        everything = {**SETTINGS, "cache_dir": tmp_path / "cache", **settings}
        data = an4(root=corpus, **everything)
        data.prepare_data()
        data.setup()
        return data

    return made


def assert_equal(one: Batch, other: Batch) -> None:
    assert (one.ids, one.texts) == (other.ids, other.texts)
    assert torch.equal(one.features, other.features)
    assert torch.equal(one.targets, other.targets)


class TestBatches:
    def test_a_batch_is_what_a_model_needs(self, make: Make) -> None:
        data = make()
        for batch in data.train_dataloader():
            assert batch.features.dtype == torch.float32
            assert batch.features.shape[0] == len(batch.ids) == len(batch.texts)
            assert batch.features.shape[1:] == (batch.feature_lengths.max(), data.num_mels)
            texts = [
                data.vocabulary.decode(row[:length].tolist())
                for row, length in zip(batch.targets, batch.target_lengths, strict=True)
            ]
            assert texts == list(batch.texts)

    def test_every_utterance_at_every_speed(self, make: Make) -> None:
        data = make()
        train = [i for batch in data.train_dataloader() for i in batch.ids]
        validation = [i for batch in data.val_dataloader() for i in batch.ids]
        assert len(set(train)) * 2 == len(train) == 42
        assert len(set(validation)) == len(validation) == 3
        assert not set(train) & set(validation)

    def test_durations_at_a_speed_are_those_of_lhotse(self, make: Make) -> None:
        part = make()._parts["train"]
        examples = zip(part.examples(), part.store.examples, strict=True)
        for cut, example in examples:
            expected = part.cuts[example.utterance].perturb_speed(example.speed)
            assert cut.duration == expected.duration
            assert cut.supervisions[0].id == expected.supervisions[0].id

    def test_another_module_gives_the_same_epoch(self, make: Make) -> None:
        for epoch in (0, 3):
            loaders = [make().train_dataloader() for _ in range(2)]
            for loader in loaders:
                loader.set_epoch(epoch)
            for one, other in zip(*loaders, strict=True):
                assert_equal(one, other)

    def test_masks_change_from_epoch_to_epoch(self, make: Make) -> None:
        loader = make(speeds=(1.0,)).train_dataloader()
        rows: list[dict[str, torch.Tensor]] = []
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            rows.append({})
            for batch in loader:
                lengths = batch.feature_lengths.tolist()
                parts = zip(batch.ids, batch.features, lengths, strict=True)
                rows[-1].update({name: f[:length] for name, f, length in parts})
        assert rows[0].keys() == rows[1].keys()
        differing = [name for name in rows[0] if not torch.equal(rows[0][name], rows[1][name])]
        assert len(differing) > len(rows[0]) / 2

    def test_only_training_is_masked(self, make: Make) -> None:
        masked, plain = make(speeds=(1.0,)), make(speeds=(1.0,), spec_augment=None)
        for name in ("val_dataloader", "test_dataloader"):
            for one, other in zip(getattr(masked, name)(), getattr(plain, name)(), strict=True):
                assert_equal(one, other)
        # No feature is exactly the mean but a masked one.
        assert [(b.features == 0).any() for b in _unpadded(plain)] == [False] * 21
        assert any((b.features == 0).any() for b in _unpadded(masked))

    def test_words_as_units(self, make: Make) -> None:
        data = make(units="word")
        assert data.vocabulary == Vocabulary(("A", "B", "BB", "C", "CB", "D", "DB"), "word")
        assert all((batch.target_lengths == 2).all() for batch in data.test_dataloader())

    def test_pieces_as_units_are_those_of_the_training_transcripts(self, make: Make) -> None:
        data = make(units="piece", num_pieces=8, speeds=(1.0,))
        texts = [text for batch in _unpadded(data) for text in batch.texts]
        assert data.vocabulary == PieceVocabulary.from_texts(texts, size=8)
        restored = make()
        restored.load_state_dict(data.state_dict())
        assert restored.vocabulary == data.vocabulary

    def test_an_alphabet_fixes_the_vocabulary(self, make: Make) -> None:
        data = make(alphabet="DCBA Z")
        assert data.vocabulary == Vocabulary(tuple(" ABCDZ"))

    def test_tail_padding_lengthens_all(self, make: Make) -> None:
        plain, padded = make(), make(tail_padding_ms=200)
        [one], [other] = plain.test_dataloader(), padded.test_dataloader()
        assert (other.feature_lengths - one.feature_lengths).tolist() == [20] * 3


def _unpadded(data: SpeechDataModule) -> list[Batch]:
    data.batch_seconds = 0.1
    return list(data.train_dataloader())


class TestErrors:
    def test_a_character_outside_the_alphabet_names_the_file(self, make: Make) -> None:
        with pytest.raises(CorpusError, match=r"\.flac has characters outside .*: \['D'\]"):
            make(alphabet="ABC ")

    def test_a_few_of_them_are_left_out(self, make: Make, corpus: Path) -> None:
        lines = (corpus / "test.tsv").read_text()
        (corpus / "test.tsv").write_text(lines.replace("A DB", "A?B"))
        with pytest.warns(UserWarning, match=r"1 of 3 files of AN4 test .*test-000\.flac has"):
            data = make(max_bad_fraction=0.5)
        assert [i for batch in data.test_dataloader() for i in batch.ids].count("test-000") == 0

    def test_a_truncated_file_is_left_out(self, make: Make, corpus: Path) -> None:
        truncate(next(corpus.glob("test/*/test-001.flac")))
        with pytest.raises(CorpusError, match=r"test-001\.flac is unreadable or truncated"):
            make()
        with pytest.warns(UserWarning, match=r"1 of 3 files of AN4 test .*test-001\.flac is"):
            data = make(max_bad_fraction=0.5)
        assert {i for b in data.test_dataloader() for i in b.ids} == {"test-000", "test-002"}

    def test_loaders_need_setup(self, corpus: Path) -> None:
        with pytest.raises(RuntimeError, match=r"setup\(\) has to run before"):
            an4(root=corpus).train_dataloader()

    @pytest.mark.parametrize(
        ("setting", "complaint"),
        [
            ({"speeds": ()}, r"data\.speeds"),
            ({"units": "word", "alphabet": "AB"}, r"data\.alphabet"),
            ({"units": "piece"}, r"data\.num_pieces and units=piece go together"),
            ({"num_pieces": 9}, r"got num_pieces=9 and units=character"),
            ({"max_bad_fraction": 2.0}, r"data\.max_bad_fraction"),
            ({"units": "phoneme"}, r"'phoneme'; set data\.units"),
        ],
    )
    def test_settings_are_validated_at_once(self, setting: dict[str, Any], complaint: str) -> None:
        with pytest.raises(ValueError, match=complaint):
            an4(root=".", **setting)

    def test_an_unknown_setting_is_an_error(self) -> None:
        with pytest.raises(TypeError, match="batch_secs"):
            an4(root=".", batch_secs=3)


class TestState:
    def test_a_checkpoint_brings_vocabulary_and_normalization(self, make: Make) -> None:
        trained, other = make(), make(units="word", speeds=(0.7,))
        other.load_state_dict(trained.state_dict())
        [expected], [got] = trained.test_dataloader(), other.test_dataloader()
        assert_equal(got, expected)

    def test_a_model_of_other_features_is_an_error(self, make: Make) -> None:
        trained, other = make(), make(num_mels=21)
        with pytest.raises(ValueError, match=r"other features .*: num_mels=21 \(trained with 20\)"):
            other.load_state_dict(trained.state_dict())

    def test_a_state_without_features_is_loaded(self, make: Make) -> None:
        data = make()
        state = data.state_dict()
        del state["features"]
        data.load_state_dict(state)
        assert data.state_dict()["normalization"] == state["normalization"]


class Recorder(LightningModule):
    """Learns nothing to speak of, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(20, 1)
        self.batches: list[tuple[Any, ...]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        total = float(batch.features.double().sum())
        self.batches.append((self.current_epoch, batch_idx, batch.ids, total))
        return self.layer(batch.features).square().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Lightning warns if there is none."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class StopAt(Callback):
    """Saves a checkpoint after some steps, and stops."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


class TestInLightning:
    @pytest.mark.parametrize("stop_at", [3, 6, 12])
    def test_a_resumed_run_gets_the_remaining_batches(
        self, make: Make, tmp_path: Path, stop_at: int
    ) -> None:
        data = make()
        assert len(data.train_dataloader()) > 4

        def fit(callbacks: list[Callback], ckpt_path: Path | None = None) -> list[tuple[Any, ...]]:
            trainer = Trainer(
                max_epochs=3,
                callbacks=callbacks,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
            )
            model = Recorder()
            trainer.fit(model, make(), ckpt_path=ckpt_path)
            return model.batches

        uninterrupted = fit([])
        assert len(uninterrupted) == 3 * len(data.train_dataloader())
        assert len({ids for epoch, _, ids, _ in uninterrupted}) > len(uninterrupted) / 2
        before = fit([StopAt(stop_at, tmp_path / "stopped.ckpt")])
        after = fit([], tmp_path / "stopped.ckpt")
        assert len(before) == stop_at
        assert before + after == uninterrupted


SPEECH = sorted({path.stem for path in CONF.glob("*.yaml")} - {"keywords"})


@pytest.mark.parametrize("name", SPEECH)
def test_every_configuration_makes_a_module(name: str, tmp_path: Path) -> None:
    config = OmegaConf.load(CONF / f"{name}.yaml")
    where = {
        "an4": {"root": str(tmp_path)},
        "librispeech": {"root": str(tmp_path)},
        "manifest": {"train": "a.json", "validation": "b.tsv", "test_fraction": 0.1},
    }
    data = instantiate(config, **where.get(name, {}))
    assert isinstance(data, SpeechDataModule)
    assert isinstance(data.spec_augment, SpecAugment)
    assert data.cache_dir == Path(".cache/lightning-nna")


def test_spoken_digits(tmp_path: Path) -> None:
    data = spoken_words(
        train_size=12, validation_size=2, test_size=2, units="word", cache_dir=tmp_path, num_mels=40
    )
    data.setup()
    batches: list[BatchLoader] = [data.train_dataloader(), data.val_dataloader()]
    assert [sum(len(batch.ids) for batch in loader) for loader in batches] == [12, 2]


@pytest.mark.data
@pytest.mark.slow
def test_real_speech(shared_data: Path, tmp_path: Path) -> None:
    data = an4(root=shared_data / "an4", cache_dir=tmp_path, num_mels=40, speeds=(1.0,))
    data.setup()
    loader = data.train_dataloader()
    assert sum(len(batch.ids) for batch in loader) == 895
    assert sum(int(batch.target_lengths.sum()) for batch in data.test_dataloader()) == sum(
        len(text) for batch in data.test_dataloader() for text in batch.texts
    )
    assert len(data.vocabulary) == 28


@pytest.mark.data
def test_the_layout_of_librispeech(shared_data: Path, tmp_path: Path) -> None:
    part = "test-other"
    root = shared_data / "librispeech_tiny" / "LibriSpeech"
    data = librispeech(
        root=root,
        train=part,
        validation=part,
        test=part,
        alphabet="ABCDEFGHIJKLMNOPQRSTUVWXYZ' ",
        cache_dir=tmp_path,
        num_mels=40,
    )
    data.setup()
    assert len(data.vocabulary) == 29
    assert sum(len(batch.ids) for batch in data.train_dataloader()) == 30
