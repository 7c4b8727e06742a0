"""Arithmetic of indices that programs compute, one-hot vectors and counts are LiteRT's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import CaptureError, export_tflite, run_tflite, verify
from lightning_nna.testing.operator_oracle import CHECKS, SPECS, Check, Example, check_operator
from lightning_nna.testing.replay import replays
from tests.emulation.modules import Function

pytestmark = pytest.mark.exactness


def best(x: Tensor) -> Tensor:
    """Indices of the largest values of the last axis."""
    return x.topk(2, -1).indices


def moved(y: Tensor) -> Tensor:
    """Values at indices of which other indices are computed."""
    index = y.topk(5).indices
    return y.gather(1, (2 * index + 1) // 2 % 9)


ARITHMETIC = Example(lambda: Function(lambda x: moved(2 * x)), ((2000, 9),))
NUMBERS = Example(lambda: Function(lambda x: (2 * x > 0.1).long().float() * (2 * x)), ((2000, 9),))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_oracle_of_arithmetic(check: Check) -> None:
    check_operator("index_arithmetic", [ARITHMETIC], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_oracle_of_numbers(check: Check) -> None:
    check_operator("numbers_of_indices", [NUMBERS], checks=[check], runtime="litert")


def in_place(index: Tensor) -> Tensor:
    copy = index.clone()
    copy += 3
    return copy.mul_(2).remainder_(5).clamp_(1, 3)


# Of the indices (4, 3, 2) of the largest of six values.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda i: i + 1,
    "sum of two": lambda i: torch.add(i, i[:1, :1], alpha=2),
    "difference": lambda i: i - i[:, :1],
    "from a number": lambda i: 5 - i,
    "reversed": lambda i: torch.rsub(i, 7, alpha=3),
    "product": lambda i: 3 * i * i,
    "negative": lambda i: -i,
    "quotient": lambda i: (i - 3) // 2,
    "quotient of a number": lambda i: 7 // (i + 1),
    "quotient, as torch has it": lambda i: torch.floor_divide(i - 4, 3),
    "quotient by its mode": lambda i: torch.div(i - 3, 4, rounding_mode="floor"),
    "rest": lambda i: (i - 3) % 4,
    "rest of a number": lambda i: 7 % (i + 1),
    "rest, as torch has it": lambda i: torch.remainder(i - 3, -4),
    "largest": lambda i: torch.maximum(i, i.flip(-1)),
    "smallest": lambda i: torch.minimum(i, i.flip(-1)),
    "clamped": lambda i: i.clamp(1, 4),
    "clamped from below": lambda i: i.clamp(min=2) + i.clamp_min(1),
    "clamped from above": lambda i: torch.clip(i, max=2) - i.clamp_max(3),
    "in place": in_place,
    "selected": lambda i: torch.where(i > 2, i, 0),
    "selected by the method": lambda i: i.where(i != i.flip(-1), i - 1),
    "filled": lambda i: i.masked_fill(i == 3, -1),
    "equal": lambda i: (i == i.flip(-1)).long(),
    "not equal": lambda i: (i != 2).int(),
    "comparisons": lambda i: (i < 3).long() + (i <= 2) + 2 * (i > 1).long() + (i >= 4),
    "logic": lambda i: torch.where((i < 3) & ~(i == 1), i, 9),
    "of a condition": lambda i: (i > 2) * 3 + i,
    "types": lambda i: (i > 2).to(torch.int64) + i.int().to(torch.long),
    "joined": lambda i: torch.cat([i, i + 7], 1),
    "stacked": lambda i: torch.stack([i, 2 * i], -1),
    "one hot": lambda i: F.one_hot(i, 6),
    "one hot of more": lambda i: F.one_hot(i[..., 0] + 1, num_classes=9),
    "count": lambda i: (i > 2).sum(-1),
    "counts": lambda i: (i > 2).sum((0, 2), keepdim=True),
    "sum of all": lambda i: i.sum(),
    "moved": lambda i: i.transpose(0, 2)[:, 1:].reshape(-1)[::2] + 1,
}


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_indices_are_results(tmp_path: Path, name: str, bits: int) -> None:
    net, spec = Function(lambda x: (2 * x, FUNCTIONS[name](best(2 * x)))), SPECS[bits]
    x = torch.randint(-3, 4, (4, 3, 6)) / 3  # Ties.
    calibrate(net, [[x]], forward=lambda net, batch: net(*batch), spec=spec)
    with emulate(net, spec), torch.no_grad():
        y, index = net(x)
    expected = FUNCTIONS[name](torch.sort(y, descending=True, stable=True)[1][..., :2])
    assert index.dtype == expected.dtype
    assert torch.equal(index, expected)
    assert not coverage(net, x, spec=spec).fallbacks
    assert replays(net, x, spec=spec)
    model = export_tflite(net, [x], tmp_path / "index.tflite")
    assert model.left_out == ()
    for each in (x, x.flip(2)):
        assert verify(net, model.path, [each]) == 1.0
    _, output = run_tflite(model.path, [x])
    assert (output == index.numpy()).all()


# Of an activation (4, 3, 6), activations.
AS_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda y: best(y).float() + y[..., :2],
    "type": lambda y: best(y).to(torch.float32) / 5,
    "like another": lambda y: best(y).type_as(y).sigmoid(),
    "operand": lambda y: best(y) * y[..., 2:4],
    "one hot": lambda y: F.one_hot(y.argmax(-1), 6).float() @ y.transpose(1, 2),
    "one hot, an operand": lambda y: y * F.one_hot(y.argmax(-1), 6),
    "one of two": lambda y: torch.where(y > 0.2, 1, 0) * y,
    "count": lambda y: y * (y > 0).sum(-1, keepdim=True).float(),
    "more than 8 bits": lambda y: (200 * best(y)).float() + y[..., :2],
    "mean": lambda y: best(y).float().mean(-1),
}


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", AS_NUMBERS)
def test_numbers_are_exported(tmp_path: Path, name: str, bits: int) -> None:
    net, spec = Function(lambda x: AS_NUMBERS[name](2 * x)), SPECS[bits]
    x = torch.randperm(72).reshape(4, 3, 6) / 36 - 1  # So far apart that the order is float's.
    calibrate(net, [[x]], forward=lambda net, batch: net(*batch), spec=spec)
    with emulate(net, spec), torch.no_grad():
        result = net(x)
    assert torch.allclose(result, net(x), atol=0.02 * float(net(x).abs().max()))
    assert not coverage(net, x, spec=spec).fallbacks
    assert replays(net, x, inputs=[1.3 * x], spec=spec)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    for each in (x, x.flip(2)):
        assert verify(net, model.path, [each]) == 1.0


@pytest.mark.parametrize("bits", SPECS)
def test_integers_beyond_the_range_take_its_ends(tmp_path: Path, bits: int) -> None:
    """A cast alone would wrap around, and the largest of 200 would be the smallest."""
    net = Function(lambda x: 0.1 * (x.tanh().argmax(-1) * 200).float())
    near, far = torch.eye(6)[:1], torch.eye(6) * 3
    calibrate(net, [[near]], forward=lambda net, batch: net(*batch), spec=SPECS[bits])
    with emulate(net, SPECS[bits]), torch.no_grad():
        assert (net(far).diff() >= 0).all()
    assert replays(net, near, inputs=[far], spec=SPECS[bits])["CAST"] == 6


class Table(nn.Module):
    """Rows of a table, an odd number of rows after the best one's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return self.table((self.table.weight @ x[..., None]).argmax(1)[:, 0] + step) + x


