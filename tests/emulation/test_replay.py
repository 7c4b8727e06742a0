"""What the emulator says it ran is what LiteRT computes, for whole small networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_nna.testing import SmallNet
from lightning_nna.testing.replay import replays

pytestmark = pytest.mark.exactness


class Mixed(nn.Module):
    """Operands of many kinds: numbers, parameters, broadcasts, concatenations, look-ups."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.net = SmallNet(6, 16, 5)
        self.gain = nn.Parameter(torch.linspace(0.5, 2.0, 5))

    def forward(self, labels: Tensor) -> Tensor:
        scores = self.net(self.table(labels))
        scaled = 0.3 * scores * self.gain - 1.5
        both = torch.cat([scores, torch.relu(scaled)], dim=-1)
        return torch.stack([both, -both], 1) / 3 + both.unsqueeze(1)


@pytest.mark.parametrize("spec", ["litert-int8", {"weight_granularity": "per_tensor"}])
def test_operands_of_every_kind(spec: object) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 11, (40, 25))
    compared = replays(Mixed(), labels, spec=spec)
    assert set(compared) == {
        "ADD",
        "CONCATENATION",
        "FULLY_CONNECTED",
        "GATHER",
        "LOGISTIC",
        "MUL",
        "QUANTIZE",
        "RELU",
        "SUB",
        "TANH",
    }
    assert compared["MUL"] > 10_000


class Linears(nn.Module):
    """What 16-bit activations need: products, sums and scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * hidden - 0.25 * hidden) + 1.0


def test_sixteen_bits() -> None:
    torch.manual_seed(1)
    compared = replays(Linears(), torch.randn(300, 48), spec="litert-int16x8")
    assert min(compared[name] for name in ("FULLY_CONNECTED", "MUL", "SUB", "ADD")) >= 9_600


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_dropout_leaves_integers(spec: str) -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(30, 60), nn.Dropout(0.1), nn.Linear(60, 60), nn.Dropout(0.3))
    net.append(nn.Linear(60, 20))
    assert replays(net.train(), torch.randn(200, 30), spec=spec)["FULLY_CONNECTED"] == 28_000
