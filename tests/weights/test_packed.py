from __future__ import annotations

import copy
import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_nna import bake, calibrate, emulate
from lightning_nna.callbacks import CompressedSensingPruning, GeneralQuantizer, NNAEmulation
from lightning_nna.deploy import load_packed, save_packed
from lightning_nna.emulation.attachment import attach, attached
from lightning_nna.testing.contract import module, trainer
from lightning_nna.weights import packed, read_packed


def same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.numel() == 0:
        return True
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.flatten().view(torch.uint8))


torch.manual_seed(0)
TENSORS = {
    "dense": torch.randn(64, 65),
    "sparse": torch.randn(64, 65).masked_fill(torch.rand(64, 65) > 0.2, 0.0),
    "two values": torch.where(torch.rand(64, 65) < 0.5, 0.25, -0.5),
    "five bits": torch.randint(-16, 16, (64, 65)) * 0.125,
    "sparse, two bits": torch.randint(1, 5, (64, 65)) * 0.5 * (torch.rand(64, 65) < 0.1),
    "by channel": torch.randn(64, 4).gather(1, torch.randint(4, (64, 65))),
    "by channel, fewer": torch.randn(64, 4)
    .gather(1, torch.arange(65) % (torch.arange(64) % 4 + 1)[:, None])
    .view(64, 5, 13),
    "constant": torch.full((9, 9), 1.5),
    "zeros": torch.zeros(7, 3),
    "negative zeros": torch.tensor([0.0, -0.0, 1.0]).repeat(50),
    "odd": torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1e-45]),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "half": torch.randn(33).half(),
    "bfloat16": torch.randn(33).bfloat16(),
    "double": torch.randn(33).double(),
    "int64": torch.arange(300),
    "bool": torch.rand(77) < 0.5,
    "int8": torch.randint(-128, 127, (300,), dtype=torch.int8),
    "strided": torch.randn(6, 8).T,
}
LAYOUTS = {
    "dense": "dense",
    "sparse": "sparse",
    "two values": "few",
    "five bits": "few",
    "sparse, two bits": "both",
    "by channel": "channels",
    "by channel, fewer": "channels",
    "constant": "few",
}


def test_every_bit_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    report = save_packed(TENSORS, path)
    found = load_packed(path)
    assert list(found) == list(TENSORS)
    assert [name for name in TENSORS if not same_bits(TENSORS[name], found[name])] == []
    assert {name: report.layouts[name] for name in LAYOUTS} == LAYOUTS
    assert all(report.packed[name] <= report.plain[name] for name in TENSORS)
    assert all(report.coded[name] > 0 for name in TENSORS if TENSORS[name].numel())
    header = path.stat().st_size - report.packed_bytes
    assert 0 < header < 8000


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.5, -3.0]), max_size=70))
def test_any_few_values_come_back(values: list[float]) -> None:
    import tempfile

    tensor = torch.tensor(values)
    with tempfile.TemporaryDirectory() as folder:
        save_packed({"x": tensor}, Path(folder) / "x.safetensors")
        assert same_bits(load_packed(Path(folder) / "x.safetensors")["x"], tensor)


def test_sizes_are_those_of_bits() -> None:
    import tempfile

    count = 64 * 65
    with tempfile.TemporaryDirectory() as folder:
        report = save_packed(TENSORS, Path(folder) / "x.safetensors")
    assert report.packed["two values"] == count // 8 + 2 * 4
    assert report.packed["five bits"] == count * 5 // 8 + 32 * 4
    kept = int((TENSORS["sparse"] != 0).sum())
    assert report.packed["sparse"] == count // 8 + kept * 4
    kept = int((TENSORS["sparse, two bits"] != 0).sum())
    assert report.packed["sparse, two bits"] == count // 8 + -(-kept * 2 // 8) + 4 * 4
    assert report.packed["by channel"] == count * 2 // 8 + 64 * 4 * 4
    assert report.packed["constant"] == 4
    assert str(report).splitlines()[-1].split()[1] == str(report.packed_bytes)


@pytest.mark.filterwarnings("ignore:.*pruned weights are zero")
def test_a_pruned_and_quantized_network(tmp_path: Path) -> None:
    fitted = module()
    prune = CompressedSensingPruning(0.75, every_n_steps=2, freeze_step=8)
    few = GeneralQuantizer(2, sharpness=8.0, hard_from=0)
    trainer(prune, few).fit(fitted)
    report = save_packed(fitted, tmp_path / "network.safetensors")
    assert report.layouts["lstm.weight_hh_l0"] == "both"
    twin = module(seed=1)
    twin.load_state_dict(load_packed(tmp_path / "network.safetensors"))
    x = next(iter(fitted.train_dataloader()))[0]
    assert torch.equal(twin(x), fitted(x))


