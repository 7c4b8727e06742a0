"""Digests of what is computed from given ranges and weights, in a process of its own.

One processor stands in for others where the variables of :data:`PLAINEST` tell PyTorch and oneDNN
so, which read them as they are imported. So this needs a process of its own, which takes ranges,
weights and inputs from a file, and prints a digest of every program and of what the emulation
computes.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
from lightning_nna.deploy import export_tflite
from lightning_nna.quantization.general_quantizer_transform import GeneralQuantizerTransform
from lightning_nna.weights.codebook import Codebook
from lightning_nna.weights.pipeline import pipeline_of

#: The farthest from any processor of today; ``make test-isa`` compares others with it.
PLAINEST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
COUNT = 64


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8), nn.Sigmoid()
    )


def plain() -> nn.Module:
    """Of the operators that every chip has."""
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Sigmoid())


def convolutional() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU(),
        nn.Conv2d(6, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ELU(), nn.BatchNorm2d(4),
    )  # fmt: skip
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.1, 3.0)
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    return net.eval()


def normed() -> nn.Module:
    """A norm's shift over the finest scales: its last bit in float32 is several of a bias."""
    net = nn.Sequential(nn.Linear(12, 256), nn.BatchNorm1d(256), nn.Linear(256, 8))
    for name in ("running_mean", "weight", "bias"):
        nn.init.normal_(getattr(net[1], name))
    nn.init.uniform_(net[1].running_var, 0.1, 3.0)
    return net.eval()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return self.last(x + self.attention(normed, normed, normed, need_weights=False)[0])


def general_quantizer(name: str, weight: Tensor) -> Any:
    transform = GeneralQuantizerTransform(weight, 3, groups=len(weight), learn_scale=True)
    # As a training leaves them: nowhere in particular.
    transform.centroids = transform.centroids * 0.93 + 0.011
    transform.scale_log2 = transform.scale_log2 - 0.137
    return transform


class Fixed:
    """The transform of S8BQAT, with values of a given entropy."""

    method, order = "HardCompression", 1

    def __init__(self, name: str, weight: Tensor) -> None:
        self.codebook = Codebook.fit(weight, 4, max_entropy_bits=2.6)
        self.grid = self.codebook.grid

    def apply(self, weight: Tensor, *, hard: bool) -> Tensor:
        return self.codebook.project(weight)

    def pull_back(self, weight: Tensor, grad: Tensor) -> Tensor:
        return grad


Method = Callable[[str, Tensor], Any]
#: Network, shape of an input, chip, method of the weights, whether scales are learned.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, Method | None, bool]] = {
    "perceptron": (perceptron, (12,), "litert-int8", None, False),
    "convolutions and batch norms": (convolutional, (1, 5, 6), "litert-int8", None, False),
    "lstm": (Recurrent, (7, 12), "litert-int8", None, False),
    "attention and layer norms": (Attention, (7, 12), "litert-int8", None, False),
    "16 bits": (plain, (12,), "litert-int16x8", None, False),
    "batch norms in 16 bits": (normed, (12,), "litert-int16x8", None, False),
    "attention in 16 bits": (Attention, (7, 12), "litert-int16x8", None, False),
    "shifts": (plain, (12,), "shift", None, False),
    "learned scales": (perceptron, (12,), "litert-int8", None, True),
    "learned scales of shifts": (plain, (12,), "shift", None, True),
    "general quantizer": (perceptron, (12,), "litert-int8", general_quantizer, False),
    "fixed centroids": (perceptron, (12,), "litert-int8", Fixed, False),
}


def prepare(path: Path) -> None:
    """Write weights, ranges and inputs, which are drawn and observed once."""
    states = {}
    for name, (build, shape, spec, _, _) in CASES.items():
        net, x = build(), torch.randn(COUNT, *shape)
        emulator = calibrate(net, [x], spec=spec)
        states[name] = {"net": net.state_dict(), "chip": emulator.state_dict(), "x": x}
    torch.save(states, path)


def digests(path: Path) -> dict[str, list[str]]:
    """For each case: of the program where the chip has one, and of the emulation's output."""
    states = torch.load(path, weights_only=True)
    found = {}
    for name, (build, _, spec, method, learned) in CASES.items():
        net, state = build(), states[name]
        net.load_state_dict(state["net"])
        if method is not None:
            for key, weight in net.named_parameters():
                if weight.dim() > 1:
                    transform = method(key, weight)
                    pipeline_of(net).claim(key, weight, transform)
                    with torch.no_grad():
                        weight.copy_(transform.apply(weight, hard=True))
        with torch.no_grad(), emulate(net, spec) as chip:
            chip.load_state_dict(state["chip"])
            if learned:
                with torch.enable_grad():
                    chip.learn("all")
                    net(state["x"])
                for step in chip.scales.tensors().values():
                    step -= 0.137
                chip.learn("none")
            output = net(state["x"])
            # No site is a new one with a range of its own.
            assert chip.ranges.state_dict() == state["chip"]["ranges"], name
        contents = [output.numpy().tobytes()]
        if spec.startswith("litert"):
            with tempfile.TemporaryDirectory() as folder:
                model = export_tflite(net, [state["x"]], Path(folder) / "net.tflite")
                contents.append(model.path.read_bytes())
        found[name] = [hashlib.sha256(part).hexdigest() for part in contents]
    return found


def main() -> None:
    """Print the digests of a file of :func:`prepare` as JSON."""
    torch.set_num_threads(1)
    print(json.dumps(digests(Path(sys.argv[1]))))
