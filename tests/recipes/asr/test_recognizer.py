"""The LightningModule: its losses against torchaudio and PyTorch, its texts, its settings."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torchaudio
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from recipes.asr.batches import Batch, Item, collate
from recipes.asr.recognizer import TransducerRecognizer, transducer_losses
from recipes.asr.rnnt import transducer
from recipes.asr.vocabulary import Vocabulary

VOCABULARY = Vocabulary((" ", "A", "B", "C"))


def _recognizer(**settings: Any) -> TransducerRecognizer:
    network = partial(
        transducer, encoder_size=8, predictor_size=8, joint_size=8, encoder_dropout=0.5
    )
    defaults = {"optimizer": partial(torch.optim.SGD, lr=0.1), "ctc_weight": 0.5}
    return TransducerRecognizer(
        network=network, vocabulary=VOCABULARY, num_mels=4, **{**defaults, **settings}
    )


@pytest.fixture
def batch() -> Batch:
    texts = ("A B", "CAB", "B")
    return collate(
        [
            Item(torch.randn(32 - 8 * index, 4), VOCABULARY.encode(text), f"u{index}", text)
            for index, text in enumerate(texts)
        ]
    )


def _random_scores() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = torch.randn(3, 7, 5, 6, requires_grad=True)
    targets = torch.tensor([[1, 2, 3, 4], [5, 5, 0, 0], [2, 0, 0, 0]])
    return logits, targets, torch.tensor([7, 5, 2]), torch.tensor([4, 2, 1])


def test_loss_of_two_scores_is_the_loss_of_all() -> None:
    logits, targets, steps, lengths = _random_scores()
    ours = transducer_losses(logits, targets, steps, lengths).sum()
    lengths_and_steps = (steps.int(), lengths.int())
    expected = torchaudio.functional.rnnt_loss(
        logits, targets.int(), *lengths_and_steps, blank=0, reduction="sum"
    )
    torch.testing.assert_close(ours, expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_ctc_is_that_of_each_utterance_alone(batch: Batch) -> None:
    recognizer = _recognizer().eval()
    _, together = recognizer.losses(batch)
    singles = [
        collate([Item(features[:frames], labels[:count].tolist(), name, text)])
        for features, frames, labels, count, name, text in zip(*batch[:1], *batch[1:], strict=True)
    ]
    alone = sum(recognizer.losses(single)[1] for single in singles)
    torch.testing.assert_close(together, alone)


def test_an_utterance_with_more_labels_than_steps_leaves_ctc_finite() -> None:
    item = Item(torch.randn(8, 4), VOCABULARY.encode("ABCABCABC"), "u", "ABCABCABC")
    transducer_part, ctc = _recognizer().eval().losses(collate([item]))
    assert torch.equal(ctc, torch.tensor(0.0))
    assert torch.isfinite(transducer_part)


def test_without_weight_there_is_no_ctc_layer(batch: Batch) -> None:
    recognizer = _recognizer(ctc_weight=0.0)
    assert recognizer.ctc_output is None
    assert torch.equal(recognizer.losses(batch)[1], torch.tensor(0.0))


def test_texts_are_those_of_the_vocabulary(batch: Batch) -> None:
    recognizer = _recognizer().eval()
    for width in (1, 3):
        texts = recognizer.decode(batch, beam_width=width)
        assert len(texts) == 3
        assert set("".join(texts)) <= set(" ABC")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"ctc_weight": -1.0}, "ctc_weight .* -1.0"), ({"beam_width": 0}, "beam_width .* 0")],
)
def test_settings_out_of_range_are_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _recognizer(**settings)


def _fit(recognizer: TransducerRecognizer, batch: Batch) -> None:
    Trainer(
        precision="bf16-mixed",
        gradient_clip_val=5.0,
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(recognizer, DataLoader([batch], batch_size=None), DataLoader([batch], batch_size=None))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
def test_mixed_precision_clips_gradients_of_an_optimizer_that_would_be_fused(batch: Batch) -> None:
    recognizer = _recognizer(optimizer=partial(torch.optim.AdamW, lr=0.01, fused=True))
    before = recognizer.model.joint.output.weight.detach().clone()
    with torch.backends.mkldnn.flags(enabled=False):  # Some processors have no bfloat16 LSTM.
        _fit(recognizer, batch)
    assert not recognizer.optimizers().optimizer.defaults["fused"]  # type: ignore[union-attr]
    after = recognizer.model.joint.output.weight
    assert after.isfinite().all()
    assert not torch.equal(after, before)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_processor_without_such_an_lstm_is_named(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(torch.nn.LSTM, "forward", fail)
    with pytest.raises(RuntimeError, match=r"no LSTM in precision bf16-mixed: set trainer\.precis"):
        _fit(_recognizer(), batch)
