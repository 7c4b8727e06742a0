"""Programs of emulated modules: every bit on LiteRT, the same bytes, errors with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
from lightning_nna.deploy import (
    CaptureError,
    Program,
    export_tflite,
    run_tflite,
    verify,
)
from lightning_nna.deploy.capture import capture
from lightning_nna.emulation.attachment import attached
from tests.deploy.networks import POORER_SPECS, SPECS
from tests.emulation.random_networks import BATCH, INPUTS, LABELS, TIME, Network, plans
from tests.recipes.asr.test_emulated import batch, conformer

pytestmark = [
    pytest.mark.exactness,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
FEW = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def calibrated(net: nn.Module, *example: Any, spec: Any = "litert-int8") -> nn.Module:
    calibrate(net, [example], forward=lambda module, batch: module(*batch), spec=spec)
    return net


@pytest.mark.slow
@pytest.mark.parametrize("bits", SPECS)
def test_every_bit_of_a_random_network(bits: int, tmp_path: Path) -> None:
    @FEW
    @given(plans(bits), st.booleans(), st.integers(0, 2**16))
    def holds(plan: list[Any], embedded: bool, seed: int) -> None:
        if "'elu'" in repr(plan):
            return  # LiteRT has no reference kernel of it.
        torch.manual_seed(seed)
        floats, labels = torch.randn(BATCH, TIME, INPUTS), torch.randint(0, LABELS, (BATCH, TIME))
        x = labels if embedded else floats
        net = calibrated(Network(plan, embedded=embedded), x, spec=SPECS[bits])
        model = export_tflite(net, [x], tmp_path / "net.tflite")
        assert verify(net, model.path, [x]) == 1.0

    holds()


class Streaming(nn.Module):
    """Two LSTM layers whose states come in and go out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(4, 8, batch_first=True)
        self.second = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, states: Any = (None, None)) -> tuple[Tensor, Any]:
        x, first = self.first(x, states[0])
        x, second = self.second(x, states[1])
        return self.head(x), (first, second)


def test_states_go_in_and_out_and_steps_make_the_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 4)
    net = calibrated(Streaming(), x)
    zeros = tuple(tuple(torch.zeros(1, 2, units) for _ in range(2)) for units in (8, 6))
    path = export_tflite(net, [x[:, :1], zeros], tmp_path / "step.tflite").path
    whole_path = export_tflite(net, [x], tmp_path / "whole.tflite").path
    program = Program(path)
    assert [port.position for port in program.inputs] == [0, 1, 2, 3, 4]
    state: Any = zeros
    steps = []
    for step in x.split(1, 1):
        output, *state = program([step, *state])
        steps.append(output)
    with emulate(net), torch.no_grad():
        whole, ends = net(x)
    np.testing.assert_array_equal(np.concatenate(steps, 1), whole.numpy())
    for found, expected in zip(state, [t for pair in ends for t in pair], strict=True):
        np.testing.assert_array_equal(found, expected.numpy())
    np.testing.assert_array_equal(run_tflite(whole_path, [x])[0], whole.numpy())


def test_a_second_run_starts_where_the_first_did(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4)
    net = calibrated(Streaming(), x)
    program = Program(export_tflite(net, [x], tmp_path / "net.tflite").path)
    for first, second in zip(program([x]), program([x]), strict=True):
        np.testing.assert_array_equal(first, second)


def test_the_same_module_gives_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 5, 4)
    net = calibrated(Streaming(), x)
    first = export_tflite(net, [x], tmp_path / "a.tflite").path.read_bytes()
    assert export_tflite(net, [x], tmp_path / "b.tflite").path.read_bytes() == first


def test_a_weight_that_is_used_twice_is_written_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(32, 32)
    x = torch.randn(2, 32)
    once = export_tflite(calibrated(nn.Sequential(shared), x), [x], tmp_path / "once.tflite")
    twice = nn.Sequential(shared, nn.Tanh(), shared)
    model = export_tflite(calibrated(twice, x), [x], tmp_path / "twice.tflite")
    assert model.operators["FULLY_CONNECTED"] == 2
    # The bias has the scale of its input and so is another.
    assert model.weight_bytes < once.weight_bytes + 32 * 32


