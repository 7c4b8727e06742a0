"""Recurrent layers as whole programs on TOSA's reference model: equal in every bit.

TOSA has no kernel of them: their programs are elementary instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import Program, export_tflite, verify
from tests.deploy.test_states import Stepping

pytestmark = [
    pytest.mark.exactness,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
PRESETS = ("tosa-int8", "tosa-int16x8")
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(7, 9),
    "lstm of two layers": lambda: nn.LSTM(7, 9, 2),
    "lstm in both directions": lambda: nn.LSTM(7, 9, bidirectional=True),
    "lstm of two layers in both directions": lambda: nn.LSTM(7, 9, 2, bidirectional=True),
    "lstm without biases": lambda: nn.LSTM(7, 9, bias=False),
    "projected lstm": lambda: nn.LSTM(7, 9, 2, proj_size=4),
    "gru": lambda: nn.GRU(7, 9),
    "gru of two layers": lambda: nn.GRU(7, 9, 2),
    "gru in both directions": lambda: nn.GRU(7, 9, bidirectional=True),
    "gru of two layers in both directions": lambda: nn.GRU(7, 9, 2, bidirectional=True),
    "gru without biases": lambda: nn.GRU(7, 9, bias=False),
    "rnn of tanh": lambda: nn.RNN(7, 9, 2),
    "rnn of relu": lambda: nn.RNN(7, 9, nonlinearity="relu"),
}


@pytest.mark.parametrize("spec", PRESETS)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_last_states(name: str, spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(5, 50, 7)
    for parameter in layer.parameters():
        parameter.data.mul_(2.5)  # Some gates saturate.
    assert not coverage(layer, x, spec=spec).fallbacks
    calibrate(layer, [x], spec=spec)
    model = export_tflite(layer, [x], tmp_path / "layer.tflite")
    assert "UNIDIRECTIONAL_SEQUENCE_LSTM" not in model.operators
    assert not model.left_out
    agreement = verify(layer, model.path, [x])
    assert Program(model.path).runtime.name == "tosa"
    assert agreement == 1.0
    assert agreement.outputs >= 5 * 5 * 50 * 4


@pytest.mark.parametrize("spec", PRESETS)
@pytest.mark.parametrize("name", [name for name in LAYERS if "both" not in name])
def test_states_go_in_and_out(name: str, spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    start: Any = [torch.zeros_like(s) for s in _listed(layer(torch.randn(1, 3, 7))[1])]
    net, x = Stepping(layer), torch.randn(6, 3, 7)
    net.head = nn.Linear(start[0].shape[-1], 3)
    nested = tuple(start) if len(start) == 2 else start[0]
    calibrate(net, [x], spec=spec)
    path = export_tflite(net, [x[:1], nested], tmp_path / "step.tflite").path
    assert verify(net, path, [x[:1], nested]) == 1.0
    program, steps, states = Program(path), [], start
    for step in x.split(1):
        output, *states = program([step, *states])
        steps.append(output)
    with emulate(net, spec), torch.no_grad():
        whole, end = net(x, nested)
    np.testing.assert_array_equal(np.concatenate(steps), whole.numpy())
    for found, expected in zip(states, _listed(end), strict=True):
        np.testing.assert_array_equal(found, expected.numpy())


def _listed(states: Any) -> list[Tensor]:
    return list(states) if isinstance(states, tuple) else [states]


@pytest.mark.parametrize("spec", PRESETS)
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell(kind: Callable[..., nn.Module], spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cell, x = kind(7, 9), torch.randn(400, 7)
    calibrate(cell, [x], spec=spec)
    path = export_tflite(cell, [x], tmp_path / "cell.tflite").path
    agreement = verify(cell, path, [x])
    assert agreement == 1.0
    assert agreement.outputs >= 10_000
