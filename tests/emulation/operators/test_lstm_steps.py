"""LSTMs of elementary instructions equal the spec's runtime in every bit, as do GRU and RNN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.emulation.spec import NNASpec, RuntimeName
from lightning_nna.testing.replay import replays

LSTM = "UNIDIRECTIONAL_SEQUENCE_LSTM"
PRESETS = ("litert-int8", "litert-int16x8", "tflm-int8", "tflm-int16x8")

pytestmark = [
    pytest.mark.exactness,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


def elementary(preset: str) -> dict[str, Any]:
    return {"preset": preset, "lstm": "elementary"}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("settings", "gain"),
    [
        ({}, 1.0),
        ({"num_layers": 2, "bidirectional": True}, 4.0),
        ({"proj_size": 5, "bias": False}, 9.0),
    ],
    ids=str,
)
def test_lstm(settings: dict[str, Any], gain: float, preset: str) -> None:
    torch.manual_seed(0)
    module = nn.LSTM(11, 14, **settings)
    for parameter in module.parameters():
        parameter.data.mul_(gain)
    x = torch.randn(12, 16, 11)
    compared = replays(module, x, inputs=(1.5 * x,), spec=elementary(preset))
    assert LSTM not in compared
    assert compared["FULLY_CONNECTED"] > 10_000
    assert compared["LOGISTIC"] >= 12 * 16 * 3 * 14


@pytest.mark.parametrize("preset", ["litert-int8", "tflm-int8"])
def test_packed_sequences_and_initial_states(preset: str) -> None:
    torch.manual_seed(1)
    module = nn.LSTM(6, 8, 2, bidirectional=True)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(9, 5, 6), [9, 7, 7, 2, 1])
    state = (0.5 * torch.randn(4, 5, 8), torch.randn(4, 5, 8))
    compared = replays(module, packed, state, spec=elementary(preset))
    assert compared["TANH"] == 2 * 26 * 4 * 8


@pytest.mark.parametrize("preset", ["tflm-int8", "tflm-int16x8"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.GRU(11, 14, 2, bidirectional=True),
        lambda: nn.RNN(11, 14, 2),
        lambda: nn.RNN(11, 14, nonlinearity="relu"),
    ],
    ids=["gru", "tanh", "relu"],
)
def test_other_recurrent_layers_on_tflite_micro(
    build: Callable[[], nn.Module], preset: str
) -> None:
    torch.manual_seed(2)
    x = torch.randn(23, 30, 11)
    compared = replays(build(), x, inputs=(1.5 * x,), spec=preset)
    assert compared["FULLY_CONNECTED"] > 10_000


class Loop(nn.Module):
    """A cell, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(7, 9)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x:
            state = self.cell(step, state)
            outputs.append(state[0])
        return torch.stack(outputs)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_cell_in_a_loop(preset: str) -> None:
    torch.manual_seed(3)
    compared = replays(Loop(), torch.randn(5, 12, 7), spec=elementary(preset))
    assert LSTM not in compared
    assert compared["TANH"] == 5 * 12 * 2 * 9


def test_where_a_runtime_has_no_kernel_the_form_is_elementary() -> None:
    for runtime in get_args(RuntimeName):
        spec = NNASpec(runtime=runtime)
        assert spec.lstm_form() == ("sequence" if runtime in ("litert", "tflm") else "elementary")
        assert spec.lstm_form(projected=True) == (
            "sequence" if runtime == "litert" else "elementary"
        )
        assert NNASpec(runtime=runtime, lstm="elementary").lstm_form() == "elementary"
    compared = replays(nn.LSTM(4, 6, proj_size=3), torch.randn(5, 6, 4), spec="tflm-int8")
    assert LSTM not in compared


def test_an_unknown_form_is_an_error() -> None:
    with pytest.raises(ValueError, match="lstm must be 'sequence', 'elementary'; got 'fused'"):
        NNASpec.from_mapping({"lstm": "fused"})


def distance(spec: dict[str, Any], module: nn.Module, x: Tensor) -> float:
    """Return the relative distance of the outputs from those of float."""
    with torch.no_grad():
        expected = module(x)[0]
        with emulate(module, spec) as emulator:
            with emulator.observing():
                module(x)
            outputs = module(x)[0]
    return float((outputs - expected).norm() / expected.norm())


def test_hidden_states_of_16_bits_are_nearer_to_float() -> None:
    torch.manual_seed(4)
    x = torch.randn(20, 32, 16)
    module, again = nn.LSTM(16, 32), nn.LSTM(16, 32)
    again.load_state_dict(module.state_dict())
    sequence = distance({"preset": "litert-int8"}, module, x)
    steps = distance(elementary("litert-int16x8"), again, x)
    assert steps < sequence / 2 < 0.02


@pytest.mark.parametrize("settings", [{}, {"proj_size": 4}, {"num_layers": 2}], ids=str)
def test_gradients_follow_those_of_float(settings: dict[str, Any]) -> None:
    torch.manual_seed(5)
    module, x = nn.LSTM(6, 10, **settings), torch.randn(8, 8, 6)

    def gradients() -> list[Tensor]:
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        module(leaf)[0].square().sum().backward()
        return [leaf.grad, *(p.grad.clone() for p in module.parameters())]

    expected = gradients()
    with emulate(module, elementary("litert-int8")) as emulator:
        with emulator.observing():
            observed = gradients()
        found = gradients()
    for in_float, seen, emulated in zip(expected, observed, found, strict=True):
        torch.testing.assert_close(seen, in_float, rtol=1e-3, atol=1e-4)
        assert torch.cosine_similarity(emulated.flatten(), in_float.flatten(), 0) > 0.98
