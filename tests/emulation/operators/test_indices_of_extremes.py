"""Indices of extremes that programs compute are LiteRT's, on ties, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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


class Chosen(nn.Module):
    """An embedding of the positions of extremes, and a term with a gradient."""

    def __init__(self, function: Callable[[Tensor], Tensor], rows: int) -> None:
        super().__init__()
        self.table, self.function = nn.Embedding(rows, 4), function

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * x
        return self.table(self.function(y)) + y[:, :4]  # type: ignore[no-any-return]


# Other roundings choose other rows: what follows differs by more than rounding.
DISCRETE = ("fast_fidelity", "straight_through", "learned")
SAFE = [check for check in CHECKS if not any(word in check.__name__ for word in DISCRETE)]


@pytest.mark.parametrize("check", SAFE, ids=lambda check: check.__name__)
def test_oracle_of_maxima(check: Check) -> None:
    example = Example(lambda: Chosen(lambda y: y.argmax(-1), 5), ((10_000, 5),))
    check_operator("argmax", [example], checks=[check], runtime="litert")


@pytest.mark.parametrize("check", SAFE, ids=lambda check: check.__name__)
def test_oracle_of_minima(check: Check) -> None:
    example = Example(lambda: Chosen(lambda y: y.argmin(-1), 5), ((10_000, 5),))
    check_operator("argmin", [example], checks=[check], runtime="litert")


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "all": lambda x: x.argmax(),
    "all, axes stay": lambda x: torch.argmax(x, keepdim=True),
    "axis": lambda x: torch.argmin(x, 1),
    "axis stays": lambda x: x.argmax(dim=-2, keepdim=True),
    "NumPy's names": lambda x: torch.argmax(x, axis=0),
    "moved": lambda x: x.argmax(-1).transpose(0, 1)[1:],
    "maximum": lambda x: x.max(1).indices,
    "minimum": lambda x: torch.min(x, -1, keepdim=True)[1],
}


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", FORMS)
def test_indices_are_results(tmp_path: Path, name: str, bits: int) -> None:
    net = Function(lambda x: (x.tanh(), FORMS[name](x.tanh())))
    x = torch.randint(-3, 4, (6, 5, 7)) / 3  # Ties.
    calibrate(net, [[x]], forward=lambda net, batch: net(*batch), spec=SPECS[bits])
    with emulate(net, SPECS[bits]), torch.no_grad():
        value, index = net(x)
    assert index.dtype == torch.int64
    assert torch.equal(index, FORMS[name](value))
    model = export_tflite(net, [x], tmp_path / "index.tflite")
    assert model.left_out == ()
    assert verify(net, model.path, [x]) == 1.0
    _, output = run_tflite(model.path, [x])
    assert (output == index.numpy()).all()


def test_a_classifier_of_indices_alone(tmp_path: Path) -> None:
    net, x = Function(lambda x: (2 * x).argmax(-1)), torch.randn(50, 10)
    assert replays(net, x, spec="litert-int8")["ARG_MAX"] == 50
    calibrate(net, [[x]], forward=lambda net, batch: net(*batch))
    model = export_tflite(net, [x], tmp_path / "index.tflite")
    assert dict(model.operators) == {"MUL": 1, "ARG_MAX": 1}
    assert verify(net, model.path, [x]) == 1.0


def test_python_decides_by_no_index(tmp_path: Path) -> None:
    net, x = Function(lambda x: (2 * x).tanh()[int((2 * x).argmax())]), torch.randn(10)
    calibrate(net, [[x]], forward=lambda net, batch: net(*batch))
    with emulate(net), torch.no_grad():
        assert torch.allclose(net(x), (2 * x.max()).tanh(), atol=0.05)
    with pytest.raises(CaptureError, match="cannot decide by it"):
        export_tflite(net, [x], tmp_path / "index.tflite")


WIDE = "litert-int16x8"


@pytest.mark.parametrize("name", ["all", "all, axes stay", "axis stays", "moved", "maximum"])
def test_sixteen_bits_have_maxima(tmp_path: Path, name: str) -> None:
    """Their kernel is the one of the largest values."""
    net = Function(lambda x: (x.tanh(), FORMS[name](x.tanh())))
    x = torch.randint(-3, 4, (6, 5, 7)) / 3  # Ties.
    calibrate(net, [[x]], forward=lambda net, batch: net(*batch), spec=WIDE)
    model = export_tflite(net, [x], tmp_path / "index.tflite")
    assert model.left_out == ()
    assert "TOPK_V2" in model.operators
    assert verify(net, model.path, [x]) == 1.0


def test_sixteen_bits_have_minima() -> None:
    net = Function(lambda x: F.one_hot((2 * x).argmin(-1), 5) + 2 * x)
    assert not coverage(net, torch.randn(3, 5), spec=WIDE).fallbacks
