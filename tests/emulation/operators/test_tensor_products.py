"""Sums of products pass the oracle in all their forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import bake, calibrate, coverage, emulate
from lightning_nna.callbacks import CompressedSensingPruning, GeneralQuantizer, NNAEmulation
from lightning_nna.deploy import export_tflite, load_packed, save_packed, verify
from lightning_nna.deploy.capture import capture
from lightning_nna.emulation.arithmetic.quantized_weight import SECOND_AXIS
from lightning_nna.testing import SmallRecurrentModule
from lightning_nna.testing.contract import trainer
from lightning_nna.testing.operator_oracle import CHECKS, Check, Example, check_operator
from lightning_nna.testing.replay import replays
from tests.emulation.modules import Function

pytestmark = pytest.mark.exactness
SPECS = {8: "litert-int8", 16: "litert-int16x8"}


def of(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Example:
    return Example(lambda: Function(function), shapes, fast_tolerance=2e-3)


class Weighted(nn.Module):
    """A function of an input and of a parameter."""

    def __init__(self, function: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, self.weight)


class Projection(nn.Module):
    """A layer as GPT-2 has it: its weight is ``(in, out)``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(30, 50)), nn.Parameter(torch.randn(50))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, 30), self.weight).view(*x.shape[:-1], 50)


MATRICES = ((110, 30), (30, 100))
EINSUMS = {
    "matrices": of(lambda a, b: torch.einsum("ij,jk->ik", a, b), *MATRICES),
    "implicit": of(lambda a, b: torch.einsum("ki,jk", a, b), (30, 100), (110, 30)),
    "heads": of(lambda a, b: torch.einsum("bthd,bshd->bhts", a, b), (2, 30, 3, 8), (2, 60, 3, 8)),
    "ellipsis": of(
        lambda a, b: torch.einsum("...td,...sd->...ts", a, b), (2, 3, 50, 9), (3, 40, 9)
    ),
    "products": of(lambda a, b: torch.einsum("bi,bj->bij", a, b), (30, 20), (30, 25)),
    "sums before": of(lambda a, b: torch.einsum("ijq,jkp->ik", a, b), (110, 30, 2), (30, 100, 3)),
    "three": of(
        lambda a, b, c: torch.einsum("ij,jk,kl->il", a, b, c), (100, 9), (9, 110), (110, 100)
    ),
    "list": of(lambda a, b: torch.einsum("ij,jk->ki", [a, b]), *MATRICES),
    "numbers": of(lambda a, b: torch.einsum(a, [0, 1], b, [1, 2], [0, 2]), *MATRICES),
    "parameter": Example(
        lambda: Weighted(lambda x, w: torch.einsum("btd,dhk->bhtk", x, w), 20, 4, 8),
        ((10, 40, 20),),
    ),
    "parameter first": Example(
        lambda: Weighted(lambda x, w: torch.einsum("oi,bit->bot", w, x), 25, 12), ((4, 12, 120),)
    ),
    "tensordot": of(lambda a, b: torch.tensordot(a, b, dims=2), (110, 5, 6), (5, 6, 100)),
    "tensordot of axes": of(
        lambda a, b: torch.tensordot(a, b, dims=([0], [1])), (6, 20, 5), (100, 6)
    ),
    "outer": of(torch.outer, (100,), (110,)),
    "inner": of(torch.inner, (10, 11, 9), (100, 9)),
    "chain": of(lambda *x: torch.linalg.multi_dot(x), (100, 9), (9, 110), (110, 100)),
    "kron": of(torch.kron, (10, 12), (10, 9)),
    "vecdot": of(lambda a, b: torch.linalg.vecdot(a, b), (500, 20), (500, 20)),
}
ADDITIONS = {
    "matrices": of(torch.addmm, (100,), *MATRICES),
    "factors": of(lambda x, a, b: torch.addmm(x, a, b, beta=0.5, alpha=-2), (110, 100), *MATRICES),
    "without addend": of(
        lambda a, b: torch.zeros(110, 100).addmm(a, b, beta=0, alpha=3), *MATRICES
    ),
    "layer": Example(Projection, ((10, 24, 30),)),
    "vector": of(torch.addmv, (12_000,), (12_000, 7), (7,)),
    "batches": of(torch.baddbmm, (4, 60, 50), (4, 60, 24), (4, 24, 50)),
    "sum of batches": of(torch.addbmm, (110, 100), (4, 110, 7), (4, 7, 100)),
    "outer": of(torch.addr, (110, 100), (110,), (100,)),
}
each_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


