"""A value of the example that would be fixed in a program is an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_nna import calibrate, coverage
from lightning_nna.deploy import CaptureError, export_tflite, run_tflite, verify
from tests.deploy.networks import SPECS, FunctionNetwork

pytestmark = pytest.mark.exactness


def calibrated(function: Any, arguments: Any, *layers: nn.Module, bits: int = 8) -> nn.Module:
    net = FunctionNetwork(function, *layers)
    calibrate(net, [arguments], forward=lambda module, x: module(*x), spec=SPECS[bits])
    return net


def after(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A function of the outputs of a linear layer."""
    return lambda x, linear: function(linear(x))


DECISIONS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "a mask that is added": (
        after(lambda y: torch.softmax(y + (y < 0) * -1e9, -1)),
        r"decide, by aten::mul at test_capture\.py:\d+ in <lambda>",
    ),
    "a mask of an argument": (
        lambda x, linear: torch.where(x > 0, linear(x), linear(x).flip(1)),
        "decide, by aten::gt",
    ),
    "an index": (
        lambda x, linear: torch.sigmoid(linear(x)[torch.arange(6), x.argmax(1)]),
        "decide, by aten::argmax",
    ),
    "an embedding of what is computed from the best": (
        lambda x, linear: F.embedding(5 - x.argmax(1), linear.weight) + linear(x),
        "decide, by aten::argmax",
    ),
    "a choice of rows": (after(lambda y: torch.sigmoid(y[y > 0])), "reads a value of the data"),
    "masked_select": (
        after(lambda y: torch.sigmoid(torch.masked_select(y, y > 0))),
        "reads a value of the data",
    ),
    "how many there are": (
        after(lambda y: torch.sigmoid(y[: len((y > 0).nonzero())])),
        "reads a value of the data",
    ),
    "a number": (
        after(lambda y: torch.sigmoid(y) if y.mean() > 0 else torch.tanh(y)),
        r"test_capture\.py:\d+ in <lambda> reads a value of the data",
    ),
    "a list": (after(lambda y: torch.sigmoid(y * y.tolist()[0][0])), "reads a value"),
    "an array": (after(lambda y: torch.sigmoid(y * float(y.numpy().max()))), "reads a value"),
    "whether it is equal": (
        after(lambda y: torch.sigmoid(y) if torch.equal(y, y + 1) else torch.tanh(y)),
        "reads a value",
    ),
    "a width": (
        lambda x, linear: torch.sigmoid(F.pad(linear(x), (0, int((x > 0).sum())))),
        "reads a value",
    ),
    "a kernel": (
        lambda x, linear: F.conv1d(x[None], linear(x)[:, :, None]),
        r"convolution#0/weight is computed from the data",
    ),
    "a bias": (
        lambda x, linear: F.linear(x, linear.weight, linear(x)[0]),
        r"fully_connected#\d/bias is computed from the data",
    ),
    "dropout": (
        after(lambda y: torch.sigmoid(F.dropout(y))),
        r"random numbers .* Leave dropout and noise out",
    ),
    "noise": (
        after(lambda y: torch.sigmoid(y + torch.randn_like(y))),
        r"random numbers.* Leave dropout and noise out",
    ),
    "batch statistics": (
        lambda x, linear: F.batch_norm(linear(x), None, None, training=True),
        r"batch_norm#0/weight is computed from the data.*running statistics",
    ),
}


