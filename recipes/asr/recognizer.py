"""A transducer with its loss, its metrics and its optimizer, as one LightningModule.

The network is the child module ``model``; the losses, the auxiliary CTC layer and the metrics are
outside of it, since only training needs them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
import torchaudio
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from recipes.asr.batches import Batch, seed_of
from recipes.asr.beam import decode
from recipes.asr.decoding import Decodable, greedy_search
from recipes.asr.pieces import AnyVocabulary
from recipes.asr.rnnt import Transducer
from recipes.asr.scored_recognizer import ScoredRecognizer
from recipes.asr.scoring import Scored
from recipes.asr.vocabulary import BLANK

_log = logging.getLogger(__name__)


class TransducerRecognizer(ScoredRecognizer):
    """Train and score a transducer.

    Logs ``train/loss`` (loss per token in nats, with the CTC part; the mean over the processes),
    ``val/loss`` and ``val/loss_per_token`` (the transducer's negative log-likelihood in nats over
    the number of labels), ``val/wer``, ``test/loss_per_token``, ``test/wer`` (a fraction), and
    ``test/wer_greedy``; see :class:`.ScoredRecognizer`.

    Args:
        network: Function of ``num_mels`` and ``num_labels`` that builds the transducer.
        vocabulary: Labels of the transducer.
        num_mels: Number of features per frame.
        optimizer: Function of the parameters that builds the optimizer.
        schedule: Function of the optimizer and ``total_steps`` that builds the learning-rate
            schedule, which advances with every optimizer step; None for a constant learning rate.
        ctc_weight: Weight of the auxiliary CTC loss on the encodings; 0 leaves the layer out.
        beam_width: Number of hypotheses of the beam search in testing; 1 decodes greedily.
        max_labels_per_step: Largest number of labels of the search at one step, positive: it keeps
            a network that is hardly trained from endless texts. A test that has steps with more
            logs a warning.
        seed: Seed of the dropout; with the step it determines the masks, also of a resumed run.

    Attributes:
        beam_width: Number of hypotheses of the beam search in testing.

    Raises:
        ValueError: If ``ctc_weight`` is negative, or ``beam_width`` or ``max_labels_per_step`` is
            not positive.
    """

    recipe_adapter = "recipes.asr.adapter.TransducerAdapter"

    def __init__(
        self,
        *,
        network: Callable[..., Transducer],
        vocabulary: AnyVocabulary,
        num_mels: int,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None,
        ctc_weight: float = 0.0,
        beam_width: int = 1,
        max_labels_per_step: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(vocabulary=vocabulary, optimizer=optimizer, schedule=schedule)
        if ctc_weight < 0:
            raise ValueError(f"ctc_weight must not be negative, got {ctc_weight}; 0 leaves CTC out")
        self.model = network(num_mels=num_mels, num_labels=len(vocabulary))
        self.ctc_weight = ctc_weight
        if max_labels_per_step < 1:
            raise ValueError(f"max_labels_per_step must be at least 1, got {max_labels_per_step}")
        self.max_labels_per_step = max_labels_per_step
        self.set_beam_width(beam_width)
        self.seed = seed
        self._cut = 0
        size = self.model.joint.output.in_features
        self.ctc_output = nn.Linear(size, len(vocabulary)) if ctc_weight else None

    def set_beam_width(self, beam_width: int) -> None:
        """Choose the number of hypotheses of the beam search in testing; 1 decodes greedily.

        Raises:
            ValueError: If it is not positive.
        """
        if beam_width < 1:
            raise ValueError(f"beam_width must be at least 1, got {beam_width}; 1 is greedy")
        self.beam_width = beam_width

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the transducer's and the CTC's negative log-likelihood of ``batch``, in nats."""
        encodings, _, logits, steps = score_references(self.model, batch)
        transducer = transducer_losses(logits, batch.targets, steps, batch.target_lengths)
        return transducer.sum(), self._ctc(encodings, steps, batch)

    def decode(self, batch: Batch, *, beam_width: int = 1) -> list[str]:
        """Recognize ``batch``, greedily or with a beam search."""
        features, lengths = batch.features, batch.feature_lengths
        labels = decode(
            self.model,
            features,
            lengths,
            beam_width=beam_width,
            max_labels_per_step=self.max_labels_per_step,
        )
        return [self.vocabulary.decode(sequence) for sequence in labels]

    @override
    def on_fit_start(self) -> None:
        """Raise if this processor has no LSTM in the Trainer's precision.

        Raises:
            RuntimeError: If there is none; the message has the remedy.
        """
        if self.device.type != "cpu" or self.trainer.precision == "32-true":
            return
        context = self.trainer.precision_plugin.forward_context()
        try:
            with torch.random.fork_rng(devices=[]), context:
                nn.LSTM(8, 8)(torch.zeros(1, 1, 8))
        except RuntimeError as error:
            raise RuntimeError(
                f"this processor has no LSTM in precision {self.trainer.precision}: set "
                "trainer.precision=32-true, or train on another device"
            ) from error

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        # A checkpoint does not store the generator, so every step seeds it.
        torch.manual_seed(seed_of(self.seed, self.global_step, batch_idx, self.global_rank))
        transducer, ctc = self.losses(batch)
        # Per token, not per utterance: batches of short and of long utterances have equal weight.
        loss = (transducer + self.ctc_weight * ctc) / batch.target_lengths.sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.texts), sync_dist=True)
        return loss

    def _ctc(self, encodings: Tensor, steps: Tensor, batch: Batch) -> Tensor:
        if self.ctc_output is None:
            return encodings.new_zeros(())
        scores = self.ctc_output(encodings).float().log_softmax(dim=-1).transpose(0, 1)
        # A transducer may output more labels than steps, CTC may not: such an utterance has
        # no CTC path, and its infinite loss must not reach the encoder.
        return nn.functional.ctc_loss(
            scores, batch.targets, steps, batch.target_lengths, BLANK, "sum", zero_infinity=True
        )

    @override
    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self._cut = 0

    @override
    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        if self._cut:
            _log.warning(
                "%d utterances had more than %d labels at a step, and the search cut them off: a "
                "network that emits labels late needs a larger max_labels_per_step",
                self._cut,
                self.max_labels_per_step,
            )

    @override
    def scored(self, batch: Batch, *, test: bool) -> Iterator[Scored]:
        beam_width = self.beam_width if test else 1
        encodings, _, logits, steps = score_references(self.model, batch)
        losses = transducer_losses(logits, batch.targets, steps, batch.target_lengths)
        limit = self.max_labels_per_step
        result = greedy_search(self.model, encodings, steps, max_labels_per_step=limit)
        if test:
            self._cut += sum(result.is_cut)
        greedy = [self.vocabulary.decode(sequence) for sequence in result.labels]
        texts = greedy if beam_width == 1 else self.decode(batch, beam_width=beam_width)
        rows = zip(
            batch.texts,
            greedy,
            texts,
            losses.tolist(),
            batch.target_lengths.tolist(),
            strict=True,
        )
        return (Scored(*row) for row in rows)


