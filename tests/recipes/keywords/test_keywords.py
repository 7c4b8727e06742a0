"""The keyword spotter: its data, its network, its training, and its emulation."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nna import coverage
from lightning_nna.callbacks import NNAEmulation
from recipes.asr.spoken_words import SpokenWords
from recipes.keywords.data import KeywordData
from recipes.keywords.network import KeywordNetwork, convolution, folded_weights
from recipes.keywords.spotter import KeywordSpotter

SMALL = SpokenWords(vocabulary="digits", train_size=8, validation_size=2, test_size=3, max_words=1)


STEPS = 120


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keywords")


def small_data(cache: Path, *, seed: int = 0, num_frames: int = 64) -> KeywordData:
    data = KeywordData(
        corpus=SMALL, batch_size=4, seed=seed, num_frames=num_frames, cache_dir=cache
    )
    data.setup()
    return data


def test_labels_are_positions_of_the_spoken_words(cache: Path) -> None:
    data = small_data(cache)
    labels = torch.cat([batch[1] for batch in data.test_dataloader()]).tolist()
    assert [data.labels[label] for label in labels] == [t.words[0] for t in SMALL.takes("test")]


def test_words_lie_in_the_middle_in_tests_and_anywhere_in_training(cache: Path) -> None:
    data = small_data(cache, num_frames=200)
    sounds = next(iter(data.test_dataloader())).spectrograms
    for sound in sounds[:, 0]:
        spoken = sound.abs().sum(1).nonzero()[:, 0]
        assert abs(int(spoken[0]) - (199 - int(spoken[-1]))) <= 1
    first, second = (_spectrograms(data, epoch) for epoch in range(2))
    torch.testing.assert_close(_spectrograms(data, 0), first, rtol=0, atol=0)
    starts = [
        int(sound.abs().sum(1).nonzero()[0]) for batch in (first, second) for sound in batch[:, 0]
    ]
    assert len(set(starts)) > 4


def _spectrograms(data: KeywordData, epoch: int) -> Tensor:
    """Return the words of a first batch of training."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # As Lightning does.
    return next(iter(loader))[0]


def test_the_same_seed_gives_the_same_batches(cache: Path) -> None:
    first, again, other = (small_data(cache, seed=seed) for seed in (1, 1, 2))
    batches = [torch.cat([b[0] for b in data.train_dataloader()]) for data in (first, again, other)]
    torch.testing.assert_close(batches[0], batches[1], rtol=0, atol=0)
    assert not torch.equal(batches[0], batches[2])


def test_words_longer_than_the_spectrogram_lose_their_ends(cache: Path) -> None:
    whole, cut = (
        next(iter(small_data(cache, num_frames=n).test_dataloader()))[0][0, 0] for n in (200, 8)
    )
    spoken = whole[whole.abs().sum(1) > 0]
    assert cut.shape == (8, spoken.shape[1])
    start = (len(spoken) - 8) // 2
    torch.testing.assert_close(cut, spoken[start : start + 8], rtol=0, atol=0)


def test_several_words_are_an_error() -> None:
    with pytest.raises(ValueError, match="max_words must be 1, got 3"):
        KeywordData(corpus=SpokenWords(max_words=3))


def test_folded_weights_compute_the_layer_with_its_batch_norm() -> None:
    layer = convolution(1, 3, 3).eval()
    norm = layer[1]
    norm.running_var.uniform_(0.1, 2.0)
    norm.weight.data.uniform_(0.5, 2.0)
    x = torch.randn(2, 1, 5, 5)
    (weights,) = folded_weights(layer)
    expected = layer[1](layer[0](x)) - layer[1](layer[0](torch.zeros_like(x)))
    actual = torch.nn.functional.conv2d(x, weights.view(3, 1, 3, 3))
    torch.testing.assert_close(actual, expected)


def test_all_of_the_network_is_emulated() -> None:
    assert not coverage(KeywordNetwork(5).eval(), torch.randn(1, 1, 64, 24)).fallbacks


@pytest.mark.parametrize(
    "callbacks", [[], [NNAEmulation(targets=["network"], calibration_steps=1)]]
)
def test_a_spotter_learns_its_words(cache: Path, callbacks: list[Callback]) -> None:
    data = small_data(cache)
    spotter = KeywordSpotter(
        network=partial(KeywordNetwork, channels=8, widths=(16,)),
        labels=data.labels,
        optimizer=partial(torch.optim.AdamW, lr=0.02),
        schedule=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.02),
    )
    trainer = pl.Trainer(
        max_steps=STEPS,
        num_sanity_val_steps=0,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(spotter, data)
    known = DataLoader(list(data.train_dataloader()), batch_size=None)
    metrics = trainer.test(spotter, known, verbose=False)[0]
    assert metrics["test/error_rate"] <= 0.25
    assert len(spotter.errors) == 8
    assert sum(spotter.errors) / 8 == pytest.approx(metrics["test/error_rate"])
