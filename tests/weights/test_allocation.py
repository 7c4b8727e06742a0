from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_nna.weights.allocation import BitAllocation, allocate_bits
from lightning_nna.weights.codebook import Codebook
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
    assert BitWidths(8, overrides=path).of(module) == found.bits == found.overrides
    assert list(path.parent.iterdir()) == [path]


def test_the_table_has_every_tensor_and_the_whole() -> None:
    found = allocate(Additive(), target_mean_bits=3)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines] == ["tensor", *found.bits, "all"]
    assert lines[-1].split()[-1] == str(found.packed_bytes)
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
        ({}, "give one of target_bytes and target_mean_bits"),
        ({"target_bytes": 9, "target_mean_bits": 1}, "give one of"),
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
