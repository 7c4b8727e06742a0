"""Compressed constants: the bytes of TFLite-Micro's own tool, the integers of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_nna import calibrate
from lightning_nna.deploy import Program, export_tflite, runtime_of, verify
from lightning_nna.deploy.capture import capture
from lightning_nna.deploy.decode import (
    DECODE,
    Encoding,
    compressed,
    lookup_tables,
    pruning,
    smallest_encoding,
    with_decoding,
)
from lightning_nna.deploy.flatbuffer import TensorSpec
from lightning_nna.deploy.graph import CapturedProgram
from lightning_nna.deploy.tflite import program_bytes
from tests.deploy.networks import FunctionNetwork

SPECS = ("tflm-int8", "tflm-int16x8")
DTYPES = ("int8", "int16", "int32")


def integers(shape: tuple[int, ...], dtype: str, values: int, seed: int = 0) -> NDArray[Any]:
    random = np.random.default_rng(seed)
    most = min(np.iinfo(dtype).max, 100_000)
    levels = random.choice(np.arange(-most, most), values, replace=False)
    return random.choice(levels, shape).astype(dtype)


def with_zeros(x: Tensor, fraction: float) -> Tensor:
    """Return a weight with this fraction of zeros."""
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) > fraction
    return x * mask


def network() -> nn.Sequential:
    """A convolution of each kind, and a table, with a quarter of the weights that are no zero."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(16, 8, 1),
        nn.Flatten(),
        nn.Linear(8 * 16, 40),
        nn.Tanh(),
    )
    for parameter in net.parameters():
        parameter.data = with_zeros(parameter.data, 0.75)
    return net.eval()


def emulated(spec: str) -> CapturedProgram:
    net = network()
    calibrate(net, [torch.randn(16, 3, 8, 8)], spec=spec)
    return capture(net, [torch.randn(1, 3, 8, 8)])


def outputs_of(program: CapturedProgram, dtype: str) -> NDArray[Any]:
    limits, random = np.iinfo(dtype), np.random.default_rng(2)
    (port,) = program.inputs
    calls = [
        [random.integers(limits.min, limits.max + 1, port.shape).astype(dtype)] for _ in range(250)
    ]
    calls += [[np.full(port.shape, bound, dtype)] for bound in (limits.min, limits.max)]
    return np.stack([x for (x,) in runtime_of("tflm").load(program_bytes(program)).run(calls)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [1, 2, 3, 16, 17, 100, 128])
@pytest.mark.parametrize("axis", [None, 0, 2])
def test_lookup_tables_have_the_bytes_of_the_tool(
    dtype: str, values: int, axis: int | None
) -> None:
    lut = pytest.importorskip("tflite_micro.tensorflow.lite.micro.compression.lut")
    editor = pytest.importorskip("tflite_micro.tensorflow.lite.micro.compression.model_editor")
    spec = pytest.importorskip("tflite_micro.tensorflow.lite.micro.compression.spec")
    data = integers((6, 31, 5), dtype, values)
    scales = np.ones(1 if axis is None else data.shape[axis])
    constant = TensorSpec(data.shape, dtype, scales, data=data, quantized_dimension=axis or 0)
    encoding = lookup_tables(constant, per_channel=axis is not None)
    assert encoding is not None
    codes = {"int8": 9, "int16": 7, "int32": 2}  # Of the schema.
    tensor = editor.Tensor(shape=data.shape, dtype=codes[dtype], data=data)
    mode = spec.PerTensor() if axis is None else spec.PerChannel(axis=axis)
    method = spec.LookUpTableCompression(index_bitwidth=encoding.bits, mode=mode)
    expected = lut.LutCompressor().compress(tensor, method)
    assert encoding.encoded == expected.encoded_data
    assert encoding.table == expected.ancillary_data


def test_an_index_has_at_most_seven_bits() -> None:
    data = np.arange(-64, 65, dtype=np.int8)
    assert lookup_tables(TensorSpec.constant(data, 0.1), per_channel=False) is None
    seven = lookup_tables(TensorSpec.constant(data[1:], 0.1), per_channel=False)
    assert seven is not None
    assert seven.bits == 7


def test_the_form_of_fewest_bytes_is_taken() -> None:
    few = integers((64, 64), "int8", 4)
    by_row = np.concatenate([integers((1, 64), "int8", 4, seed) for seed in range(64)])
    sparse = np.where(np.arange(4096).reshape(64, 64) % 10, 0, integers((64, 64), "int8", 200))
    found = [
        smallest_encoding(TensorSpec.constant(data.astype(np.int8), np.ones(64)))
        for data in (few, by_row, sparse)
    ]
    assert [each and each.method for each in found] == [
        "lookup table",
        "lookup table per channel",
        "pruning",
    ]
    dense = integers((64, 64), "int8", 250)
    smallest = smallest_encoding(TensorSpec.constant(dense, np.ones(64)))
    assert smallest is None or smallest.size_bytes >= dense.nbytes


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec.constant(np.zeros((2, 3, 4), np.int8)),  # No quantization parameters.
        TensorSpec((2, 3), "int8", 0.1),  # No constant.
        TensorSpec.constant(np.zeros((0, 4), np.int8), 0.1),
    ],
)
def test_what_has_no_other_form(spec: TensorSpec) -> None:
    assert smallest_encoding(spec) is None


