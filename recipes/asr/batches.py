"""Batches of similar duration, planned by Lhotse, equal whenever an epoch is repeated.

Lhotse's bucketing sampler groups utterances by duration. Every bucket has its own batch size, so
that all batches have about the same number of seconds and all epochs the same number of batches,
however they are shuffled: Lightning reads the length once. The batches of an epoch are planned at
its beginning from (seed, epoch) alone; a run that was stopped in the middle resumes the plan at the
next batch.
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
    """A batch of padded utterances; as a named tuple, Lightning moves its tensors to the device."""

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

    Args:
        items: Utterances, at least one.

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
    """A plan of the examples in each batch of every epoch.

    Args:
        cuts: One cut per example; the ids of the cuts' first supervisions are unique.
        batch_seconds: Upper bound of the audio in a batch, in seconds, padding included. A longer
            utterance is a batch by itself.
        num_buckets: Number of groups by duration, positive.
        shuffle: True for an order that depends on the epoch.
        curriculum_epochs: Number of first epochs in which short utterances come before long ones.
        seed: Seed of the order.
        rank: Index of this process, from 0.
        world_size: Number of processes; all get equally many batches. The last batches are split
            among the processes if they are too few.

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
                "must be positive"
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
            # With all cuts in the buffer no bucket is empty early, so that all epochs are equally
            # long.
            buffer_size=len(cuts),
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world_size=world_size,
            # Several processes step together: their batches should take equally long. One process
            # needs it, too: otherwise Lhotse may stop at an empty bucket while others are not.
            sync_buckets=True,
        )
        # The newest plan, by what it depends on: of 100,000 utterances one takes seconds.
        self._planned: tuple[tuple[int, bool], list[list[int]]] | None = None
        self._length = len(self.epoch(0))

    def __len__(self) -> int:
        """Return the number of batches of this process, equal in every epoch."""
        return self._length

    def epoch(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch, as positions in ``cuts``."""
        key = (epoch if self.shuffle else 0, epoch < self.curriculum_epochs)
        if self._planned is None or self._planned[0] != key:
            self._planned = key, self._plan(epoch)
        return [*self._planned[1]]

    def _plan(self, epoch: int) -> list[list[int]]:
        self._sampler.set_epoch(epoch if self.shuffle else 0)
        # Lhotse may repeat a cut under a new id; the id of its supervision stays.
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

    Lightning reads the length and the state, and calls `set_epoch` through ``sampler``.

    Args:
        plan: Plan of the batches of each epoch.
        item: Function of a position and an epoch that returns the item; depends on nothing else.
        num_workers: Number of processes that assemble batches ahead; 0 assembles them in this
            process, which is fast enough for features from a memory map.
    """

    batch_sampler = None
    """Lightning reads this attribute of every loader that has a ``sampler``."""

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
        """Yield the batches of the epoch; the first iteration after a loaded state resumes it.

        The body runs at the first ``next``: Lightning creates the iterator before it sets the
        epoch.
        """
        self._delivered, self._start = self._start, 0
        batches = self.plan.epoch(self._epoch)[self._delivered :]
        loader = torch.utils.data.DataLoader(
            _Assembly(batches, self.item, self._epoch),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            # Otherwise it would draw from torch's global generator, whose state training uses.
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
        """Set the epoch of the next iteration; a new epoch begins at its first batch."""
        if epoch != self._epoch:
            self._epoch, self._delivered, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, and the number of its batches that were delivered."""
        return {"epoch": self._epoch, "delivered": self._delivered, "length": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume the epoch at the call of `state_dict`.

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


def _unchanged(batch: Any) -> Any:
    return batch


def seed_of(*parts: object) -> int:
    """Derive a seed from all parts, equal on every machine.

    Args:
        parts: Objects whose texts are hashed.

    Example:
        >>> seed_of(0, 1, "utterance") == seed_of(0, 1, "utterance") != seed_of(0, 2, "utterance")
        True
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _bucket_bounds(cuts: Sequence[MonoCut], num_buckets: int) -> list[float]:
    """Return the longest duration of each bucket, in seconds; their total durations are equal."""
    longest = max(cut.duration for cut in cuts)
    num_buckets = min(num_buckets, len(cuts))
    if num_buckets == 1:
        return [longest]
    bounds = estimate_duration_buckets(CutSet.from_cuts(cuts), num_buckets)
    return [*sorted({float(bound) for bound in bounds if bound < longest}), longest]
