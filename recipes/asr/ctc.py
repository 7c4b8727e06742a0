"""A plain convolutional encoder trained with CTC, as an example of a model of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from recipes.asr.batches import Batch
from recipes.asr.pieces import AnyVocabulary
from recipes.asr.scored_recognizer import ScoredRecognizer
from recipes.asr.scoring import Scored
from recipes.asr.vocabulary import BLANK

_STRIDE = 4


class CTCEncoder(nn.Module):
    """Score the labels of every fourth frame with separable convolutions over time.

    Args:
        num_mels: Number of features per frame.
        num_labels: Number of labels, the blank included.
        channels: Number of channels.
        kernel_size: Number of steps that a depthwise convolution sees, odd.
        blocks: Number of depthwise and pointwise convolutions after the first two.

    Reference:
        Kriman et al., "QuartzNet", arXiv 1910.10261, 2020: the separable blocks, without their
        skip connections.

    Example:
        >>> CTCEncoder(40, 11, channels=8, blocks=1)(torch.zeros(2, 16, 40)).shape
        torch.Size([2, 4, 11])
    """

    def __init__(
        self,
        num_mels: int,
        num_labels: int,
        *,
        channels: int = 128,
        kernel_size: int = 11,
        blocks: int = 4,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = num_mels
        for _ in range(2):
            layers += _normed(nn.Conv1d(inputs, channels, 5, stride=2, padding=2, bias=False))
            inputs = channels
        settings: dict[str, Any] = {"groups": channels, "padding": kernel_size // 2, "bias": False}
        for _ in range(blocks):
            layers.append(nn.Conv1d(channels, channels, kernel_size, **settings))
            layers += _normed(nn.Conv1d(channels, channels, 1, bias=False))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_labels)

    def forward(
        self, features: Float[Tensor, "batch frames mels"]
    ) -> Float[Tensor, "batch steps labels"]:
        """Return logits of the labels."""
        return self.head(self.layers(features.transpose(1, 2)).transpose(1, 2))


def _normed(convolution: nn.Conv1d) -> list[nn.Module]:
    return [convolution, nn.BatchNorm1d(convolution.out_channels), nn.ReLU()]


class CTCRecognizer(ScoredRecognizer):
    """Train and score an encoder with CTC; recognize the best label of every step.

    Logs ``train/loss`` (nats per label), and see :class:`.ScoredRecognizer`.

    Args:
        network: Function of ``num_mels`` and ``num_labels`` that builds the encoder.
        vocabulary: Labels of the encoder.
        num_mels: Number of features per frame.
        optimizer: See :class:`.ScoredRecognizer`.
        schedule: See :class:`.ScoredRecognizer`.
        frames: Number of frames to which validation and test pad every utterance, as a program of
            one length does; None pads to the longest of the batch.

    Reference:
        Graves et al., "Connectionist temporal classification", ICML 2006.
    """

    def __init__(
        self,
        *,
        network: Callable[..., nn.Module],
        vocabulary: AnyVocabulary,
        num_mels: int,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None,
        frames: int | None = None,
    ) -> None:
        super().__init__(vocabulary=vocabulary, optimizer=optimizer, schedule=schedule)
        self.model = network(num_mels=num_mels, num_labels=len(vocabulary))
        self.frames = frames

    @override
    def forward(
        self, features: Float[Tensor, "batch frames mels"]
    ) -> Float[Tensor, "batch steps labels"]:
        """Return logits; in evaluation the features are padded first.

        Raises:
            ValueError: If an utterance has more frames than are padded to.
        """
        if self.frames is not None and not self.training:
            missing = self.frames - features.shape[1]
            if missing < 0:
                raise ValueError(
                    f"an utterance has {features.shape[1]} frames, and the recognizer pads to "
                    f"{self.frames}: set model.frames to the length of the longest"
                )
            features = nn.functional.pad(features, (0, 0, 0, missing))
        logits: Tensor = self.model(features)
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        losses = ctc_losses(self(batch.features), batch)
        loss = losses.sum() / batch.target_lengths.sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.texts), sync_dist=True)
        return loss

    @override
    def scored(self, batch: Batch, *, test: bool) -> Iterator[Scored]:
        logits = self(batch.features)
        losses = ctc_losses(logits, batch).tolist()
        paths = zip(logits.argmax(2), steps_of(batch).tolist(), strict=True)
        texts = [self.vocabulary.decode(labels_of(path[:steps])) for path, steps in paths]
        rows = zip(batch.texts, texts, texts, losses, batch.target_lengths.tolist(), strict=True)
        return (Scored(*row) for row in rows)


def ctc_losses(
    logits: Float[Tensor, "batch steps labels"], batch: Batch
) -> Float[Tensor, " batch"]:
    """Return the negative log-likelihood of each reference, in nats; 0 for one without a path.

    Args:
        logits: Scores of the labels at each step.
        batch: Batch with the references.
    """
    return nn.functional.ctc_loss(
        logits.float().log_softmax(2).transpose(0, 1),
        batch.targets,
        steps_of(batch),
        batch.target_lengths,
        blank=BLANK,
        reduction="none",
        zero_infinity=True,
    )


def steps_of(batch: Batch) -> Int[Tensor, " batch"]:
    """Return the number of steps of each utterance."""
    return (batch.feature_lengths + _STRIDE - 1) // _STRIDE


def labels_of(path: Int[Tensor, " steps"]) -> list[int]:
    """Return the labels of a path: repeated ones once, and no blanks.

    Example:
        >>> labels_of(torch.tensor([0, 3, 3, 0, 3, 5]))
        [3, 3, 5]
    """
    return [int(label) for label in torch.unique_consecutive(path) if label != BLANK]
