"""Emulated recurrent layers equal LiteRT's, every bit, and learn as they do in float."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.testing.replay import check_instructions, replays
from tests.emulation.chain import check_chain

LSTM = "UNIDIRECTIONAL_SEQUENCE_LSTM"

pytestmark = [
    pytest.mark.exactness,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


def _rough(module: nn.Module, gain: float) -> nn.Module:
    """Parameters so large that gates saturate and cells grow."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(gain)
    return module


@pytest.mark.parametrize("gain", [1.0, 4.0, 9.0])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"proj_size": 7},
        {"num_layers": 2, "proj_size": 3, "bidirectional": True, "bias": False},
    ],
    ids=str,
)
def test_lstm(settings: dict[str, int], gain: float) -> None:
    torch.manual_seed(len(settings))
    module = _rough(nn.LSTM(19, 22, **settings), gain)
    x = torch.randn(21, 33, 19)
    compared = replays(module, x, inputs=(1.5 * torch.randn(21, 33, 19),), spec="litert-int8")
    assert compared[LSTM] > 10_000 or "proj_size" in settings
    assert compared[LSTM] > 2_000


@pytest.mark.parametrize("rows", [0, 1])
def test_lstm_at_its_extremes(rows: int) -> None:
    """All weights and all inputs at the ends of their ranges: every sum is at its largest."""
    module = nn.LSTM(200, 16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_((torch.randn_like(parameter) > 0) * 2.0 - 1.0)
        module.weight_ih_l0[:5] = 1.0
    x = torch.ones(12, 60, 200)
    x[:, 30:] = -1.0
    x[rows] = (torch.randn(60, 200) > 0) * 2.0 - 1.0
    assert replays(module, x, spec="litert-int8")[LSTM] == 12 * 60 * 16


def test_packed_sequences_and_initial_states() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(11, 20, 2, bidirectional=True)
    packed = nn.utils.rnn.pack_padded_sequence(
        torch.randn(30, 9, 11), [30, 22, 22, 9, 5, 5, 5, 2, 1]
    )
    state = (0.5 * torch.randn(4, 9, 20), torch.randn(4, 9, 20))
    assert replays(module, packed, state, spec="litert-int8")[LSTM] == 101 * 80


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_cells_in_a_loop(kind: Callable[..., nn.Module]) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = kind(13, 24)

        def forward(self, x: Tensor) -> Tensor:
            state, outputs = None, []
            for step in x:
                state = self.cell(step, state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            return torch.stack(outputs)

    torch.manual_seed(0)
    compared = replays(Loop(), torch.randn(14, 40, 13), spec="litert-int8")
    assert compared[LSTM if kind is nn.LSTMCell else "LOGISTIC"] >= 14 * 40 * 24


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
@pytest.mark.parametrize("shape", [(7, 40, 13), (7, 13)])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_last_state_stays_on_the_chip(
    kind: Callable[..., nn.Module], shape: tuple[int, ...], spec: str
) -> None:
    """What reads it takes its integers: nothing comes from float but the sequences themselves."""

    class Final(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = kind(13, 24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            last = self.layer(x)[1]
            return self.head((last[0] if isinstance(last, tuple) else last).squeeze(0))

    torch.manual_seed(2)
    module, x, recorded = Final(), torch.randn(shape), []
    with emulate(module, spec) as chip, torch.no_grad():
        with chip.observing():
            module(x)
        with chip.running(recorder=recorded.append):
            result = module(x)
    check_instructions(recorded)
    check_chain(recorded, x, result)


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_gru(settings: dict[str, int], spec: str) -> None:
    torch.manual_seed(1)
    module = nn.GRU(15, 18, **settings)
    compared = replays(module, torch.randn(17, 35, 15), spec=spec)
    assert compared["FULLY_CONNECTED"] > 10_000
    assert compared["TANH"] > 10_000


def _gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    module(x)[0].square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in module.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize(
    "module",
    [
        nn.LSTM(6, 10, 2, bidirectional=True),
        nn.LSTM(6, 10, proj_size=4),
        nn.GRU(6, 10, 2, bidirectional=True),
    ],
    ids=["lstm", "projected", "gru"],
)
def test_gradients_follow_those_of_float(module: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.4, 0.4)
    x = torch.randn(12, 8, 6)
    expected = _gradients(module, x)
    with emulate(module) as chip:
        with chip.observing():
            observed = _gradients(module, x)
        found = _gradients(module, x)
    for in_float, seen, on_chip in zip(expected, observed, found, strict=True):
        torch.testing.assert_close(seen, in_float, rtol=1e-3, atol=1e-4)
        assert torch.cosine_similarity(on_chip.flatten(), in_float.flatten(), 0) > 0.98
