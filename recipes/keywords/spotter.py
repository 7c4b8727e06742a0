"""A keyword spotter as a LightningModule: cross-entropy, word errors, one-cycle learning rate."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from recipes.keywords.data import Batch


class KeywordSpotter(pl.LightningModule):
    """Train and score a network that tells spoken words apart.

    Logs ``train/loss``, ``val/loss`` and ``test/loss`` (nats per word), ``val/error_rate`` and
    ``test/error_rate`` (fractions).

    Args:
        network: Network from spectrograms to logits of the words.
        learning_rate: Largest learning rate of the one-cycle schedule.
        total_steps: Number of optimizer steps of the schedule.

    Attributes:
        errors: Whether each word of the last test run was misrecognized, in the order of the data.
    """

    def __init__(self, network: nn.Module, *, learning_rate: float, total_steps: int) -> None:
        super().__init__()
        self.network = network
        self.learning_rate, self.total_steps = learning_rate, total_steps
        self.errors: list[bool] = []

    @override
    def forward(
        self, spectrograms: Float[Tensor, "batch 1 frames mels"]
    ) -> Float[Tensor, "batch labels"]:
        return self.network(spectrograms)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch, "val")

    @override
    def on_test_start(self) -> None:
        self.errors = []

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.errors += self._score(batch, "test")

    def _score(self, batch: Batch, name: str) -> list[bool]:
        """Log loss and error rate of a batch, and tell which words are misrecognized."""
        logits = self(batch[0])
        wrong = logits.argmax(1) != batch[1]
        self.log(f"{name}/loss", nn.functional.cross_entropy(logits, batch[1]), on_epoch=True)
        self.log(f"{name}/error_rate", wrong.float().mean(), on_epoch=True)
        return wrong.tolist()

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, self.total_steps, pct_start=0.15
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
