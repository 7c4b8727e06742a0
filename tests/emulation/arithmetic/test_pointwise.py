"""Functions of one activation against LiteRT's kernels, for every input of 8 and of 16 bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema

from lightning_nna.emulation.arithmetic import pointwise
from tests import litert
from tests.litert import OperatorSpec, TensorSpec

pytestmark = pytest.mark.exactness

SPANS = [(0.004, 0.004), (0.02, 0.013), (0.05, 0.07), (0.31, 0.2), (1.7, 0.9)]


def run(name: str, x: TensorSpec, y: TensorSpec, values: np.ndarray, options: object) -> np.ndarray:
    operator = OperatorSpec(name, ("x",), ("y",), options)
    model = litert.build_model({"x": x, "y": y}, [operator], ["x"], ["y"])
    # ELU has no reference kernel; the other one is the same table.
    return litert.run_model(model, [values], "litert-optimized" if name == "ELU" else "litert")[
        0
    ].astype(np.int64)


@pytest.mark.parametrize(("scale", "output_scale"), SPANS)
@pytest.mark.parametrize(
    ("name", "function", "options"),
    [
        ("ELU", pointwise.elu, None),
        ("GELU", pointwise.gelu, schema.GeluOptionsT(approximate=False)),
        ("GELU", pointwise.gelu_tanh, schema.GeluOptionsT(approximate=True)),
    ],
)
def test_tables(
    name: str,
    function: Callable[[float], float],
    options: object,
    scale: float,
    output_scale: float,
) -> None:
    for zero, out in ((0, 0), (-128, -128), (7, -100)):
        x = np.arange(-128, 128).astype(np.int8)
        given = TensorSpec(x.shape, "int8", scale, zero)
        result = TensorSpec(x.shape, "int8", output_scale, out)
        expected = run(name, given, result, x, options)
        found = pointwise.tabulate(function, -128 - zero, scale, output_scale) + out
        np.testing.assert_array_equal(found.clamp(-128, 127).numpy(), expected)


@pytest.mark.parametrize(("scale", "output_scale"), SPANS)
def test_hard_swish(scale: float, output_scale: float) -> None:
    for zero, out in ((0, 0), (-128, -128), (7, -100)):
        x = np.arange(-128, 128).astype(np.int8)
        given = TensorSpec(x.shape, "int8", scale, zero)
        result = TensorSpec(x.shape, "int8", output_scale, out)
        expected = run("HARD_SWISH", given, result, x, None)
        centered = torch.from_numpy(x.astype(np.int64)) - zero
        found = pointwise.hard_swish(centered, scale, output_scale) + out
        np.testing.assert_array_equal(found.clamp(-128, 127).numpy(), expected)


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("slope", [0.01, 0.3, 0.9999])
@pytest.mark.parametrize(("scale", "output_scale"), SPANS)
def test_leaky_relu(scale: float, output_scale: float, slope: float, dtype: str) -> None:
    limits = np.iinfo(dtype)
    for zero, out in ((0, 0),) if dtype == "int16" else ((0, 0), (-128, -128), (7, -100)):
        x = np.arange(limits.min, limits.max + 1).astype(dtype)
        given = TensorSpec(x.shape, dtype, scale, zero)
        result = TensorSpec(x.shape, dtype, output_scale, out)
        expected = run("LEAKY_RELU", given, result, x, schema.LeakyReluOptionsT(alpha=slope))
        centered = torch.from_numpy(x.astype(np.int64)) - zero
        found = pointwise.leaky_relu(centered, slope, scale, output_scale) + out
        np.testing.assert_array_equal(found.clamp(limits.min, limits.max).numpy(), expected)


@pytest.mark.parametrize(
    "scale", [2.0**-12, 2.0**-11, 2.0**-10, 2.0**-14, 1e-4, 3.3e-4, 0.002, 0.1]
)
@pytest.mark.parametrize(
    ("name", "function"),
    [("LOGISTIC", pointwise.logistic_int16), ("TANH", pointwise.tanh_int16)],
)
def test_sixteen_bits(name: str, function: Callable[..., torch.Tensor], scale: float) -> None:
    x = np.arange(-(2**15), 2**15).astype(np.int16)
    given, result = (TensorSpec(x.shape, "int16", s) for s in (scale, 2.0**-15))
    expected = run(name, given, result, x, None)
    found = function(torch.from_numpy(x.astype(np.int64)), scale)
    np.testing.assert_array_equal(found.numpy(), expected)