@pytest.mark.parametrize("on_chip", [False, True], ids=["float", "chip"])
def test_a_codebook_of_each_channel(on_chip: bool, tmp_path: Path) -> None:
    fitted = module()
    few = GeneralQuantizer(2, codebook="per_channel", hard_from=0)
    chip = [NNAEmulation(calibration_steps=2)] if on_chip else []
    trainer(*chip, few).fit(fitted)
    x = next(iter(fitted.train_dataloader()))[0]
    with emulate(fitted) if on_chip else nullcontext(), torch.no_grad():
        fitted(x)
    report = save_packed(fitted, tmp_path / "network.safetensors")
    assert report.layouts["head.first.weight"] == "channels"
    if_scaled = 1 if on_chip else 0
    width = 1 if on_chip else 4
    assert report.packed["head.first.weight"] == 64 * 2 // 8 + 8 * (4 * width + 4 * if_scaled)
    twin = module(seed=1)
    twin.load_state_dict(load_packed(tmp_path / "network.safetensors"))
    assert torch.equal(twin.head.first.weight, fitted.head.first.weight)


def test_a_file_of_the_earlier_format_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "FORMAT", "lightning-nna packed 2")
    tensors = {name: TENSORS[name] for name in ("dense", "sparse", "five bits", "sparse, two bits")}
    save_packed(tensors, tmp_path / "x.safetensors")
    found = load_packed(tmp_path / "x.safetensors")
    assert all(same_bits(tensor, found[name]) for name, tensor in tensors.items())


def test_values_with_the_bytes_of_an_empty_checksum_come_back(tmp_path: Path) -> None:
    x = torch.randn(64, 64)
    x.view(-1)[:32] = torch.frombuffer(bytearray(b"0000"), dtype=torch.float32)
    path = tmp_path / "x.safetensors"
    save_packed({"x": x}, path)
    assert b"0" * 64 in path.read_bytes()
    np.testing.assert_array_equal(read_packed.read_packed(path)["x"], x.numpy())


def test_nothing_is_left_half_written(tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    save_packed(nn.Linear(2, 2), path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"phase is a tensor of torch\.complex64"):
        save_packed({"phase": torch.zeros(2, dtype=torch.complex64)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_none(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_packed(tmp_path / "nowhere.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no file of this project"):
        load_packed(tmp_path / "other.safetensors")


def on_chip() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    with torch.no_grad():
        # Rows of few values, each with a step of its own.
        net[0].weight.copy_(torch.randint(-3, 4, (6, 8)) * torch.rand(6, 1))
    calibrate(net, [torch.randn(32, 8)])
    with emulate(net), torch.no_grad():
        net(torch.randn(2, 8))
    return net


def test_a_module_on_the_chip_comes_back_as_the_chip_has_it(tmp_path: Path) -> None:
    net, x = on_chip(), torch.randn(16, 8)
    path = tmp_path / "net.safetensors"
    report = save_packed(net, path)
    with emulate(net), torch.no_grad():
        expected = net(x)
    # Indices of at most seven values, and six steps.
    assert report.packed["0.weight"] <= 6 * 8 * 4 // 8 + 6 * 8 + 6 * 4
    twin = copy.deepcopy(net)
    twin.load_state_dict(load_packed(path))
    state = attached(net).state_dict()
    attach(twin).load_state_dict(state)
    with emulate(twin), torch.no_grad():
        assert torch.equal(twin(x), expected)
    assert torch.equal(twin[0].weight, bake(net)[0].weight)


def test_values_of_even_chance_cost_their_entropy(tmp_path: Path) -> None:
    report = save_packed({"x": torch.arange(4.0).repeat(400)}, tmp_path / "x.safetensors")
    assert report.coded_bytes == 1600 * 2 // 8 + 4 * 4
    skewed = torch.zeros(1600)
    skewed[:16] = 1.0
    share = 0.01 * math.log2(100) + 0.99 * math.log2(1 / 0.99)
    report = save_packed({"x": skewed}, tmp_path / "x.safetensors")
    assert report.coded_bytes == math.ceil(1600 * share / 8) + 2 * 4


READ = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("read_packed", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
found = module.read_packed(sys.argv[2])
assert not {"torch", "lightning", "lightning_nna"} & set(sys.modules), "more than NumPy is needed"
import numpy
numpy.savez(sys.argv[3], **found)
"""


def test_numpy_and_safetensors_are_enough(tmp_path: Path) -> None:
    path, copied = tmp_path / "packed.safetensors", tmp_path / "arrays.npz"
    save_packed(TENSORS, path)
    arguments = [read_packed.__file__, str(path), str(copied)]
    subprocess.run([sys.executable, "-c", READ, *arguments], check=True)
    found = np.load(copied)
    for name, tensor in TENSORS.items():
        plain = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        np.testing.assert_array_equal(found[name], plain.numpy(), strict=True)


def test_an_altered_file_is_refused(tmp_path: Path) -> None:
    path, altered = tmp_path / "packed.safetensors", tmp_path / "altered.safetensors"
    save_packed({name: TENSORS[name] for name in LAYOUTS}, path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(1000):
        data = bytearray(whole)
        if random.random() < 0.3:
            data = data[: random.integers(0, len(data))]
        elif random.random() < 0.3:
            data += bytes(random.integers(1, 9))
        else:
            data[random.integers(0, len(data))] ^= int(random.integers(1, 256))
        altered.write_bytes(data)
        with pytest.raises(ValueError, match=r"altered\.safetensors is no"):
            load_packed(altered)
