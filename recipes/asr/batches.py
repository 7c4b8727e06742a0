"""Batches of similar duration, planned by Lhotse, the same whenever an epoch is repeated.

Lhotse's bucketing sampler groups utterances by duration. Every bucket has its own batch size, so
that a batch holds about the same number of seconds and an epoch the same number of batches,
whatever its shuffling: Lightning asks for the length once. The batches of an epoch are planned at
its beginning from (seed, epoch) alone; a run that was stopped in the middle takes up the plan at
the batch where it left.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float, Int64
from lhotse import CutSet, MonoCut
from lhotse.dataset import DynamicBucketingSampler
from lhotse.dataset.sampling.dynamic_bucketing import (
    FixedBucketBatchSizeConstraint,
    estimate_duration_buckets,
)
from torch import Tensor

from recipes.asr.vocabulary import BLANK


class Batch(NamedTuple):
    """Padded utterances; a named tuple, so that Lightning moves its tensors to the device."""

    features: Float[Tensor, "batch frames mels"]
    """Normalized log-mel features in float32, padded with zeros (the mean)."""
    feature_lengths: Int64[Tensor, " batch"]
    """Frames of each utterance."""
    targets: Int64[Tensor, "batch labels"]
    """Label indices, padded with 0 (the blank)."""
    target_lengths: Int64[Tensor, " batch"]
    """Labels of each utterance."""
    ids: tuple[str, ...]
    """Utterance ids; the same at every speed."""
    texts: tuple[str, ...]
    """Reference transcripts."""


class Item(NamedTuple):
    """One utterance of a batch before padding."""

    features: Float[Tensor, "frames mels"]
    targets: list[int]
    id: str
    text: str


def collate(items: Sequence[Item]) -> Batch:
    """Pad items to one batch.

    Example:
        >>> batch = collate([Item(torch.ones(3, 2), [1], "a", "X"),
        ...                  Item(torch.ones(5, 2), [2, 1], "b", "YX")])
        >>> batch.features.shape, batch.targets.tolist()
        (torch.Size([2, 5, 2]), [[1, 0], [2, 1]])
    """
    features = torch.nn.utils.rnn.pad_sequence([i.features for i in items], batch_first=True)
    targets = [torch.tensor(i.targets, dtype=torch.long) for i in items]
    return Batch(
        features=features,
        feature_lengths=torch.tensor([len(i.features) for i in items]),
        targets=torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=BLANK),
        target_lengths=torch.tensor([len(i.targets) for i in items]),
        ids=tuple(i.id for i in items),
        texts=tuple(i.text for i in items),
    )


class BatchPlan:
    """Which examples each batch of an epoch holds.

    Args:
        cuts: One cut per example; a cut's first supervision has an id of its own.
        batch_seconds: Upper bound of the audio in a batch, padding included, in seconds. An
            utterance longer than that is a batch by itself.
        num_buckets: Number of groups by duration.
        shuffle: Whether the order depends on the epoch.
        curriculum_epochs: In this many epochs, the first ones, short utterances come before long
            ones.
        seed: Seed of the order.
        rank: Which of the processes this is.
        world_size: Number of processes; each gets its share of the batches, and as many as the
            others. Batches that are too few in the end are split among the processes.

    Example:
        >>> from lhotse.testing.dummies import dummy_cut, dummy_supervision
        >>> cuts = [dummy_cut(i, duration=1.0 + i, supervisions=[dummy_supervision(i)])
        ...         for i in range(6)]
        >>> plan = BatchPlan(cuts, batch_seconds=8.0, num_buckets=2)
        >>> sorted(i for batch in plan.epoch(3) for i in batch)
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self,
        cuts: Sequence[MonoCut],
        *,
        batch_seconds: float,
        num_buckets: int = 10,
        shuffle: bool = False,
        curriculum_epochs: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_seconds <= 0 or num_buckets < 1:
            raise ValueError(
                f"data.batch_seconds ({batch_seconds}) and data.num_buckets ({num_buckets}) "
                "have to be positive"
            )
        self.shuffle, self.seed, self.curriculum_epochs = shuffle, seed, curriculum_epochs
        self._durations = [cut.duration for cut in cuts]
        self._positions = {cut.supervisions[0].id: i for i, cut in enumerate(cuts)}
        bounds = _bucket_bounds(cuts, num_buckets)
        self._sampler = DynamicBucketingSampler(
            list(cuts),
            constraint=FixedBucketBatchSizeConstraint(
                max_seq_len_buckets=bounds,
                batch_sizes=[max(1, int(batch_seconds / bound)) for bound in bounds],
            ),
            duration_bins=bounds[:-1],
            # All cuts in the buffer: no bucket runs dry early, which keeps the epochs equal long.
            buffer_size=len(cuts),
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world_size=world_size,
            # Several processes step together: their batches should take equally long. With one
            # process it matters too: without it, Lhotse may stop at a bucket that is empty while
            # others are not.
            sync_buckets=True,
        )
        self._length = len(self.epoch(0))

    def __len__(self) -> int:
        """Number of batches of this process, in every epoch."""
        return self._length

    def epoch(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, as positions in ``cuts``."""
        self._sampler.set_epoch(epoch if self.shuffle else 0)
        # A supervision keeps its id where Lhotse repeats a cut under a new one.
        batches = [[self._positions[c.supervisions[0].id] for c in cuts] for cuts in self._sampler]
        if self.shuffle:
            # Lhotse visits the buckets in the same order in every epoch, small batches last. All
            # processes draw the same order, so that they still step through equal lengths.
            random.Random(seed_of(self.seed, epoch)).shuffle(batches)
        if epoch < self.curriculum_epochs:
            batches.sort(key=lambda batch: max(self._durations[i] for i in batch))
        return batches


class BatchLoader:
    """An iterable of batches that Lightning can stop and resume in the middle of an epoch.

    Lightning finds the length, the state and, by way of ``sampler``, `set_epoch`.

    Args:
        plan: The batches of each epoch.
        item: Makes item ``position`` for ``epoch``; depends on nothing else.
        num_workers: Processes that assemble batches ahead; 0 assembles them in this one, which
            is enough for features that are read from a memory map.
    """

    batch_sampler = None
    """Lightning reads it of whatever has a ``sampler``."""

    def __init__(
        self, plan: BatchPlan, item: Callable[[int, int], Item], *, num_workers: int = 0
    ) -> None:
        self.plan, self.item, self.num_workers = plan, item, num_workers
        self._epoch = 0
        self._delivered = 0
        self._start = 0

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        """Batches of the epoch; from where a loaded state left off, once.

        The body runs at the first ``next``: Lightning makes the iterator before it tells the
        epoch.
        """
        self._delivered, self._start = self._start, 0
        batches = self.plan.epoch(self._epoch)[self._delivered :]
        loader = torch.utils.data.DataLoader(
            _Assembly(batches, self.item, self._epoch),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            # Else it would draw from torch's global generator, whose state is the training's own.
            generator=torch.Generator(),
        )
        for batch in loader:
            self._delivered += 1
            yield batch

    @property
    def sampler(self) -> Self:
        """This loader: Lightning calls ``loader.sampler.set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; another one begins at its first batch."""
        if epoch != self._epoch:
            self._epoch, self._delivered, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its batches were handed out."""
        return {"epoch": self._epoch, "delivered": self._delivered, "length": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the epoch where `state_dict` was called.

        Raises:
            ValueError: If the state is that of other data, batch size or number of processes.
        """
        if state["length"] != len(self):
            raise ValueError(
                f"the checkpoint was written in an epoch of {state['length']} batches, this one "
                f"has {len(self)}; resume with the same data settings and number of processes"
            )
        self._epoch = state["epoch"]
        self._start = self._delivered = state["delivered"]


class _Assembly(torch.utils.data.Dataset):
    """The batches of one epoch as a map-style dataset, for worker processes."""

    def __init__(
        self, batches: list[list[int]], item: Callable[[int, int], Item], epoch: int
    ) -> None:
        self.batches, self.item, self.epoch = batches, item, epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return collate([self.item(position, self.epoch) for position in self.batches[index]])


def _as_it_is(batch: Any) -> Any:
    return batch


def seed_of(*parts: object) -> int:
    """A seed that depends on all parts, the same on every machine.

    Example:
        >>> seed_of(0, 1, "utterance") == seed_of(0, 1, "utterance") != seed_of(0, 2, "utterance")
        True
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _bucket_bounds(cuts: Sequence[MonoCut], num_buckets: int) -> list[float]:
    """The longest duration of each bucket, ascending, such that all hold equally many seconds."""
    longest = max(cut.duration for cut in cuts)
    num_buckets = min(num_buckets, len(cuts))
    if num_buckets == 1:
        return [longest]
    bounds = estimate_duration_buckets(CutSet.from_cuts(cuts), num_buckets)
    return [*sorted({float(bound) for bound in bounds if bound < longest}), longest]
