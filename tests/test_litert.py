"""The integer restatement equals LiteRT's reference kernels in every output bit."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests import integer_reference as reference
from tests.integer_reference import Stored
from tests.litert import (
    TensorSpec,
    binary_model,
    concatenation_model,
    embedding_lookup_model,
    fully_connected_model,
    gather_model,
    lstm_model,
    run_calls,
    run_model,
    unary_model,
)

pytestmark = pytest.mark.exactness
SEEDS = range(4)


def random_int8(rng: np.random.Generator, shape: tuple[int, ...], low: int = -128) -> np.ndarray:
    return rng.integers(low, 128, shape).astype(np.int8)


def random_stored(rng: np.random.Generator, shape: tuple[int, ...]) -> Stored:
    scale = np.float32(2 ** rng.uniform(-9, -2))
    return Stored(random_int8(rng, shape), scale, int(rng.integers(-128, 128)))


def spec_of(stored: Stored) -> TensorSpec:
    """Describe a tensor that is given at run time."""
    values = stored.values
    return TensorSpec(values.shape, str(values.dtype), stored.scale, stored.zero)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_fully_connected(seed: int, per_channel: bool, relu: bool) -> None:
    rng = np.random.default_rng(seed)
    inputs, units = (int(size) for size in rng.integers(1, 80, 2))
    x = random_stored(rng, (64, inputs))
    scale = (2 ** rng.uniform(-10, -5, units if per_channel else 1)).astype(np.float32)
    weight = Stored(random_int8(rng, (units, inputs), -127), scale)
    bias = rng.integers(-5000, 5000, units).astype(np.int32)
    # Outputs that use the range: accumulators have a deviation of about 74^2 sqrt(inputs).
    y_scale = np.float32(74**2 * math.sqrt(inputs) * x.scale * scale.mean() / 50)
    y = Stored(random_int8(rng, (64, units)), y_scale, int(rng.integers(-60, 60)))

    model = fully_connected_model(
        spec_of(x),
        TensorSpec.constant(weight.values, scale),
        TensorSpec.constant(bias, scale * x.scale),
        spec_of(y),
        relu=relu,
    )
    (outputs,) = run_model(model, [x.values])

    expected = reference.fully_connected(x, weight, bias, y, relu=relu)
    np.testing.assert_array_equal(outputs, expected)


def test_fully_connected_without_bias_keeps_leading_axes() -> None:
    rng = np.random.default_rng(0)
    x = random_stored(rng, (3, 5, 8))
    weight = Stored(random_int8(rng, (4, 8), -127), np.float32(0.01))
    y = Stored(random_int8(rng, (3, 5, 4)), np.float32(0.3), 7)

    constant = TensorSpec.constant(weight.values, weight.scale)
    (outputs,) = run_model(
        fully_connected_model(spec_of(x), constant, None, spec_of(y)), [x.values]
    )

    assert outputs.shape == (3, 5, 4)
    np.testing.assert_array_equal(outputs, reference.fully_connected(x, weight, None, y))


@pytest.mark.parametrize("shapes", [((40, 30), (40, 30)), ((40, 1, 30), (1, 20, 30)), ((40,), ())])
@pytest.mark.parametrize("name", ["ADD", "SUB", "MUL"])
@pytest.mark.parametrize("seed", SEEDS)
def test_binary(seed: int, name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    rng = np.random.default_rng(seed)
    a, b = (random_stored(rng, shape) for shape in shapes)
    shape = np.broadcast_shapes(*shapes)
    y = random_stored(rng, shape)
    largest = 128 * a.scale * b.scale if name == "MUL" else max(a.scale, b.scale)
    y = y._replace(scale=np.float32(largest * rng.uniform(0.6, 2.0)))

    (outputs,) = run_model(
        binary_model(name, spec_of(a), spec_of(b), spec_of(y)), [a.values, b.values]
    )

    expected = {
        "ADD": lambda: reference.add(a, b, y),
        "SUB": lambda: reference.add(a, b, y, sign=-1),
        "MUL": lambda: reference.multiply(a, b, y),
    }[name]()
    np.testing.assert_array_equal(outputs, expected)


EVERY_INT8 = np.arange(-128, 128).astype(np.int8)


@pytest.mark.parametrize("x_scale", [0.003, 0.02, 0.047, 0.11])
@pytest.mark.parametrize(
    ("name", "function", "scale", "zero"),
    [
        ("LOGISTIC", reference.logistic_single, 1 / 256, -128),
        ("TANH", reference.tanh_single, 1 / 128, 0),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_table(seed: int, name: str, function, scale: float, zero: int, x_scale: float) -> None:
    rng = np.random.default_rng(seed)
    x = Stored(
        EVERY_INT8, np.float32(x_scale * rng.uniform(0.9, 1.1)), int(rng.integers(-128, 128))
    )
    y = Stored(EVERY_INT8, np.float32(scale), zero)

    (outputs,) = run_model(unary_model(name, spec_of(x), spec_of(y)), [x.values])

    np.testing.assert_array_equal(outputs, reference.table(function, x, y))


@pytest.mark.parametrize("ratio", [0.13, 0.5, 1.0, 1.7, 3.9])
@pytest.mark.parametrize("name", ["RELU", "QUANTIZE"])
@pytest.mark.parametrize("seed", SEEDS)
def test_rescaling(seed: int, name: str, ratio: float) -> None:
    rng = np.random.default_rng(seed)
    x = random_stored(rng, (256,))._replace(values=EVERY_INT8)
    y = random_stored(rng, (256,))._replace(scale=np.float32(x.scale * ratio))

    (outputs,) = run_model(unary_model(name, spec_of(x), spec_of(y)), [x.values])

    predict = {"RELU": reference.relu, "QUANTIZE": reference.requantize}[name]
    np.testing.assert_array_equal(outputs, predict(x, y))


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_quantize_from_float(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 4, 4000), np.arange(-40, 40) / 16]).astype(np.float32)
    limits, scale, zero = {
        "int8": (reference.INT8, 0.0625, 11),
        "int16": (reference.INT16, 0.0003, 0),
    }[dtype]
    y = Stored(x, np.float32(scale), zero)

    model = unary_model(
        "QUANTIZE", TensorSpec(x.shape, "float32"), TensorSpec(x.shape, dtype, y.scale, zero)
    )
    (outputs,) = run_model(model, [x])

    np.testing.assert_array_equal(outputs, reference.quantize(x, y, limits=limits))


def test_dequantize() -> None:
    x = Stored(EVERY_INT8, np.float32(0.0371), -9)
    model = unary_model("DEQUANTIZE", spec_of(x), TensorSpec((256,), "float32"))

    (outputs,) = run_model(model, [x.values])

    np.testing.assert_array_equal(outputs, reference.dequantize(x))


def test_concatenation_and_lookups_move_integers_as_they_are() -> None:
    rng = np.random.default_rng(0)
    grid = {"scale": np.float32(0.1), "zero_point": 3}
    parts = [random_int8(rng, (4, width)) for width in (2, 5)]
    specs = [TensorSpec(part.shape, "int8", **grid) for part in parts]
    joined = np.concatenate(parts, axis=1)
    (outputs,) = run_model(
        concatenation_model(specs, TensorSpec(joined.shape, "int8", **grid), axis=1), parts
    )
    np.testing.assert_array_equal(outputs, joined)

    symmetric = TensorSpec.constant(joined, np.float32(0.1))
    indices = np.array([3, 0, 0, 2, 1], np.int32)
    y = TensorSpec((5, 7), "int8", np.float32(0.1))
    for lookup in (gather_model, embedding_lookup_model):
        (outputs,) = run_model(lookup(symmetric, TensorSpec((5,), "int32"), y), [indices])
        np.testing.assert_array_equal(outputs, joined[indices])


class LSTM:
    """A random LSTM: its program, and the prediction of its outputs."""

    def __init__(self, seed: int, *, cell_exponent: int = -11, gain: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        batch, self.steps, inputs, units = (int(size) for size in rng.integers(2, 12, 4))
        self.x = random_stored(rng, (batch, self.steps, inputs))
        # Scales that bring the gates to a deviation of about gain: stored integers have 74.
        scales = gain * rng.uniform(0.5, 2, (2, 4)).astype(np.float32) / 74**2
        scales[0] /= self.x.scale * np.float32(math.sqrt(inputs))
        scales[1] *= 128 / np.float32(math.sqrt(units))
        self.input_weights, self.recurrent_weights = (
            [Stored(random_int8(rng, (units, size), -127), scale) for scale in row]
            for size, row in zip((inputs, units), scales, strict=True)
        )
        self.biases = [rng.integers(-4000, 4000, units).astype(np.int32) for _ in range(4)]
        zero = int(rng.integers(-30, 30))
        hidden_scale = np.float32(rng.uniform(0.5, 1) / 128)
        self.hidden = Stored(np.full((batch, units), zero), hidden_scale, zero)
        self.cell = Stored(np.zeros((batch, units)), 2.0**cell_exponent)

    def model(self, steps: int, cell_clip: float = 0.0) -> bytes:
        x = self.x._replace(values=self.x.values[:, :steps])
        input_weights, recurrent_weights = (
            [TensorSpec.constant(weight.values, weight.scale) for weight in weights]
            for weights in (self.input_weights, self.recurrent_weights)
        )
        biases = [
            TensorSpec.constant(bias, weight.scale * x.scale)
            for bias, weight in zip(self.biases, self.input_weights, strict=True)
        ]
        shape = self.hidden.values.shape
        return lstm_model(
            spec_of(x),
            input_weights,
            recurrent_weights,
            biases,
            TensorSpec(shape, "int8", self.hidden.scale, self.hidden.zero),
            TensorSpec(shape, "int16", self.cell.scale),
            cell_clip=cell_clip,
        )

    def expected(self, cell_clip: float = 0.0) -> np.ndarray:
        return reference.lstm(
            self.x,
            self.input_weights,
            self.recurrent_weights,
            self.biases,
            self.hidden,
            self.cell,
            cell_clip=cell_clip,
        )


@pytest.mark.parametrize("gain", [0.3, 1.0, 6.0])
@pytest.mark.parametrize("cell_exponent", range(-15, -8))
def test_lstm(cell_exponent: int, gain: float) -> None:
    lstm = LSTM(-cell_exponent, cell_exponent=cell_exponent, gain=gain)

    (outputs,) = run_model(lstm.model(lstm.steps), [lstm.x.values])

    np.testing.assert_array_equal(outputs, lstm.expected())


@pytest.mark.parametrize("cell_clip", [0.4, 3.0])
def test_lstm_clips_its_cell(cell_clip: float) -> None:
    lstm = LSTM(1, gain=3.0)

    (outputs,) = run_model(lstm.model(lstm.steps, cell_clip), [lstm.x.values])

    np.testing.assert_array_equal(outputs, lstm.expected(cell_clip))


def test_lstm_one_step_at_a_time_equals_the_sequence() -> None:
    lstm = LSTM(2)

    calls = [[lstm.x.values[:, step : step + 1]] for step in range(lstm.steps)]
    outputs = [output for (output,) in run_calls(lstm.model(1), calls)]

    np.testing.assert_array_equal(np.concatenate(outputs, axis=1), lstm.expected())


def test_lstm_zeroes_a_gate_whose_weights_are_scaled_per_channel() -> None:
    lstm = LSTM(3)
    units = lstm.hidden.values.shape[1]
    spread = [weight._replace(scale=np.full(units, weight.scale)) for weight in lstm.input_weights]
    zeroed = [np.zeros_like(weight.values) for weight in lstm.input_weights]

    lstm.input_weights = spread
    (outputs,) = run_model(lstm.model(lstm.steps), [lstm.x.values])
    lstm.input_weights = [
        Stored(values, weight.scale[0]) for values, weight in zip(zeroed, spread, strict=True)
    ]
    lstm.biases = [np.zeros_like(bias) for bias in lstm.biases]

    np.testing.assert_array_equal(outputs, lstm.expected())