@each_check
@pytest.mark.parametrize("name", EINSUMS)
def test_einsum(name: str, check: Check) -> None:
    check_operator("einsum", [EINSUMS[name]], checks=[check], runtime="litert")


@each_check
@pytest.mark.parametrize("name", ADDITIONS)
def test_addmm(name: str, check: Check) -> None:
    check_operator("addmm", [ADDITIONS[name]], checks=[check], runtime="litert")


class Bilinear(nn.Bilinear):
    def __init__(self) -> None:
        super().__init__(8, 9, 40)


@each_check
def test_bilinear(check: Check) -> None:
    check_operator(
        "bilinear", [Example(Bilinear, ((30, 9, 8), (30, 9, 9)))], checks=[check], runtime="litert"
    )


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", [*EINSUMS, *ADDITIONS])
def test_results_are_near_those_of_float(name: str, bits: int) -> None:
    torch.manual_seed(0)
    example = {**EINSUMS, **ADDITIONS}[name]
    module, inputs = example.build(), example.inputs()
    with torch.no_grad():
        expected = module(*inputs)
        with emulate(module, SPECS[bits]) as chip:
            with chip.observing():
                module(*inputs)
            result = module(*inputs)
    assert result.shape == expected.shape
    error = (result - expected).abs().max() / expected.abs().max()
    assert float(error) < 0.03


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        *(("ij->ji", (3, 4)), ("bij->b", (2, 3, 4)), ("ij->", (3, 4))),
        *(("ii->i", (4, 4)), ("ii", (4, 4)), ("bibj->ji", (3, 4, 3, 2)), ("iii->i", (3, 3, 3))),
    ],
)
def test_one_operand(equation: str, shape: tuple[int, ...]) -> None:
    module, x = Function(lambda x: torch.einsum(equation, 0.5 * x)), torch.randn(shape)
    assert not coverage(module, x).fallbacks
    with emulate(module) as chip, torch.no_grad():
        with chip.observing():
            module(x)
        assert torch.allclose(module(x), torch.einsum(equation, 0.5 * x), atol=0.05)


# Numbers beside the diagonal are not read.
OF_THE_DIAGONAL = [check for check in CHECKS if "not_finite" not in check.__name__]


@pytest.mark.parametrize("check", OF_THE_DIAGONAL, ids=lambda check: check.__name__)
def test_products_of_diagonals(check: Check) -> None:
    example = of(lambda a, b: torch.einsum("bii,ik->bk", a, b), (100, 9, 9), (9, 110))
    check_operator("einsum", [example], checks=[check], runtime="litert")


