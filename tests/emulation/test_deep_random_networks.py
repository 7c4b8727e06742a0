"""Random networks of all operators, up to 30 blocks deep: emulation, program and LiteRT agree."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_nna import coverage, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.emulation.operators.catalog import operators
from lightning_nna.emulation.program import Instruction
from lightning_nna.testing.operator_oracle import SPECS_OF, runtime_for
from lightning_nna.testing.replay import check_instructions
from tests.emulation.modules import Function
from tests.emulation.random_networks import (
    BATCH,
    CLASSES,
    FUNCTIONS,
    INPUTS,
    LAYERS,
    TIME,
    Network,
    Plan,
    deep_plan,
    train,
)

pytestmark = [
    pytest.mark.exactness,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
SPECS = {8: "litert-int8", 16: "litert-int16x8"}
#: In 200 networks, every fourth has activations of 16 bits.
SEEDS = range(200)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_network_is_exported_and_equal(seed: int, tmp_path: Path) -> None:
    bits = 16 if seed % 4 == 3 else 8
    torch.manual_seed(seed)
    net = Network(deep_plan(random.Random(seed)), embedded=False)
    x, new = torch.randn(BATCH, TIME, INPUTS), 1.2 * torch.randn(BATCH, TIME, INPUTS)
    recorded: list[Instruction] = []
    with emulate(net, SPECS[bits]) as chip:
        with chip.observing():
            net(x)
        train(net, chip, x, steps=2)
        net.eval()
        with chip.running(recorder=recorded.append), torch.no_grad():
            net(new)
    assert sum(check_instructions(recorded).values()) >= BATCH * TIME * CLASSES
    model = export_tflite(net, [x], tmp_path / "network.tflite")
    assert verify(net, model.path, [new], runtime=runtime_for(model)) == 1.0


@pytest.mark.parametrize("seed", range(8))
def test_every_instruction_is_tflite_micros(seed: int) -> None:
    bits = 16 if seed % 4 == 3 else 8
    torch.manual_seed(seed)
    net = Network(deep_plan(random.Random(seed), 12), embedded=False).eval()
    x = torch.randn(BATCH, TIME, INPUTS)
    recorded: list[Instruction] = []
    with emulate(net, SPECS_OF["tflm"][bits]) as chip, torch.no_grad():
        with chip.observing():
            net(x)
        with chip.running(recorder=recorded.append):
            net(1.2 * x)
    assert sum(check_instructions(recorded, "tflm").values()) >= BATCH * TIME * CLASSES


@pytest.mark.parametrize("bits", SPECS)
def test_every_operator_is_drawn(bits: int) -> None:
    """The blocks consist of all operators of this width, and none of them falls back."""
    torch.manual_seed(0)
    blocks: list[Plan] = [("function", name) for name in FUNCTIONS]
    blocks += [("layer", name, 4) for name in LAYERS]
    drawn, fallbacks = set(), []
    for block in blocks:
        table = coverage(Network([block], embedded=False), torch.randn(3, 6, 5), spec=SPECS[bits])
        drawn.update(row.operator for row in table.rows)
        fallbacks += [(block[1], row.operator) for row in table.fallbacks]
    labels, x = torch.zeros(3, 6, dtype=torch.long), torch.randn(3, 6)
    others: list[tuple[nn.Module, torch.Tensor]] = [
        (Network([("layer", "linear", 4)], embedded=True), labels),
        (nn.EmbeddingBag(6, 4), labels),
    ]
    # No block follows indices.
    others += [(Function(lambda x: (2 * x).argmax(1) + (2 * x).argmin(1)), x)]
    for module, example in others:
        table = coverage(module, example, spec=SPECS[bits])
        drawn.update(row.operator for row in table.rows)
    assert not fallbacks
    assert {name for name, each in operators().items() if bits in each.widths} <= drawn
