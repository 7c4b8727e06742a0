"""Provenance ids follow elements through whatever PyTorch does to a tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_nna.deploy.provenance import CONSTANT, RANDOM, STEERING, Provenance


def assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = x[:, 1]
    y[torch.tensor([True, False]), :, 2:] = x[1:, :, :2]
    return y


MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(6, 4),
    "copy of a transposition": lambda x: x.transpose(0, 2).contiguous(),
    "slice with a step": lambda x: x[:, ::2, 1:],
    "index": lambda x: x[:, [2, 0, 0]],
    "index_select": lambda x: x.index_select(2, torch.tensor([3, 1])),
    "gather": lambda x: x.gather(2, torch.zeros(2, 3, 1, dtype=torch.long)),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 0),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1),
    "unfold": lambda x: x.unfold(2, 3, 1),
    "split and cat": lambda x: torch.cat(list(reversed(x.split([1, 2], 1))), 1),
    "stack": lambda x: torch.stack(x.unbind(1), 2),
    "double": lambda x: x.double(),
    "in place": lambda x: torch.empty(3, 2, 4).copy_(x.transpose(0, 1)),
    "reflected": lambda x: F.pad(x, (1, 2), mode="reflect"),
    "reflected on two sides": lambda x: F.pad(x[None], (1, 2, 1, 1), mode="reflect"),
    "replicated": lambda x: F.pad(x[None], (1, 2, 0, 3), mode="replicate"),
    "circular": lambda x: F.pad(x, (1, 2), mode="circular"),
    "rotated": lambda x: x.rot90(1, (1, 2)),
    "flipped": lambda x: x.fliplr().flipud(),
    "of a grid": lambda x: torch.meshgrid(x[0, 0], x[0, 1], indexing="ij")[1],
    "broadcast": lambda x: torch.broadcast_tensors(x[:1], x)[0],
    "repeated unevenly": lambda x: x.repeat_interleave(torch.tensor([1, 2, 3]), 1),
    "taken": lambda x: x.take(torch.tensor([1, 5, 2])),
    "taken along an axis": lambda x: x.take_along_dim(torch.tensor([[[1], [0], [2]]]), 2),
    "selected by a mask": lambda x: x.masked_select(torch.tensor([True, False, True, True])),
    "swapped in place": lambda x: x.clone().swapdims_(0, 1),
    "scattered to a row": lambda x: x.select_scatter(x[1], 0, 0),
    "scattered to a slice": lambda x: x.slice_scatter(x[:, :, 2:], 2, 0, 2),
    "scattered to a diagonal": lambda x: x.diagonal_scatter(x.diagonal(0, 1, 2).flip(1), 0, 1, 2),
    "scattered by an index": lambda x: x.scatter(2, torch.tensor([[[1], [0], [2]]]), x[1:]),
    "scattered by a mask": lambda x: x.masked_scatter(torch.arange(4) % 3 == 0, x.flip(0)),
    "copied to rows": lambda x: x.index_copy(1, torch.tensor([2]), x[:, :1]),
    "put": lambda x: x.index_put((torch.tensor([0]), torch.tensor([1])), x[1, 0]),
    "assigned": assigned,
    "packed": lambda x: pad_packed_sequence(
        pack_padded_sequence(x, torch.tensor([3, 3]), batch_first=True), batch_first=True
    )[0],
}


@pytest.mark.parametrize("name", MOVED)
def test_a_layout_moves_ids_like_values(name: str) -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    with Provenance() as provenance:
        provenance.assign(x)
        moved = MOVED[name](x)
    assert torch.equal(provenance.ids(moved).double(), moved.double())


def test_what_is_filled_in_is_the_programs() -> None:
    x = torch.ones(2, 2)
    with Provenance() as provenance:
        provenance.assign(x)
        padded = F.pad(x, (1, 0))
        joined = torch.cat([x.new_zeros(1, 2), x])
        weight = torch.ones(2, 2) * 3
    assert provenance.ids(padded)[:, 0].tolist() == [CONSTANT] * 2
    assert provenance.ids(joined)[0].tolist() == [CONSTANT] * 2
    assert provenance.ids(weight).unique().tolist() == [CONSTANT]


ZEROS: dict[str, Callable[[Tensor], Tensor]] = {
    "tril": lambda x: x.tril(),
    "triu": lambda x: x.triu(1),
    "diag_embed": torch.diag_embed,
    "block_diag": lambda x: torch.block_diag(x[0], x[1]),
    "index_fill": lambda x: x.index_fill(1, torch.tensor([0]), 0.0),
    "assigned": lambda x: x.clone().index_put_((torch.tensor([0]),), torch.tensor(0.0)),
    "filled": lambda x: x.scatter(2, torch.tensor([[[1], [0], [2]]]), 0.0),
}


@pytest.mark.parametrize("name", ZEROS)
def test_zeros_that_a_layout_fills_in_are_the_programs(name: str) -> None:
    x = torch.arange(24.0).reshape(2, 3, 4) + 1
    with Provenance() as provenance:
        provenance.assign(x)
        moved = ZEROS[name](x)
    assert torch.equal(provenance.ids(moved).double() - CONSTANT, moved.double())


def test_a_computation_assigns_new_ids() -> None:
    x = torch.ones(3)
    with Provenance() as provenance:
        first = provenance.assign(x)
        doubled = x * 2
        view = doubled[1:]
        x.add_(1)
    seen = torch.cat([first, provenance.ids(doubled), provenance.ids(x)])
    assert len(seen.unique()) == 9
    assert torch.equal(provenance.ids(view), provenance.ids(doubled)[1:])


def test_data_that_decide_about_a_layout_make_none() -> None:
    x, order = torch.randn(4), torch.randn(4)
    with Provenance() as provenance:
        first = provenance.assign(x)
        provenance.assign(order)
        chosen = x[order.argsort()]
    assert not set(provenance.ids(chosen).tolist()) & set(first.tolist())


def test_integers_that_come_in_steer() -> None:
    lengths = torch.tensor([2, 1])
    with Provenance() as provenance:
        provenance.assign(lengths)
        mask = torch.arange(2) < lengths[:, None]
    assert provenance.ids(mask).unique().tolist() == [STEERING]


def test_causes_are_those_of_all_operands_in_float_too() -> None:
    first, second = torch.tensor([2, 1]), torch.tensor([3, 3])
    with Provenance() as provenance:
        provenance.assign(first)
        provenance.assign(second)
        mask = (first < second).float() * 2.0
        drawn = torch.rand(2) + mask
        data = torch.ones(2)
        provenance.assign(data)
        mixed = data * mask
    assert provenance.causes(mask) == 0b11
    assert provenance.causes(drawn) == 0b11 | RANDOM
    assert provenance.causes(mixed) is None


def test_lengths_move_values_and_data_do_not() -> None:
    x, lengths = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([3, 1])
    with Provenance(origin=lambda: "here") as provenance:
        provenance.assign(x)
        provenance.assign(lengths)
        last = x[torch.arange(2), lengths - 1]
        kept = x.masked_fill((torch.arange(3) >= lengths[:, None])[..., None], 0.0)
        by_data = x[(x[:, 0, 0] * 0).long()]
    assert provenance.ids(last).tolist() == [[4, 5], [6, 7]]
    assert provenance.ids(kept)[1].tolist() == [[6, 7], [CONSTANT] * 2, [CONSTANT] * 2]
    assert provenance.layout_causes == 1
    assert int(provenance.ids(by_data).min()) > 13
    reason = provenance.reason(int(provenance.ids(by_data).min()))
    assert reason == "values of the data decide about the layout, by aten::index at here"


def test_results_that_nobody_asks_for_take_neither_ids_nor_memory() -> None:
    with Provenance() as provenance:
        x = torch.ones(1000)
        provenance.assign(x)
        y, handles = x, []
        for _ in range(1000):
            y = (y.clone() + 1).mul_(0.5)
            handles.append(StorageWeakRef(y.untyped_storage()))
    assert provenance.count == 1000
    assert sum(handle.expired() for handle in handles) == 999
    assert torch.equal(provenance.ids(y), torch.arange(1000, 2000))
    assert provenance.count == 2000


def test_memory_that_is_freed_and_used_again_has_no_ids() -> None:
    with Provenance() as provenance:
        x = torch.ones(1000)
        provenance.assign(x)
        for _ in range(1000):
            _ = x + 1
            unrelated = torch.zeros(1000)
            assert provenance.ids(unrelated).unique().tolist() == [CONSTANT]
