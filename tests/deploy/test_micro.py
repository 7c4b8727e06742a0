"""Exports for a microcontroller: the array is the file, and the vectors are the emulation's."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nna import calibrate
from lightning_nna.callbacks import GeneralQuantizer, NNAEmulation
from lightning_nna.deploy import (
    MicroExport,
    Program,
    UnsupportedProgramError,
    export_micro,
    runtime_of,
    verify,
)
from lightning_nna.deploy.micro_sources import MICRO_OPERATORS, resolver_function
from lightning_nna.deploy.runtimes.tflite_micro import LoadedTFLiteMicro
from lightning_nna.testing.contract import trainer
from tests.deploy.networks import FunctionNetwork

COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
TOOL_CHAIN = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
WARNINGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror")
SPECS = ("tflm-int8", "tflm-int16x8")

# What TensorFlow Lite Micro's public headers declare of what an export calls.
STUBS = {
    "micro_mutable_op_resolver.h": """
        enum TfLiteStatus { kTfLiteOk, kTfLiteError };
        namespace tflite {
        template <unsigned int count>
        struct MicroMutableOpResolver {
          TfLiteStatus AddConv2D() { return kTfLiteOk; }
          TfLiteStatus AddDecode() { return kTfLiteOk; }
          TfLiteStatus AddEthosU() { return kTfLiteOk; }
          TfLiteStatus AddFullyConnected() { return kTfLiteOk; }
          TfLiteStatus AddReshape() { return kTfLiteOk; }
          TfLiteStatus AddTanh() { return kTfLiteOk; }
          TfLiteStatus AddTranspose() { return kTfLiteOk; }
        };
        }
    """,
    "micro_interpreter.h": """
        #include <cstddef>
        #include <cstdint>
        #include "tensorflow/lite/micro/micro_mutable_op_resolver.h"
        #include "tensorflow/lite/schema/schema_generated.h"
        struct TfLiteTensor { union { void* raw; } data; std::size_t bytes; };
        namespace tflite {
        struct MicroInterpreter {
          template <class Operators>
          MicroInterpreter(const Model*, const Operators&, std::uint8_t*, std::size_t) {}
          TfLiteStatus AllocateTensors() { return kTfLiteOk; }
          TfLiteStatus Reset() { return kTfLiteOk; }
          TfLiteStatus Invoke() { return kTfLiteOk; }
          TfLiteTensor* input(std::size_t) { return nullptr; }
          TfLiteTensor* output(std::size_t) { return nullptr; }
        };
        }
    """,
    "schema_generated.h": """
        namespace tflite { struct Model; const Model* GetModel(const void*); }
    """,
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 40), nn.Tanh())
    weight = net[3].weight
    assert isinstance(weight, Tensor)
    weight.data *= torch.rand(weight.shape) > 0.9
    return net.eval()


def export(folder: Path, spec: str = "tflm-int8", **settings: Any) -> tuple[nn.Module, MicroExport]:
    net, x = network(), torch.randn(1, 3, 6, 6)
    calibrate(net, [torch.randn(8, 3, 6, 6)], spec=spec)
    return net, export_micro(net, [x], folder / "firmware", **settings)


def compiled(folder: Path, *sources: Path) -> Path:
    """Compile sources of a folder, and what TensorFlow's headers declare."""
    for name, text in STUBS.items():
        place = "schema" if name.startswith("schema") else "micro"
        header = folder / "stubs/tensorflow/lite" / place / name
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(f"#pragma once\n{text}")
    command = [str(COMPILER), *WARNINGS, "-I", str(folder / "stubs"), *map(str, sources)]
    program = folder / "program"
    made = subprocess.run(
        [*command, "-o", str(program)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    return program


def array_of(source: str, name: str) -> list[int]:
    """Read the numbers of an array of a C++ source, one dimension after the other."""
    (body,) = re.findall(rf"\b{name}(?:\[\w*\])+ = \{{(.*?)\}};", source, re.DOTALL)
    assert re.fullmatch(r"[\s{},0-9a-fx-]*", body)
    return [int(each, 0) for each in re.findall(r"-?\w+", body)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("compress", [False, True])
def test_the_array_is_the_file_and_the_vectors_are_the_integers(
    spec: str, compress: bool, tmp_path: Path
) -> None:
    _, micro = export(tmp_path, spec, compress=compress)
    source = (micro.folder / "model_data.cc").read_text()
    assert bytes(array_of(source, "kData")) == micro.path.read_bytes()
    vectors = (micro.folder / "model_test_vectors.cc").read_text()
    for name, kind in (("kInput0", "input"), ("kOutput0", "output")):
        expected = np.load(micro.folder / f"model_{kind}_0.npy")
        assert len(expected) == 4
        assert array_of(vectors, name) == expected.reshape(-1).tolist()


@TOOL_CHAIN
def test_the_sources_compile_and_hold_the_same_bytes(tmp_path: Path) -> None:
    _, micro = export(tmp_path, compress=True, name="kws")
    main = tmp_path / "main.cc"
    main.write_text(
        f"""
        #include <cstdio>
        #include "{micro.folder}/kws_test_vectors.h"
        int main() {{
          using namespace kws;
          static_assert(kArenaBytes == {micro.arena_bytes}, "");
          static_assert(kInput0Elements == 108 && kOutput0Elements == 40, "");
          std::fwrite(kData, 1, kDataBytes, stdout);
          std::fwrite(kInput0, 1, sizeof(kInput0), stdout);
          std::fwrite(kOutput0, 1, sizeof(kOutput0), stdout);
          std::fwrite(&kInput0Scale, 1, sizeof(kInput0Scale), stdout);
          return reinterpret_cast<unsigned long>(kData) % 16 != 0;
        }}
        """
    )
    sources = [micro.folder / f"kws_{part}.cc" for part in ("data", "test_vectors")]
    program = compiled(tmp_path, main, *sources)
    printed = subprocess.run([program], capture_output=True, check=True).stdout
    (port,) = Program(micro.path).inputs
    qparams = Program(micro.path).qparams_of(port)
    assert qparams is not None
    arrays = [np.load(micro.folder / f"kws_{kind}_0.npy") for kind in ("input", "output")]
    scale = np.float32(qparams.scale).tobytes()
    assert printed == b"".join([micro.path.read_bytes(), *(x.tobytes() for x in arrays), scale])


@TOOL_CHAIN
@pytest.mark.parametrize("compress", [False, True])
def test_operators_and_the_check_call_what_the_runtime_has(compress: bool, tmp_path: Path) -> None:
    _, micro = export(tmp_path, compress=compress)
    (block,) = re.findall(r"```cpp\n(.*?)```", (micro.folder / "README.md").read_text(), re.DOTALL)
    main = micro.folder / "main.cc"
    main.write_text(
        f"{block}\nnamespace tflite {{ const Model* GetModel(const void*) {{ return nullptr; }} }}"
    )
    parts = ("data", "test_vectors", "check")
    compiled(tmp_path, main, *(micro.folder / f"model_{part}.cc" for part in parts))
    operators = (micro.folder / "model_operators.h").read_text()
    assert f"MicroMutableOpResolver<{5 + compress}>" in operators
    assert set(re.findall(r"Add\w+(?=\(\))", operators)) == {
        "AddConv2D",
        "AddFullyConnected",
        "AddReshape",
        "AddTanh",
        "AddTranspose",
    } | ({"AddDecode"} if compress else set())


def test_functions_of_operators_are_those_of_the_public_resolver() -> None:
    named = {
        "ARG_MAX": "AddArgMax",
        "AVERAGE_POOL_2D": "AddAveragePool2D",
        "BATCH_MATMUL": "AddBatchMatMul",
        "BROADCAST_TO": "AddBroadcastTo",
        "CUMSUM": "AddCumSum",
        "DEPTHWISE_CONV_2D": "AddDepthwiseConv2D",
        "EMBEDDING_LOOKUP": "AddEmbeddingLookup",
        "L2_NORMALIZATION": "AddL2Normalization",
        "LOG_SOFTMAX": "AddLogSoftmax",
        "MAX_POOL_2D": "AddMaxPool2D",
        "PADV2": "AddPadV2",
        "RELU6": "AddRelu6",
        "RESIZE_NEAREST_NEIGHBOR": "AddResizeNearestNeighbor",
        "REVERSE_V2": "AddReverseV2",
        "SELECT_V2": "AddSelectV2",
        "SPACE_TO_BATCH_ND": "AddSpaceToBatchNd",
        "STRIDED_SLICE": "AddStridedSlice",
        "TRANSPOSE_CONV": "AddTransposeConv",
        "UNIDIRECTIONAL_SEQUENCE_LSTM": "AddUnidirectionalSequenceLSTM",
    }
    assert {each: resolver_function(each) for each in named} == named
    assert set(named) <= MICRO_OPERATORS


@pytest.mark.exactness
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("compress", [False, True])
def test_a_runtime_computes_the_vectors_in_every_bit(
    spec: str, compress: bool, tmp_path: Path
) -> None:
    net, micro = export(tmp_path, spec, compress=compress, test_vectors=250)
    inputs = np.load(micro.folder / "model_input_0.npy")
    expected = np.load(micro.folder / "model_output_0.npy")
    loaded = runtime_of("tflm").load(micro.path.read_bytes())
    outputs = np.stack([y for (y,) in loaded.run([[x] for x in inputs])])
    np.testing.assert_array_equal(outputs, expected)
    assert expected.size >= 10_000
    assert micro.agreement == 1.0
    assert verify(net, micro.path, [torch.randn(1, 3, 6, 6)]) == 1.0


@pytest.mark.parametrize("compress", [False, True])
def test_a_program_runs_in_its_arena(compress: bool, tmp_path: Path) -> None:
    _, micro = export(tmp_path, compress=compress)
    assert micro.arena_bytes is not None
    contents, x = micro.path.read_bytes(), np.load(micro.folder / "model_input_0.npy")[0]
    loaded = LoadedTFLiteMicro(contents, arena_bytes=micro.arena_bytes)
    loaded.run([[x]])
    assert loaded.arena_bytes() <= micro.arena_bytes < loaded.arena_bytes() + 5000


def test_an_index_that_is_not_set_is_none_of_a_table(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 4)), torch.tensor([[8]])
    calibrate(net, [torch.arange(9)[:, None]], spec="tflm-int8")
    assert export_micro(net, [x], tmp_path / "net").agreement == 1.0


def test_compression_trades_flash_for_the_arena(tmp_path: Path) -> None:
    _, micro = export(tmp_path, compress=True)
    assert micro.flash_bytes == micro.path.stat().st_size < micro.plain_flash_bytes - 3000
    assert micro.arena_bytes is not None
    assert micro.plain_arena_bytes is not None
    assert micro.plain_arena_bytes < micro.arena_bytes < micro.plain_arena_bytes + 40 * 128 + 600
    (weight,) = micro.compressed
    assert (weight.method, weight.before_bytes) == ("pruning", 40 * 128)
    page = (micro.folder / "README.md").read_text()
    for number in (micro.flash_bytes, micro.plain_flash_bytes, micro.arena_bytes):
        assert f"{number:,}" in page
    assert "160 of 160 integers" in page


class Images(pl.LightningModule):
    """Fit noise with two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(128, 40)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self(batch[0]).square().mean()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(64, 3, 6, 6)), batch_size=8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.exactness
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("spec", SPECS)
def test_codebooks_of_channels_are_tables_of_channels(
    spec: str, bits: int, granularity: str, tmp_path: Path
) -> None:
    fitted = Images()
    emulation = NNAEmulation(spec, calibration_steps=2)
    quantizer = GeneralQuantizer(
        bits, codebook="per_channel", granularity=granularity, hard_from=0, sharpness=8.0
    )
    trainer(emulation, quantizer, steps=6).fit(fitted)
    micro = export_micro(
        fitted, [torch.randn(1, 3, 6, 6)], tmp_path / "net", compress=True, test_vectors=250
    )
    assert micro.agreement == 1.0
    assert micro.agreement.outputs == 250 * 40
    linear, convolution = 40 * 128, 32 * 16 * 9
    sizes = {
        each.before_bytes: each.after_bytes
        for each in micro.compressed
        if (each.method, each.bits) == ("lookup table per channel", bits)
    }
    assert sizes[linear] == linear * bits // 8 + 40 * 2**bits + 16
    assert sizes[convolution] == convolution * bits // 8 + 32 * 2**bits + 16
    assert micro.flash_bytes < micro.plain_flash_bytes - 2000


class Cell(nn.Module):
    """A recurrent cell whose states are arguments: one tensor, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.tanh(self.first(torch.cat((x, states[0]), dim=1)))
        last = torch.tanh(self.last(torch.cat((first, states[1]), dim=1)))
        return last, torch.stack((first, last))


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Cell(), [torch.randn(1, 8), torch.zeros(2, 1, 4)]
    batch = (torch.randn(9, 8), torch.rand(2, 9, 4) * 2 - 1)
    calibrate(net, [batch], spec="tflm-int8", forward=lambda module, each: module(*each))
    micro = export_micro(net, x, tmp_path / "cell")
    assert micro.agreement == 1.0
    page = (micro.folder / "README.md").read_text()
    assert "| input 1 | argument 1 | int8 | [2, 1, 4] |" in page
    assert len(list(micro.folder.glob("model_output_*.npy"))) == len(
        set(port.tensor for port in Program(micro.path).outputs)
    )


@pytest.mark.skipif(importlib.util.find_spec("ethosu") is None, reason="Vela is not installed")
def test_for_an_npu_vela_compiles_it(tmp_path: Path) -> None:
    net, micro = export(tmp_path, accelerator="ethos-u55-128")
    assert micro.operators == {"ethos-u": 1}
    assert "AddEthosU()" in (micro.folder / "model_operators.h").read_text()
    source = (micro.folder / "model_data.cc").read_text()
    assert bytes(array_of(source, "kData")) == micro.path.read_bytes()
    assert micro.flash_bytes < micro.plain_flash_bytes
    assert verify(net, micro.folder / "model_source.tflite", [torch.randn(1, 3, 6, 6)]) == 1.0
    assert micro.vela is not None
    assert micro.vela.command in (micro.folder / "README.md").read_text()
    assert "--accelerator-config ethos-u55-128" in micro.vela.command
    assert micro.arena_bytes is None
    assert not (micro.folder / "vela").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spec": "litert-int8"}, "the spec 'litert-int8' has the integers of 'litert'.*any_spec"),
        ({"name": "Model"}, "name is that of files and of a C\\+\\+ namespace.*got 'Model'"),
        ({"name": "tflite"}, "got 'tflite'"),
        ({"test_vectors": 0}, "test_vectors must be at least 1, got 0"),
        (
            {"compress": True, "accelerator": "ethos-u55-128"},
            "Vela compresses the weights for ethos-u55-128 itself: leave compress out",
        ),
    ],
)
def test_settings_that_do_not_go(settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_another_spec_is_exported_when_asked(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 200)), torch.randn(1, 64)
    calibrate(net, [torch.randn(50, 64)], spec="litert-int8")
    micro = export_micro(net, [x], tmp_path / "net", any_spec=True, test_vectors=50)
    assert micro.agreement is not None
    assert 0.9 < micro.agreement < 1.0


