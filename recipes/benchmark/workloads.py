"""Workloads that the speed of training is measured on: networks with a batch and a loss.

Sizes are those of a layer or two of a recognizer, or of small networks: the four of MLPerf Tiny, a
BERT and a Conformer. Data are random, so that nothing is needed but the packages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torchaudio.models.conformer import Conformer, ConformerLayer

from lightning_nna.testing.tiny_networks import TINY_NETWORKS
from recipes.asr.recognizer import transducer_losses
from recipes.asr.rnnt import transducer

#: Groups of workloads, each with targets of its own.
Group = Literal["layers", "gru", "small"]


@dataclass(frozen=True)
class Workload:
    """A network, a batch and the loss that a training step minimizes.

    Attributes:
        title: Name in tables.
        module: Function that makes the network.
        batch: Function that makes the arguments of its forward.
        loss: Function from the network's output and the batch to the loss.
        group: Group, which has a table and targets of its own.
    """

    title: str
    module: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    group: Group = "layers"


def _mlp() -> nn.Module:
    sizes = (512, 1024, 1024, 512)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _convolutions() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (80, 128, 128, 128):
        layers += [nn.Conv1d(inputs, 128, 5, padding=2), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*layers)


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.layers = kind(256, 256, num_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)[0]
        return result


class _Conformer(nn.Module):
    """One block; padding is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.block = ConformerLayer(144, 576, 4, 31)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        result: Tensor = self.block(x, padded)
        return result


def _conformer_batch() -> tuple[Tensor, ...]:
    lengths = torch.arange(100, 60, -5)
    padded = torch.arange(100)[None, :] >= lengths[:, None]
    return torch.randn(100, 8, 144), padded


class _Transducer(nn.Module):
    """The RNN-T of ``recipes/conf/model/an4.yaml``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = transducer(
            num_mels=64,
            num_labels=28,
            frame_stack=6,
            frame_stride=6,
            encoder_size=320,
            encoder_layers=2,
            embedding_size=64,
            predictor_size=128,
            joint_size=160,
            encoder_dropout=0.25,
            predictor_dropout=0.25,
        )

    def forward(self, features: Tensor, lengths: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
        start = torch.zeros_like(labels[:, :1])
        logits: Tensor = self.model(
            features, lengths, torch.cat([start, labels], dim=1), counts + 1
        )[0]
        return logits


def _transducer_batch() -> tuple[Tensor, ...]:
    """Eight utterances of three seconds and twenty labels: a batch of AN4."""
    labels = torch.randint(1, 28, (8, 20))
    return torch.randn(8, 300, 64), torch.full((8,), 300), labels, torch.full((8,), 20)


def _transducer_loss(logits: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    _, lengths, labels, counts = batch
    steps = torch.full_like(lengths, logits.shape[1])
    return transducer_losses(logits, labels, steps, counts).sum() / counts.sum()


class _Bert(nn.Module):
    """A BERT of two layers of 128, with embeddings of 1000 tokens and 64 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(1000, 128), nn.Embedding(64, 128)
        self.norm, self.dropout = nn.LayerNorm(128), nn.Dropout(0.1)
        layer = nn.TransformerEncoderLayer(128, 2, 512, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.pooler = nn.Linear(128, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        embedded = self.tokens(tokens) + self.positions(positions)
        hidden = self.layers(self.dropout(self.norm(embedded)))
        return torch.tanh(self.pooler(hidden[:, 0]))


class _SmallConformer(nn.Module):
    """Four blocks of 80; padding is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Conformer(80, 4, 320, 4, 31)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        result: Tensor = self.blocks(x, lengths)[0]
        return result


def _tiny(title: str, name: str, batch: int) -> Workload:
    """Return a network of MLPerf Tiny as a workload."""

    def module() -> nn.Module:
        network, example = TINY_NETWORKS[name]()
        # The forward gives lazy layers their parameters.
        network.eval()(example)
        return network.train()

    shape = TINY_NETWORKS[name]()[1].shape[1:]
    return Workload(title, module, lambda: (torch.randn(batch, *shape),), _mean_square, "small")


def _mean_square(result: Tensor, _: tuple[Tensor, ...]) -> Tensor:
    return result.square().mean()


#: Workloads by the name that rows and the command line use.
WORKLOADS: dict[str, Workload] = {
    "mlp": Workload("MLP 512-1024-1024-512", _mlp, lambda: (torch.randn(256, 512),), _mean_square),
    "conv1d": Workload(
        "Conv1d stack, 4 layers with batch norm",
        _convolutions,
        lambda: (torch.randn(16, 80, 200),),
        _mean_square,
    ),
    "lstm": Workload(
        "LSTM 2x256, 100 steps of 16",
        lambda: _Recurrent(nn.LSTM),
        lambda: (torch.randn(100, 16, 256),),
        _mean_square,
    ),
    "gru": Workload(
        "GRU 2x256, 100 steps of 16",
        lambda: _Recurrent(nn.GRU),
        lambda: (torch.randn(100, 16, 256),),
        _mean_square,
        "gru",
    ),
    "conformer": Workload("Conformer block", _Conformer, _conformer_batch, _mean_square),
    "rnnt": Workload("AN4 RNN-T step", _Transducer, _transducer_batch, _transducer_loss),
    "kws": _tiny("MLPerf Tiny: keyword spotting, DS-CNN, batch 32", "keyword_spotting", 32),
    "anomaly": _tiny(
        "MLPerf Tiny: anomaly detection, autoencoder, batch 64", "anomaly_detection", 64
    ),
    "resnet8": _tiny(
        "MLPerf Tiny: images of 32x32, ResNet-8, batch 32", "image_classification", 32
    ),
    "vww": _tiny(
        "MLPerf Tiny: visual wake words, MobileNetV1 0.25, batch 32", "visual_wake_words", 32
    ),
    "bert": Workload(
        "BERT, 2 layers of 128, 32 x 64 tokens",
        _Bert,
        lambda: (torch.randint(1000, (32, 64)),),
        _mean_square,
        "small",
    ),
    "small_conformer": Workload(
        "Conformer, 4 layers of 80, 32 x 50 frames",
        _SmallConformer,
        lambda: (torch.randn(32, 50, 80), torch.arange(50, 18, -1)),
        _mean_square,
        "small",
    ),
}
