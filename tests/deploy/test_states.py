"""States of recurrent layers in programs: last ones, stacked ones, learned ones, step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
from lightning_nna.deploy import CaptureError, Program, export_tflite, run_tflite, verify
from tests.deploy.networks import SPECS

pytestmark = pytest.mark.exactness
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU}
#: Specs of every runtime that runs in this process, and of both forms of the LSTM.
STREAMING: dict[str, Any] = {
    f"{preset} {form}": {"preset": preset, "lstm": form}
    for preset in ("litert-int8", "litert-int16x8", "tflm-int8", "tflm-int16x8")
    for form in ("sequence", "elementary")
}


def hidden(states: Any) -> Tensor:
    return states[0] if isinstance(states, tuple) else states


class Classifier(nn.Module):
    """A linear layer that reads last hidden states."""

    def __init__(self, layer: nn.Module, read: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.layer, self.read, self.head = layer, read, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(hidden(self.layer(x)[1])))


READINGS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor], int]] = {
    "the last layer's": ({"num_layers": 2}, lambda h: h[-1], 5),
    "both directions'": ({"bidirectional": True}, lambda h: torch.cat([h[-2], h[-1]], 1), 10),
    "both directions' of the last layer": (
        {"bidirectional": True, "num_layers": 2},
        lambda h: torch.cat(h.view(2, 2, 2, 5)[-1].unbind(0), 1),
        10,
    ),
    "all on one grid": ({"num_layers": 2}, lambda h: h.transpose(0, 1).reshape(2, -1), 10),
    "their mean": ({"num_layers": 2}, lambda h: h.mean(0), 5),
}


@pytest.mark.parametrize("bits", SPECS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reading", READINGS)
def test_last_hidden_states(reading: str, kind: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings, read, width = READINGS[reading]
    net = Classifier(KINDS[kind](4, 5, batch_first=True, **settings), read, width)
    x = torch.randn(2, 3, 4)
    calibrate(net, [x], spec=SPECS[bits])
    model = export_tflite(net, [x], tmp_path / "net.tflite")
    assert verify(net, model.path, [x], random_inputs=2) == 1.0
    with torch.no_grad():
        np.testing.assert_allclose(run_tflite(model.path, [x])[0], net(x), atol=0.03)


def test_the_last_hidden_state_is_not_quantized_again() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4)
    net = Classifier(nn.LSTM(4, 5, num_layers=2, batch_first=True), lambda h: h[-1], 5)
    emulator = calibrate(net, [x])
    assert not [key for key in emulator.ranges.ranges if key.startswith("head/") and "input" in key]
    with emulate(net) as chip:
        outputs, (h_n, _) = net.layer(x)
        assert chip.state.qparams_of(h_n[-1]) == chip.state.qparams_of(outputs)
        assert chip.state.qparams_of(h_n[0]) != chip.state.qparams_of(outputs)
        assert chip.state.qparams_of(h_n[-1:].squeeze(0)) == chip.state.qparams_of(outputs)
        assert chip.state.qparams_of(h_n) is None
        np.testing.assert_array_equal(h_n[-1].detach(), outputs[:, -1].detach())


class Stepping(nn.Module):
    """Layers in one module, whose states come in and go out as PyTorch has them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(5, 3)

    def forward(self, x: Tensor, states: Any = None) -> tuple[Tensor, Any]:
        x, states = self.layer(x, states)
        return self.head(x), states