def test_an_operator_that_it_lacks_is_named(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.GELU()), torch.randn(4, 6)
    calibrate(net, [x], spec="litert-int8")
    with pytest.raises(UnsupportedProgramError, match="TFLite-Micro has no kernel of GELU: use"):
        export_micro(net, [x], tmp_path / "net", any_spec=True)
    assert list(tmp_path.iterdir()) == []


def test_without_the_runtime_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tflite_micro.python.tflite_micro", None)
    with pytest.warns(UserWarning, match="not compared and has no arena size: TFLite-Micro is not"):
        _, micro = export(tmp_path)
    assert (micro.arena_bytes, micro.agreement) == (None, None)
    assert "Not compared with TFLite-Micro" in (micro.folder / "README.md").read_text()
    assert "kArenaBytes" not in (micro.folder / "model_data.h").read_text()


def test_an_earlier_export_is_replaced_and_other_files_are_not(tmp_path: Path) -> None:
    export(tmp_path, compress=True)
    _, micro = export(tmp_path, test_vectors=2)
    assert len(np.load(micro.folder / "model_input_0.npy")) == 2
    assert [each.name for each in tmp_path.iterdir()] == ["firmware"]
    (micro.folder / "main.cc").write_text("int main() {}")
    with pytest.raises(ValueError, match=r"files of no earlier export, as main\.cc"):
        export(tmp_path)


def test_an_export_that_fails_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, micro = export(tmp_path)
    contents = micro.path.read_bytes()

    def fail(*arguments: Any) -> str:
        raise OSError("the disk is full")

    monkeypatch.setattr("lightning_nna.deploy.micro.readme", fail)
    with pytest.raises(OSError, match="disk is full"):
        export(tmp_path, compress=True)
    assert micro.path.read_bytes() == contents
    assert [each.name for each in tmp_path.iterdir()] == ["firmware"]


def test_layers_of_no_argument_are_named(tmp_path: Path) -> None:
    """The page names what is part of the program."""
    net = FunctionNetwork(lambda x, scale, layer: layer(x) * scale, nn.Linear(8, 4))
    x = torch.randn(5, 8)
    calibrate(net, [(x, 2.0)], spec="tflm-int8", forward=lambda module, each: module(*each))
    micro = export_micro(net, [x, 2.0], tmp_path / "net")
    assert "Argument 1 is part of the program: 2.0." in (micro.folder / "README.md").read_text()
