"""From an emulated call to the LiteRT program that it must equal."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lightning_nna.emulation.arithmetic.quantized_weight import QuantizedWeight
from lightning_nna.emulation.emulator import Emulator
from lightning_nna.emulation.operators.linear import integer_bias
from lightning_nna.emulation.ranges import QParams, affine_qparams, cell_state_exponent
from tests import litert
from tests.litert import TensorSpec


def grid(chip: Emulator, key: str) -> QParams:
    """Frozen parameters of a site's operand or output."""
    observed = chip.ranges[key]
    return affine_qparams(observed.minimum, observed.maximum)


def spec(shape: tuple[int, ...], q: QParams) -> TensorSpec:
    return TensorSpec(shape, "int8", q.scale, q.zero_point)


def random_integers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """int8 values, a third of them extremes."""
    generator = np.random.default_rng(seed)
    values = generator.integers(-128, 128, shape)
    extremes = generator.choice([-128, 127], shape)
    return np.where(generator.random(shape) < 1 / 3, extremes, values).astype(np.int8)


def real(integers: np.ndarray, q: QParams) -> Tensor:
    centered = torch.from_numpy(integers.astype(np.float32)) - q.zero_point
    return centered * q.scale


def integers(values: Tensor, q: QParams) -> np.ndarray:
    scaled = values.detach().double() / q.scale
    rounded = scaled.round()
    assert torch.equal(rounded * q.scale, values.detach().double())  # exactly on the grid
    return (rounded + q.zero_point).numpy().astype(np.int64)


def check(model: bytes, inputs: list[np.ndarray], emulated: np.ndarray) -> None:
    (expected,) = litert.run_model(model, inputs)
    np.testing.assert_array_equal(emulated, expected.astype(np.int64))


def fully_connected_program(
    chip: Emulator, layer: nn.Linear, shape: tuple[int, ...], x: QParams, y: QParams
) -> bytes:
    """A linear layer, per channel or per tensor as the chip's spec says."""
    per_channel = chip.spec.weight_granularity == "per_channel"
    weight = chip.state.weight(layer.weight, 1 if per_channel else layer.out_features)
    accumulator = weight.scales.double() * x.scale
    bias = None
    if layer.bias is not None:
        q_b = integer_bias(layer.bias, accumulator).numpy().astype(np.int32)
        bias = TensorSpec.constant(q_b, _scales(accumulator, per_channel))
    stored = TensorSpec.constant(
        weight.integers.numpy().astype(np.int8), _scales(weight.scales, per_channel)
    )
    outputs = spec((*shape[:-1], layer.out_features), y)
    return litert.fully_connected_model(spec(shape, x), stored, bias, outputs)


def _scales(scales: Tensor, per_channel: bool) -> np.ndarray | float:
    return scales.numpy() if per_channel else float(scales[0])


def lstm_program(
    chip: Emulator,
    layer: nn.LSTM,
    shape: tuple[int, int, int],
    x: QParams,
    site: str,
) -> bytes:
    """The layer as LiteRT has it: a weight, a scale and a bias for each of the four gates."""
    hidden = layer.hidden_size
    y = grid(chip, f"{site}/layer0/output")
    exponent = cell_state_exponent(chip.ranges[f"{site}/layer0/cell"].magnitude)
    w_ih, w_hh = (chip.state.weight(w, hidden) for w in (layer.weight_ih_l0, layer.weight_hh_l0))
    scales = w_ih.scales.double() * x.scale
    q_b = integer_bias(layer.bias_ih_l0 + layer.bias_hh_l0, scales).numpy().astype(np.int32)

    def gates(weight: QuantizedWeight) -> list[TensorSpec]:
        whole = weight.integers.numpy().astype(np.int8)
        each = weight.scales.numpy()
        return [
            TensorSpec.constant(whole[k * hidden : (k + 1) * hidden], float(each[k * hidden]))
            for k in range(4)
        ]

    biases = [
        TensorSpec.constant(q_b[k * hidden : (k + 1) * hidden], float(scales[k * hidden]))
        for k in range(4)
    ]
    state = TensorSpec((shape[0], hidden), "int8", y.scale, y.zero_point, is_variable=True)
    cell = TensorSpec((shape[0], hidden), "int16", 2.0**exponent, is_variable=True)
    return litert.lstm_model(spec(shape, x), gates(w_ih), gates(w_hh), biases, state, cell)
