"""Every operator code that a program can have is one that LiteRT loads and runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ai_edge_litert import schema_py_generated as schema
from torch import Tensor, nn

from lightning_nna import calibrate
from lightning_nna.deploy import export_tflite, run_tflite, verify
from lightning_nna.deploy.flatbuffer import DTYPES, OperatorSpec, TensorSpec, version_of
from lightning_nna.emulation.operators.catalog import kernels, operators
from lightning_nna.emulation.program import SCHEMA_TYPES
from tests.deploy.networks import POORER_SPECS, SPECS, FunctionNetwork

pytestmark = pytest.mark.exactness


def permuted(x: Tensor) -> Tensor:
    """Elements in an order that is no view; 31 has no factor in common with their number."""
    return x.reshape(-1)[torch.arange(x.numel()) * 31 % x.numel()]


IMAGE = (2, 4, 6, 6)
ROWS = (3, 4)
# Operators written besides TANH: a function of a quantized tensor, the input's shape, and layers.
CASES: dict[
    str, tuple[Callable[..., Any], tuple[int, ...], tuple[Callable[[], nn.Module], ...]]
] = {
    "ADD": (lambda x: x + torch.sigmoid(x), ROWS, ()),
    "BATCH_MATMUL": (lambda x: x @ x.transpose(1, 2), (2, 3, 4), ()),
    "BROADCAST_TO": (lambda x: x[:, None].expand(3, 2000, 4), ROWS, ()),
    "CONCATENATION": (lambda x: torch.cat([x, x]), ROWS, ()),
    "CONV_2D": (lambda x, conv: conv(x), IMAGE, (lambda: nn.Conv2d(4, 3, 3),)),
    "DEPTHWISE_CONV_2D": (
        lambda x, conv: conv(x),
        IMAGE,
        (lambda: nn.Conv2d(4, 4, 3, groups=4),),
    ),
    "EQUAL": (lambda x: torch.where(x == x.flip(0), x, 2 * x), ROWS, ()),
    "FLOOR_DIV": (lambda x: x.argmax(-1) // 2, ROWS, ()),
    "FLOOR_MOD": (lambda x: x.argmax(-1) % 2, ROWS, ()),
    "FULLY_CONNECTED": (lambda x, linear: linear(x), ROWS, (lambda: nn.Linear(4, 3),)),
    "GATHER": (permuted, (9, 11), ()),
    "GATHER_ND": (lambda x: x[x.argmax(0), x.argmax(0) % 2], (4, 3, 2), ()),
    "GREATER_EQUAL": (lambda x: torch.where(x >= x.flip(0), x, 2 * x), ROWS, ()),
    "LEAKY_RELU": (lambda x: F.leaky_relu(x), ROWS, ()),
    "LESS": (lambda x: torch.where(x < x.flip(0), x, 2 * x), ROWS, ()),
    "LOGICAL_AND": (lambda x: torch.where((x > 0) & (x < x.flip(0)), x, 2 * x), ROWS, ()),
    "LOGICAL_NOT": (lambda x: torch.where(~(x > 0), x, 2 * x), ROWS, ()),
    "LOGICAL_OR": (lambda x: torch.where((x > 0) | (x < x.flip(0)), x, 2 * x), ROWS, ()),
    "LOGISTIC": (torch.sigmoid, ROWS, ()),
    "MAXIMUM": (lambda x: torch.maximum(x, x.flip(0)), ROWS, ()),
    "MEAN": (lambda x: x.mean(1), ROWS, ()),
    "MINIMUM": (lambda x: torch.minimum(x, x.flip(0)), ROWS, ()),
    "MUL": (lambda x: x * torch.sigmoid(x), ROWS, ()),
    "NOT_EQUAL": (lambda x: torch.where(x != x.flip(0), x, 2 * x), ROWS, ()),
    "ONE_HOT": (lambda x: F.one_hot(x.argmax(-1), 4), ROWS, ()),
    "PAD": (
        lambda x, conv: conv(x),
        (2, 4, 7),
        (lambda: nn.Conv1d(4, 4, 3, padding=2),),
    ),
    "QUANTIZE": (lambda x, norm: norm(x), ROWS, (lambda: nn.LayerNorm(4),)),
    "REDUCE_MAX": (lambda x: x.amax(1), ROWS, ()),
    "REDUCE_MIN": (lambda x: x.amin(1), ROWS, ()),
    "RELU": (lambda x: torch.relu(x.flip(0)), ROWS, ()),
    "RELU6": (lambda x: F.relu6(x.flip(0)), ROWS, ()),
    "RESIZE_BILINEAR": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), IMAGE, ()),
    "RESIZE_NEAREST_NEIGHBOR": (lambda x: F.interpolate(x, scale_factor=2), IMAGE, ()),
    "RESHAPE": (lambda x: torch.softmax(x.reshape(2, 6), -1), ROWS, ()),
    "REVERSE_V2": (lambda x: torch.sigmoid(x.flip(0)), ROWS, ()),
    "RSQRT": (lambda x, norm: norm(x), ROWS, (lambda: nn.LayerNorm(4),)),
    "SELECT_V2": (lambda x: torch.where(torch.arange(4) < 2, x, x.flip(0)), ROWS, ()),
    "SOFTMAX": (lambda x: torch.softmax(x, -1), ROWS, ()),
    "STRIDED_SLICE": (lambda x: torch.sigmoid(x[:, ::2]), ROWS, ()),
    "SUB": (lambda x: x - torch.sigmoid(x), ROWS, ()),
    "SUM": (lambda x: (x > 0).sum(-1), ROWS, ()),
    "TANH": (lambda x: x, ROWS, ()),
    "TRANSPOSE": (lambda x: torch.sigmoid(x.transpose(1, 2).contiguous()), (2, 3, 4), ()),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": (
        lambda x, lstm: lstm(x)[0],
        (2, 3, 4),
        (lambda: nn.LSTM(4, 5, batch_first=True),),
    ),
}
ONLY_8_BITS = {
    "ARG_MAX": (lambda x: x.argmax(-1), ROWS, ()),
    "CAST": (F.softplus, ROWS, ()),
    "GELU": (F.gelu, ROWS, ()),
    # In 16 bits the operands of the opposite kernel are exchanged.
    "GREATER": (lambda x: torch.where(x > x.flip(0), x, 2 * x), ROWS, ()),
    "HARD_SWISH": (F.hardswish, ROWS, ()),
    "LESS_EQUAL": (lambda x: torch.where(x <= x.flip(0), x, 2 * x), ROWS, ()),
    "LOG_SOFTMAX": (lambda x: torch.log_softmax(x, -1), ROWS, ()),
    "RELU_0_TO_1": (lambda x: x.clamp(0, 1), ROWS, ()),
    "RELU_N1_TO_1": (lambda x: (y := x + x) * F.hardtanh(y), ROWS, ()),
}
# Kernels of the CPU, whose operands are dequantized before and quantized after.
ON_THE_CPU = {
    name: (lambda x, function=function: torch.tanh(function(torch.sigmoid(x) + 0.1)), ROWS, ())
    for name, kernel in kernels().items()
    for function in [getattr(torch, name, None) for name in kernel.computes_in_float[:1]]
}
# Of 5 and 6 axes: other versions, where the kernels have so many.
MANY_AXES = {
    "BROADCAST_TO": (lambda x: x[:, None].expand(2, 800, 3, 2, 1, 2), (2, 3, 2, 1, 2), ()),
    "STRIDED_SLICE": (lambda x: x[:, :, :, ::2, 1:], (2, 3, 2, 3, 2), ()),
    "TRANSPOSE": (lambda x: torch.sigmoid(x.permute(4, 3, 2, 1, 0).clone()), (2, 3, 2, 3, 2), ()),
}


def exported(
    case: Any, bits: int, path: Path, spec: Any = None, **settings: Any
) -> tuple[nn.Module, Any, Any]:
    function, shape, layers = case
    torch.manual_seed(0)
    net = FunctionNetwork(lambda x, *rest: function(torch.tanh(x), *rest), *(f() for f in layers))
    x = torch.randn(shape)
    calibrate(net, [x], spec=spec or SPECS[bits])
    return net, x, export_tflite(net, [x], path, **settings)


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize(("name", "case"), [*CASES.items(), *MANY_AXES.items()])
def test_an_operator_is_loaded_and_equal(name: str, case: Any, bits: int, tmp_path: Path) -> None:
    net, x, model = exported(case, bits, tmp_path / "net.tflite")
    assert name in model.operators
    assert verify(net, model.path, [x]) == 1.0


@pytest.mark.parametrize("name", ONLY_8_BITS)
def test_an_operator_of_8_bits_is_loaded_and_equal(name: str, tmp_path: Path) -> None:
    net, x, model = exported(ONLY_8_BITS[name], 8, tmp_path / "net.tflite")
    assert name in model.operators
    assert verify(net, model.path, [x]) == 1.0


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("name", ON_THE_CPU)
def test_an_operator_of_the_cpu_is_loaded(name: str, bits: int, tmp_path: Path) -> None:
    path, spec = tmp_path / "net.tflite", POORER_SPECS[bits]
    net, x, model = exported(ON_THE_CPU[name], bits, path, spec, allow_cpu=True)
    assert {name, "DEQUANTIZE", "QUANTIZE"} <= set(model.operators)
    assert verify(net, model.path, [x]) > 0.9


def test_elu_runs_on_the_other_kernels(tmp_path: Path) -> None:
    _, x, model = exported((F.elu, ROWS, ()), 8, tmp_path / "net.tflite")
    assert "ELU" in model.operators
    assert np.isfinite(run_tflite(model.path, [x], runtime="litert-optimized")[0]).all()


def test_every_operator_that_can_be_written_is_among_them() -> None:
    # EMBEDDING_LOOKUP is written by tests of the oracle alone, which load it.
    tried = {*CASES, *ONLY_8_BITS, *ON_THE_CPU, "DEQUANTIZE", "ELU", "EMBEDDING_LOOKUP"}
    # The oracle exports the examples of an operator, and demands its kernel if there is one.
    brought = [operator.litert for operator in operators().values()]
    of_examples = {each[0].name for each in brought if len(each) == 1}
    assert tried | of_examples == set(kernels())


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: x.repeat(2, 1, 3), ROWS),
        (lambda x: x.repeat_interleave(2, 1), ROWS),
        (lambda x: x.tile(2, 2), ROWS),
        (lambda x: x[:, :1].expand(3, 4), ROWS),
        (lambda x: x.broadcast_to(2, 3, 4), ROWS),
        (lambda x: torch.stack([x, x], 1), ROWS),
    ],
)
@pytest.mark.parametrize("bits", SPECS)
def test_broadcasts(function: Any, shape: Any, bits: int, tmp_path: Path) -> None:
    net, x, model = exported((function, shape, ()), bits, tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0


def test_an_operator_without_versions_is_named() -> None:
    x = TensorSpec((2,), "int8", 0.1)
    with pytest.raises(ValueError, match="versions of CUMSUM are not known"):
        version_of(OperatorSpec("CUMSUM", ("x",), ("y",)), {"x": x})


@pytest.mark.parametrize(
    ("name", "dtype", "options", "version"),
    [
        # As op_version.cc of the TensorFlow Lite converter has them.
        ("FULLY_CONNECTED", "int8", {"keepNumDims": False}, 4),
        ("FULLY_CONNECTED", "int8", {"keepNumDims": True}, 5),
        ("MUL", "int8", {}, 2),
        ("MUL", "int16", {}, 4),
        ("QUANTIZE", "int8", {}, 1),
        ("QUANTIZE", "int16", {}, 2),
        ("BROADCAST_TO", "bool", {}, 2),
    ],
)
def test_versions(name: str, dtype: str, options: Any, version: int) -> None:
    table = getattr(schema, f"{name.title().replace('_', '')}OptionsT")(**options)
    x = TensorSpec((2, 2), dtype, 0.1)
    inputs = ("x", "x", "x")[: {"QUANTIZE": 1, "FULLY_CONNECTED": 3}.get(name, 2)]
    assert version_of(OperatorSpec(name, inputs, ("x",), table), {"x": x}) == version


def test_types_of_options_are_those_of_the_schema() -> None:
    assert {name: DTYPES[name] for name in SCHEMA_TYPES} == SCHEMA_TYPES
