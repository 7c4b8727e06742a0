"""Plain recurrent layers and cells pass the oracle, and their states stay on the accelerator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_nna import emulate
from lightning_nna.testing.operator_oracle import CHECKS, Check, Example, check_operator
from lightning_nna.testing.replay import check_instructions, replays
from tests.emulation.chain import check_chain
from tests.emulation.operators.examples import Calling, layer

pytestmark = pytest.mark.exactness
SPECS = ["litert-int8", "litert-int16x8"]
EXAMPLES = {
    "two ways": Example(
        layer(lambda: nn.RNN(40, 32, 2, bidirectional=True)), ((6, 30, 40),), fast_tolerance=0.02
    ),
    "relu": Example(
        layer(lambda: nn.RNN(40, 70, nonlinearity="relu", batch_first=True)),
        ((30, 5, 40),),
        fast_tolerance=0.02,
    ),
    "without bias": Example(
        layer(lambda: nn.RNN(10, 80, bias=False)), ((5, 30, 10),), fast_tolerance=0.02
    ),
    # The state has 16 bits, where float32's rounding errs more often; beyond 1 it would be clipped.
    "cell": Example(
        lambda: Calling(lambda cell, x, h: cell(x, torch.tanh(h)), nn.RNNCell(40, 80)),
        ((130, 40), (130, 80)),
        fast_tolerance=0.02,
    ),
    "relu cell": Example(
        layer(lambda: nn.RNNCell(40, 80, nonlinearity="relu")),
        ((130, 40), (130, 80)),
        fast_tolerance=0.02,
    ),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", EXAMPLES)
def test_oracle(name: str, check: Check) -> None:
    check_operator("rnn", [EXAMPLES[name]], checks=[check], runtime="litert")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_packed_sequences_and_initial_states(nonlinearity: str, spec: str) -> None:
    torch.manual_seed(0)
    module = nn.RNN(9, 20, 2, nonlinearity=nonlinearity)
    x, lengths = torch.randn(12, 30, 9), torch.randint(3, 13, (30,))
    state = torch.randn(2, 30, 20).tanh()

    def forward(x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return module(packed, state)[0].data

    assert replays(module, x, forward=forward, spec=spec)["FULLY_CONNECTED"] >= 10_000
    with torch.no_grad():
        expected = forward(x)
        with emulate(module, spec) as chip:
            with chip.observing():
                forward(x)
            error = (forward(x) - expected).abs().max() / expected.abs().max()
    assert float(error) < 0.03


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_the_last_state_stays_on_the_accelerator(nonlinearity: str, spec: str) -> None:
    class Final(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.RNN(13, 24, nonlinearity=nonlinearity), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.layer(x)[1].squeeze(0))
            return result

    torch.manual_seed(2)
    module, x, recorded = Final(), torch.randn(7, 40, 13), []
    with emulate(module, spec) as chip, torch.no_grad():
        with chip.observing():
            module(x)
        with chip.running(recorder=recorded.append):
            result = module(x)
    check_instructions(recorded)
    check_chain(recorded, x, result)
