"""Single spoken words as spectrograms of one length, synthesized by espeak-ng."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from recipes.asr.audio import AudioFormat
from recipes.asr.batches import seed_of
from recipes.asr.features import FeatureStore, LogMel
from recipes.asr.spoken_words import VOCABULARIES, SpokenWords
from recipes.asr.spoken_words import Vocabulary as WordList

#: Single words of the commands; the voices of the test are not in training.
COMMANDS = SpokenWords(
    vocabulary="commands",
    train_size=6000,
    validation_size=500,
    test_size=4000,
    max_words=1,
    snr_db=(5.0, 35.0),
)
#: Spectra of 30 ms every 20 ms, as on a microcontroller.
LOG_MEL = LogMel(num_mels=24, window_ms=30.0, hop_ms=20.0)


class Batch(NamedTuple):
    """Spoken words."""

    spectrograms: Float[Tensor, "batch 1 frames mels"]
    labels: Int64[Tensor, " batch"]
    """Positions of the words in the vocabulary."""
    indices: Int64[Tensor, " batch"]
    """Positions of the words in their part of the corpus."""


Word = tuple[Float[Tensor, "1 frames mels"], Int64[Tensor, ""], int]


class KeywordData(pl.LightningDataModule):
    """Batches of spectrograms and the positions of their words in the vocabulary.

    A word begins at a random frame in training, and in the middle otherwise. Order and frames
    follow from the seed and the epoch alone, so a resumed run gets the batches of the uninterrupted
    one. Several processes share the words among them.

    Args:
        corpus: Words to synthesize, one in an utterance.
        num_frames: Number of frames of a spectrogram; shorter ones are padded with the mean.
        batch_size: Number of words in a batch, of each process.
        seed: Seed of the order and of the positions in training.
        cache_dir: Folder of words and features.
        test_part: Part that testing scores, ``"test"``; or ``"validation"``, to choose settings.

    Raises:
        ValueError: If utterances of ``corpus`` may have several words, or ``test_part`` is unknown.
    """

    def __init__(
        self,
        *,
        corpus: SpokenWords = COMMANDS,
        num_frames: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        cache_dir: str | Path = ".cache/lightning-nna",
        test_part: str = "test",
    ) -> None:
        super().__init__()
        if corpus.max_words != 1:
            raise ValueError(f"a keyword is one word: max_words must be 1, got {corpus.max_words}")
        if test_part not in ("test", "validation"):
            raise ValueError(f"data.test_part is test or validation, got {test_part!r}")
        self.corpus, self.num_frames, self.test_part = corpus, num_frames, test_part
        self.batch_size, self.seed, self.cache_dir = batch_size, seed, Path(cache_dir)
        self.labels = VOCABULARIES[corpus.vocabulary]
        self._parts: dict[str, _Words] = {}

    def model_settings(self) -> dict[str, Any]:
        """Return the arguments of a spotter that follow from the data."""
        return {"labels": self.labels}

    @override
    def setup(self, stage: str | None = None) -> None:
        if not self._parts:
            for name, (words, labels) in _features(self.corpus, self.cache_dir).items():
                if name == "train":
                    part: _Words = _ShiftedWords(words, labels, self.num_frames, self.seed)
                else:
                    part = _Words(words, labels, self.num_frames)
                self._parts[name] = part

    @override
    def prepare_data(self) -> None:
        self.setup()

    @override
    def train_dataloader(self) -> DataLoader[Word]:
        return self._loader("train", shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Word]:
        return self._loader("validation", shuffle=False)

    @override
    def test_dataloader(self) -> DataLoader[Word]:
        return self._loader(self.test_part, shuffle=False)

    def _loader(self, name: str, *, shuffle: bool) -> DataLoader[Word]:
        words = self._parts[name]
        world_size = self.trainer.world_size if self.trainer else 1
        sampler = _Order(
            words,
            num_replicas=world_size,
            rank=self.trainer.global_rank if self.trainer else 0,
            shuffle=shuffle,
            seed=self.seed,
        )
        return DataLoader(
            words,
            batch_size=self.batch_size,
            sampler=sampler,
            # A last batch of few words has a noisy gradient; a corpus of few words is a batch.
            drop_last=shuffle and len(words) >= world_size * self.batch_size,
            collate_fn=_collated,
        )


class _Order(DistributedSampler[Word]):
    """The order of the words in an epoch; the words begin at the frames of that epoch."""

    @override
    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        assert isinstance(self.dataset, _Words)
        self.dataset.epoch = epoch


def _collated(words: Sequence[Word]) -> Batch:
    spectrograms, labels, indices = zip(*words, strict=True)
    return Batch(torch.stack(spectrograms), torch.stack(labels), torch.tensor(indices))


@cache
def _features(corpus: SpokenWords, cache_dir: Path) -> dict[str, tuple[list[Tensor], Tensor]]:
    """Load normalized frames and positions of the words of each part, once a process."""
    splits = corpus.load(
        cache_dir=cache_dir,
        audio_format=AudioFormat(sample_rate_hz=LOG_MEL.sample_rate_hz),
        max_bad_fraction=0.0,
    )._asdict()
    stores = {
        name: FeatureStore.build(
            cuts, log_mel=LOG_MEL, cache_dir=cache_dir, name=f"keywords {name}"
        )
        for name, cuts in splits.items()
    }
    normalize = stores["train"].normalization
    positions = {word: label for label, word in enumerate(VOCABULARIES[corpus.vocabulary])}
    parts = {}
    for name, store in stores.items():
        texts = {cut.id: cut.supervisions[0].text for cut in splits[name]}
        labels = [positions[texts[example.utterance]] for example in store.examples]
        words = [normalize(store[position]) for position in range(len(store))]
        parts[name] = words, torch.tensor(labels)
    return parts


class _Words(Dataset[Word]):
    """Words in the middle of their spectrograms.

    Attributes:
        epoch: Epoch that the words are read for.
    """

    def __init__(self, words: Sequence[Tensor], labels: Tensor, num_frames: int) -> None:
        self.words, self.labels, self.num_frames = words, labels, num_frames
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, position: int) -> Word:
        placed = _placed(self.words[position], self.num_frames, self._shift(position))
        return placed, self.labels[position], position

    def _shift(self, position: int) -> float:
        return 0.5


class _ShiftedWords(_Words):
    """Words that begin at another random frame in each epoch."""

    def __init__(self, words: Sequence[Tensor], labels: Tensor, num_frames: int, seed: int) -> None:
        super().__init__(words, labels, num_frames)
        self.seed = seed

    @override
    def _shift(self, position: int) -> float:
        return seed_of(self.seed, self.epoch, position) / 2**56


def _placed(
    word: Float[Tensor, "spoken mels"], num_frames: int, shift: float
) -> Float[Tensor, "1 frames mels"]:
    """Put a word between zeros; one that is too long loses its ends in the same proportion.

    Args:
        word: Normalized frames.
        num_frames: Number of frames of the result.
        shift: Fraction of the free frames that lie before the word, in [0, 1].
    """
    excess = len(word) - num_frames
    if excess > 0:
        start = int(shift * excess)
        return word[None, start : start + num_frames]
    placed = word.new_zeros(1, num_frames, word.shape[1])
    start = int(shift * -excess)
    placed[0, start : start + len(word)] = word
    return placed


def spoken_keywords(
    *,
    vocabulary: WordList = COMMANDS.vocabulary,
    train_size: int = COMMANDS.train_size,
    validation_size: int = COMMANDS.validation_size,
    test_size: int = COMMANDS.test_size,
    snr_db: Sequence[float] = COMMANDS.snr_db,
    corpus_seed: int = COMMANDS.corpus_seed,
    **settings: Any,
) -> KeywordData:
    """Build the data of single words that espeak-ng synthesizes.

    See `recipes.asr.spoken_words.SpokenWords` for the arguments, `KeywordData` for ``settings``.
    """
    low, high = snr_db
    corpus = SpokenWords(
        vocabulary=vocabulary,
        train_size=train_size,
        validation_size=validation_size,
        test_size=test_size,
        max_words=1,
        snr_db=(low, high),
        corpus_seed=corpus_seed,
    )
    return KeywordData(corpus=corpus, **settings)