class Diagonals(nn.Module):
    """Diagonals of an activation and of a parameter, and a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        scaled = torch.einsum("bij,jj->bij", x, self.weight)
        return torch.einsum("bii->bi", scaled) * torch.trace(scaled[0])


@pytest.mark.parametrize("bits", SPECS)
def test_diagonals_are_exported(tmp_path: Path, bits: int) -> None:
    torch.manual_seed(0)
    net, x = Diagonals(), torch.randn(4, 5, 5)
    calibrate(net, [x], spec=SPECS[bits])
    assert not coverage(net, x, spec=SPECS[bits]).fallbacks
    with emulate(net, SPECS[bits]), torch.no_grad():
        assert torch.allclose(net(x), net.float()(x), atol=0.1)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0


def test_a_projection_is_one_fully_connected_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Projection(), torch.randn(4, 10, 30)
    calibrate(net, [x])
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert model.operators["FULLY_CONNECTED"] == 1
    assert not {"ADD", "BATCH_MATMUL", "TRANSPOSE"} & set(model.operators)
    assert verify(net, model.path, [x]) == 1.0


#: Functions of an input and of a parameter, shapes of both, and how many scales the weight has.
PER_OUTPUT: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], int]] = {
    "matmul": (lambda x, w: x @ w, (3, 50, 30), (30, 80), 80),
    "mm": (torch.mm, (150, 30), (30, 80), 80),
    "addmm": (lambda x, w: torch.addmm(w[0] / 2, x, w), (150, 30), (30, 80), 80),
    "in, out": (lambda x, w: torch.einsum("bi,io->bo", x, w), (150, 30), (30, 80), 80),
    "out, in": (lambda x, w: torch.einsum("bi,oi->bo", x, w), (150, 30), (80, 30), 80),
    "heads": (lambda x, w: torch.einsum("bd,dhk->bhk", x, w), (150, 30), (30, 8, 10), 8),
    "heads last": (lambda x, w: torch.einsum("bd,khd->bhk", x, w), (150, 30), (10, 8, 30), 10),
    "last": (lambda x, w: torch.einsum("bde,deo->bo", x, w), (150, 5, 6), (5, 6, 80), 1),
    "vector": (lambda x, w: x @ w, (12_000, 30), (30,), 1),
}


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", PER_OUTPUT)
def test_a_parameter_has_a_scale_for_each_output(name: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    function, inputs, shape, count = PER_OUTPUT[name]
    net, x = Weighted(function, *shape), torch.randn(inputs)
    replays(net, x, spec=SPECS[bits])
    calibrate(net, [x], spec=SPECS[bits])
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0
    program = capture(net, [x])
    (layer,) = (each for each in program.operators if each.name == "FULLY_CONNECTED")
    assert len(np.unique(program.tensors[layer.inputs[1]].scales)) == count


@pytest.mark.parametrize("bits", SPECS)
def test_small_outputs_are_as_exact_as_large_ones(bits: int) -> None:
    torch.manual_seed(0)
    net, x = Weighted(torch.matmul, 30, 4), torch.randn(50, 30)
    with torch.no_grad():
        net.weight *= torch.tensor([1.0, 1e-2, 1e-3, 1e-4])
        with emulate(net, SPECS[bits]) as chip:
            with chip.observing():
                net(x)
            weight = chip.state.weight(net.weight, SECOND_AXIS).values
        error = (weight - net.weight).abs().amax(0) / net.weight.abs().amax(0)
    assert float(error.max()) <= 0.5 / 127 + 1e-6


class Multiplied(SmallRecurrentModule):
    """A classifier that multiplies by parameters ``(in, out)``."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.Identity(), nn.Identity()
        self.first, self.bias = nn.Parameter(torch.randn(24, 16)), nn.Parameter(torch.zeros(16))
        self.second = nn.Parameter(torch.randn(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(1), self.first).relu() @ self.second


@pytest.mark.filterwarnings("ignore:CompressedSensingPruning saw no inputs")
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("learned", ["none", "all"])
@pytest.mark.parametrize("bits", SPECS)
def test_weight_methods_and_learned_scales_keep_their_promises(
    bits: int, learned: Any, granularity: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x = Multiplied(), torch.randn(64, 6, 4)
    methods = [
        CompressedSensingPruning(0.5, targets=["first"]),
        GeneralQuantizer(3, granularity=granularity, pin_zero=True, targets=["first"]),
    ]
    emulation = NNAEmulation(SPECS[bits], calibration_steps=2, learned_scales=learned)
    before = net.second.detach().clone()
    trainer(emulation, *methods).fit(net)
    assert len(net.first.unique()) <= 8
    assert float((net.first == 0).float().mean()) >= 0.5
    assert not torch.equal(before, net.second)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0
    save_packed(net, tmp_path / "net.safetensors")
    packed = load_packed(tmp_path / "net.safetensors")
    baked = bake(net)
    assert isinstance(baked, Multiplied)
    assert torch.equal(packed["first"], baked.first)
    assert torch.equal(packed["second"], baked.second)


class Hyper(nn.Module):
    """A linear layer whose weight another layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.bias = nn.Linear(6, 12 * 8), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        weight = self.weights(condition).view(12, 8)
        return F.linear(x, weight, self.bias)


@pytest.mark.parametrize("bits", SPECS)
def test_a_weight_that_is_computed_is_an_operand(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, inputs = Hyper(), (torch.randn(900, 8), torch.randn(6))
    compared = replays(net, *inputs, spec=SPECS[bits])
    assert compared["BATCH_MATMUL"] == compared["ADD"] == 900 * 12
    calibrate(net, [inputs], lambda net, batch: net(*batch), spec=SPECS[bits])
    model = export_tflite(net, list(inputs), tmp_path / "net.tflite")
    assert verify(net, model.path, list(inputs)) == 1.0