@pytest.mark.parametrize("allow_cpu", [False, True])
@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("kind", DECISIONS)
def test_data_decide_nothing(kind: str, bits: int, allow_cpu: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    function, message = DECISIONS[kind]
    x = torch.randn(6, 6)
    net = calibrated(function, (x,), nn.Linear(6, 6), bits=bits)
    with pytest.raises(CaptureError, match=message):
        export_tflite(net, [x], tmp_path / "net.tflite", allow_cpu=allow_cpu)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("layers", "shape", "message"),
    [
        (
            [nn.Conv1d(6, 5, 3), nn.BatchNorm1d(5, track_running_stats=False)],
            (3, 6, 9),
            r"1/batch_norm#0/.* is computed from the data.*track_running_stats=True",
        ),
        ([nn.BatchNorm1d(6, track_running_stats=False)], (8, 6), "track_running_stats=True"),
    ],
)
def test_statistics_of_the_example_are_none_of_the_program(
    layers: list[nn.Module], shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    x = torch.randn(shape)
    net = nn.Sequential(*layers)
    calibrate(net, [x])
    with pytest.raises(CaptureError, match=message):
        export_tflite(net, [x], tmp_path / "net.tflite")


def test_a_weight_and_statistics_that_are_instructions_of_the_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 6)
    x = torch.randn(6, 6)
    net = calibrated(lambda x, linear: F.linear(F.normalize(x), linear(x)), (x,), linear)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [torch.randn(6, 6)]) == 1.0
    for norm in (nn.InstanceNorm1d(6), nn.InstanceNorm1d(6, affine=True, track_running_stats=True)):
        layers, x = nn.Sequential(nn.Conv1d(6, 6, 3), norm), torch.randn(3, 6, 9)
        calibrate(layers, [x])
        model = export_tflite(layers, [x], tmp_path / "layers.tflite")
        assert verify(layers, model.path, [torch.randn(3, 6, 9)]) == 1.0


def test_an_embedding_with_a_limit_is_computed_in_float_and_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    labels = torch.tensor([[0, 3], [2, 2]])
    net = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Tanh())
    assert [row.site for row in coverage(net, labels).fallbacks] == ["0/embedding#0"]
    calibrate(net, [labels])
    with pytest.raises(CaptureError, match=r"0/embedding#0 .* max_norm scales rows"):
        export_tflite(net, [labels], tmp_path / "net.tflite")


