"""Values that are written to a part of a tensor share its parameters, and a program has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_nna import calibrate, coverage, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.emulation.program import Instruction
from lightning_nna.testing.operator_oracle import CHECKS, SPECS, Check, Example, check_operator
from tests.emulation.modules import Function

pytestmark = pytest.mark.exactness

ROWS = (120, 100)


def between(x: Tensor) -> Tensor:
    y = 1.5 * x
    y[:, 10:50] = torch.tanh(x[:, :40])
    return y


EXAMPLES = [
    Example(lambda: Function(between), (ROWS,), moves_only=True),
    Example(
        lambda: Function(lambda x: F.pad(torch.tanh(x), (1, 2), value=0.3)),
        (ROWS,),
        moves_only=True,
    ),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", EXAMPLES)
def test_oracle(example: Example, check: Check) -> None:
    check_operator("assignment", [example], checks=[check], runtime="litert")


TRIANGLES = [
    Example(lambda: Function(lambda x: (x * 2).tril()), (ROWS,)),
    Example(lambda: Function(lambda x: torch.triu(x * 2, diagonal=1)), ((3, 60, 60),)),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", TRIANGLES)
def test_oracle_of_triangles(example: Example, check: Check) -> None:
    check_operator("triangle", [example], checks=[check], runtime="litert")


def a_row(y: Tensor, z: Tensor) -> None:
    y[0] = z[1]


def a_number(y: Tensor, z: Tensor) -> None:
    y[:, 0] = 0.25


def zeros(y: Tensor, z: Tensor) -> None:
    y[..., 2:] = 0


def by_a_list(y: Tensor, z: Tensor) -> None:
    y[[0, 2]] = z[:2]


def by_a_mask(y: Tensor, z: Tensor) -> None:
    y[torch.arange(6).expand(4, 6) % 2 == 0] = 0.5


def rows_by_a_mask(y: Tensor, z: Tensor) -> None:
    y[torch.arange(4) > 1] = z[:2]


def by_an_index(y: Tensor, z: Tensor) -> None:
    y.index_copy_(0, torch.tensor([3, 0]), z[:2])
    y.index_fill_(1, torch.tensor([2]), 0.0)


def through_a_view(y: Tensor, z: Tensor) -> None:
    y[1:][:, 2:] = z[1:, 2:]


def added(y: Tensor, z: Tensor) -> None:
    y[:, 1] += z[:, 0]


def copied(y: Tensor, z: Tensor) -> None:
    y[:, 1:3].copy_(z[:, 1:3])


def filled(y: Tensor, z: Tensor) -> None:
    y[:, 3].zero_()
    y[0].fill_(0.5)


def doubled(y: Tensor, z: Tensor) -> None:
    y[2] *= 2


def scattered(y: Tensor, z: Tensor) -> None:
    y.scatter_(1, torch.tensor([[1], [0], [2], [5]]), z[:, :1])
    y.scatter_(1, torch.tensor([[0], [1], [2], [3]]), 0.0)


WRITES: dict[str, Callable[[Tensor, Tensor], None]] = {
    function.__name__: function
    for function in (
        a_row, a_number, zeros, by_a_list, by_a_mask, rows_by_a_mask, by_an_index,
        through_a_view, added, copied, filled, doubled, scattered,
    )
}  # fmt: skip


def written(name: str) -> Function:
    def function(x: Tensor) -> Tensor:
        y, z = torch.sigmoid(x) * 1.5, x * 2
        WRITES[name](y, z)
        return torch.tanh(y) + y

    return Function(function)


COPIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "select_scatter": lambda y, z: y.select_scatter(z[0], 0, 1),
    "slice_scatter": lambda y, z: torch.slice_scatter(y, z[:2], 0, 1, 3),
    "diagonal_scatter": lambda y, z: torch.diagonal_scatter(y, z[0, :4]),
    "scatter": lambda y, z: y.scatter(0, torch.tensor([[0, 1, 2, 3, 0, 1]]), src=z[:1]),
    "index_put": lambda y, z: y.index_put((torch.tensor([0, 1]), torch.tensor([2, 3])), z[0, :2]),
    "index_copy": lambda y, z: y.index_copy(dim=1, index=torch.tensor([4]), source=z[:, :1]),
    "masked_scatter": lambda y, z: y.masked_scatter(torch.arange(6) % 2 == 0, z),
    "masked_fill": lambda y, z: y.masked_fill(torch.arange(6) % 2 == 0, 0.75),
    "pad": lambda y, z: F.pad(y, (1, 2), value=-0.5),
    "pad with the lowest": lambda y, z: F.pad(y, (1, 0), value=-torch.inf).amax(1, keepdim=True),
    "constant_pad_nd": lambda y, z: torch.constant_pad_nd(y, (1, 2), 3.0),
    "tril": lambda y, z: y.tril(),
    "triu": lambda y, z: z.triu_(1),
}


def copying(name: str) -> Function:
    def function(x: Tensor) -> Tensor:
        return torch.tanh(COPIES[name](torch.sigmoid(x) * 1.5, x * 2))

    return Function(function)


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", [*WRITES, *COPIES])
def test_a_program_has_the_same_bits(name: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = written(name) if name in WRITES else copying(name)
    x = torch.randn(4, 6)
    assert not coverage(net, x, spec=SPECS[bits]).fallbacks
    calibrate(net, [x], spec=SPECS[bits])
    with emulate(net, SPECS[bits]), torch.no_grad():
        assert float((net(x) - net.function(x)).abs().max()) < 0.1
        emulated = net(x)
    assert float((emulated - net(x)).abs().max()) < 0.1
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0


@pytest.mark.parametrize("name", [*WRITES, *COPIES])
def test_the_gradient_is_near_the_float_one(name: str) -> None:
    torch.manual_seed(0)
    net = written(name) if name in WRITES else copying(name)
    x = torch.randn(4, 6, requires_grad=True)
    calibrate(net, [1.1 * x.detach()])
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    with emulate(net):
        (emulated,) = torch.autograd.grad(net(x).square().sum(), x)
    assert float(F.cosine_similarity(emulated.flatten(), expected.flatten(), 0)) > 0.98


@pytest.mark.parametrize("make", [torch.zeros, torch.empty])
@pytest.mark.parametrize("bits", SPECS)
def test_a_result_that_is_filled_in_parts(
    make: Callable[..., Tensor], bits: int, tmp_path: Path
) -> None:
    def function(x: Tensor) -> Tensor:
        result = make(4, 6)
        for column in range(6):
            result[:, column] = torch.tanh(x[:, column])
        return result * 2

    net, x = Function(function), torch.randn(4, 6)
    assert not coverage(net, x, spec=SPECS[bits]).fallbacks
    calibrate(net, [x], spec=SPECS[bits])
    with emulate(net, SPECS[bits]) as chip, torch.no_grad():
        assert float((net(x) - 2 * torch.tanh(x)).abs().max()) < 0.05
        assert "./tanh#0/output" not in chip.ranges.ranges
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert model.operators["TANH"] == 6
    assert verify(net, model.path, [x]) == 1.0


def test_parameters_stay_where_the_range_covers_what_is_written() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] = torch.sigmoid(x[:, 1])
        return y

    net, x = Function(function), torch.randn(50, 6)
    x[0, 1:3] = torch.tensor([-3.0, 3.0])
    calibrate(net, [x])
    recorded: list[Instruction] = []
    with emulate(net) as chip, torch.no_grad(), chip.running(recorder=recorded.append):
        net(x)
    # The input, and the column that is written; the other columns are not touched.
    sizes = [y.outputs[0].integers.numel() for y in recorded if y.operator == "QUANTIZE"]
    assert sorted(sizes) == [50, 50, 300]


def test_where_data_write_a_program_has_no_kernel() -> None:
    def function(x: Tensor) -> Tensor:
        y = torch.tanh(x)
        y[torch.arange(4), y.argmax(1)] = y[:, 0] * 2
        return y

    assert coverage(Function(function), torch.randn(4, 6)).fallbacks


def test_values_that_are_added_up_run_in_float() -> None:
    def function(x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return y.index_put((torch.tensor([0, 0]),), y[:2], accumulate=True)

    assert coverage(Function(function), torch.randn(4, 6)).fallbacks


def test_an_argument_that_is_changed_is_quantized_as_it_is_then(tmp_path: Path) -> None:
    def function(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = 0.0
        x[:, 1] = 0.5
        return torch.tanh(x)

    net, x = Function(function), torch.randn(4, 6)
    calibrate(net, [x])
    with emulate(net) as chip:
        assert [key for key in chip.ranges.ranges if key.endswith("input")] == ["./tanh#0/input"]
        assert torch.equal(net(x)[:, 0], torch.zeros(4))
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0
