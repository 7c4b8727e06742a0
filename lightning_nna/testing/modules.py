"""Tiny modules that exercise what users' modules do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset


class SmallNet(nn.Module):
    """Two linear layers with a functional tanh between, a residual and a product.

    Example:
        >>> SmallNet()(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, inputs: int = 4, hidden: int = 8, outputs: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.third = nn.Linear(hidden, outputs)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Scores."""
        hidden = torch.tanh(self.first(x))
        gate = self.second(hidden).sigmoid()
        return self.third(hidden * gate + hidden)


class RandomSequences(Dataset):
    """Sequences whose class is the sign of a fixed projection of their sum: learnable, seeded."""

    def __init__(self, size: int = 64, steps: int = 6, inputs: int = 4, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(size, steps, inputs, generator=generator)
        direction = torch.randn(inputs, generator=torch.Generator().manual_seed(7))
        self.y = (self.x.sum(1) @ direction > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class ResumableLoader:
    """Batches in a fixed order that know where they stopped; each rank has its own part.

    Args:
        dataset: Pairs of tensors.
        batch_size: Examples a batch.

    Example:
        >>> loader = ResumableLoader(RandomSequences(size=8), batch_size=4)
        >>> loader.load_state_dict({"next": 1})
        >>> [len(y) for _, y in loader]
        [4]
    """

    def __init__(self, dataset: RandomSequences, *, batch_size: int) -> None:
        self.dataset, self.batch_size, self.next = dataset, batch_size, 0

    @staticmethod
    def _ranks() -> tuple[int, int]:
        """Rank and number of ranks."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size // self._ranks()[1]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank, ranks = self._ranks()
        while self.next < len(self):
            first = (self.next * ranks + rank) * self.batch_size
            self.next += 1
            rows = slice(first, first + self.batch_size)
            yield self.dataset.x[rows], self.dataset.y[rows]
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        """Index of the next batch."""
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the state was taken."""
        self.next = state["next"]


class SmallRecurrentModule(pl.LightningModule):
    """Embedding-free recurrent classifier; automatic or manual optimization.

    Args:
        manual: Step the optimizer in ``training_step``.
        dropout: Between the two LSTM layers.
        learning_rate: Of AdamW.
        dropout_seed: With the step, the seed of its dropout: no checkpoint keeps the generator.
            None leaves the generator alone.
        checkpointing: Forget what is inside the head and compute it again in the backward, with
            this value of ``use_reentrant``; None for no activation checkpointing.
        cell: ``"lstm"`` or ``"gru"``. PyTorch leaves LSTMs in bfloat16 to oneDNN, which has them
            for some processors only; GRUs it computes itself, on every processor.
    """

    def __init__(
        self,
        *,
        manual: bool = False,
        dropout: float = 0.0,
        learning_rate: float = 0.02,
        dropout_seed: int | None = None,
        checkpointing: bool | None = None,
        cell: Literal["lstm", "gru"] = "lstm",
    ) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.learning_rate = learning_rate
        self.dropout_seed = dropout_seed
        self.checkpointing = checkpointing
        # Under one name, which patterns of tests have, whichever it is.
        kind = {"lstm": nn.LSTM, "gru": nn.GRU}[cell]
        self.lstm = kind(4, 8, 2, batch_first=True, dropout=dropout)
        self.head = SmallNet(8, 8, 2)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Float[Tensor, "batch steps 4"]) -> Float[Tensor, "batch 2"]:
        """Logits."""
        states, _ = self.lstm(x)
        if self.checkpointing is None:
            return self.head(states[:, -1])
        return checkpoint(self.head, states[:, -1], use_reentrant=self.checkpointing)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Cross-entropy."""
        if self.dropout_seed is not None:
            torch.manual_seed(self.dropout_seed + self.global_step)
        x, y = batch
        loss = self.loss(self(x), y)
        self.log("train/loss", loss)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Cross-entropy on held-out sequences."""
        x, y = batch
        self.log("val/loss", F.cross_entropy(self(x), y))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Cross-entropy on other sequences."""
        x, y = batch
        self.log("test/loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)

    def train_dataloader(self) -> ResumableLoader:
        """Eight batches an epoch; a run that stops in mid-epoch goes on with the next one."""
        return ResumableLoader(RandomSequences(), batch_size=8)

    def val_dataloader(self) -> DataLoader:
        """Other sequences."""
        return DataLoader(RandomSequences(seed=1), batch_size=16)

    def test_dataloader(self) -> DataLoader:
        """Others again."""
        return DataLoader(RandomSequences(seed=2), batch_size=16)


class LateModule(SmallRecurrentModule):
    """The same, with a head that only ``configure_model`` builds."""

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def configure_model(self) -> None:
        """Build the head, once."""
        if "head" not in dict(self.named_children()):
            self.head = SmallNet(8, 8, 2)


class SeveralOptimizersModule(SmallRecurrentModule):
    """Two optimizers in manual optimization; that of the head steps after every second batch."""

    def __init__(self) -> None:
        super().__init__(manual=True)

    def training_step(  # type: ignore[override]
        self, batch: tuple[Tensor, Tensor], batch_index: int
    ) -> None:
        """A forward for each optimizer, as in adversarial training."""
        x, y = batch
        optimizers: Any = self.optimizers()
        for number, optimizer in enumerate(optimizers):
            if number and batch_index % 2:
                continue
            optimizer.zero_grad()
            loss = self.loss(self(x), y)
            self.manual_backward(loss)
            optimizer.step()
        self.log("train/loss", loss.detach())

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        """AdamW for the LSTM, and one for the head."""
        parts = (self.lstm, self.head)
        return [torch.optim.AdamW(part.parameters(), lr=self.learning_rate) for part in parts]
