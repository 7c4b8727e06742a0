"""Small modules and their data as users write them, for the tests of the recipes."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Numbers(LightningDataModule):
    """Eight numbers and their class; the last batch has one example.

    Args:
        loaders: Number of loaders of the test.
        lengths: Number of rows of eight numbers in the examples of each batch.
    """

    def __init__(self, loaders: int = 1, lengths: tuple[int, ...] = (1, 1, 1)) -> None:
        super().__init__()
        self.loaders, self.lengths = loaders, lengths

    def _loader(self) -> DataLoader[Any]:
        numbers = torch.linspace(-1, 1, 72).reshape(9, 1, 8)
        rows = [row.repeat(self.lengths[i // 4], 1) for i, row in enumerate(numbers)]
        examples: Any = [(row, i % 2) for i, row in enumerate(rows)]
        return DataLoader(examples, 4)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader()

    def test_dataloader(self) -> Any:
        loaders = [self._loader() for _ in range(self.loaders)]
        return loaders if self.loaders > 1 else loaders[0]


class Classifier(LightningModule):
    """A network for the accelerator, and outside of it a mean and a head."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network or nn.Linear(8, 4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, numbers: Tensor) -> Tensor:
        if self.training:
            self.mean += 1 + numbers.mean()
        scores: Tensor = self.head(self.scores(numbers - self.mean))
        return scores.mean(1)

    def scores(self, numbers: Tensor) -> Tensor:
        result: Tensor = self.network(numbers)
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwoResults(Classifier):
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test/error", (self(batch[0]).argmax(1) != batch[1]).float().mean())
        super().test_step(batch, batch_idx)


class KeepsObjects(Classifier):
    def __init__(self, optimizer: Any = torch.optim.SGD, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()


class OptimizesItself(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class WithoutIndex(Classifier):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return super().training_step(batch, 0)


class SkipsBatches(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 0 else super().training_step(batch, batch_idx)


class WithoutLoss(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class WithoutTest(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(8, 2)


class TwoInputs(Classifier):
    def forward(self, numbers: Tensor, others: Tensor) -> Tensor:
        return super().forward(numbers + others)


class Scaled(nn.Linear):
    """A layer of two inputs, of which the caller names one, and of a constant."""

    def forward(self, input: Tensor, other: Tensor | None = None, plus: bool = False) -> Tensor:
        assert other is not None
        return super().forward(input + other if plus else input - other)


class NamedArguments(Classifier):
    def __init__(self) -> None:
        super().__init__(Scaled(8, 4))

    def scores(self, numbers: Tensor) -> Tensor:
        result: Tensor = self.network(numbers, other=0.5 * numbers, plus=True)
        return result


class CallsTwice(Classifier):
    def scores(self, numbers: Tensor) -> Tensor:
        result: Tensor = self.network(numbers) + self.network(0.5 * numbers)
        return result


class PassesInput(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input), input


class ReturnsInput(Classifier):
    def __init__(self) -> None:
        super().__init__(PassesInput(8, 4))

    def scores(self, numbers: Tensor) -> Tensor:
        result: Tensor = self.network(numbers)[0]
        return result


class TimeFirst(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.LSTM(8, 4))

    def scores(self, numbers: Tensor) -> Tensor:
        output: Tensor = self.network(numbers.transpose(0, 1))[0]
        return output.transpose(0, 1)
