"""Random whole networks, trained emulated: every instruction is LiteRT's, and they connect."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lightning_nna import emulate
from lightning_nna.emulation.program import Instruction
from lightning_nna.testing.replay import check_instructions
from tests.emulation.chain import check_chain
from tests.emulation.random_networks import (
    BATCH,
    CLASSES,
    INPUTS,
    LABELS,
    TIME,
    Network,
    Plan,
    plans,
    train,
)

pytestmark = [
    pytest.mark.exactness,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
SPECS = {8: "litert-int8", 16: "litert-int16x8"}
#: They write numbers, or repeat some integers more often than others, which the chain does not
#: follow; programs of networks with them are run by `test_deep_random_networks.py`.
NOT_FOLLOWED = ("assigned", "filled", "reflected", "between", "masked", "less its second")
FEW = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # A failing network is small enough; making it smaller takes minutes.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def equals_litert(
    plan: list[Plan], bits: int, *, embedded: bool, training: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    net = Network(plan, embedded=embedded)
    floats, labels = torch.randn(BATCH, TIME, INPUTS), torch.randint(0, LABELS, (BATCH, TIME))
    x = labels if embedded else floats
    recorded: list[Instruction] = []
    with emulate(net, SPECS[bits]) as chip:
        with chip.observing():
            net(x)
        train(net, chip, x)
        with chip.running(recorder=recorded.append), torch.no_grad():
            result = net.train(training)(x)
    assert sum(check_instructions(recorded).values()) >= BATCH * TIME * CLASSES
    assert check_chain(recorded, x, result) >= len(recorded)


@pytest.mark.parametrize("bits", SPECS)
def test_every_instruction_is_the_references(bits: int) -> None:
    @FEW
    @given(plans(bits, NOT_FOLLOWED), st.booleans(), st.booleans(), st.integers(0, 2**16))
    def holds(plan: list[Plan], embedded: bool, training: bool, seed: int) -> None:
        equals_litert(plan, bits, embedded=embedded, training=training, seed=seed)

    holds()


def test_a_changed_integer_opens_the_chain() -> None:
    """The check of the chain itself: one integer less, or a result of another run, is noticed."""
    torch.manual_seed(0)
    net = Network([("layer", "linear", 8), ("function", "tanh")], embedded=False)
    x = torch.randn(BATCH, TIME, INPUTS)
    recorded: list[Instruction] = []
    with emulate(net) as chip, torch.no_grad():
        with chip.observing():
            net(x)
        with chip.running(recorder=recorded.append):
            result = net(x)
    assert check_chain(recorded, x, result) == len(recorded)
    operand = recorded[-1].inputs[0]
    assert operand is not None
    operand.integers[0, 0, 0] += 1
    with pytest.raises(AssertionError, match=r"head/fully_connected#0: operand 0 .* no source"):
        check_chain(recorded, x, result)
    operand.integers[0, 0, 0] -= 1
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        check_chain(recorded, x, result + 0.1)