def test_an_integer_argument_is_an_input(tmp_path: Path) -> None:
    net, x, step = Table(), torch.randn(50, 4), torch.zeros(50, dtype=torch.long)
    calibrate(net, [[x, step]], forward=lambda net, batch: net(*batch))
    model = export_tflite(net, [x, step], tmp_path / "net.tflite")
    assert {port.position for port in model.inputs} == {0, 1}
    assert verify(net, model.path, [x, step]) == 1.0


def test_python_may_decide_by_indices_of_no_instruction(tmp_path: Path) -> None:
    """A count of an argument's values, which no program needs."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(x), (x.argmax(-1) + 1) % 3 == 1

    net, x = Function(function), torch.randn(5, 6)
    calibrate(net, [[x]], forward=lambda net, batch: net(*batch), spec="litert-int8")
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert model.left_out == (1,)
    assert dict(model.operators) == {"TANH": 1}


def test_what_is_no_program_is_told(tmp_path: Path) -> None:
    x = torch.randn(5, 6)
    (row,) = coverage(Function(lambda x: F.one_hot((2 * x).argmax(-1))), x).fallbacks
    assert "num_classes" in row.remedy
    (row,) = coverage(Function(lambda x: (2 * x) // 3), x).fallbacks
    assert "no kernel rounds a quotient" in row.remedy
    net = Function(lambda x: (2 * x).argmax(-1) * 2**30 + 1)
    calibrate(net, [[x]], forward=lambda net, batch: net(*batch), spec="litert-int8")
    with pytest.raises(OverflowError, match="32 bits"):
        export_tflite(net, [x], tmp_path / "net.tflite")
    net = Function(lambda x: (2 * x).gather(1, x.argmax(1, True) // 2))
    calibrate(net, [[x]], forward=lambda net, batch: net(*batch), spec="litert-int8")
    with pytest.raises(CaptureError, match="values of the data decide, by aten::argmax"):
        export_tflite(net, [x], tmp_path / "net.tflite")
