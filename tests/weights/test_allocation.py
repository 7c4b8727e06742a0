from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_nna.weights.allocation import BitAllocation, allocate_bits
from lightning_nna.weights.codebook import Codebook
from lightning_nna.weights.pipeline import WeightGrid
from lightning_nna.weights.price import Price
from lightning_nna.weights.selection import BitWidths

CANDIDATES = (1, 2, 3, 4, 8)


class Additive(nn.Module):
    """Four tensors whose squared errors add up, each with a weight of its own: no interplay."""

    IMPORTANCE = (1.0, 30.0, 0.1, 4.0)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ParameterList(torch.randn(16, 8) for _ in self.IMPORTANCE)
        self.whole = [part.detach().clone() for part in self.parts]

    def loss(self) -> Tensor:
        errors = [(p - w).square().sum() for p, w in zip(self.parts, self.whole, strict=True)]
        return sum(i * e for i, e in zip(self.IMPORTANCE, errors, strict=True)) + 1.0


class Calls:
    """Bytes that are read: those of each tensor as often as it is called; a closed form."""

    unit = "reads"

    def __init__(self, calls: Mapping[str, float]) -> None:
        self.calls = calls

    def __call__(self, name: str, weight: Tensor, grid: WeightGrid | None = None) -> float:
        index = (len(weight.unique()) - 1).bit_length()
        return self.calls.get(name, 1) * index * weight.numel() / 8


def allocate(module: Additive, **settings: object) -> BitAllocation:
    return allocate_bits(module, lambda m: m.loss(), candidates=CANDIDATES, **settings)


@pytest.mark.parametrize("mean_bits", [1.5, 2.0, 3.0, 4.0, 6.0])
def test_it_comes_near_to_the_best_of_all_choices(mean_bits: float) -> None:
    """Losses add up here, so every choice can be scored; greedy may be off by one tensor's step."""
    found = allocate(Additive(), target_mean_bits=mean_bits)
    assert found.mean_bits <= mean_bits

    def total(choice: tuple[int, ...]) -> float:
        return sum(
            row[b] - found.float_loss for row, b in zip(found.losses.values(), choice, strict=True)
        )

    fitting = [
        choice for choice in itertools.product(CANDIDATES, repeat=4) if sum(choice) / 4 <= mean_bits
    ]
    best = min(total(choice) for choice in fitting)
    mine = total(tuple(found.bits.values()))
    steps = [
        c for c in fitting if sum(a != b for a, b in zip(c, found.bits.values(), strict=True)) <= 1
    ]
    assert mine == min(total(choice) for choice in steps)
    assert mine <= 1.5 * best


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_a_price_is_paid_where_it_costs_the_loss_least(ratio: float) -> None:
    """Tensors of the same size that are read 1, 1, 10 and 0 times: every choice can be scored."""
    calls = {"parts.0": 1.0, "parts.1": 1.0, "parts.2": 10.0, "parts.3": 0.0}
    price = Calls(calls)
    assert isinstance(price, Price)
    found = allocate(Additive(), price=price, target_price_ratio=ratio)
    # 16 x 8 weights; a width of 8 bits has 128 values, and so an index of 7 bits.
    widths = {1: 1, 2: 2, 3: 3, 4: 4, 8: 7}
    prices = {name: {b: 16 * i * times for b, i in widths.items()} for name, times in calls.items()}
    assert found.prices == prices
    assert found.unit == "reads"
    budget = ratio * 16 * 7 * 12
    assert found.price == sum(prices[name][b] for name, b in found.bits.items()) <= budget
    # What is never read costs nothing.
    assert found.bits["parts.3"] == 8

    def total(choice: tuple[int, ...]) -> float:
        rows = zip(found.losses.values(), choice, strict=True)
        return sum(row[b] - found.float_loss for row, b in rows)

    fitting = [
        choice
        for choice in itertools.product(CANDIDATES, repeat=4)
        if sum(row[b] for row, b in zip(prices.values(), choice, strict=True)) <= budget
    ]
    mine = tuple(found.bits.values())
    steps = [c for c in fitting if sum(a != b for a, b in zip(c, mine, strict=True)) <= 1]
    assert total(mine) == min(total(choice) for choice in steps)
    assert total(mine) <= 1.5 * min(total(choice) for choice in fitting)
    absolute = allocate(Additive(), price=price, target_price=budget)
    assert absolute == found


def test_a_width_that_costs_more_than_a_wider_one_is_not_kept() -> None:
    class Bumpy(Calls):
        def __call__(self, name: str, weight: Tensor, grid: WeightGrid | None = None) -> float:
            index = (len(weight.unique()) - 1).bit_length()
            return {1: 10.0, 2: 60.0, 3: 60.0, 4: 20.0, 7: 50.0}[index]

    found = allocate(Additive(), price=Bumpy({}), target_price=80.0)
    assert set(found.bits.values()) <= {1, 4}
    free = allocate(Additive(), price=Bumpy({}), target_price=240.0)
    assert set(free.bits.values()) == {8}


def test_prices_get_the_scales_of_the_integers() -> None:
    grids: list[WeightGrid | None] = []

    class Recording(Calls):
        def __call__(self, name: str, weight: Tensor, grid: WeightGrid | None = None) -> float:
            assert grid is not None
            integers = weight / grid.scales[:, None].repeat_interleave(16 // len(grid.scales), 0)
            torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-4)
            grids.append(grid)
            return super().__call__(name, weight, grid)

    allocate(Additive(), price=Recording({}), target_price_ratio=0.5)
    assert len(grids) == 4 * len(CANDIDATES)