def test_an_input_on_two_grids_comes_in_twice(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x) * x[:, :1].clone()

    x = torch.randn(4, 3) * torch.tensor([1.0, 9.0, 9.0])
    net = calibrated(Twice(), x)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert [port.position for port in model.inputs] == [0, 0]
    assert verify(net, model.path, [x]) == 1.0


def test_lengths_are_part_of_the_program_and_masks_of_the_data_are_not(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            padding = torch.arange(x.shape[1]) >= lengths[:, None]
            scores = (x @ x.transpose(1, 2)).masked_fill(padding[:, None], float("-inf"))
            return torch.softmax(scores, -1)

    x, lengths = torch.randn(2, 4, 3), torch.tensor([4, 2])
    net = calibrated(Masked(), x, lengths)
    model = export_tflite(net, [x, lengths], tmp_path / "net.tflite")
    assert (model.fixed, verify(net, model.path, [x, lengths])) == ((1,), 1.0)


def test_batch_norm_dropout_and_parameters_of_their_own(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4)
            self.gain, self.drop = nn.Parameter(torch.rand(4, 1)), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.drop(self.norm(self.conv(x)))) * self.gain + self.gain

    torch.manual_seed(0)
    x = torch.randn(2, 3, 6)
    net = calibrated(Mixed(), x)
    net.train()
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert net.drop.training
    assert verify(net, model.path, [x]) == 1.0


@pytest.mark.parametrize("kind", ["maximum", "minimum", "where"])
def test_choices_between_activations(kind: str, tmp_path: Path) -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, second = torch.tanh(x), torch.tanh(-x).roll(1, 0)
            if kind == "where":
                return torch.where(torch.arange(4) < 2, first, second)
            return getattr(torch, kind)(first, second)

    x = torch.randn(3, 4)
    net = calibrated(Chosen(), x)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    names = {"maximum": "MAXIMUM", "minimum": "MINIMUM", "where": "SELECT_V2"}
    assert names[kind] in model.operators
    assert verify(net, model.path, [x]) == 1.0


def test_a_conformer_and_its_whole_utterance(tmp_path: Path) -> None:
    net, example = conformer(3), batch()
    features, lengths = example[0][:1], example[1][:1]
    calibrate(net, [example], forward=lambda module, batch: module.eval()(*batch))
    transcribe = type(net).transcribe
    model = export_tflite(net, [features, lengths], tmp_path / "net.tflite", forward=transcribe)
    assert {"BATCH_MATMUL", "SOFTMAX", "RSQRT", "DEPTHWISE_CONV_2D"} <= set(model.operators)
    other = [torch.randn(features.shape), lengths]
    assert verify(net, model.path, other, forward=transcribe) == 1.0


