"""Plans of an epoch, and loaders that stop and go on in the middle of it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import MonoCut
from lhotse.testing.dummies import dummy_cut, dummy_supervision

from recipes.asr.batches import BatchLoader, BatchPlan, Item, collate, seed_of


def cuts_of(durations: Sequence[float]) -> list[MonoCut]:
    return [
        dummy_cut(i, duration=d, supervisions=[dummy_supervision(i, duration=d)])
        for i, d in enumerate(durations)
    ]


DURATIONS = np.random.default_rng(0).lognormal(1.0, 0.6, size=200).round(2).tolist()


def flat(batches: list[list[int]]) -> list[int]:
    return [position for batch in batches for position in batch]


class TestPlan:
    @settings(deadline=None, max_examples=40)
    @given(
        durations=st.lists(st.floats(0.1, 20).map(lambda d: round(d, 2)), min_size=1, max_size=60),
        num_buckets=st.integers(1, 12),
        shuffle=st.booleans(),
        epoch=st.integers(0, 5),
    )
    def test_every_example_is_in_one_batch(
        self, durations: list[float], num_buckets: int, shuffle: bool, epoch: int
    ) -> None:
        plan = BatchPlan(
            cuts_of(durations), batch_seconds=30, num_buckets=num_buckets, shuffle=shuffle
        )
        batches = plan.epoch(epoch)
        assert sorted(flat(batches)) == list(range(len(durations)))
        assert len(batches) == len(plan)
        assert all(len(b) == 1 or len(b) * max(durations[i] for i in b) <= 30 for b in batches)

    def test_batches_hold_similar_durations(self) -> None:
        plan = BatchPlan(cuts_of(DURATIONS), batch_seconds=40, num_buckets=8)
        seconds = padded = 0.0
        for batch in plan.epoch(0):
            lengths = [DURATIONS[i] for i in batch]
            seconds, padded = seconds + sum(lengths), padded + max(lengths) * len(lengths)
        in_order = [DURATIONS[i : i + 10] for i in range(0, 200, 10)]
        assert seconds / padded > 0.85
        assert seconds / sum(max(d) * len(d) for d in in_order) < 0.6

    def test_an_epoch_is_shuffled_its_own_way_and_repeatable(self) -> None:
        def plans(seed: int) -> list[list[list[int]]]:
            plan = BatchPlan(cuts_of(DURATIONS), batch_seconds=40, shuffle=True, seed=seed)
            return [plan.epoch(epoch) for epoch in (0, 1, 2)]

        first = plans(7)
        assert plans(7) == first
        assert first[0] != first[1] != first[2]
        assert plans(8) != first
        # The buckets, too, come in another order.
        sizes = [[len(batch) for batch in epoch] for epoch in first]
        assert sizes[0] != sizes[1]

    def test_an_epoch_repeats_when_it_is_set_again(self) -> None:
        plan = BatchPlan(cuts_of(DURATIONS), batch_seconds=40, shuffle=True)
        third = plan.epoch(3)
        plan.epoch(0)
        assert plan.epoch(3) == third

    def test_without_shuffling_all_epochs_are_equal(self) -> None:
        plan = BatchPlan(cuts_of(DURATIONS), batch_seconds=40)
        assert plan.epoch(0) == plan.epoch(5)

    def test_a_curriculum_begins_with_short_utterances(self) -> None:
        settings = {"batch_seconds": 40, "shuffle": True}
        plain = BatchPlan(cuts_of(DURATIONS), **settings)
        plan = BatchPlan(cuts_of(DURATIONS), curriculum_epochs=1, **settings)
        longest = [max(DURATIONS[i] for i in batch) for batch in plan.epoch(0)]
        assert longest == sorted(longest)
        assert sorted(map(sorted, plan.epoch(0))) == sorted(map(sorted, plain.epoch(0)))
        assert plan.epoch(1) == plain.epoch(1)

    @pytest.mark.parametrize("world_size", [2, 3])
    def test_processes_share_the_examples_evenly(self, world_size: int) -> None:
        plans = [
            BatchPlan(
                cuts_of(DURATIONS), batch_seconds=40, shuffle=True, rank=r, world_size=world_size
            )
            for r in range(world_size)
        ]
        epochs = [plan.epoch(2) for plan in plans]
        assert len({len(epoch) for epoch in epochs}) == 1
        assert all(len(plan) == len(epoch) for plan, epoch in zip(plans, epochs, strict=True))
        assert sorted(i for epoch in epochs for i in flat(epoch)) == list(range(200))
        longest = [[max(DURATIONS[i] for i in batch) for batch in epoch] for epoch in epochs]
        apart = np.abs(np.subtract(longest[0], longest[1]))
        assert np.median(apart) < 1.0

    def test_a_single_example_is_repeated_for_every_process(self) -> None:
        plans = [
            BatchPlan(cuts_of([1.0]), batch_seconds=9, rank=rank, world_size=2) for rank in (0, 1)
        ]
        assert [plan.epoch(0) for plan in plans] == [[[0]], [[0]]]

    @pytest.mark.parametrize("setting", [{"batch_seconds": 0}, {"num_buckets": 0}])
    def test_settings_are_positive(self, setting: dict[str, int]) -> None:
        with pytest.raises(ValueError, match=r"data\.batch_seconds .* must be positive"):
            BatchPlan(cuts_of([1.0]), **{"batch_seconds": 9, **setting})


def item(position: int, epoch: int) -> Item:
    """A few frames that tell where they come from."""
    features = torch.full((position % 5 + 1, 2), float(100 * epoch + position))
    return Item(features, [position + 1] * (position % 3 + 1), f"u{position}", "TEXT")


def loader(**settings: int) -> BatchLoader:
    plan = BatchPlan(cuts_of(DURATIONS), batch_seconds=40, shuffle=True)
    return BatchLoader(plan, item, **settings)


def ids(batches: BatchLoader) -> list[tuple[str, ...]]:
    return [batch.ids for batch in batches]


class TestCollate:
    def test_padding_is_zero_and_lengths_are_true(self) -> None:
        batch = collate([item(4, 0), item(2, 0)])
        assert batch.features.shape == (2, 5, 2)
        assert batch.feature_lengths.tolist() == [5, 3]
        assert batch.features[1, 3:].abs().sum() == 0
        assert batch.targets.tolist() == [[5, 5, 0], [3, 3, 3]]
        assert batch.target_lengths.tolist() == [2, 3]
        assert (batch.ids, batch.texts) == (("u4", "u2"), ("TEXT", "TEXT"))


class TestLoader:
    def test_an_epoch_delivers_everything_once(self) -> None:
        batches = list(loader())
        assert len(batches) == len(loader())
        assert Counter(i for batch in batches for i in batch.ids) == {
            f"u{i}": 1 for i in range(200)
        }

    def test_items_depend_on_their_epoch(self) -> None:
        batches = loader()
        batches.sampler.set_epoch(3)
        first = next(iter(batches))
        assert first.features[0, 0, 0] == 300 + int(first.ids[0][1:])

    @pytest.mark.parametrize("delivered", [0, 1, 7, 19])
    def test_it_resumes_at_the_next_batch(self, delivered: int) -> None:
        uninterrupted, stopped, resumed = loader(), loader(), loader()
        uninterrupted.set_epoch(2)
        expected = ids(uninterrupted)
        stopped.set_epoch(2)
        iterator = iter(stopped)
        for _ in range(delivered):
            next(iterator)
        resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
        # Lightning makes the iterator first and tells the epoch afterwards.
        rest = iter(resumed)
        resumed.set_epoch(2)
        assert [batch.ids for batch in rest] == expected[delivered:]
        assert ids(resumed) == expected

    def test_after_a_complete_epoch_the_next_begins_at_its_start(self) -> None:
        finished, resumed, expected = loader(), loader(), loader()
        ids(finished)
        resumed.load_state_dict(finished.state_dict())
        resumed.set_epoch(1)
        expected.set_epoch(1)
        assert ids(resumed) == ids(expected)

    def test_a_resumed_loader_can_be_stopped_again(self) -> None:
        expected, first, second, third = ids(loader()), loader(), loader(), loader()
        iterator = iter(first)
        delivered = [next(iterator).ids for _ in range(3)]
        second.load_state_dict(first.state_dict())
        iterator = iter(second)
        delivered += [next(iterator).ids for _ in range(2)]
        third.load_state_dict(second.state_dict())
        assert delivered + ids(third) == expected

    def test_the_state_of_other_data_is_an_error(self) -> None:
        state = {**loader().state_dict(), "length": 3}
        with pytest.raises(ValueError, match="an epoch of 3 batches, this one has"):
            loader().load_state_dict(state)

    def test_the_training_generator_is_unchanged(self) -> None:
        before = torch.get_rng_state()
        ids(loader())
        assert torch.equal(torch.get_rng_state(), before)

    def test_workers_deliver_the_same(self) -> None:
        for batch, expected in zip(loader(), loader(num_workers=1), strict=True):
            assert isinstance(batch.ids, tuple)
            assert batch[4:] == expected[4:]
            assert torch.equal(batch.features, expected.features)


def test_seeds_differ_in_every_part() -> None:
    seeds = {seed_of(*parts) for parts in [(0, 0, "a"), (0, 1, "a"), (1, 0, "a"), (0, 0, "b")]}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**56 for seed in seeds)
