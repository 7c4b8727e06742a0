"""Random networks as whole programs on TFLite-Micro and on TOSA: equal in every bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lightning_nna import coverage, emulate
from lightning_nna.deploy import Program, export_tflite, verify
from lightning_nna.testing.operator_oracle import SPECS_OF
from tests.emulation.random_networks import (
    BATCH,
    CLASSES,
    INPUTS,
    TIME,
    Network,
    deep_plan,
    not_covered,
    train,
)

pytestmark = [
    pytest.mark.exactness,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
#: Seeds and most blocks by runtime; every fourth network has activations of 16 bits.
DRAWS = [
    *(("tflm", seed, 30) for seed in range(40)),
    *(("tosa", seed, 12) for seed in range(16)),
]


@pytest.mark.parametrize(("runtime", "seed", "deepest"), DRAWS)
def test_a_program_is_equal(runtime: str, seed: int, deepest: int, tmp_path: Path) -> None:
    spec = SPECS_OF[runtime][16 if seed % 4 == 3 else 8]
    without = not_covered(spec)
    torch.manual_seed(seed)
    net = Network(deep_plan(random.Random(seed), deepest, without), embedded=False)
    x, new = torch.randn(BATCH, TIME, INPUTS), 1.2 * torch.randn(BATCH, TIME, INPUTS)
    assert not coverage(net, x, spec=spec).fallbacks
    with emulate(net, spec) as chip:
        with chip.observing():
            net(x)
        train(net, chip, x, steps=1)
    model = export_tflite(net.eval(), [x], tmp_path / "network.tflite")
    assert Program(model.path).runtime.name == runtime
    agreement = verify(net, model.path, [new], random_inputs=2)
    assert agreement == 1.0
    assert agreement.outputs == 3 * BATCH * TIME * CLASSES


def test_what_is_left_out_of_the_draw() -> None:
    """The records say so; a kernel that a runtime gets, or loses, changes this."""
    indices, comparisons = {"less its second", "chosen"}, {"where", "masked", "between"}
    assert not_covered("tflm-int8") == {*indices, "marked"}
    assert not_covered("tosa-int8") == {*indices, *comparisons}
    assert not_covered("tosa-int16x8") == {*indices, *comparisons, "marked"}
    extremes = {"less its largest", "less its smallest", "log softmax"}
    assert not_covered("tflm-int16x8") == {*indices, *comparisons, *extremes, "marked"}
