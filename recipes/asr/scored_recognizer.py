"""The base of recognizers of speech: words that count once, all processes, the optimizer."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from functools import partial

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from typing_extensions import override

from recipes.asr.batches import Batch
from recipes.asr.pieces import AnyVocabulary
from recipes.asr.scoring import Scored, WordErrors, gather_scored, word_errors, word_rate


class ScoredRecognizer(LightningModule):
    """Validate and test a recognizer of speech.

    Logs ``val/loss`` and ``val/loss_per_token`` (nats over the number of labels), ``val/wer``,
    ``test/loss_per_token``, ``test/wer`` (a fraction), and ``test/wer_greedy``. Metrics count every
    utterance once, for any number of processes and any padding of their parts.

    Args:
        vocabulary: Labels.
        optimizer: Function of the parameters that builds the optimizer.
        schedule: Function of the optimizer and ``total_steps`` that builds the learning-rate
            schedule, which advances with every optimizer step; None for a constant learning rate.

    Attributes:
        score: Word errors of the last test run, of all processes.
        tested: Results of the last test run by utterance id, of all processes.
    """

    recipe_adapter = "recipes.asr.adapter.RecognizerAdapter"

    def __init__(
        self,
        *,
        vocabulary: AnyVocabulary,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None,
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.optimizer, self.schedule = optimizer, schedule
        self.score: WordErrors | None = None
        self.tested: dict[str, Scored] = {}
        # By utterance id: processes may have the same utterance, which counts once.
        self._scored: dict[str, Scored] = {}

    @abstractmethod
    def scored(self, batch: Batch, *, test: bool) -> Iterable[Scored]:
        """Score and recognize each utterance of a batch, in its order.

        Args:
            batch: Batch of utterances.
            test: Whether this is a test, whose search may be a slower one than validation's.
        """

    @override
    def on_validation_epoch_start(self) -> None:
        self._scored = {}

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._scored |= zip(batch.ids, self.scored(batch, test=False), strict=True)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_scored("val")

    @override
    def on_test_epoch_start(self) -> None:
        self._scored = {}

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._scored |= zip(batch.ids, self.scored(batch, test=True), strict=True)

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
