"""The data of a speech recognizer as a Lightning data module.

`SpeechDataModule` turns a corpus into batches: manifests, vocabulary, cached features at several
speeds, SpecAugment, buckets of similar duration. `spoken_words`, `an4` and `librispeech` build it
for one corpus each, `manifest` for a corpus of one's own; they are the targets of the files in
``recipes/conf/data``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
from lhotse import MonoCut, SupervisionSegment
from lhotse.utils import perturb_num_samples

from recipes.asr.audio import AudioFormat, clip_of
from recipes.asr.batches import Batch, BatchLoader, BatchPlan, Item, seed_of
from recipes.asr.corpora import AN4, BadFiles, Corpus, LibriSpeech
from recipes.asr.features import FeatureStore, LogMel, Normalization, SpecAugment, check_speeds
from recipes.asr.manifest_cache import lasting_objects
from recipes.asr.manifests import Manifest, Sources
from recipes.asr.pieces import AnyVocabulary, PieceVocabulary, vocabulary_from_dict
from recipes.asr.spoken_words import SpokenWords
from recipes.asr.spoken_words import Vocabulary as WordList
from recipes.asr.vocabulary import UnitKind, Vocabulary

__all__ = ["Batch", "SpeechDataModule", "an4", "librispeech", "manifest", "spoken_words"]


class SpeechDataModule(pl.LightningDataModule):
    """Batches of speech for training, validation and test.

    A batch follows from the settings, the epoch and its position in the epoch alone, so a resumed
    run gets the batches of the uninterrupted one. A checkpoint has the vocabulary and the
    normalization: they belong to the model, also on another corpus.

    Args:
        corpus: Corpus of the utterances.
        units: Units of the vocabulary: ``"character"``, ``"word"``, or ``"piece"`` for those that
            SentencePiece finds in the training transcripts.
        alphabet: Allowed characters; None for those of the training transcripts.
        num_pieces: Number of labels with ``units="piece"``, blank included.
        num_mels: Number of mel bands.
        sample_rate_hz: Sample rate of the features, in Hz.
        resample: True to resample recordings of other rates; False makes them an error.
        mono: True to average the channels of a recording; False makes several an error.
        speeds: Speed factors; an epoch has each training utterance once at each of them.
        tail_padding_ms: Length of digital silence after each utterance, in ms, for recordings that
            end too early for a streaming model. It also marks the end: a transducer may learn to
            wait for it, so use 0 for recordings that end in a pause.
        spec_augment: Masks of the training features, or None.
        batch_seconds: Upper bound of the audio in a batch, in seconds, padding included.
        scoring_batch_seconds: The same for validation and test, where large batches are fast; None
            for ``batch_seconds``.
        num_buckets: Number of groups by duration, positive.
        curriculum_epochs: Number of first epochs in which short utterances come before long ones.
        seed: Seed of the order and of the masks.
        cache_dir: Folder of features, and of corpora that are synthesized.
        max_bad_fraction: Largest fraction of unusable files that causes a warning and no error, in
            [0, 1].
        num_workers: Number of processes that assemble batches ahead.
        test_part: Part that testing scores, ``"test"``; or ``"validation"``, to choose settings.

    Attributes:
        vocabulary: Vocabulary of the labels; after ``setup``.
        normalization: Normalization of the training features; after ``setup``.
        num_mels: Number of features per frame.
    """

    vocabulary: AnyVocabulary
    normalization: Normalization

    def __init__(
        self,
        *,
        corpus: Corpus,
        units: UnitKind | Literal["piece"] = "character",
        alphabet: str | None = None,
        num_pieces: int | None = None,
        num_mels: int = 80,
        sample_rate_hz: int = 16000,
        resample: bool = False,
        mono: bool = False,
        speeds: Sequence[float] = (1.0,),
        tail_padding_ms: float = 0.0,
        spec_augment: SpecAugment | None = None,
        batch_seconds: float = 200.0,
        scoring_batch_seconds: float | None = None,
        num_buckets: int = 10,
        curriculum_epochs: int = 0,
        seed: int = 0,
        cache_dir: str | Path = ".cache/lightning-nna",
        max_bad_fraction: float = 0.01,
        num_workers: int = 0,
        test_part: str = "test",
    ) -> None:
        super().__init__()
        check_speeds(speeds)
        if test_part not in ("test", "validation"):
            raise ValueError(f"data.test_part is test or validation, got {test_part!r}")
        if alphabet is not None and units != "character":
            raise ValueError(f"data.alphabet goes with units=character, not with units={units}")
        if (num_pieces is not None) != (units == "piece"):
            raise ValueError(
                f"data.num_pieces and units=piece go together, got num_pieces={num_pieces} and "
                f"units={units}"
            )
        # Validate these settings now, not after hours of reading.
        if units != "piece":
            Vocabulary((), units)
        BadFiles(of="corpus", max_fraction=max_bad_fraction)
        self.corpus, self.units, self.alphabet = corpus, units, alphabet
        self.num_pieces = num_pieces
        self.num_mels = num_mels
        self.log_mel = LogMel(num_mels=num_mels, sample_rate_hz=sample_rate_hz)
        self.audio_format = AudioFormat(sample_rate_hz=sample_rate_hz, resample=resample, mono=mono)
        self.speeds = tuple(float(speed) for speed in speeds)
        self.tail_padding_ms = tail_padding_ms
        self.spec_augment = spec_augment
        self.batch_seconds, self.num_buckets, self.seed = batch_seconds, num_buckets, seed
        self.scoring_batch_seconds = scoring_batch_seconds or batch_seconds
        self.curriculum_epochs = curriculum_epochs
        self.cache_dir = Path(cache_dir)
        self.max_bad_fraction, self.num_workers = max_bad_fraction, num_workers
        self.test_part = test_part
        self._parts: dict[str, _Part] = {}

    def prepare_data(self) -> None:
        """Fill the cache, once per machine, before ``setup``."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Open manifests and features of all three parts, and build the vocabulary.

        Raises:
            CorpusError: If the corpus is missing, or too many of its files cannot be used.
        """
        if not self._parts:
            self._parts, self.vocabulary = self._load()
            self.normalization = self._parts["train"].store.normalization

    def train_dataloader(self) -> BatchLoader:
        """Return shuffled, masked batches, with every utterance at every speed."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> BatchLoader:
        """Return unchanged utterances of the validation part, always in the same batches."""
        return self._loader("validation", shuffle=False)

    def test_dataloader(self) -> BatchLoader:
        """Return unchanged utterances of the tested part, always in the same batches."""
        return self._loader(self.test_part, shuffle=False)

    def model_settings(self) -> dict[str, Any]:
        """Return the arguments of a recognizer that follow from the data; after ``setup``."""
        return {"vocabulary": self.vocabulary, "num_mels": self.num_mels}

    def state_dict(self) -> dict[str, Any]:
        """Return vocabulary and normalization, with the settings of their features."""
        return {
            "features": asdict(self.log_mel),
            "vocabulary": self.vocabulary.to_dict(),
            "normalization": self.normalization.to_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Use the vocabulary and the normalization that a model was trained with.

        Raises:
            ValueError: If these belong to other features than this module delivers, or were written
                by another version of the recipes.
        """
        if missing := sorted({"vocabulary", "normalization"} - state_dict.keys()):
            raise ValueError(
                f"the settings of the data that the model was trained with lack {missing}: another "
                "version of the recipes wrote them; train the model again, or use that version"
            )
        # Files of older versions have no settings of features.
        trained, settings = state_dict.get("features"), asdict(self.log_mel)
        if trained is not None and trained != settings:
            differing = ", ".join(
                f"{key}={value} (trained with {trained.get(key)})"
                for key, value in settings.items()
                if value != trained.get(key)
            )
            raise ValueError(f"the model was trained on other features than data has: {differing}")
        self.vocabulary = vocabulary_from_dict(state_dict["vocabulary"])
        self.normalization = Normalization.from_dict(state_dict["normalization"])

    def _load(self) -> tuple[dict[str, _Part], AnyVocabulary]:
        splits = self.corpus.load(
            cache_dir=self.cache_dir,
            audio_format=self.audio_format,
            max_bad_fraction=self.max_bad_fraction,
        )
        # A lazy set of Lhotse reads its manifest at every iteration.
        parts = {name: list(cuts) for name, cuts in splits._asdict().items()}
        vocabulary = self._make_vocabulary(parts["train"])
        return {
            name: self._make_part(name, cuts, vocabulary) for name, cuts in parts.items()
        }, vocabulary

    def _make_vocabulary(self, train: Sequence[MonoCut]) -> AnyVocabulary:
        texts = (_text(cut) for cut in train)
        if self.num_pieces is not None:
            return PieceVocabulary.from_texts(texts, size=self.num_pieces)
        units = cast(UnitKind, self.units)
        if self.alphabet is not None:
            return Vocabulary(tuple(sorted(set(self.alphabet))), units)
        return Vocabulary.from_texts(texts, units)

    def _make_part(self, name: str, cuts: Sequence[MonoCut], vocabulary: AnyVocabulary) -> _Part:
        name = f"{type(self.corpus).__name__} {name}"
        bad = BadFiles(of=name, max_fraction=self.max_bad_fraction)
        store = FeatureStore.build(
            _encodable(cuts, vocabulary, bad),
            log_mel=self.log_mel,
            cache_dir=self.cache_dir,
            speeds=self.speeds if name.endswith("train") else (1.0,),
            tail_padding_ms=self.tail_padding_ms,
            max_bad_fraction=self.max_bad_fraction,
            name=name,
            audio_format=self.audio_format,
        )
        return _Part(store, {cut.id: cut for cut in cuts})

    def _loader(self, name: str, *, shuffle: bool) -> BatchLoader:
        if name not in self._parts:
            raise RuntimeError("SpeechDataModule.setup() has to run before its data loaders")
        part = self._parts[name]
        plan = BatchPlan(
            part.examples(),
            batch_seconds=self.batch_seconds if shuffle else self.scoring_batch_seconds,
            num_buckets=self.num_buckets,
            shuffle=shuffle,
            curriculum_epochs=self.curriculum_epochs if shuffle else 0,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )
        augment = self.spec_augment if shuffle else None
        item = partial(self._item, part, augment)
        return BatchLoader(plan, item, num_workers=self.num_workers)

    def _item(self, part: _Part, augment: SpecAugment | None, position: int, epoch: int) -> Item:
        example = part.store.examples[position]
        features = self.normalization(part.store[position])
        if augment is not None:
            seed = seed_of(self.seed, epoch, example.utterance, example.speed)
            features = augment(features, seed=seed)
        text = part.texts[example.utterance]
        return Item(features, self.vocabulary.encode(text), example.utterance, text)


class _Part:
    """A part of a corpus: its features and its manifest."""

    def __init__(self, store: FeatureStore, cuts: dict[str, MonoCut]) -> None:
        self.store, self.cuts = store, cuts
        self.texts = {utterance: _text(cut) for utterance, cut in cuts.items()}

    def examples(self) -> list[MonoCut]:
        """Return one cut per example of the store, with its duration at its speed."""
        with lasting_objects():
            return [
                _at_speed(self.cuts[example.utterance], example.speed)
                for example in self.store.examples
            ]


def _at_speed(cut: MonoCut, speed: float) -> MonoCut:
    """Return a cut of the duration at a speed; Lhotse would copy the recording, too."""
    if speed == 1.0:
        return cut
    num_samples = round(cut.duration * cut.sampling_rate)
    duration = perturb_num_samples(num_samples, speed) / cut.sampling_rate
    name = f"{cut.id}_sp{speed}"
    supervision = SupervisionSegment(name, recording_id=cut.id, start=0.0, duration=duration)
    return MonoCut(name, start=0.0, duration=duration, channel=0, supervisions=[supervision])


def spoken_words(
    *,
    vocabulary: WordList = "digits",
    train_size: int = 6000,
    validation_size: int = 200,
    test_size: int = 400,
    max_words: int = 7,
    level_db: Sequence[float] = (-28.0, -20.0),
    snr_db: Sequence[float] = (10.0, 30.0),
    corpus_seed: int = 0,
    **settings: Any,
) -> SpeechDataModule:
    """Build the data of words that espeak-ng synthesizes.

    See `recipes.asr.spoken_words.SpokenWords` for the arguments, `SpeechDataModule` for
    ``settings``.
    """
    corpus = SpokenWords(
        vocabulary=vocabulary,
        train_size=train_size,
        validation_size=validation_size,
        test_size=test_size,
        max_words=max_words,
        level_db=_range(level_db),
        snr_db=_range(snr_db),
        corpus_seed=corpus_seed,
    )
    return SpeechDataModule(corpus=corpus, **settings)


def an4(
    *,
    root: str | Path,
    validation_fraction: float = 0.05,
    split_seed: int = 0,
    **settings: Any,
) -> SpeechDataModule:
    """Build the data of CMU AN4.

    See `recipes.asr.corpora.AN4` for the arguments, and `SpeechDataModule` for ``settings``.
    """
    corpus = AN4(root=root, validation_fraction=validation_fraction, split_seed=split_seed)
    return SpeechDataModule(corpus=corpus, **settings)


def librispeech(
    *,
    root: str | Path,
    train: str | Sequence[str] = "train-clean-100",
    validation: str | Sequence[str] = "dev-clean",
    test: str | Sequence[str] = "test-clean",
    **settings: Any,
) -> SpeechDataModule:
    """Build the data of LibriSpeech.

    See `recipes.asr.corpora.LibriSpeech` for the arguments, `SpeechDataModule` for ``settings``.
    """
    corpus = LibriSpeech(root=root, train=train, validation=validation, test=test)
    return SpeechDataModule(corpus=corpus, **settings)


def manifest(
    *,
    train: Sources,
    validation: Sources | None = None,
    test: Sources | None = None,
    validation_fraction: float | None = None,
    test_fraction: float | None = None,
    split_seed: int = 0,
    **settings: Any,
) -> SpeechDataModule:
    """Build the data of a corpus of one's own.

    See `recipes.asr.manifests.Manifest` for the arguments, `SpeechDataModule` for ``settings``.
    """
    corpus = Manifest(
        train=train,
        validation=validation,
        test=test,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        split_seed=split_seed,
    )
    return SpeechDataModule(corpus=corpus, **settings)


def _range(bounds: Sequence[float]) -> tuple[float, float]:
    lowest, highest = bounds
    return float(lowest), float(highest)


def _text(cut: MonoCut) -> str:
    return str(cut.supervisions[0].text)


def _encodable(cuts: Sequence[MonoCut], vocabulary: AnyVocabulary, bad: BadFiles) -> list[MonoCut]:
    """Select the cuts whose transcripts have units of the vocabulary only."""
    encodable = []
    for cut in cuts:
        if unknown := vocabulary.unknown(_text(cut)):
            bad.add(clip_of(cut).name, f"has {vocabulary.kind}s outside the vocabulary: {unknown}")
        else:
            encodable.append(cut)
    bad.report(len(cuts))
    return encodable