def test_a_price_that_is_not_finite() -> None:
    with pytest.raises(FloatingPointError, match=r"parts.0 with 1 bits costs nan"):
        allocate(Additive(), price=Calls({"parts.0": float("nan")}), target_price=9.0)


def test_sizes_are_exact_to_the_byte() -> None:
    module = nn.Sequential(nn.Linear(7, 5), nn.Conv1d(3, 4, 2))
    found = allocate_bits(
        module,
        lambda m: m[0](torch.ones(7)).sum() ** 2,
        target_bytes=100,
        candidates=CANDIDATES,
        granularity="per_channel",
    )
    expected = 0
    for name, rows, count in (("0.weight", 5, 35), ("1.weight", 4, 24)):
        bits = found.bits[name]
        expected += (count * bits + 7) // 8 + 2**bits + 4 * rows
    assert found.packed_bytes == expected <= 100


def test_the_module_is_as_it_was_even_when_the_loss_fails() -> None:
    module = Additive()
    module.train()
    module.parts.eval()
    before = copy.deepcopy(module.state_dict())
    allocate(module, target_mean_bits=2)
    calls = iter(range(6))

    def failing(m: nn.Module) -> Tensor:
        if next(calls) == 5:
            raise KeyError("a bug of the user's")
        return m.loss()

    with pytest.raises(KeyError):
        allocate_bits(module, failing, target_mean_bits=2, candidates=CANDIDATES)
    after = module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert module.training
    assert not module.parts.training


def test_it_is_saved_and_read_by_the_weight_methods(tmp_path: Path) -> None:
    module = Additive()
    found = allocate(module, target_mean_bits=3)
    path = tmp_path / "deep" / "bits.json"
    found.save(path)
    assert BitAllocation.load(path) == found
    priced = allocate(module, price=Calls({}), target_price_ratio=0.5)
    priced.save(tmp_path / "priced.json")
    assert BitAllocation.load(tmp_path / "priced.json") == priced
    assert BitWidths(8, overrides=path).of(module) == found.bits == found.overrides
    assert list(path.parent.iterdir()) == [path]


def test_the_table_has_every_tensor_and_the_whole() -> None:
    found = allocate(Additive(), target_mean_bits=3)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines] == ["tensor", *found.bits, "all"]
    assert lines[-1].split()[-1] == str(found.packed_bytes)
    assert len({len(line) for line in lines}) == 1
    priced = allocate(Additive(), price=Calls({}), target_price_ratio=0.5)
    lines = str(priced).splitlines()
    assert (lines[0].split()[-1], lines[-1].split()[-1]) == ("reads", f"{priced.price:.0f}")
    assert len({len(line) for line in lines}) == 1


def test_a_width_that_breaks_the_network_is_not_chosen() -> None:
    module = Additive()

    def loss(m: Additive) -> float:
        values = len(m.parts[2].unique())
        return float("nan") if values <= 2 else float(m.loss())

    found = allocate_bits(module, loss, target_mean_bits=2, candidates=CANDIDATES)
    assert found.bits["parts.2"] > 1


def test_widths_are_those_of_codebooks() -> None:
    module = Additive()
    found = allocate(module, target_mean_bits=3)
    module.parts[0].data.copy_(Codebook.fit(module.parts[0].detach(), 2).project(module.parts[0]))
    assert float(module.loss().detach()) == found.losses["parts.0"][2]


def test_tables_of_channels_are_in_the_sizes() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), torch.randn(32, 16)
    y = net(x).detach()
    found = allocate_bits(
        *(net, lambda n: (n(x) - y).square().mean()),
        target_mean_bits=2,
        candidates=(1, 2, 3),
        codebook="per_channel",
    )
    assert found.sizes["0.weight"] == {b: 16 * 8 * b // 8 + 8 * 2**b + 4 for b in (1, 2, 3)}
    book = Codebook.fit(net[0].weight, 2, channels=8)
    net[0].weight.data.copy_(book.project(net[0].weight))
    with torch.no_grad():
        assert float((net(x) - y).square().mean()) == found.losses["0.weight"][2]
    with pytest.raises(ValueError, match=r"1.weight cannot have 16 centroids \(4 bits\)"):
        allocate_bits(
            net, lambda n: 0.0, target_mean_bits=2, candidates=(4,), codebook="per_channel"
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of target_bytes, target_mean_bits, .* got none"),
        ({"target_bytes": 9, "target_mean_bits": 1}, "got target_bytes, target_mean_bits"),
        ({"target_price": 9}, "target_price goes with a price"),
        ({"target_bytes": 9, "price": Calls({})}, "target_bytes goes without a price"),
        (
            {"target_price": 9, "price": Calls({})},
            "the target is 9 reads, and the least .* is 64 reads",
        ),
        ({"target_mean_bits": 0.5}, "the target is 256 bits, and the least .* is 512 bits"),
        ({"target_bytes": 10}, "the target is 10 bytes, and the least .* is 88 bytes"),
        ({"target_mean_bits": 2, "candidates": (0, 4)}, "got 0"),
        ({"target_mean_bits": 2, "candidates": ()}, "candidates is empty"),
        ({"target_mean_bits": 2, "targets": ["encoder"]}, "matches no weight"),
    ],
)
def test_wrong_arguments_are_named(settings: dict[str, object], message: str) -> None:
    chosen = {"candidates": CANDIDATES} | settings
    with pytest.raises(ValueError, match=message):
        allocate_bits(Additive(), lambda m: m.loss(), **chosen)


def test_a_loss_that_is_not_finite() -> None:
    with pytest.raises(FloatingPointError, match="is nan"):
        allocate_bits(Additive(), lambda m: float("nan"), target_mean_bits=2)
