"""Single spoken words as spectrograms of one length, synthesized by espeak-ng."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import lightning.pytorch as pl
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from recipes.asr.audio import AudioFormat
from recipes.asr.features import FeatureStore, LogMel
from recipes.asr.spoken_words import VOCABULARIES, SpokenWords

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

Batch = tuple[Float[Tensor, "batch 1 frames mels"], Int64[Tensor, " batch"]]
Word = tuple[Float[Tensor, "1 frames mels"], Int64[Tensor, ""]]


class KeywordData(pl.LightningDataModule):
    """Batches of spectrograms and the positions of their words in the vocabulary.

    A word begins at a random frame in training, and in the middle otherwise.

    Args:
        corpus: Words to synthesize, one in an utterance.
        num_frames: Number of frames of a spectrogram; shorter ones are padded with the mean.
        batch_size: Number of words in a batch.
        seed: Seed of the order and of the positions in training.
        cache_dir: Folder of words and features.

    Raises:
        ValueError: If utterances of ``corpus`` may have several words.
    """

    def __init__(
        self,
        *,
        corpus: SpokenWords = COMMANDS,
        num_frames: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        cache_dir: str | Path = ".cache/lightning-nna",
    ) -> None:
        super().__init__()
        if corpus.max_words != 1:
            raise ValueError(f"a keyword is one word: max_words must be 1, got {corpus.max_words}")
        self.corpus, self.num_frames = corpus, num_frames
        self.batch_size, self.seed, self.cache_dir = batch_size, seed, Path(cache_dir)
        self.labels = VOCABULARIES[corpus.vocabulary]
        self._parts: dict[str, Dataset[Word]] = {}

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
    def train_dataloader(self) -> DataLoader[Word]:
        return self._loader("train", torch.Generator().manual_seed(self.seed))

    @override
    def val_dataloader(self) -> DataLoader[Word]:
        return self._loader("validation")

    @override
    def test_dataloader(self) -> DataLoader[Word]:
        return self._loader("test")

    def _loader(self, name: str, order: torch.Generator | None = None) -> DataLoader[Word]:
        shuffles = order is not None
        return DataLoader(
            self._parts[name],
            batch_size=self.batch_size,
            shuffle=shuffles,
            drop_last=shuffles,
            generator=order,
        )


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
    """Words in the middle of their spectrograms."""

    def __init__(self, words: Sequence[Tensor], labels: Tensor, num_frames: int) -> None:
        self.words, self.labels, self.num_frames = words, labels, num_frames

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, position: int) -> Word:
        placed = _placed(self.words[position], self.num_frames, self._shift())
        return placed, self.labels[position]

    def _shift(self) -> float:
        return 0.5


class _ShiftedWords(_Words):
    """Words that begin at another random frame each time."""

    def __init__(self, words: Sequence[Tensor], labels: Tensor, num_frames: int, seed: int) -> None:
        super().__init__(words, labels, num_frames)
        self.random = torch.Generator().manual_seed(seed)

    @override
    def _shift(self) -> float:
        return float(torch.rand((), generator=self.random))


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
