"""LSTMs equal the kernel of the spec's runtime in every bit, states included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
from lightning_nna.deploy import export_tflite
from lightning_nna.deploy.runtimes import runtime_of
from lightning_nna.emulation.operators.lstm_kernels import kernel_of
from lightning_nna.emulation.program import Instruction
from lightning_nna.emulation.spec import PRESETS
from lightning_nna.testing.replay import on_runtime

LSTM = "UNIDIRECTIONAL_SEQUENCE_LSTM"
SPECS = ("litert-int8", "tflm-int8")

pytestmark = pytest.mark.exactness

#: Steps, batch, inputs, units, and the factor of all weights: with large ones gates saturate.
SHAPES = (
    (1, 1, 1, 4, 1.0),
    (1, 8, 5, 64, 2.0),
    (2, 2, 7, 4, 9.0),
    (3, 1, 40, 12, 1.0),
    (5, 8, 64, 8, 4.0),
    (7, 4, 3, 33, 0.1),
    (9, 5, 17, 16, 20.0),
    (12, 3, 32, 48, 1.0),
    (15, 8, 10, 64, 3.0),
    (16, 2, 200, 10, 2.0),
    (18, 7, 24, 50, 0.5),
    (20, 8, 19, 64, 1.0),
    (20, 8, 64, 64, 9.0),
    (20, 6, 8, 20, 60.0),
)


def record(module: nn.Module, spec: str, *example: object, inputs: tuple = ()) -> list[Instruction]:
    """Calibrate with an example, and return the LSTMs of an emulated run."""
    recorded: list[Instruction] = []
    with emulate(module, spec) as emulator, torch.no_grad():
        with emulator.observing():
            module(*example)
        with emulator.running(recorder=recorded.append):
            module(*(inputs or example))
    return [each for each in recorded if each.operator == LSTM]


def compare(instruction: Instruction, spec: str) -> int:
    """Demand equal outputs, hidden states and cells; return the number of outputs."""
    reference = on_runtime(instruction, PRESETS[spec].runtime, states=True)
    expected = (*instruction.outputs, *instruction.new_state)
    for stored, found in zip(expected, reference, strict=True):
        np.testing.assert_array_equal(stored.integers.numpy(), found)
    return int(reference[0].size)


def lstm_of(inputs: int, units: int, gain: float) -> nn.LSTM:
    module = nn.LSTM(inputs, units)
    for parameter in module.parameters():
        parameter.data.mul_(gain)
    return module


@pytest.mark.parametrize("spec", SPECS)
def test_random_weights_inputs_and_states(spec: str) -> None:
    torch.manual_seed(0)
    compared = 0
    for steps, batch, inputs, units, gain in SHAPES:
        x = torch.randn(steps, batch, inputs)
        state = (0.5 * torch.randn(1, batch, units), torch.randn(1, batch, units))
        for start in (None, state):
            module = lstm_of(inputs, units, gain)
            (instruction,) = record(module, spec, x, start, inputs=(1.5 * x, start))
            compared += compare(instruction, spec)
    assert compared >= 10_000


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("magnitude", [0.02, 1.0])
def test_ends_of_all_ranges(magnitude: float, spec: str) -> None:
    """All weights and inputs at the ends of their ranges, in some rows with one sign."""
    torch.manual_seed(1)
    module = nn.LSTM(100, 32)
    for parameter in module.parameters():
        parameter.data = magnitude * torch.randn_like(parameter).sign()
    module.weight_ih_l0.data[:8] = magnitude
    x = torch.randn(12, 30, 100).sign()
    x[:, :10], x[:, 10:20] = 1.0, -1.0
    ends = torch.ones(1, 30, 32)
    (instruction,) = record(module, spec, x, (ends, 20 * ends), inputs=(x, (-ends, -20 * ends)))
    assert compare(instruction, spec) >= 10_000


def train(module: nn.Module, x: Tensor) -> None:
    """Learn to sum the inputs so far, by a few updates."""
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    goal = torch.tanh(x.sum(2, keepdim=True).cumsum(0) / 4)
    for _ in range(15):
        optimizer.zero_grad()
        (module(x)[0].mean(2, keepdim=True) - goal).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("inputs", "weights"), [(1e6, 1.0), (1.0, 1e8)])
def test_what_leaves_32_bits_wraps_around(inputs: float, weights: float, spec: str) -> None:
    torch.manual_seed(4)
    (instruction,) = record(lstm_of(8, 6, weights), spec, inputs * torch.randn(15, 13, 8))
    assert compare(instruction, spec) == 15 * 13 * 6


@pytest.mark.parametrize("spec", SPECS)
def test_weights_that_were_trained_emulated(spec: str) -> None:
    torch.manual_seed(2)
    module, x, recorded = nn.LSTM(5, 16, 2, bidirectional=True), torch.randn(12, 16, 5), []
    with emulate(module, spec) as emulator:
        with emulator.observing(), torch.no_grad():
            module(x)
        train(module, x)
        with emulator.running(recorder=recorded.append), torch.no_grad():
            module(1.3 * x)
    layers = [each for each in recorded if each.operator == LSTM]
    assert sum(compare(each, spec) for each in layers) == 4 * 12 * 16 * 16


def test_no_gradient_passes_a_recurrent_part_that_was_clipped() -> None:
    """On TFLite-Micro the recurrent part is clipped to 8 before the input part is added."""
    x, ones = torch.ones(1, 2, 1), torch.ones(1, 2, 4)
    gradients = {}
    for spec in SPECS:
        module = nn.LSTM(1, 4, bias=False)
        module.weight_ih_l0.data[:], module.weight_hh_l0.data[:] = -7.0, 8.0
        # 4 units at 1 times 8 are 32, of which 8 remain: 8 - 7 = 1 is inside, 32 - 7 is not.
        h = ones.clone().requires_grad_()
        with emulate(module, spec) as emulator:
            with emulator.observing():
                module(x, (h, 0.5 * ones))
            module.zero_grad()
            h.grad = None
            module(x, (h, 0.5 * ones))[0].sum().backward()
        gradients[spec] = (h.grad, module.weight_hh_l0.grad, module.weight_ih_l0.grad)
    for h, w_hh, _ in gradients.values():
        assert not h.any()
        assert not w_hh.any()
    assert gradients["tflm-int8"][2].any()
    assert not gradients["litert-int8"][2].any()


@pytest.mark.parametrize("spec", SPECS)
def test_a_program_of_one_step_keeps_its_state_from_call_to_call(spec: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    module, x = nn.LSTM(9, 24, 2, batch_first=True), torch.randn(6, 20, 9)
    calibrate(module, [x], spec=spec)

    def outputs(module: nn.Module, x: Tensor) -> Tensor:
        return module(x)[0]

    model = export_tflite(module, [x[:, :1]], tmp_path / "step.tflite", forward=outputs)
    with emulate(module, spec) as emulator, torch.no_grad():
        whole = module(x)[0]
        y = emulator.state.qparams_of(whole)
        recorded: list[Instruction] = []
        with emulator.running(recorder=recorded.append):
            module(x)
    quantized = recorded[0].outputs[0].integers.numpy().astype(np.int8)
    assert y is not None
    calls = [[quantized.reshape(20, 6, 9)[step][:, None]] for step in range(20)]
    program = runtime_of(PRESETS[spec].runtime).load(model.path.read_bytes())
    for _ in range(2):  # The first call starts again.
        steps = [result[0] for result in program.run(calls, keep_state=True)]
        found = (np.concatenate(steps, 1).astype(np.int32) - y.zero_point) * np.float32(y.scale)
        np.testing.assert_array_equal(found, whole.numpy())


def test_tables_of_both_kernels_are_near_the_functions() -> None:
    x = torch.arange(-(2**15), 2**15).double()
    for kernel in map(kernel_of, ("litert", "tflm")):
        sigmoid = torch.sigmoid(x * 2.0**-12)
        assert (kernel.sigmoid() * 2.0**-15 - sigmoid).abs().max() < 4e-4
        for exponent in range(-15, -8):
            tanh = torch.tanh(x * 2.0**exponent)
            assert (kernel.tanh(exponent) * 2.0**-15 - tanh).abs().max() < 1e-3
