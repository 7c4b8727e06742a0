"""Telemetry of operators that drop values at random: their own errors, without the dropout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_nna import calibrate, emulate
from lightning_nna.emulation.telemetry import SiteTelemetry, Telemetry

_LENGTHS = [9, 7, 4, 2]


class _Attention(nn.Module):
    """Self-attention that drops half of its probabilities in training."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.body = nn.MultiheadAttention(16, 4, 0.5, batch_first=True)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, x, x, **self.options)[0]


class _Product(nn.Module):
    """Attention without projections, its arguments by keyword or by position."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.by_name = by_name

    def forward(self, x: Tensor) -> Tensor:
        p = 0.5 if self.training else 0.0
        if self.by_name:
            # Torch takes the scale by name alone.
            return F.scaled_dot_product_attention(
                x, key=x, value=x, attn_mask=None, dropout_p=p, is_causal=False, scale=0.25
            )
        return F.scaled_dot_product_attention(x, x, x, None, p, True)


class _Recurrence(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self, kind: type[nn.RNNBase], packed: bool) -> None:
        super().__init__()
        self.body = kind(16, 8, num_layers=2, dropout=0.5, batch_first=True)
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            return self.body(x)[0]
        return self.body(pack_padded_sequence(x, _LENGTHS, batch_first=True))[0].data


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "attention": (_Attention, "body/attention#0"),
    "attention without weights": (lambda: _Attention(need_weights=False), "body/attention#0"),
    "product": (lambda: _Product(by_name=False), "./attention#0"),
    "product by name": (lambda: _Product(by_name=True), "./attention#0"),
    "lstm": (lambda: _Recurrence(nn.LSTM, packed=False), "body/lstm#0"),
    "packed lstm": (lambda: _Recurrence(nn.LSTM, packed=True), "body/lstm#0"),
    "gru": (lambda: _Recurrence(nn.GRU, packed=False), "body/gru#0"),
    "packed rnn": (lambda: _Recurrence(nn.RNN, packed=True), "body/rnn#0"),
}


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_is_no_error_of_the_arithmetic(name: str, spec: str) -> None:
    torch.manual_seed(0)
    build, site = NETWORKS[name]
    net, x = build(), torch.randn(4, 9, 16)
    with emulate(net, spec) as chip:
        net.eval()
        calibrate(net, [x])
        rows: dict[bool, SiteTelemetry] = {}
        for training in (False, True):
            net.train(training)
            telemetry = Telemetry()
            with torch.no_grad(), chip.running(telemetry=telemetry):
                net(x)
            rows[training] = telemetry[site]
    assert rows[True] == rows[False]
    assert rows[True].sqnr_db > 20


@pytest.mark.parametrize("name", NETWORKS)
def test_telemetry_of_dropout_changes_neither_results_nor_random_numbers(name: str) -> None:
    torch.manual_seed(0)
    net, x = NETWORKS[name][0](), torch.randn(4, 9, 16)
    results, gradients, states = [], [], []
    with emulate(net) as chip:
        calibrate(net, [x])
        net.train()
        for telemetry in (None, Telemetry()):
            torch.manual_seed(1)
            leaf = x.clone().requires_grad_()
            with chip.running(telemetry=telemetry):
                result = net(leaf)
            result.square().sum().backward()
            results.append(result.detach())
            gradients.append(leaf.grad)
            states.append(torch.get_rng_state())
    for first, second in (results, gradients, states):
        assert torch.equal(first, second)
