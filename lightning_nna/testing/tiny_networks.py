"""Networks of MLPerf Tiny, the benchmark of microcontrollers, with random weights.

Reference:
    Banbury et al., *MLPerf Tiny Benchmark*, 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def convolution(inputs: int, outputs: int, kernel: Any, **settings: Any) -> nn.Sequential:
    """Return a convolution with batch norm and ReLU.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        kernel: Size of the kernel, one number or one an axis.
        **settings: Further arguments of ``nn.Conv2d``.
    """
    conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **settings)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def separable(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return a depthwise convolution and one of kernel size 1, each with batch norm and ReLU.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        stride: Stride of the depthwise convolution.
    """
    return nn.Sequential(
        convolution(inputs, inputs, 3, stride=stride, padding=1, groups=inputs),
        convolution(inputs, outputs, 1),
    )


class DepthwiseNet(nn.Module):
    """Classify images or spectrograms with separable convolutions and a global mean.

    Args:
        first: First convolution.
        blocks: Convolutions after it.
        classes: Number of classes.
    """

    def __init__(self, first: nn.Module, blocks: nn.Module, classes: int) -> None:
        super().__init__()
        self.first, self.blocks = first, blocks
        self.head = nn.LazyLinear(classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``(batch, classes)`` for ``x`` of ``(batch, channels, H, W)``."""
        return self.head(self.blocks(self.first(x)).mean((2, 3)))


def keyword_spotting() -> tuple[nn.Module, Tensor]:
    """Return DS-CNN, and an example of 49 frames of 10 coefficients."""
    blocks = nn.Sequential(*[separable(64, 64) for _ in range(4)])
    first = convolution(1, 64, (10, 4), stride=2, padding=(5, 1))
    return DepthwiseNet(first, blocks, 12), torch.randn(1, 1, 49, 10)


def visual_wake_words(size: int = 96) -> tuple[nn.Module, Tensor]:
    """Return MobileNetV1 of a quarter of the channels, and an example image.

    Args:
        size: Height and width of the image.
    """
    widths, strides = (
        (8, 16, 32, 32, 64, 64, 128, *[128] * 5, 256, 256),
        (
            *(1, 2, 1, 2, 1, 2),
            *[1] * 5,
            *(2, 1),
        ),
    )
    pairs = zip(pairwise(widths), strides, strict=True)
    blocks = nn.Sequential(*[separable(*pair, stride) for pair, stride in pairs])
    first = convolution(3, 8, 3, stride=2, padding=1)
    return DepthwiseNet(first, blocks, 2), torch.randn(1, 3, size, size)


class Residual(nn.Module):
    """Add two convolutions to their input, which one of kernel size 1 fits in shape.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        stride: Stride of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, 3, stride=stride, padding=1)
        second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second = nn.Sequential(second, nn.BatchNorm2d(outputs))
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of shape ``(batch, outputs, H / stride, W / stride)``."""
        return torch.relu(self.skip(x) + self.second(self.first(x)))


class ResNet8(nn.Module):
    """Classify images of 32 by 32 pixels with three residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = convolution(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``(batch, 10)`` for ``x`` of shape ``(batch, 3, 32, 32)``."""
        return self.head(self.blocks(self.first(x)).mean((2, 3)))


def image_classification() -> tuple[nn.Module, Tensor]:
    """Return ResNet8, and an example image."""
    return ResNet8(), torch.randn(1, 3, 32, 32)


def anomaly_detection() -> tuple[nn.Module, Tensor]:
    """Return an autoencoder of spectrograms, and an example of five frames of 128 bands."""
    layers: list[nn.Module] = []
    widths = (640, 128, 128, 128, 128, 8, 128, 128, 128, 128)
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 640)), torch.randn(1, 640)


#: Functions that return a network and an example, by the name of the task.
TINY_NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "keyword_spotting": keyword_spotting,
    "visual_wake_words": visual_wake_words,
    "image_classification": image_classification,
    "anomaly_detection": anomaly_detection,
}
