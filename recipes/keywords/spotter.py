"""A keyword spotter as a LightningModule: cross-entropy, and the errors of each word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, distributed, nn
from typing_extensions import override

from recipes.keywords.data import Batch


class KeywordSpotter(pl.LightningModule):
    """Train and test a network that tells spoken words apart.

    Logs ``train/loss``, ``val/loss`` and ``test/loss`` (nats per word), ``val/error_rate`` and
    ``test/error_rate`` (fractions). Validation and test count every word once, for any number of
    processes.

    Args:
        network: Function of ``num_labels`` that builds a network from spectrograms to logits.
        labels: Words in the order of the logits.
        optimizer: Function of the parameters that builds the optimizer.
        schedule: Function of the optimizer and ``total_steps`` that builds the learning-rate
            schedule, which advances with every optimizer step; None for a constant learning rate.

    Attributes:
        recognized: Label and recognized label of each word of the last validation or test, of all
            processes, by its position in the corpus.
    """

    recipe_adapter = "recipes.keywords.adapter.KeywordAdapter"

    def __init__(
        self,
        *,
        network: Callable[..., nn.Module],
        labels: Sequence[str],
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        self.network = network(num_labels=len(labels))
        self.labels = tuple(labels)
        self.optimizer, self.schedule = optimizer, schedule
        self.recognized: dict[int, tuple[int, int]] = {}
        self._losses: dict[int, float] = {}

    @property
    def errors(self) -> list[bool]:
        """Errors of the last test: True for a misrecognized word, in the order of the corpus."""
        return [label != answer for label, answer in self.recognized.values()]

    @override
    def forward(
        self, spectrograms: Float[Tensor, "batch 1 frames mels"]
    ) -> Float[Tensor, "batch labels"]:
        return self.network(spectrograms)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch.spectrograms), batch.labels)
        self.log("train/loss", loss, batch_size=len(batch.labels), sync_dist=True)
        return loss

    @override
    def on_validation_epoch_start(self) -> None:
        self._begin()

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_scored("val")

    @override
    def on_test_epoch_start(self) -> None:
        self._begin()

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_scored("test")

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(self.parameters())
        if self.schedule is None:
            return {"optimizer": optimizer}
        total_steps = int(self.trainer.estimated_stepping_batches)
        schedule = self.schedule(optimizer, total_steps=total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _begin(self) -> None:
        self.recognized, self._losses = {}, {}

    def _score(self, batch: Batch) -> None:
        """Keep loss and recognized label of each word."""
        logits = self(batch.spectrograms)
        losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        indices, labels = batch.indices.tolist(), batch.labels.tolist()
        self.recognized |= dict(
            zip(indices, zip(labels, logits.argmax(1).tolist(), strict=True), strict=True)
        )
        self._losses |= dict(zip(indices, losses.tolist(), strict=True))

    def _log_scored(self, stage: str) -> None:
        """Log loss and error rate of the words of all processes, each once."""
        self.recognized = _gathered(self.recognized)
        losses = _gathered(self._losses).values()
        # The maximum of equal values is the value, to the bit.
        settings: dict[str, Any] = {"sync_dist": True, "reduce_fx": "max"}
        self.log(f"{stage}/loss", sum(losses) / len(losses), **settings)
        rate = sum(self.errors) / len(self.errors)
        self.log(f"{stage}/error_rate", rate, prog_bar=stage == "val", **settings)


def _gathered(own: dict[int, Any]) -> dict[int, Any]:
    """Merge what all processes have by position; several may have the same word."""
    parts: list[dict[int, Any]] = [own]
    if distributed.is_available() and distributed.is_initialized():
        parts = [{} for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(parts, own)
    return dict(sorted((key, value) for part in parts for key, value in part.items()))