class Arctangent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.atan(self.layer(x))


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(9, 3)

    def forward(self, labels: Tensor) -> Tensor:
        return torch.tanh(self.layer(labels // 2))


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return torch.sigmoid(y[int(y.argmax())])


@pytest.mark.parametrize(
    ("net", "example", "message"),
    [
        (Arctangent(), torch.randn(2, 3), r"atan#0 is no operator of litert-int8.*coverage"),
        (
            Halves(),
            torch.tensor([[1, 2]]),
            r"computed from integer arguments in no emulated operator",
        ),
        (
            Sorted(),
            torch.randn(4),
            r"test_tflite.py:\d+ in Sorted.forward reads a value of the data",
        ),
    ],
)
def test_a_module_that_is_no_program_is_an_error(
    net: nn.Module, example: Tensor, message: str, tmp_path: Path
) -> None:
    calibrated(net, example)
    with pytest.raises(CaptureError, match=message):
        export_tflite(net, [example], tmp_path / "net.tflite")
    assert list(tmp_path.iterdir()) == []


class Detour(nn.Module):
    """A function between two layers that no accelerator has."""

    def __init__(self, detour: Any) -> None:
        super().__init__()
        self.first, self.last, self.detour = nn.Linear(6, 5), nn.Linear(5, 4), detour

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.detour(torch.sigmoid(self.first(x)) + 0.1))


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize(
    ("detour", "operators", "least"),
    [
        (torch.abs, ["ABS"], 1.0),
        (torch.floor, ["FLOOR"], 1.0),
        (torch.sqrt, ["SQRT"], 1.0),
        (torch.square, ["SQUARE"], 1.0),
        # The last bit of their float32 is the library's, and 16 bits see more of it than 8.
        (torch.cos, ["COS"], 0.999),
        (torch.exp, ["EXP"], 0.999),
        (torch.log, ["LOG"], 0.999),
        (torch.rsqrt, ["RSQRT"], 0.999),
        (torch.sin, ["SIN"], 0.999),
        (lambda x: x.flip(1).exp().square(), ["EXP", "SQUARE"], 0.999),
    ],
)
def test_an_operator_of_the_cpu_if_it_is_allowed(
    bits: int, detour: Any, operators: list[str], least: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    net = calibrated(Detour(detour), x, spec=POORER_SPECS[bits])
    with pytest.raises(CaptureError, match=r"is no operator of .* allow_cpu=True"):
        export_tflite(net, [x], tmp_path / "net.tflite")
    model = export_tflite(net, [x], tmp_path / "net.tflite", allow_cpu=True)
    assert [name for name in model.operators if name in operators] == operators
    assert model.operators["DEQUANTIZE"] == model.operators["QUANTIZE"] == 1
    assert verify(net, model.path, [x]) >= least


def test_what_the_cpu_leaves_may_be_a_result_and_may_be_read_twice(tmp_path: Path) -> None:
    class Twice(Detour):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            found = self.detour(torch.sigmoid(self.first(x)))
            return torch.tanh(found) * torch.sigmoid(found), found

    net, x = Twice(torch.sqrt), torch.randn(3, 6)
    calibrated(net, x, spec=POORER_SPECS[8])
    model = export_tflite(net, [x], tmp_path / "net.tflite", allow_cpu=True)
    assert model.operators["SQRT"] == 1
    assert verify(net, model.path, [x]) == 1.0


@pytest.mark.parametrize(
    ("detour", "message"),
    [
        (torch.atan, r"atan#0 is no operator of litert-int8.*forward=$"),
        (lambda x: x.exp_(), r"exp#0 is no operator of litert-int8 .*exp_ at .*without exp$"),
        (
            lambda x: torch.exp(x).flip(1),
            "reads floats that no operator of the CPU computes in this layout",
        ),
    ],
)
def test_what_the_cpu_cannot_have_either(detour: Any, message: str, tmp_path: Path) -> None:
    net, x = Detour(detour), torch.randn(3, 6)
    calibrated(net, x, spec=POORER_SPECS[8])
    with pytest.raises(CaptureError, match=message):
        export_tflite(net, [x], tmp_path / "net.tflite", allow_cpu=True)


def test_paths_without_ranges_are_an_error_and_leave_none() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    with pytest.raises(CaptureError, match="has no ranges yet: call calibrate"):
        capture(net, [torch.randn(2, 3)])
    calibrated(net, torch.randn(2, 3))
    for _ in range(2):
        with pytest.raises(CaptureError, match=r"no calibration has seen .*1/tanh"):
            capture(net, [torch.randn(2, 3)], forward=lambda module, x: module[1](2 * x + x))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"preset": "shift"}, "rounding is 'shift'"),
        ({"rounding": "single"}, "rounding is 'single'"),
        ({"preset": "litert-int16x8", "rounding": "double"}, "rounding is 'double'"),
        ({"accumulator_bits": 16}, "accumulator_bits is 16, and .* 8-bit activations have 32"),
        ({"activation_bits": 16}, "accumulator_bits is 32, and .* 16-bit activations have 64"),
        ({"accumulator_overflow": "saturate"}, "accumulator_overflow is 'saturate'"),
        ({"table_entries": 256}, "table_entries is 256"),
        ({"bias_bits": 40}, "bias_bits is 40"),
    ],
)
def test_an_arithmetic_that_no_program_has_is_refused_whatever_its_name(
    settings: dict[str, Any], named: str
) -> None:
    spec = {**settings, "name": "litert-int8"}
    net = calibrated(nn.Linear(3, 3), torch.randn(2, 3), spec=spec)
    with pytest.raises(CaptureError, match=named):
        capture(net, [torch.randn(2, 3)])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_bits": 4},
        {"bias_bits": 16},
        {"weight_granularity": "per_tensor"},
        {"preset": "litert-int16x8"},
        {"preset": "litert-int16x8", "bias_bits": 32, "weight_bits": 3},
    ],
)
def test_what_the_kernels_compute_is_a_program_under_any_name(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 6)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].bias.mul_(50.0)
    calibrated(net, x, spec={**settings, "name": "of-our-own"})
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    with emulate(net, attached(net).spec), torch.no_grad():
        expected = net(x)
    torch.testing.assert_close(torch.as_tensor(run_tflite(path, [x])[0]), expected, rtol=0, atol=0)