@pytest.mark.parametrize("spec", STREAMING)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_stacked_lstm_streams(layers: int, spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Stepping(nn.LSTM(4, 5, num_layers=layers, batch_first=True))
    x, zeros = torch.randn(2, 5, 4), torch.zeros(layers, 2, 5)
    calibrate(net, [x], spec=STREAMING[spec])
    model = export_tflite(net, [x[:, :1], (zeros, zeros)], tmp_path / "step.tflite")
    assert verify(net, model.path, [x[:, :1], (zeros, zeros)]) == 1.0
    program, steps, states = Program(model.path), [], [zeros, zeros]
    assert {port.position for port in program.inputs} == {0, 1, 2}
    for step in x.split(1, 1):
        output, *states = program([step, *states])
        steps.append(output)
    with emulate(net, STREAMING[spec]), torch.no_grad():
        whole, ends = net(x)
    np.testing.assert_array_equal(np.concatenate(steps, 1), whole.numpy())
    for found, expected in zip(states, ends, strict=True):
        np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("spec", [*SPECS.values(), "tflm-int8", "tflm-int16x8"])
def test_a_stacked_gru_streams(spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x, start = Stepping(nn.GRU(4, 5, 2, batch_first=True)), torch.randn(2, 5, 4), None
    zeros = torch.zeros(2, 2, 5)
    calibrate(net, [x], spec=spec)
    path = export_tflite(net, [x[:, :1], zeros], tmp_path / "step.tflite").path
    program, steps, state = Program(path), [], zeros
    for step in x.split(1, 1):
        output, state = program([step, state])
        steps.append(output)
    with emulate(net, spec), torch.no_grad():
        whole, end = net(x, start)
    np.testing.assert_array_equal(np.concatenate(steps, 1), whole.numpy())
    np.testing.assert_array_equal(state, end.numpy())


class Learned(nn.Module):
    """A recurrent layer that starts at parameters, or at states that are given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        shape = (layer.num_layers, 1, 5)
        self.layer = layer
        self.h, self.c = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor, states: Any = None) -> tuple[Tensor, Any]:
        if states is None:
            h, c = (s.expand(-1, x.shape[0], -1).contiguous() for s in (self.h, self.c))
            states = (h, c) if isinstance(self.layer, nn.LSTM) else h
        return self.layer(x, states)


@pytest.mark.parametrize("spec", STREAMING)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_learned_initial_states(kind: str, layers: int, spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Learned(KINDS[kind](4, 5, layers, batch_first=True)), torch.randn(2, 3, 4)
    calibrate(net, [x], spec=STREAMING[spec])
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    assert verify(net, path, [x]) == 1.0
    program = Program(path)
    with torch.no_grad():
        expected = net(x)[0]
    for _ in range(3):  # Every call starts again.
        np.testing.assert_allclose(program([x])[0], expected, atol=0.1)
        np.testing.assert_array_equal(program([x])[0], run_tflite(path, [x])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_starts_where_the_encoder_ended(kind: str, tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = (KINDS[kind](4, 4, 2, batch_first=True) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            end = self.encoder(x)[1]
            if isinstance(end, tuple):
                end = (end[0], torch.zeros_like(end[1]))
            return self.decoder(x, end)[0]

    torch.manual_seed(0)
    net, x = Two(), torch.randn(2, 3, 4)
    calibrate(net, [x])
    path = export_tflite(net, [x], tmp_path / "net.tflite").path
    assert verify(net, path, [x]) == 1.0


def test_gradients_reach_both_layers_through_last_states() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4)
    net = Classifier(nn.LSTM(4, 5, 2, batch_first=True), lambda h: h.transpose(0, 1).flatten(1), 10)
    calibrate(net, [x])
    with emulate(net):
        net(x).square().sum().backward()
    found = [p.grad.clone() for p in net.layer.parameters()]
    net.zero_grad()
    net(x).square().sum().backward()
    for ours, exact in zip(found, net.layer.parameters(), strict=True):
        assert nn.functional.cosine_similarity(ours.ravel(), exact.grad.ravel(), dim=0) > 0.9


def test_a_state_that_is_shuffled_is_refused(tmp_path: Path) -> None:
    class Shuffled(Stepping):
        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Any]:
            return super().forward(x, (h.flip(2), c.flip(2)))

    torch.manual_seed(0)
    net, x, zeros = (
        Shuffled(nn.LSTM(4, 5, batch_first=True)),
        torch.randn(2, 3, 4),
        torch.zeros(1, 2, 5),
    )
    calibrate(net, [(x, zeros, zeros)], forward=lambda module, batch: module(*batch))
    with pytest.raises(CaptureError, match="is no argument, nor an unchanged part of one"):
        export_tflite(net, [x, zeros, zeros], tmp_path / "net.tflite")


class Keeping(nn.Module):
    """Goes on where the last call ended, without saying so."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.state, self.offset = layer, None, torch.full((4,), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x, self.state = self.layer(x + self.offset, self.state)
        return x


@pytest.mark.parametrize("kind", KINDS)
def test_state_that_a_module_keeps_is_refused(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Keeping(KINDS[kind](4, 5, batch_first=True)), torch.randn(2, 3, 4)
    calibrate(net, [x, x])
    with pytest.raises(CaptureError, match="an earlier call has left in the attribute state"):
        export_tflite(net, [x], tmp_path / "net.tflite")
    net.state = None
    model = export_tflite(net, [x], tmp_path / "net.tflite")  # From zero; the offset is a constant.
    assert model.fixed == ()
