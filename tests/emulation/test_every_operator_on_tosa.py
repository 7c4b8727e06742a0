"""Every operator on TOSA's reference model: equal in every bit, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_nna import calibrate, emulate
from lightning_nna.deploy import UnsupportedProgramError, export_tflite, verify
from lightning_nna.emulation.operators.catalog import operators
from lightning_nna.emulation.program import Instruction
from lightning_nna.testing.operator_oracle import (
    SPECS,
    SPECS_OF,
    check_operator,
    equals_the_runtime_on_random_inputs,
)
from lightning_nna.testing.replay import check_instructions
from tests.emulation.operators.examples import EXAMPLES

pytestmark = [
    pytest.mark.exactness,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
#: Kernels that the converter has no form for, or one that is no TOSA, by operator and width.
REFUSED = {
    ("attention", 16): "RESHAPE",  # Of 48 bits, around a product of more than three axes.
    ("elu", 8): "exp",
    ("layer_norm", 8): "RSQRT",
    ("layer_norm", 16): "RSQRT",
    ("log_softmax", 8): "LOG_SOFTMAX",
    ("log_softmax", 16): "OpTable: Unexpected output type",
    ("lstm", 8): "UNIDIRECTIONAL_SEQUENCE_LSTM",
    ("lstm", 16): "UNIDIRECTIONAL_SEQUENCE_LSTM",
    ("rms_norm", 8): "RSQRT",
    ("rms_norm", 16): "RSQRT",
    ("select", 8): "GREATER",
    ("select", 16): "LESS",
}
#: Of hundreds of instructions, all of which other operators have: run as one program.
WHOLE = {"gru"}
EACH = [(name, bits) for name in EXAMPLES for bits in operators()[name].widths]


@pytest.mark.parametrize(
    ("name", "bits"), sorted(each for each in {*EACH} - {*REFUSED} if each[0] not in WHOLE)
)
def test_it_is_equal_in_every_bit(name: str, bits: int) -> None:
    check_operator(
        name,
        EXAMPLES[name],
        widths=[bits],
        runtime="tosa",
        checks=[equals_the_runtime_on_random_inputs],
    )


@pytest.mark.parametrize("bits", SPECS)
def test_a_gru_is_equal_in_every_bit(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.GRUCell(16, 12), (torch.randn(300, 16), torch.randn(300, 12))
    calibrate(net, [x], forward=lambda net, x: net(*x), spec=SPECS_OF["tosa"][bits])
    path = export_tflite(net, x, tmp_path / "net.tflite").path
    agreement = verify(net, path, x)
    assert agreement == 1.0
    assert agreement.outputs >= 10_000


@pytest.mark.parametrize(("name", "bits"), sorted({*EACH} & {*REFUSED}))
def test_it_is_refused_by_name(name: str, bits: int) -> None:
    example = EXAMPLES[name][0]
    module, inputs = example.build(), example.inputs()
    recorded: list[Instruction] = []
    with emulate(module, SPECS[bits]) as chip, torch.no_grad():
        with chip.observing():
            module(*inputs)
        with chip.running(recorder=recorded.append):
            module(*inputs)
    others = {"QUANTIZE", "FULLY_CONNECTED", "MUL", "MEAN", "SUB", "ADD"}
    own = [each for each in recorded if each.operator not in others]
    with pytest.raises(UnsupportedProgramError, match=REFUSED[name, bits]):
        check_instructions(own, "tosa")


def test_all_refusals_are_of_operators_that_there_are() -> None:
    assert {*REFUSED} <= {*EACH}