@pytest.mark.parametrize(("scale", "axis"), [(np.ones(3), 1), (0.1, 2)])
def test_quantization_parameters_that_the_kernels_do_not_decode(scale: Any, axis: int) -> None:
    data = np.zeros((2, 3, 4), np.int8)
    spec = TensorSpec(data.shape, "int8", scale, data=data, quantized_dimension=axis)
    assert smallest_encoding(spec) is None


def test_a_zero_point_of_16_bits_is_not_pruned() -> None:
    data = np.zeros((2, 3, 4), np.int16)
    assert pruning(TensorSpec(data.shape, "int16", 0.1, 3, data=data)) is None


Form = Callable[[TensorSpec], Encoding | None]


@pytest.mark.exactness
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "form",
    [
        lambda x: lookup_tables(x, per_channel=False),
        lambda x: lookup_tables(x, per_channel=True),
        pruning,
    ],
    ids=["lookup table", "lookup table per channel", "pruning"],
)
def test_the_kernels_decode_every_form_of_every_constant(spec: str, form: Form) -> None:
    program = emulated(spec)
    constants = {
        name: form(each)
        for name, each in program.tensors.items()
        if each.data is not None and each.scales.any()
    }
    encodings = {name: each for name, each in constants.items() if each is not None}
    assert len(encodings) >= 7
    decoding = with_decoding(program, encodings)
    assert sum(each.name == DECODE for each in decoding.operators) == 4
    dtype = "int8" if spec == "tflm-int8" else "int16"
    plain, decoded = outputs_of(program, dtype), outputs_of(decoding, dtype)
    assert plain.size >= 10_000
    np.testing.assert_array_equal(decoded, plain)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "fully connected": (lambda: nn.Linear(128, 100), (128,)),
    "without bias": (lambda: nn.Linear(128, 100, bias=False), (128,)),
    "convolution": (lambda: nn.Conv2d(32, 100, 2), (32, 3, 3)),
    "depthwise": (lambda: nn.Conv2d(100, 100, 7, groups=100), (100, 8, 8)),
}


