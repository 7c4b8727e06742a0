"""What ``verify`` compares, what it says of it, and what it cannot compare."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_nna.deploy
from lightning_nna import calibrate
from lightning_nna.deploy import Agreement, _extra, export_tflite, verify
from tests.deploy.networks import POORER_SPECS

pytestmark = pytest.mark.exactness


def test_random_inputs_find_what_the_batch_does_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 5, bias=False)), torch.randn(4, 6)
    calibrate(net, [x])
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    with torch.no_grad():
        net[0].weight.neg_()  # The sums of zeros stay as they are.
    alone = verify(net, path, [torch.zeros(4, 6)], random_inputs=0)
    found = verify(net, path, [torch.zeros(4, 6)])
    assert (alone, alone.outputs, alone.inputs) == (1.0, 20, 1)
    assert found < 0.5
    assert (found.outputs, found.inputs, found.skipped) == (100, 5, 0)
    assert found.differing == round(100 * (1 - found))


def test_an_agreement_is_a_number_that_says_more() -> None:
    found = Agreement(3, 4, inputs=2, skipped=1)
    assert (found, f"{found:.2f}", max(found, 0.5)) == (0.75, "0.75", 0.75)
    assert repr(found) == "0.75 of 4 outputs from 2 inputs, 1 skipped"
    copy = pickle.loads(pickle.dumps(found))
    assert (copy, copy.differing, copy.skipped) == (0.75, 1, 1)


class Changing(nn.Module):
    """Its results become what ``make`` says."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(6, 6), lambda y: y

    def forward(self, x: Tensor) -> Any:
        return self.make(self.linear(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda y: y[:, :1], r"result 0 has shape \(4, 1\) in the module and \(4, 6\) in the prog"),
        (lambda y: y[0], r"result 0 has shape \(6,\) in the module"),
        (
            lambda y: y > 0,
            r"result 0 is a torch\.bool tensor in the module and float32 in the prog",
        ),
        (lambda y: [], r"result 0 is a NoneType in the module"),
    ],
)
def test_results_of_another_form_are_named(make: Any, message: str, tmp_path: Path) -> None:
    net, x = Changing(), torch.randn(4, 6)
    calibrate(net, [x])
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    net.make = make
    with pytest.raises(ValueError, match=message):
        verify(net, path, [x])


def test_random_inputs_without_a_finite_value_are_skipped_and_counted(tmp_path: Path) -> None:
    class Energy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(torch.log(torch.relu(x)))

    net, x = Energy(), torch.rand(4, 6) + 1.0
    calibrate(net, [x], spec=POORER_SPECS[8])
    path = export_tflite(net, [x], tmp_path / "net.tflite", allow_cpu=True).path
    found = verify(net, path, [x])
    assert found > 0.9
    # Those that reach beyond the range come in as 0, too.
    assert (found.inputs, found.skipped) == (3, 2)


def test_labels_are_drawn_from_those_given(tmp_path: Path) -> None:
    net, labels = nn.Sequential(nn.Embedding(9, 4), nn.Tanh()), torch.tensor([[8, 2, 2]])
    calibrate(net, [labels])
    path = export_tflite(net, [labels], tmp_path / "net.tflite").path
    found = verify(net, path, [labels])
    assert (found, found.outputs) == (1.0, 60)


def test_without_the_extra_one_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if "lite" in name else name)
    message = r"needs ai_edge_litert: install the extra, pip install 'lightning-nna\[deploy\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        importlib.reload(_extra)
    monkeypatch.undo()
    importlib.reload(_extra)
    assert lightning_nna.deploy.__all__
