"""A transducer with its loss, its metrics and its optimizer, as one LightningModule.

The network is the child module ``model``; the losses, the auxiliary CTC layer and the metrics are
outside of it, since only training needs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torchaudio
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from recipes.asr.batches import Batch, seed_of
from recipes.asr.beam import beam_decode
from recipes.asr.decoding import Decodable, greedy_decode, greedy_search
from recipes.asr.pieces import AnyVocabulary
from recipes.asr.rnnt import Transducer
from recipes.asr.scoring import Scored, WordErrors, gather_scored, word_errors, word_rate
from recipes.asr.vocabulary import BLANK


class TransducerRecognizer(LightningModule):
    """Train and score a transducer.

    Logs ``train/loss`` (loss per token in nats, with the CTC part; the mean over the processes),
    ``val/loss`` and ``val/loss_per_token`` (the transducer's negative log-likelihood in nats over
    the number of labels), ``val/wer``, ``test/loss_per_token``, ``test/wer`` (a fraction), and
    ``test/wer_greedy``. Metrics of validation and test count every utterance once, for any number
    of processes and any padding of their parts.

    Args:
        network: Function of ``num_mels`` and ``num_labels`` that builds the transducer.
        vocabulary: Labels of the transducer.
        num_mels: Number of features per frame.
        optimizer: Function of the parameters that builds the optimizer.
        schedule: Function of the optimizer and ``total_steps`` that builds the learning-rate
            schedule, which advances with every optimizer step; None for a constant learning rate.
        ctc_weight: Weight of the auxiliary CTC loss on the encodings; 0 leaves the layer out.
        beam_width: Number of hypotheses of the beam search in testing; 1 decodes greedily.
        seed: Seed of the dropout; with the step it determines the masks, also of a resumed run.

    Attributes:
        beam_width: Number of hypotheses of the beam search in testing.
        score: Word errors of the last test run, of all processes.
        hypotheses: Texts of the last test run by utterance id, of all processes.

    Raises:
        ValueError: If ``ctc_weight`` is negative or ``beam_width`` is not positive.
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
        seed: int = 0,
    ) -> None:
        super().__init__()
        if ctc_weight < 0:
            raise ValueError(f"ctc_weight must not be negative, got {ctc_weight}; 0 leaves CTC out")
        self.model = network(num_mels=num_mels, num_labels=len(vocabulary))
        self.vocabulary = vocabulary
        self.optimizer = optimizer
        self.schedule = schedule
        self.ctc_weight = ctc_weight
        self.set_beam_width(beam_width)
        self.seed = seed
        size = self.model.joint.output.in_features
        self.ctc_output = nn.Linear(size, len(vocabulary)) if ctc_weight else None
        self.score: WordErrors | None = None
        self.tested: dict[str, Scored] = {}
        # By utterance id: processes may have the same utterance, which counts once.
        self._scored: dict[str, Scored] = {}

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
        if beam_width == 1:
            labels = greedy_decode(self.model, features, lengths)
        else:
            labels = beam_decode(self.model, features, lengths, beam_width=beam_width)
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

    @override
    def on_validation_epoch_start(self) -> None:
        self._scored = {}

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch, beam_width=1)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_scored("val")

    @override
    def on_test_epoch_start(self) -> None:
        self._scored = {}

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch, beam_width=self.beam_width)

    @override
    def on_test_epoch_end(self) -> None:
        scored = self._log_scored("test")
        references = [result.reference for result in scored.values()]
        greedy = word_rate([result.greedy for result in scored.values()], references)
        self._log_once("test/wer_greedy", greedy)
        self.tested = scored
        self.score = word_errors([result.hypothesis for result in scored.values()], references)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(self.parameters(), **self._unfused())
        if self.schedule is None:
            return {"optimizer": optimizer}
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = self.schedule(optimizer, total_steps=total_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _unfused(self) -> dict[str, bool]:
        """Return further arguments of the optimizer: ``fused=False`` if it cannot be fused.

        Lightning assumes that every fused optimizer unscales its gradients itself, and does not
        clip gradients for it in mixed precision.
        """
        mixed = isinstance(self.trainer.precision_plugin, MixedPrecision)
        fused = isinstance(self.optimizer, partial) and self.optimizer.keywords.get("fused")
        if not (mixed and fused and self.trainer.gradient_clip_val):
            return {}
        rank_zero_info(
            "the optimizer is not fused in this run: in mixed precision Lightning clips the "
            "gradients of a fused one not at all"
        )
        return {"fused": False}

    def _ctc(self, encodings: Tensor, steps: Tensor, batch: Batch) -> Tensor:
        if self.ctc_output is None:
            return encodings.new_zeros(())
        scores = self.ctc_output(encodings).float().log_softmax(dim=-1).transpose(0, 1)
        # A transducer may output more labels than steps, CTC may not: such an utterance has
        # no CTC path, and its infinite loss must not reach the encoder.
        return nn.functional.ctc_loss(
            scores, batch.targets, steps, batch.target_lengths, BLANK, "sum", zero_infinity=True
        )

    def _score(self, batch: Batch, *, beam_width: int) -> None:
        """Store loss and transcripts of each utterance of ``batch``."""
        encodings, _, logits, steps = score_references(self.model, batch)
        losses = transducer_losses(logits, batch.targets, steps, batch.target_lengths)
        labels = greedy_search(self.model, encodings, steps)
        greedy = [self.vocabulary.decode(sequence) for sequence in labels]
        texts = greedy if beam_width == 1 else self.decode(batch, beam_width=beam_width)
        rows = zip(
            batch.ids,
            batch.texts,
            greedy,
            texts,
            losses.tolist(),
            batch.target_lengths.tolist(),
            strict=True,
        )
        for id_, *values in rows:
            self._scored[id_] = Scored(*values)

    def _log_scored(self, stage: str) -> dict[str, Scored]:
        """Log loss and word error rate of all utterances of all processes; return them by id."""
        scored = gather_scored(self._scored)
        results = scored.values()
        loss = math.fsum(result.loss for result in results) / sum(r.labels for r in results)
        rate = word_rate(
            [result.hypothesis for result in results], [result.reference for result in results]
        )
        self._log_once(f"{stage}/loss", loss)
        self._log_once(f"{stage}/loss_per_token", loss, prog_bar=True)
        self._log_once(f"{stage}/wer", rate, prog_bar=stage == "val")
        return scored

    def _log_once(self, name: str, value: float, *, prog_bar: bool = False) -> None:
        """Log a value that is equal in all processes."""
        # The maximum of equal values is the value, to the bit; their mean may differ.
        self.log(name, value, prog_bar=prog_bar, sync_dist=True, reduce_fx="max")


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