def test_state_in_a_buffer_is_refused(tmp_path: Path) -> None:
    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("average", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(x)
            self.average = y[0]
            return y

    net, x = Averaging(), torch.randn(2, 3)
    calibrate(net, [x])
    with pytest.raises(CaptureError, match="writes data to the buffer average"):
        export_tflite(net, [x], tmp_path / "net.tflite")


LENGTHS: dict[str, Callable[..., Tensor]] = {
    "last steps": lambda x, n, linear: torch.sigmoid(linear(x)[torch.arange(3), n - 1]),
    "a float mask": lambda x, n, linear: (
        linear(x) * (torch.arange(5) < n[:, None]).float()[..., None]
    ),
    "zeros": lambda x, n, linear: torch.tanh(
        linear(x).masked_fill((torch.arange(5) >= n[:, None])[..., None], 0)
    ),
    "scores": lambda x, n, linear: torch.softmax(
        (linear(x) @ x.transpose(1, 2)).masked_fill(
            ~(torch.arange(5) < n[:, None])[:, None], -torch.inf
        ),
        -1,
    ),
    "a slice": lambda x, n, linear: torch.tanh(linear(x)[:, : int(n.max()) - 1]),
    "a list": lambda x, n, linear: torch.cat([linear(x)[k, :m] for k, m in enumerate(n.tolist())]),
}


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("kind", LENGTHS)
def test_lengths_decide_and_are_part_of_the_program(kind: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, lengths = torch.randn(3, 5, 6), torch.tensor([5, 2, 3])
    net = calibrated(LENGTHS[kind], (x, lengths), nn.Linear(6, 6), bits=bits)
    model = export_tflite(net, [x, lengths], tmp_path / "net.tflite")
    assert model.fixed == (1,)
    assert verify(net, model.path, [torch.randn(3, 5, 6), lengths]) == 1.0
    with pytest.raises(ValueError, match=r"argument 1 is part of .* \[5, 2, 3\], got \[5, 2, 4\]"):
        run_tflite(model.path, [x, torch.tensor([5, 2, 4])])


def test_lengths_of_packed_sequences_are_part_of_the_program(tmp_path: Path) -> None:
    def forward(x: Tensor, lengths: Tensor, lstm: nn.LSTM) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(lstm(packed)[0], batch_first=True)[0]

    torch.manual_seed(0)
    x, lengths = torch.randn(3, 5, 6), torch.tensor([2, 5, 3])
    net = calibrated(forward, (x, lengths), nn.LSTM(6, 4, batch_first=True))
    model = export_tflite(net, [x, lengths], tmp_path / "net.tflite")
    assert model.fixed == (1,)
    assert verify(net, model.path, [torch.randn(3, 5, 6), lengths]) == 1.0


def test_a_number_is_part_of_the_program(tmp_path: Path) -> None:
    x = torch.randn(3, 6)
    net = calibrated(lambda x, n, linear: linear(x)[:, :n], (x, 2), nn.Linear(6, 6))
    model = export_tflite(net, [x, 2], tmp_path / "net.tflite")
    assert model.fixed == (1,)
    with pytest.raises(ValueError, match=r"argument 1 is part of .* with 2, got 3"):
        run_tflite(model.path, [x, 3])


@pytest.mark.parametrize("bits", SPECS)
def test_a_mask_is_an_input(bits: int, tmp_path: Path) -> None:
    def forward(x: Tensor, keep: Tensor, linear: nn.Linear) -> Tensor:
        y = linear(x)
        return torch.where(keep, y, y.flip(1))

    torch.manual_seed(0)
    x, keep = torch.randn(3, 6), torch.rand(3, 6) < 0.5
    net = calibrated(forward, (x, keep), nn.Linear(6, 6), bits=bits)
    model = export_tflite(net, [x, keep], tmp_path / "net.tflite")
    assert ([port.position for port in model.inputs], model.fixed) == ([0, 1], ())
    assert verify(net, model.path, [x, ~keep]) == 1.0


def test_labels_that_decide_as_well_are_an_error(tmp_path: Path) -> None:
    def forward(labels: Tensor, embedding: nn.Embedding) -> Tensor:
        y = embedding(labels)
        return torch.softmax(y.masked_fill((labels == 0)[..., None], -torch.inf), 1)

    labels = torch.tensor([[1, 0, 2]])
    net = calibrated(forward, (labels,), nn.Embedding(5, 4))
    with pytest.raises(CaptureError, match="argument 0 is read by the program and decides"):
        export_tflite(net, [labels], tmp_path / "net.tflite")


def test_arguments_that_are_no_list_are_named(tmp_path: Path) -> None:
    x = torch.randn(3, 6)
    net = calibrated(lambda x, linear: linear(x), (x,), nn.Linear(6, 6))
    for given in (x, {"x": x}):
        with pytest.raises(TypeError, match=r"pass \[x\]"):
            export_tflite(net, given, tmp_path / "net.tflite")  # type: ignore[arg-type]


def test_a_network_of_integers_alone_is_told_to_take_floats(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 6), dtype=torch.uint8)
    net = calibrated(lambda x, linear: linear(x / 255.0), (image,), nn.Linear(6, 6))
    with pytest.raises(CaptureError, match="integers are constants of a program, so pass floats"):
        export_tflite(net, [image], tmp_path / "net.tflite")


def test_an_empty_batch_is_an_error(tmp_path: Path) -> None:
    net = calibrated(lambda x, linear: linear(x), (torch.randn(3, 6),), nn.Linear(6, 6))
    with pytest.raises(CaptureError, match=r"arguments are empty, of shape \(0, 6\)"):
        export_tflite(net, [torch.randn(0, 6)], tmp_path / "net.tflite")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_result_among_others_is_left_out(tmp_path: Path) -> None:
    # As the carried frames of a streaming encoder that needs none.
    x = torch.randn(3, 6)
    net = calibrated(lambda x, linear: (y := linear(x), y[:0]), (x,), nn.Linear(6, 6))
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert model.left_out == (1,)
    assert verify(net, model.path, [x]) == 1.0


def test_results_that_are_all_empty_are_an_error(tmp_path: Path) -> None:
    net = calibrated(lambda x, linear: linear(x)[:0], (torch.randn(3, 6),), nn.Linear(6, 6))
    with pytest.raises(CaptureError, match="no result of the forward is an activation"):
        export_tflite(net, [torch.randn(3, 6)], tmp_path / "net.tflite")


def test_a_constant_in_an_operand_is_joined_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    token = nn.Parameter(torch.randn(1, 6))
    net = calibrated(
        lambda x, linear: torch.tanh(torch.cat([token.detach(), linear(x)])),
        (torch.randn(3, 6),),
        nn.Linear(6, 6),
    )
    model = export_tflite(net, [torch.randn(3, 6)], tmp_path / "net.tflite")
    assert model.operators.get("CONCATENATION") == 1
    assert np.isfinite(run_tflite(model.path, [torch.randn(3, 6)])[0]).all()


def test_constants_in_an_operand_that_is_widened(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def forward(x: Tensor) -> Tensor:
        y = torch.tanh(x)
        y[..., -1] = 0.25
        return y.var(-1) * y.mean(-1)

    net, x = calibrated(forward, (torch.randn(3, 6, 5),)), torch.randn(3, 6, 5)
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_stack_of_tensors_of_different_scales(axis: int, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6)
    net = calibrated(
        lambda x, linear: torch.stack([torch.tanh(x), torch.sigmoid(x), linear(x)], axis),
        (x,),
        nn.Linear(6, 6),
        bits=bits,
    )
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0
    np.testing.assert_allclose(run_tflite(model.path, [x])[0], net(x).detach(), atol=0.05)


def test_a_stack_of_tensors_of_one_scale_requantizes_nothing(tmp_path: Path) -> None:
    x = torch.randn(3, 6)
    net = calibrated(lambda x: torch.stack([torch.tanh(x), torch.tanh(x).flip(0)]), (x,))
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert "QUANTIZE" not in model.operators
    assert verify(net, model.path, [x]) == 1.0


@pytest.mark.parametrize("bits", SPECS)
def test_constants_in_a_result_keep_their_values(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    token, x = nn.Parameter(torch.randn(1, 6)), torch.randn(3, 6)

    class WithToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.linear = token, nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.tanh(self.linear(x))
            joined = torch.cat([self.token, y])
            return joined[:2], F.pad(y, (1, 0))

    net = WithToken()
    calibrate(net, [x], spec=SPECS[bits])
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x]) == 1.0
    np.testing.assert_allclose(run_tflite(model.path, [x])[0][0], token.detach()[0], atol=0.05)


def test_arguments_that_are_passed_on_are_left_out(tmp_path: Path) -> None:
    x, state = torch.randn(3, 6), torch.randn(3, 2)
    net = calibrated(lambda x, s, linear: (x, linear(x), s[:1]), (x, state), nn.Linear(6, 6))
    model = export_tflite(net, [x, state], tmp_path / "net.tflite")
    assert (model.left_out, [port.position for port in model.outputs]) == ((0, 2), [1])
    assert "without results (0, 2)" in str(model)
    assert verify(net, model.path, [x, state]) == 1.0
    (found,) = run_tflite(model.path, [x, state])
    assert found.shape == (3, 6)


def test_a_forward_without_activations_is_an_error(tmp_path: Path) -> None:
    net = calibrated(lambda x, linear: (linear(x) > 0, x), (torch.randn(3, 6),), nn.Linear(6, 6))
    with pytest.raises(CaptureError, match="no result of the forward is an activation"):
        export_tflite(net, [torch.randn(3, 6)], tmp_path / "net.tflite")
