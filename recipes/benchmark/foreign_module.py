"""A network that others wrote, with a batch, a loss and the programs that it is exported as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from typing_extensions import override


@dataclass(frozen=True)
class ForeignProgram:
    """A function of a network that is exported as one program.

    Attributes:
        run: Function from the network and the arguments to the results.
        arguments: Function from the network and its batch to the arguments of one inference.
        name: Name of the program; empty if the network has only one.
        is_deployed: Whether it is a program that a device runs; else it has further results, so
            that more outputs can be compared.
    """

    run: Callable[..., Any]
    arguments: Callable[..., tuple[Any, ...]]
    name: str = ""
    is_deployed: bool = True


@dataclass(frozen=True)
class ForeignModule:
    """A network, a batch and the loss that a training step minimizes.

    Attributes:
        title: Name in tables.
        source: Library that the code of the network is from.
        module: Function that makes the network, with random weights.
        batch: Function that makes the arguments of a training forward.
        loss: Function from the result of the training forward to the loss.
        run: Training forward: function from the network and the batch to its result.
        programs: Programs that the network is exported as; empty for one that runs ``run`` on the
            first example of the batch.
        learning_rate: Learning rate of Adam.
        warmup_steps: Number of float steps before the calibration.
        range_margin: Fraction by which ranges are wider than what calibration observed.
        task_class: LightningModule that trains it; None for :class:`ForeignTask`.
    """

    title: str
    source: str
    module: Callable[[], nn.Module]
    batch: Callable[[], tuple[Any, ...]]
    loss: Callable[[Any], Tensor]
    run: Callable[..., Any] = lambda module, *batch: module(*batch)
    programs: tuple[ForeignProgram, ...] = ()
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    range_margin: float = 0.0
    task_class: type[ForeignTask] | None = None

    @property
    def exported(self) -> tuple[ForeignProgram, ...]:
        """Programs that the network is exported as."""
        return self.programs or (ForeignProgram(self.run, lambda module, *batch: first(batch)),)

    def task(self, seed: int = 0) -> ForeignTask:
        """Make a LightningModule that trains a new network, with the seed of weights and batch."""
        return (self.task_class or ForeignTask)(self, seed)


class ForeignTask(pl.LightningModule):
    """Train a network on one batch.

    Args:
        foreign: The network, its batch and its loss.
        seed: Seed of the weights; that of the batch is the next one.

    Attributes:
        losses: Loss of every training step.
    """

    def __init__(self, foreign: ForeignModule, seed: int = 0) -> None:
        super().__init__()
        self.foreign, self.seed = foreign, seed
        torch.manual_seed(seed)
        self.network: Any = foreign.module()
        self.losses: list[float] = []

    @override
    def forward(self, *batch: Any) -> Any:
        """Run the training forward of the network."""
        return self.foreign.run(self.network, *batch)

    @override
    def training_step(self, batch: tuple[Any, ...], batch_index: int) -> Tensor | None:
        """Compute the loss of the batch."""
        loss = self.foreign.loss(self(*batch))
        self.losses.append(float(loss.detach()))
        return loss

    @override
    def configure_optimizers(self) -> Any:
        """Train all parameters that have gradients with Adam."""
        trained = [each for each in self.network.parameters() if each.requires_grad]
        return torch.optim.Adam(trained, lr=self.foreign.learning_rate)

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return a loader that has the one batch."""
        batches: Any = [self.batch()]
        return DataLoader(batches, batch_size=None)

    def batch(self) -> tuple[Any, ...]:
        """Make the batch of the network, the same in every call."""
        torch.manual_seed(self.seed + 1)
        return self.foreign.batch()


def with_features(features: Callable[..., Tensor]) -> tuple[ForeignProgram, ForeignProgram]:
    """Return the program of a classifier of images, and one that returns its features, too.

    Args:
        features: Function from the network and images to the features that it pools.
    """
    arguments: Callable[..., tuple[Any, ...]] = lambda network, *batch: first(batch)  # noqa: E731
    return (
        ForeignProgram(lambda network, images: network(images), arguments),
        ForeignProgram(features, arguments, "features", is_deployed=False),
    )


def first(batch: Any) -> Any:
    """Return the first example of every tensor of a batch.

    Args:
        batch: Nested tensors, shape ``(batch, ...)`` each.
    """
    return tree_map(lambda x: x[:1] if isinstance(x, Tensor) else x, batch)


def classification(classes: int, *, smoothing: float = 0.0) -> Callable[[Tensor], Tensor]:
    """Return a loss that asks for the classes 0, 1, 2, … in turn.

    Args:
        classes: Number of classes; logits have shape ``(..., classes)``.
        smoothing: Label smoothing; the loss of a network that knows its batch is not zero then.
    """

    def loss(logits: Tensor) -> Tensor:
        labels = torch.arange(logits.numel() // classes, device=logits.device) % classes
        scores = logits.reshape(-1, classes)
        return F.cross_entropy(scores, labels, label_smoothing=smoothing)

    return loss


def regression(result: Tensor) -> Tensor:
    """Compute the mean square error of a result, any shape, to a fixed sine."""
    steps = torch.arange(result.numel(), device=result.device, dtype=torch.float32)
    return F.mse_loss(result, torch.sin(0.1 * steps).view_as(result))
