"""A depthwise-separable convolutional network for keywords (DS-CNN) with ReLU6.

Reference:
    Zhang et al., "Hello Edge: keyword spotting on microcontrollers", arXiv 1711.07128; the
    activations are those of MobileNet (arXiv 1704.04861).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def convolution(inputs: int, outputs: int, kernel: int, **settings: Any) -> nn.Sequential:
    """Return a convolution with batch norm and ReLU6.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        kernel: Height and width of the kernel.
        **settings: Further arguments of ``nn.Conv2d``.
    """
    conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **settings)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class KeywordNetwork(nn.Module):
    """Classify a spectrogram with separable convolutions and a global mean.

    Args:
        num_labels: Number of words.
        channels: Number of channels of the first convolution.
        widths: Number of channels of each separable convolution after it; the first one halves
            the time and the frequencies again.

    Example:
        >>> KeywordNetwork(50)(torch.zeros(2, 1, 64, 24)).shape
        torch.Size([2, 50])
    """

    def __init__(
        self,
        num_labels: int,
        *,
        channels: int = 32,
        widths: tuple[int, ...] = (64, 64, 64, 64),
    ) -> None:
        super().__init__()
        self.first = convolution(1, channels, 3, stride=2, padding=1)
        inputs, blocks = channels, []
        for position, outputs in enumerate(widths):
            stride = 2 if position == 0 else 1
            depthwise = convolution(inputs, inputs, 3, stride=stride, padding=1, groups=inputs)
            blocks.append(nn.Sequential(depthwise, convolution(inputs, outputs, 1)))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, num_labels)

    def forward(
        self, spectrograms: Float[Tensor, "batch 1 frames mels"]
    ) -> Float[Tensor, "batch labels"]:
        """Return logits of the words."""
        return self.head(self.blocks(self.first(spectrograms)).mean((2, 3)))


@torch.no_grad()
def folded_weights(network: nn.Module) -> Iterator[Float[Tensor, "channels weights"]]:
    """Yield the weights of each convolution with the batch norm after it folded in.

    Args:
        network: Network of modules from :func:`convolution`.

    Example:
        >>> [tuple(w.shape) for w in folded_weights(convolution(1, 4, 3).eval())]
        [(4, 9)]
    """
    for module in network.modules():
        if isinstance(module, nn.Sequential) and isinstance(module[0], nn.Conv2d):
            conv, norm = module[0], module[1]
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_var is not None
            factors = norm.weight / (norm.running_var + norm.eps).sqrt()
            yield conv.weight.flatten(1) * factors[:, None]