@pytest.mark.exactness
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("spec", SPECS)
def test_one_scale_is_written_for_each_channel_where_channels_have_tables(
    spec: str, layer: str
) -> None:
    build, shape = LAYERS[layer]
    net, x = build(), torch.randn(4, *shape)
    size = net.weight[0].numel()
    rows = [integers((1, size), "int8", 4, seed) for seed in range(100)]
    weight = torch.from_numpy(np.concatenate(rows)).float()
    weight[:, 0] = 127  # One scale for all channels.
    net.weight.data = weight.view_as(net.weight)
    calibrate(net, [x], spec=spec)
    program = capture(net, [x[:1]])
    decoding, tensors = compressed(program)
    tensor = max(tensors, key=lambda each: each.before_bytes)
    assert len(program.tensors[tensor.name].scales) == 1
    assert (tensor.method, tensor.bits) == ("lookup table per channel", 3)
    assert tensor.after_bytes == -(-100 * size * 3 // 8) + 500 + 16
    assert len(program_bytes(decoding)) < len(program_bytes(program)) - 1000
    dtype = "int8" if spec == "tflm-int8" else "int16"
    plain, decoded = outputs_of(program, dtype), outputs_of(decoding, dtype)
    assert plain.size >= 10_000
    np.testing.assert_array_equal(decoded, plain)


def test_a_weight_with_another_reader_keeps_its_scale() -> None:
    """A product of activations and a sum read it, too: neither has a scale for each row."""
    layer, x = nn.Linear(128, 100, bias=False), torch.randn(4, 128)
    rows = [integers((1, 128), "int8", 4, seed) for seed in range(100)]
    layer.weight.data = torch.from_numpy(np.concatenate(rows)).float()
    layer.weight.data[:, 0] = 127
    net = FunctionNetwork(lambda x, f: f(x).mean() + f.weight, layer)
    calibrate(net, [x], spec="tflm-int8")
    program = capture(net, [x[:1]])
    decoding, tensors = compressed(program)
    assert all(each.method != "lookup table per channel" for each in tensors)
    np.testing.assert_array_equal(outputs_of(decoding, "int8"), outputs_of(program, "int8"))


@pytest.mark.exactness
@pytest.mark.parametrize("spec", SPECS)
def test_zeros_of_a_constant_operand_are_its_zero_point(spec: str, tmp_path: Path) -> None:
    """An operand that is not symmetric has another integer where it is zero."""
    constant = nn.Parameter(with_zeros(torch.rand(1, 4096), 0.9))
    net = FunctionNetwork(lambda x, layer: x + layer.constant, nn.Module())
    net.layers[0].constant = constant
    x = torch.randn(4, 4096)
    calibrate(net, [x], spec=spec)
    program, tensors = compressed(capture(net, [x]))
    assert [each.method for each in tensors] == ["pruning"]
    path = tmp_path / "net.tflite"
    path.write_bytes(program_bytes(program))
    agreement = verify(net, path, [x])
    assert agreement == 1.0
    assert agreement.outputs >= 10_000


def test_a_constant_of_two_readers_is_decoded_for_each(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.data = with_zeros(layer.weight.data, 0.9)
    net, x = FunctionNetwork(lambda x, f: f(torch.tanh(f(x))), layer), torch.randn(3, 64)
    calibrate(net, [x], spec="tflm-int8")
    program, tensors = compressed(capture(net, [x]))
    assert len(tensors) == 1
    assert [each.name for each in program.operators].count(DECODE) == 2
    path = tmp_path / "net.tflite"
    path.write_bytes(program_bytes(program))
    assert verify(net, path, [x]) == 1.0
    assert Program(path).runtime.name == "tflm"


def test_a_program_without_a_smaller_form_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(32, 32), torch.randn(4, 32)
    calibrate(net, [x], spec="tflm-int8")
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    program, tensors = compressed(capture(net, [x]))
    assert tensors == ()
    assert program_bytes(program) == path.read_bytes()


@pytest.mark.exactness
def test_the_tool_makes_a_program_of_equal_outputs() -> None:
    compress = pytest.importorskip("tflite_micro.tensorflow.lite.micro.compression.compress")
    builder = pytest.importorskip("tflite_micro.tensorflow.lite.micro.compression.spec_builder")
    spec = pytest.importorskip("tflite_micro.tensorflow.lite.micro.compression.spec")
    torch.manual_seed(0)
    net, x = nn.Linear(128, 100, bias=False), torch.randn(4, 128)
    net.weight.data = torch.round(torch.rand(100, 128) * 14 - 7)
    net.weight.data[:, 0] = 7  # One scale for all rows.
    calibrate(net, [x], spec="tflm-int8")
    program = capture(net, [x[:1]])
    ours, (tensor,) = compressed(program)
    assert (tensor.method, tensor.bits) == ("lookup table", 4)
    number = list(program.tensors).index(tensor.name)
    entries = builder.SpecBuilder().add_tensor(subgraph=0, tensor=number)
    plain = program_bytes(program)
    theirs = compress.compress(plain, entries.with_lut(4, spec.PerTensor()).build())
    random = np.random.default_rng(0)
    calls = [[random.integers(-128, 128, (1, 128)).astype(np.int8)] for _ in range(100)]
    expected, tool, own = (
        np.stack([y for (y,) in runtime_of("tflm").load(bytes(each)).run(calls)])
        for each in (plain, theirs, program_bytes(ours))
    )
    assert expected.size >= 10_000
    np.testing.assert_array_equal(own, expected)
    np.testing.assert_array_equal(tool, expected)
