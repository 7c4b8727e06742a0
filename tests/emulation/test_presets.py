"""The presets that LiteRT does not run, against integers in NumPy that know nothing of them.

``ethos-u`` rounds every product by a fixed-point multiplier twice; ``shift`` has nothing but shifts
and a saturating accumulator of 24 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.emulation.emulator import Emulator
from lightning_nna.emulation.operators.linear import integer_bias
from lightning_nna.emulation.ranges import QParams, affine_qparams
from tests import integer_reference as reference
from tests.emulation.oracle import integers, random_integers, real
from tests.integer_reference import INT8, Stored

pytestmark = pytest.mark.exactness


def grid(chip: Emulator, key: str) -> QParams:
    observed = chip.ranges[key]
    return affine_qparams(
        observed.minimum, observed.maximum, power_of_two=chip.spec.power_of_two_scales
    )


def shifted(x: np.ndarray, factor: float) -> np.ndarray:
    """Times a power of two, ties away from zero."""
    exponent = math.log2(factor)
    assert exponent == round(exponent)
    if exponent >= 0:
        return x << int(exponent)
    return np.asarray(reference.rounding_divide_by_power(x, -int(exponent)))


RESCALE: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "ethos-u": reference.rescale,
    "shift": shifted,
}


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Difference(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b


MODULES: dict[str, type[nn.Module]] = {"add": Sum, "sub": Difference, "mul": Product}


@pytest.mark.parametrize("spec", RESCALE)
@pytest.mark.parametrize(("inputs", "outputs"), [(7, 9), (320, 64)])
def test_fully_connected(inputs: int, outputs: int, spec: str) -> None:
    torch.manual_seed(inputs)
    layer = nn.Linear(inputs, outputs)
    with emulate(layer, spec) as chip:
        with chip.observing():
            layer(torch.randn(64, inputs) - 0.5)
        x, y = (grid(chip, f"./fully_connected#0/{name}") for name in ("input", "output"))
        q_x = random_integers((2000, inputs), 1)
        result = integers(layer(real(q_x, x)), y)
        weight = chip.state.weight(layer.weight, 1)
        scales = weight.scales.double() * x.scale
        q_b = integer_bias(layer.bias, scales).numpy().astype(np.int64)
    sums = (q_x.astype(np.int64) - x.zero_point) @ weight.integers.numpy().astype(np.int64).T + q_b
    columns = [
        RESCALE[spec](sums[:, channel], float(scale) / y.scale)
        for channel, scale in enumerate(scales)
    ]
    np.testing.assert_array_equal(result, np.clip(np.stack(columns, 1) + y.zero_point, *INT8))


def test_an_accumulator_of_24_bits_saturates() -> None:
    """1024 products of 255 and 127 are four times what 24 bits hold."""
    layer = nn.Linear(1024, 3, bias=False)
    with torch.no_grad():
        layer.weight.fill_(127 / 128)
        layer.weight[1, ::2] *= -1
        layer.weight[2] *= -1
    with emulate(layer, "shift") as chip, torch.no_grad():
        chip.ranges.observe("./fully_connected#0/input", torch.tensor([0.0, 255.0]))
        chip.ranges.observe("./fully_connected#0/output", torch.tensor([-2.6e5, 2.6e5]))
        chip.freeze()
        x, y = (grid(chip, f"./fully_connected#0/{name}") for name in ("input", "output"))
        q_x = random_integers((400, 1024), 3)
        q_x[0], q_x[1] = 127, -128
        result = integers(layer(real(q_x, x)), y)
        weight = chip.state.weight(layer.weight, 1)
    sums = (q_x.astype(np.int64) - x.zero_point) @ weight.integers.numpy().astype(np.int64).T
    assert (np.abs(sums) > 2**23).mean() > 0.1
    factor = x.scale * float(weight.scales[0]) / y.scale
    rescaled = shifted(np.clip(sums, -(2**23), 2**23 - 1), factor)
    np.testing.assert_array_equal(result, np.clip(rescaled + y.zero_point, *INT8))


@pytest.mark.parametrize("spec", RESCALE)
@pytest.mark.parametrize("ratio", [1.0, 0.037, 11.3])
@pytest.mark.parametrize("name", MODULES)
def test_two_operands(name: str, ratio: float, spec: str) -> None:
    module, shape = MODULES[name](), (120, 100)
    torch.manual_seed(0)
    with emulate(module, spec) as chip:
        with chip.observing():
            module(torch.randn(shape) + 0.3, ratio * torch.randn(shape))
        a, b, y = (grid(chip, f"./{name}#0/{each}") for each in ("input", "other", "output"))
        q_a, q_b = random_integers(shape, 1), random_integers(shape, 2)
        q_a[0], q_b[0], q_a[1], q_b[1] = -128, -128, 127, -128
        result = integers(module(real(q_a, a), real(q_b, b)), y)
    left, right = (Stored(q, g.scale, g.zero_point) for q, g in ((q_a, a), (q_b, b)))
    expected = predicted(name, left, right, y, RESCALE[spec])
    np.testing.assert_array_equal(result, np.clip(expected + y.zero_point, *INT8))


def predicted(
    name: str,
    a: Stored,
    b: Stored,
    y: QParams,
    rescale: Callable[[np.ndarray, float], np.ndarray],
) -> np.ndarray:
    """Integers less the zero point, not clipped."""
    left, right = (each.values.astype(np.int64) - each.zero for each in (a, b))
    scales = [np.float32(each.scale) for each in (a, b)]
    if name == "mul":
        return rescale(left * right, float(scales[0] * scales[1] / np.float32(y.scale)))
    twice_coarser = 2 * float(max(scales))
    left, right = (
        rescale(q << 20, float(scale) / twice_coarser)
        for q, scale in zip((left, right), scales, strict=True)
    )
    total = left + right if name == "add" else left - right
    return rescale(total, twice_coarser / (2**20 * y.scale))