def score_references(
    model: Decodable, batch: Batch
) -> tuple[
    Float[Tensor, "batch steps dim"],
    Float[Tensor, "batch labels_and_one dim"],
    Float[Tensor, "batch steps labels_and_one vocabulary"],
    Int[Tensor, " batch"],
]:
    """Score every pair of a step and a prefix of the reference.

    Args:
        model: Transducer, or its programs.
        batch: Padded utterances with their references.

    Returns:
        Encodings, predictions, logits of every pair, and the valid steps of each utterance.
    """
    encodings, steps = model.transcribe(batch.features, batch.feature_lengths)
    start = torch.full_like(batch.targets[:, :1], BLANK)
    labels = torch.cat([start, batch.targets], dim=1)
    predictions, _, _ = model.predict(labels, batch.target_lengths + 1, None)
    logits, _, _ = model.join(encodings, steps, predictions, batch.target_lengths + 1)
    return encodings, predictions, logits, steps


def transducer_losses(
    logits: Float[Tensor, "batch steps labels_and_one vocabulary"],
    targets: Int[Tensor, "batch labels"],
    steps: Int[Tensor, " batch"],
    target_lengths: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    r"""Compute the negative log-likelihood of each row of ``targets``, in nats.

    An alignment needs two scores at each pair: blank's and the next label's. With these two alone
    ``torchaudio.functional.rnnt_loss`` takes half the time that it takes with the vocabulary.

    Args:
        logits: Scores of the joint network, not normalized.
        targets: Labels, padded with blank.
        steps: Number of valid steps of each utterance.
        target_lengths: Number of valid labels of each utterance.

    Example:
        >>> logits = torch.zeros(1, 1, 2, 4)  # one step, one label: both of probability 1/4
        >>> one = torch.tensor([1])
        >>> transducer_losses(logits, torch.tensor([[2]]), one, one).exp()
        tensor([16.])

    Reference:
        Graves, "Sequence transduction with recurrent neural networks", arXiv 1211.3711, 2012.
    """
    scores = logits.float().log_softmax(dim=-1)
    # After the last label there is no next one; the loss does not read this score.
    following = nn.functional.pad(targets, (0, 1), value=BLANK)[:, None, :, None]
    label = scores.gather(3, following.expand(-1, scores.shape[1], -1, -1))
    return torchaudio.functional.rnnt_loss(
        torch.cat([scores[..., BLANK : BLANK + 1], label], dim=-1),
        torch.ones_like(targets, dtype=torch.int32),
        steps.int(),
        target_lengths.int(),
        blank=0,
        reduction="none",
        fused_log_softmax=False,
    )
