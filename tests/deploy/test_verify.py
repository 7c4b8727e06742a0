"""What ``verify`` compares, what it says of it, and what it cannot compare."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_nna.deploy
from lightning_nna import calibrate
from lightning_nna.deploy import Agreement, Program, _extra, export_tflite, program, verify
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


class Streaming(nn.Module):
    """An embedding and two LSTM layers, whose states are arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(7, 4), nn.LSTM(4, 5, 2, batch_first=True)

    def forward(self, label: Tensor, state: tuple[Tensor, Tensor]) -> Any:
        return self.lstm(self.embedding(label), state)


@pytest.mark.exactness
@pytest.mark.parametrize("runtime", ["litert-int8", "tflm-int8"])
@pytest.mark.parametrize("elements_at_once", [1, 200, 1 << 20])
def test_many_calls_have_the_results_of_each(
    runtime: str, elements_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "_ELEMENTS_AT_ONCE", elements_at_once)
    torch.manual_seed(0)
    streaming, image = Streaming(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    labels, states = torch.randint(7, (9, 1, 1)), torch.randn(9, 2, 2, 1, 5)
    spoken = [[label, (h, c)] for label, (h, c) in zip(labels, states, strict=True)]
    seen = [[x] for x in torch.randn(9, 1, 3, 5, 6)]
    for net, calls, order in ((streaming, spoken, ()), (image, seen, (0,))):
        calibrate(
            net, [tuple(x) for x in calls], forward=lambda net, call: net(*call), spec=runtime
        )
        path = tmp_path / "net.tflite"
        export_tflite(net, calls[0], path, channels_last_inputs=order, channels_last_outputs=order)
        loaded = Program(path)
        together, alone = loaded.run_all(calls), [loaded(call) for call in calls]
        assert len(together) == 9
        for results, expected in zip(together, alone, strict=True):
            assert [x.dtype for x in results] == [x.dtype for x in expected]
            for x, y in zip(results, expected, strict=True):
                np.testing.assert_array_equal(x, y, strict=True)
        assert any((x != y).any() for x, y in zip(together[0], together[1], strict=True))
        assert loaded.run_all([]) == []
        assert verify(net, path, calls[0]) == 1.0
