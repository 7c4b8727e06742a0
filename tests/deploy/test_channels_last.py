"""Programs read and write images with their channels last, and the caller passes them unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
from lightning_nna.deploy import CaptureError, Program, export_tflite, verify
from lightning_nna.deploy.tflite import read_program
from lightning_nna.testing.tiny_networks import visual_wake_words
from tests.deploy.networks import SPECS, FunctionNetwork

pytestmark = pytest.mark.exactness


def segmentation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Sigmoid())


@pytest.mark.parametrize("spec", SPECS.values())
def test_an_image_goes_in_and_out_without_a_transposition(spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = segmentation(), torch.randn(1, 3, 9, 11)
    calibrate(net, [x], spec=spec)
    own = export_tflite(net, [x], tmp_path / "own.tflite")
    assert own.operators["TRANSPOSE"] == 2
    model = export_tflite(
        net, [x], tmp_path / "last.tflite", channels_last_inputs=[0], channels_last_outputs=[0]
    )
    assert dict(model.operators) == {"CONV_2D": 2, "LOGISTIC": 1}
    assert verify(net, model.path, [x], random_inputs=16) == 1.0
    (port,), (result,) = model.inputs, model.outputs
    assert (port.shape, port.order) == ((1, 3, 9, 11), (0, 2, 3, 1))
    assert (result.shape, result.order) == ((1, 5, 9, 11), (0, 2, 3, 1))
    assert read_program(model.path).inputs == model.inputs
    assert read_program(model.path).outputs == model.outputs


def test_the_input_of_the_file_is_the_image_channels_last(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = segmentation(), torch.randn(2, 3, 4, 7)
    calibrate(net, [x])
    path = tmp_path / "last.tflite"
    export_tflite(net, [x], path, channels_last_inputs=[0], channels_last_outputs=[0])
    program = Program(path)
    (outputs,) = program([x])
    with emulate(net), torch.no_grad():
        np.testing.assert_array_equal(outputs, net(x).numpy())
    # What a device does: it knows the file alone.
    interpreter = Interpreter(str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    interpreter.allocate_tensors()
    (entry,), (end,) = interpreter.get_input_details(), interpreter.get_output_details()
    qparams = program.qparams_of(program.inputs[0])
    assert qparams is not None
    scaled = (x / qparams.scale).round() + qparams.zero_point
    integers = scaled.clamp(-128, 127).to(torch.int8).permute(0, 2, 3, 1)
    interpreter.set_tensor(entry["index"], integers.contiguous().numpy())
    interpreter.invoke()
    scale, zero_point = end["quantization"]
    values = (interpreter.get_tensor(end["index"]).astype(np.float32) - zero_point) * scale
    np.testing.assert_array_equal(values.transpose(0, 3, 1, 2).astype(np.float32), outputs)


@pytest.mark.parametrize("spec", SPECS.values())
def test_a_tiny_network_transposes_nothing(spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = visual_wake_words(32)
    batch = torch.randn(4, *x.shape[1:])
    net.train()(batch)
    calibrate(net.eval(), [batch], spec=spec)
    model = export_tflite(net, [x], tmp_path / "net.tflite", channels_last_inputs=[0])
    assert "TRANSPOSE" not in model.operators
    assert verify(net, model.path, [x]) == 1.0


def test_several_arguments_and_a_sequence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # The second argument is read with two sets of quantization parameters.
    first, second = nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(4, 6, 1)
    net = FunctionNetwork(
        lambda x, y, a, b: (a(x) + b(y), torch.tanh(y + 3 * x), y * x.flip(1)), first, second
    )
    x, y = torch.randn(2, 4, 10), 2 * torch.randn(2, 4, 10)
    calibrate(net, [(x, y)], forward=lambda net, batch: net(*batch))
    for inputs, outputs in (([1], [0]), ([0, 1], [0, 2]), ([0], [1])):
        model = export_tflite(
            net,
            [x, y],
            tmp_path / "net.tflite",
            channels_last_inputs=inputs,
            channels_last_outputs=outputs,
        )
        assert verify(net, model.path, [x, y]) == 1.0
        ordered = {port.position for port in model.inputs if port.order is not None}
        assert ordered == set(inputs)


def test_an_argument_that_an_operator_has_computed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3)),
        torch.randn(2, 3, 8, 8),
    )
    calibrate(net, [x])
    with emulate(net), torch.no_grad():
        middle = net[1](net[0](x))

    def tail(net: Any, y: Tensor) -> Tensor:
        return net[2](y)

    model = export_tflite(
        net, [middle], tmp_path / "net.tflite", forward=tail, channels_last_inputs=[0]
    )
    assert model.inputs[0].from_chip
    assert "TRANSPOSE" in model.operators  # Of the result.
    assert verify(net, model.path, [middle], forward=tail) == 1.0


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x: Tensor, state: Any, index: Tensor) -> Any:
        y, state = self.lstm(x, state)
        return y, y[:, -1], F.embedding(index, torch.eye(6)) + y[:, -1:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels_last_inputs": [1]}, "program overwrites.*leave it out of channels_last_inputs"),
        ({"channels_last_inputs": [3]}, r"argument 3 cannot .* shape \(3, 2\); channels are axis"),
        ({"channels_last_inputs": [9]}, "argument 9 cannot have .* it is no input of the program"),
        ({"channels_last_outputs": [1]}, r"result 1 cannot .* shape \(3, 6\); .* Leave 1 out"),
        ({"channels_last_outputs": [5]}, "result 5 cannot have .* it is no output of the program"),
    ],
)
def test_what_has_no_channels_is_an_error(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    net, x = _Recurrent(), torch.randn(3, 2, 4)
    example = [x, (torch.zeros(1, 3, 6), torch.zeros(1, 3, 6)), torch.randint(0, 6, (3, 2))]
    calibrate(net, [example], forward=lambda net, batch: net(*batch))
    with pytest.raises(CaptureError, match=message):
        export_tflite(net, example, tmp_path / "net.tflite", **settings)
