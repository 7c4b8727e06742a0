"""Every operator on TOSA's reference model: equal in every bit, or missing by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import UnsupportedProgramError, export_tflite, verify
from lightning_nna.emulation.operators.catalog import operators
from lightning_nna.emulation.program import Instruction
from lightning_nna.testing.operator_oracle import (
    SPECS,
    SPECS_OF,
    Check,
    check_operator,
    equals_the_runtime_on_random_inputs,
    is_covered,
    is_exported,
)
from lightning_nna.testing.replay import check_instructions, replays
from tests.emulation.operators.examples import EXAMPLES, Calling

pytestmark = [
    pytest.mark.exactness,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
#: What the converter has no form for, or one that is no TOSA, of programs of LiteRT's presets, by
#: operator and width.
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
#: What the presets of TOSA leave to the CPU, with the kernel that is missing.
LACKING = {("select", 8): "GREATER of int8", ("select", 16): "LESS of int16"}
#: Of hundreds of instructions, all of which other operators have: run as whole programs, those of
#: the LSTM in `test_recurrent_on_tosa.py`.
WHOLE = {"gru", "lstm"}
EACH = [(name, bits) for name in EXAMPLES for bits in operators()[name].widths]
EQUAL = sorted(each for each in {*EACH} - {*LACKING} if each[0] not in WHOLE)


@pytest.mark.parametrize(
    "check",
    [equals_the_runtime_on_random_inputs, is_covered, is_exported],
    ids=lambda check: check.__name__,
)
@pytest.mark.parametrize(("name", "bits"), EQUAL)
def test_it_is_equal_in_every_bit(name: str, bits: int, check: Check) -> None:
    check_operator(name, EXAMPLES[name], widths=[bits], runtime="tosa", checks=[check])


@pytest.mark.parametrize(("name", "bits"), LACKING)
def test_what_it_lacks_is_named(name: str, bits: int) -> None:
    example = EXAMPLES[name][0]
    table = coverage(example.build(), *example.inputs(), spec=SPECS_OF["tosa"][bits])
    reason = f"the TOSA reference model has no kernel {LACKING[name, bits]}: compare "
    assert [row for row in table.fallbacks if row.remedy.startswith(reason)]


MATRICES = [
    ((4, 5), (5, 6)),
    ((5,), (5,)),
    ((4, 5), (5,)),
    ((3, 4, 5), (5, 6)),
    ((1, 4, 5), (7, 5, 6)),
    ((2, 3, 4, 5), (2, 3, 5, 6)),
    ((2, 3, 4, 5), (3, 5, 6)),
    ((5, 1, 4, 5), (3, 5, 6)),
    ((2, 3, 1, 4, 5), (2, 1, 3, 5, 6)),
]


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize(("left", "right"), MATRICES)
def test_products_of_any_axes(
    left: tuple[int, ...], right: tuple[int, ...], bits: int, tmp_path: Path
) -> None:
    """TOSA multiplies matrices with one batch axis: the program broadcasts and reshapes them."""
    torch.manual_seed(0)
    net, x = Calling(torch.matmul), [torch.randn(left), torch.randn(right)]
    spec = SPECS_OF["tosa"][bits]
    assert not coverage(net, *x, spec=spec).fallbacks
    assert replays(net, *x, spec=spec)["BATCH_MATMUL"] == torch.matmul(*x).numel()
    calibrate(net, [x], forward=lambda net, x: net(*x), spec=spec)
    model = export_tflite(net, x, tmp_path / "net.tflite")
    assert model.operators["BATCH_MATMUL"] == 1
    assert verify(net, model.path, x) == 1.0


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.normalize(x, dim=-1),
        lambda x: torch.linalg.vector_norm(x, dim=-1),
        lambda x: x.std(1),
        lambda x: F.cosine_similarity(x, x.roll(1, 1), dim=-1),
        lambda x: F.local_response_norm(x, 3),
        lambda x: F.group_norm(x, 2),
        lambda x: F.log_softmax(x, 1),
    ],
    ids=("normalize", "norm", "std", "cosine", "local response", "group norm", "log softmax"),
)
def test_roots_and_logarithms_are_tables(
    function: Callable[[Tensor], Tensor], bits: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x = Calling(function), torch.randn(20, 6, 10)
    spec = SPECS_OF["tosa"][bits]
    assert not coverage(net, x, spec=spec).fallbacks
    assert replays(net, x, inputs=[1.3 * x], spec=spec)["GATHER"] > 0
    calibrate(net, [x], spec=spec)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0


def test_the_table_of_a_root_is_half_as_long_as_one_of_all_integers(tmp_path: Path) -> None:
    net, x = nn.LayerNorm(6), torch.randn(40, 6)
    calibrate(net, [x], spec="tosa-int8")
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert 2**16 <= model.weight_bytes < 2**16 + 2**10


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


def test_constants_of_several_instructions(tmp_path: Path) -> None:
    """The converter takes those for weights; each instruction has its own, in one buffer."""

    def function(x: Tensor) -> Tensor:
        y, z = torch.tanh(x), torch.sigmoid(x) * 2 - 1
        y, z = torch.maximum(y, bound), torch.maximum(z, bound)
        return torch.cat([torch.minimum(y, -bound), torch.minimum(z, -bound)])

    bound = torch.tensor([[-0.5, -0.25, -0.125, -0.75]])
    net, x = Calling(function), torch.linspace(-3, 3, 200).view(50, 4)
    calibrate(net, [x], spec="tosa-int8")
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert model.operators["MAXIMUM"] == model.operators["MINIMUM"] == 2
    assert verify(net, model.path, [x]) == 1.0


def test_all_refusals_are_of_operators_that_there_are() -> None:
    assert {*REFUSED, *LACKING} <= {*EACH}
