"""Rows of parameters that arguments name, one by one or in bags, are LiteRT's in every bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.deploy.tflite import read_program
from lightning_nna.testing.operator_oracle import CHECKS, SPECS, Check, Example, check_operator
from lightning_nna.testing.replay import replays
from tests.emulation.modules import Function

pytestmark = pytest.mark.exactness


class Rows(nn.Module):
    """A parameter whose rows a function reads."""

    def __init__(self, function: object, *shape: int) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, index: Tensor) -> Tensor:
        return self.function(self.weight, index)  # type: ignore[operator, no-any-return]


LOOK_UPS = {
    "item": lambda weight, index: weight[index],
    "method": lambda weight, index: weight.index_select(0, index.flatten()),
    "keywords": lambda weight, index: torch.index_select(input=weight, dim=0, index=index[0]),
}
BAGS = [
    Example(lambda: nn.EmbeddingBag(7, 40, mode="mean"), ((260, 6),), rows=7),
    Example(lambda: nn.EmbeddingBag(7, 40, mode="sum"), ((260, 6),), rows=7),
    Example(lambda: nn.EmbeddingBag(7, 40, mode="max"), ((260, 6),), rows=7),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("index", range(len(BAGS)))
def test_oracle_of_bags(index: int, check: Check) -> None:
    check_operator("embedding_bag", [BAGS[index]], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ["item", "method"])
def test_oracle_of_rows(name: str, check: Check) -> None:
    example = Example(lambda: Rows(LOOK_UPS[name], 2, 12), ((100, 10),), rows=2)
    check_operator("embedding", [example], checks=[check], runtime="litert")


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 3, 2)])
@pytest.mark.parametrize("name", LOOK_UPS)
def test_rows_of_any_shape(tmp_path: Path, name: str, shape: tuple[int, ...], bits: int) -> None:
    net = Rows(lambda weight, index: LOOK_UPS[name](weight, index).tanh(), *shape)
    index = torch.randint(5, (4, 6))
    in_float = net(index)
    in_float.sum().backward()
    expected, net.weight.grad = net.weight.grad, None
    calibrate(net, [[index]], forward=lambda net, batch: net(*batch), spec=SPECS[bits])
    with emulate(net, SPECS[bits]):
        result = net(index)
        result.sum().backward()
    assert net.weight.grad is not None
    assert expected is not None
    assert torch.allclose(result, in_float, atol=0.05)
    assert torch.allclose(net.weight.grad, expected, atol=0.1 * float(expected.abs().max()))
    model = export_tflite(net, [index], tmp_path / "rows.tflite")
    assert "GATHER" in model.operators
    assert not read_program(model.path).fixed  # Another index has other rows.
    assert verify(net, model.path, [index]) == 1.0


def test_fixed_rows_are_a_constant() -> None:
    index = torch.tensor([1, 0, 1])

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))
            self.register_buffer("index", index)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.weight[self.index]  # type: ignore[index]

    table = coverage(Fixed(), torch.randn(3, 4))
    assert [row.site.rsplit("/", 1)[1] for row in table.rows] == ["add#0"]


def test_programs_number_rows_from_zero(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(5, 3))
    net, arguments = (
        Function(lambda x, k: x + weight[k]),
        [torch.randn(2, 3), torch.tensor([0, -1])],
    )
    calibrate(net, [arguments], forward=lambda net, batch: net(*batch))
    with emulate(net):
        assert torch.allclose(net(*arguments), arguments[0] + weight[[0, 4]], atol=0.1)
    with pytest.raises(IndexError, match="embedding#0 reads rows -1 to 0 of 5, and a program"):
        export_tflite(net, arguments, tmp_path / "rows.tflite")


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
@pytest.mark.parametrize("offsets", [[0, 3, 6], [0, 2, 7]])
def test_bags_by_offsets(tmp_path: Path, offsets: list[int], mode: str, bits: int) -> None:
    net = nn.EmbeddingBag(6, 8, mode=mode)
    arguments = [torch.randint(6, (9,)), torch.tensor(offsets)]
    replays(net, *arguments, spec=SPECS[bits])
    calibrate(net, [arguments], forward=lambda net, batch: net(*batch), spec=SPECS[bits])
    with emulate(net, SPECS[bits]):
        result = net(*arguments)
    assert torch.allclose(result, net(*arguments), atol=0.1)
    model = export_tflite(net, arguments, tmp_path / "bags.tflite")
    assert verify(net, model.path, arguments) == 1.0
    assert tuple(read_program(model.path).fixed) == (1,)


@pytest.mark.parametrize("bits", SPECS)
def test_factors_of_rows(tmp_path: Path, bits: int) -> None:
    table = nn.Parameter(torch.randn(6, 8))

    def bag(index: Tensor, factors: Tensor) -> Tensor:
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=factors)

    net, arguments = Function(bag), [torch.randint(6, (5, 4)), torch.rand(5, 4)]
    replays(net, *arguments, spec=SPECS[bits])
    calibrate(net, [arguments], forward=lambda net, batch: net(*batch), spec=SPECS[bits])
    with emulate(net, SPECS[bits]):
        assert torch.allclose(net(*arguments), bag(*arguments), atol=0.1)
    model = export_tflite(net, arguments, tmp_path / "bags.tflite")
    assert verify(net, model.path, arguments) == 1.0


@pytest.mark.parametrize("settings", [{"padding_idx": 0}, {"max_norm": 1.0}, {"sparse": True}])
def test_what_no_kernel_has_says_why(settings: dict[str, object]) -> None:
    net = nn.EmbeddingBag(6, 8, mode="sum", **settings)  # type: ignore[arg-type]
    (row,) = coverage(net, torch.randint(6, (3, 4))).fallbacks
    assert row.remedy
