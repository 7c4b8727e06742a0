"""Values that a program reads at indices it has computed are LiteRT's, and so are the gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import CaptureError, export_tflite, verify
from lightning_nna.emulation.operators.gather import _parsed
from lightning_nna.testing.operator_oracle import CHECKS, SPECS, Check, Example, check_operator
from lightning_nna.testing.replay import replays
from tests.emulation.modules import Function

pytestmark = pytest.mark.exactness

EXAMPLES = [
    Example(lambda: Function(lambda x: (2 * x).gather(1, (2 * x).topk(5).indices)), ((2000, 9),)),
    Example(
        lambda: Function(lambda x: (2 * x)[torch.arange(2000)[:, None], (2 * x).topk(5).indices]),
        ((2000, 9),),
    ),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_oracle(index: int, check: Check) -> None:
    check_operator("gather", [EXAMPLES[index]], checks=[check], runtime="litert")


def best(x: Tensor) -> Tensor:
    """Indices of the largest values of the last axis."""
    return x.topk(2, -1).indices


# Of an activation (4, 3, 6).
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "gather": lambda y: y.gather(-1, best(y)),
    "gather, another axis": lambda y: y.gather(0, y.topk(2, 0).indices),
    "gather, fewer rows": lambda y: torch.gather(y, dim=2, index=best(y)[:2, 1:]),
    "gather, rows at once": lambda y: y.gather(
        1, y.mean(-1).topk(2, 1)[1][..., None].expand(4, 2, 6)
    ),
    "gather, first rows": lambda y: y.gather(
        0, y[:, 0, 0].topk(2, 0)[1][:, None, None].expand(2, 3, 6)
    ),
    "along an axis": lambda y: torch.take_along_dim(y, best(y), -1),
    "along a broadcast axis": lambda y: torch.take_along_dim(y, best(y[:1, :1]), dim=2),
    "along a broadcast source": lambda y: torch.take_along_dim(y[:1], best(y), dim=2),
    "along all": lambda y: torch.take_along_dim(y, best(y)),
    "take": lambda y: torch.take(y, best(y)),
    "select": lambda y: y.index_select(1, best(y.mean(0)[..., :3])[0]),
    "rows": lambda y: y[best(y)[0] % 4],
    "columns": lambda y: y[:, :, best(y)[0, 0]],
    "last columns": lambda y: y[..., best(y)[0]],
    "of one row": lambda y: y[2, :, best(y)[0]],
    "a new axis": lambda y: y[:, None, best(y)[0] // 2],
    "side by side": lambda y: y[:, best(y)[0] // 2, best(y)[1]],
    "apart": lambda y: y[best(y)[0] // 2, :, best(y)[1]],
    "with positions": lambda y: y[torch.arange(4), 1, y[:, 1].argmax(-1)],
    "with a list": lambda y: y[[0, 3], best(y)[0, 0] // 2],
    "one": lambda y: y.reshape(-1)[y.argmax()],
    "of indices": lambda y: y.gather(-1, best(y).gather(-1, best(y)[..., :1] // 5)),
    "of a constant": lambda y: torch.linspace(-1, 1, 6)[best(y)],
    "of integers": lambda y: y[..., torch.tensor([3, 1, 4, 1, 5, 2])[best(y)[0, 0]]],
}  # fmt: skip


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", FORMS)
def test_forms_are_exported_and_have_gradients(tmp_path: Path, name: str, bits: int) -> None:
    torch.manual_seed(0)
    net, spec = Function(lambda x: FORMS[name](x.clamp(-3, 3))), SPECS[bits]
    x = torch.randperm(72).reshape(4, 3, 6) / 36 - 1  # So far apart that the order is float's.
    calibrate(net, [[x]], forward=lambda net, batch: net(*batch), spec=spec)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    with emulate(net, spec):
        result = net(leaf)
    expected = net(other)
    assert result.shape == expected.shape
    assert torch.allclose(result, expected, atol=0.02)
    weights = torch.randn(result.shape)
    for y in (result, expected):
        assert not y.requires_grad or (y * weights).sum().backward() is None
    for each in (leaf, other):
        each.grad = torch.zeros_like(x) if each.grad is None else each.grad
    assert torch.allclose(leaf.grad, other.grad, atol=1e-6)
    assert not coverage(net, x, spec=spec).fallbacks
    assert replays(net, x, inputs=[1.3 * x], spec=spec)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0
    assert verify(net, model.path, [x.flip(0, 2)]) == 1.0  # Other indices.


def test_indices_count_from_zero() -> None:
    net = Function(lambda x: (2 * x)[(2 * x).topk(1, 0).indices - 9])
    with pytest.raises(IndexError, match=r"gather#0 reads at -1 of 9.*write index % 9"):
        calibrate(net, [torch.arange(9.0)])


@pytest.mark.parametrize("bits", SPECS)
def test_an_index_that_no_instruction_computes_is_an_error(tmp_path: Path, bits: int) -> None:
    net, x = Function(lambda x: (2 * x).gather(1, x.argmax(1, True))), torch.randn(5, 6)
    calibrate(net, [[x]], forward=lambda net, batch: net(*batch), spec=SPECS[bits])
    with pytest.raises(CaptureError, match="values of the data decide, by aten::argmax"):
        export_tflite(net, [x], tmp_path / "net.tflite")


def test_masks_that_select_are_no_program() -> None:
    def function(x: Tensor) -> Any:
        y = 2 * x
        return y[y[:, 0] > 0, y[y[:, 0] > 0].topk(1).indices[:, 0]]

    table = coverage(Function(function), torch.randn(5, 6))
    assert any("torch.where" in row.remedy for row in table.fallbacks)


class Memory(nn.Module):
    """Rows of a buffer, which are constants of eight bits."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[(2 * x).argmax(-1)]


@pytest.mark.parametrize("bits", SPECS)
def test_rows_of_a_buffer(tmp_path: Path, bits: int) -> None:
    net, x = Memory(), torch.randn(20, 6)
    calibrate(net, [[x]], forward=lambda net, batch: net(*batch), spec=SPECS[bits])
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0
    assert verify(net, model.path, [-x]) == 1.0


@pytest.mark.parametrize(
    ("index", "axes", "is_first"),
    [
        ((torch.tensor([1]),), [0], False),
        ((slice(None), torch.tensor([1]), torch.tensor([0])), [1, 2], False),
        ((torch.tensor([1]), slice(None), torch.tensor([0])), [0, 2], True),
        ((0, slice(None), torch.tensor([0])), [1], False),
        ((None, torch.tensor([1]), None, torch.tensor([0])), [1, 3], True),
    ],
)
def test_axes_of_the_result(index: Any, axes: list[int], is_first: bool) -> None:
    x = torch.arange(24).reshape(2, 3, 4)
    view, found, numbers, first = _parsed(x, index)
    assert (found, first) == (axes, is_first)
    several = torch.stack(torch.broadcast_tensors(*numbers), -1)
    moved = x[view].movedim(found, tuple(range(len(found))))
    place = 0 if first else axes[0]
    assert torch.equal(x[index].movedim(place, 0), moved[tuple(several.unbind(-1))])