def test_an_elu_runs_on_the_only_kernel_that_there_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 6)
    net = calibrated(nn.Sequential(nn.ELU()), x)
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    with pytest.raises(ValueError, match=r"no reference kernel of it: pass runtime='litert-opt"):
        run_tflite(path, [x])
    with emulate(net), torch.no_grad():
        expected = net(x)
    (found,) = run_tflite(path, [x], runtime="litert-optimized")
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=0, atol=0)


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    x = torch.randn(2, 3)
    path = export_tflite(calibrated(nn.Linear(3, 3), x), [x], tmp_path / "net.tflite").path
    with pytest.raises(ValueError, match=r"argument 0 has shape \(4, 3\), the program \(2, 3\)"):
        run_tflite(path, [torch.randn(4, 3)])
    with pytest.raises(ValueError, match="argument 0 is missing"):
        run_tflite(path, [])
    with pytest.raises(TypeError, match=r"are a list of the module's arguments, got a Tensor"):
        run_tflite(path, x)


def test_optimized_kernels_run_and_may_differ(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    net = calibrated(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8)), x)
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    assert 0.9 < verify(net, path, [x], runtime="litert-optimized") <= 1.0


ALTERED = 500


def test_an_altered_program_is_refused(tmp_path: Path) -> None:
    x = torch.randn(2, 3)
    path = export_tflite(calibrated(nn.Linear(3, 3), x), [x], tmp_path / "net.tflite").path
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    altered = tmp_path / "altered.tflite"
    for _ in range(ALTERED):
        data = bytearray(whole)
        if random.random() < 0.3:
            data = data[: random.integers(0, len(data))]
        elif random.random() < 0.3:
            data += bytes(random.integers(1, 9))
        else:
            data[random.integers(0, len(data))] ^= int(random.integers(1, 256))
        altered.write_bytes(data)
        with pytest.raises(ValueError, match=r"altered\.tflite is no"):
            Program(altered)


def test_weights_with_the_bytes_of_an_empty_checksum_are_kept(tmp_path: Path) -> None:
    """In 8 bits 48 is the byte of the digit 0, and an empty checksum is 64 of them."""
    torch.manual_seed(0)
    layer, x = nn.Linear(128, 8), torch.randn(20, 128)
    layer.weight.data.fill_(48.0)
    layer.weight.data[:, 0] = 127.0
    net = calibrated(layer, x)
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    assert b"0" * 64 in path.read_bytes()
    assert verify(net, path, [x]) == 1.0


def test_a_foreign_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign.tflite").write_bytes(b"\x18\0\0\0TFL3" + bytes(100))
    with pytest.raises(ValueError, match="no file of this project"):
        Program(tmp_path / "foreign.tflite")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tflite"):
        Program(tmp_path / "nowhere.tflite")
