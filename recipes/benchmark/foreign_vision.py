"""Networks for images: timm, torchvision, U-Nets, and MLPerf Tiny's four.

MLPerf Tiny's networks are written from its description (Banbury et al., arXiv 2106.07597).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from recipes.benchmark.foreign_module import (
    ForeignModule,
    classification,
    regression,
    with_features,
)

_IMAGE = 32


def _images(channels: int = 3, height: int = _IMAGE, width: int = _IMAGE) -> tuple[Tensor]:
    return (torch.randn(8, channels, height, width),)


def _mobilenetv3() -> nn.Module:
    import timm

    network: nn.Module = timm.create_model("mobilenetv3_small_050", num_classes=100, drop_rate=0.0)
    return network


def _resnet18() -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    network: nn.Module = ResNet(
        BasicBlock, [2, 2, 2, 2], num_classes=100, stem_width=16, channels=(16, 32, 64, 128)
    )
    return network


def _mobilenet_v2() -> nn.Module:
    from torchvision.models import mobilenet_v2

    network: nn.Module = mobilenet_v2(num_classes=100, width_mult=0.25, dropout=0.0)
    return network


class _DoubleConvolution(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """U-Net of two levels.

    Args:
        is_bilinear: Whether images are enlarged by bilinear resizing; else by transposed
            convolutions.

    Reference:
        Ronneberger et al., "U-Net: convolutional networks for biomedical image segmentation",
        MICCAI 2015, arXiv 1505.04597.
    """

    def __init__(self, *, is_bilinear: bool) -> None:
        super().__init__()
        self.stem = _DoubleConvolution(3, 8)
        self.down = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), _DoubleConvolution(size, 2 * size)) for size in (8, 16)
        )
        self.enlarge = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
                nn.Conv2d(2 * size, size, 1),
            )
            if is_bilinear
            else nn.ConvTranspose2d(2 * size, size, 2, stride=2)
            for size in (16, 8)
        )
        self.up = nn.ModuleList(_DoubleConvolution(2 * size, size) for size in (16, 8))
        self.head = nn.Conv2d(8, 2, 1)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Compute logits, shape ``(batch, 2, height, width)``, of images."""
        levels = [self.stem(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        y = levels.pop()
        for enlarge, up in zip(self.enlarge, self.up, strict=True):
            y, skipped = enlarge(y), levels.pop()
            rows, columns = skipped.size(2) - y.size(2), skipped.size(3) - y.size(3)
            y = F.pad(y, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
            y = up(torch.cat([skipped, y], dim=1))
        result: Tensor = self.head(y)
        return result


class DSCNN(nn.Module):
    """Depthwise separable network for keyword spotting of MLPerf Tiny."""

    def __init__(self, size: int = 64, classes: int = 12) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(1, size, (10, 4), stride=2, padding=(5, 1), bias=False),
            nn.BatchNorm2d(size),
            nn.ReLU(),
        ]
        for _ in range(4):
            layers += _separable(size, size, 1)
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(size, classes)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Compute logits, shape ``(batch, 12)``, of features, shape ``(batch, 1, 49, 10)``."""
        result: Tensor = self.head(self.pool(self.features(x)).flatten(1))
        return result


def _separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


class MobileNetV1(nn.Module):
    """MobileNet of a quarter of the width, visual wake words of MLPerf Tiny."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        ]
        sizes = (8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)
        strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
        for (inputs, outputs), stride in zip(pairwise(sizes), strides, strict=True):
            layers += _separable(inputs, outputs, stride)
        self.features = nn.Sequential(*layers)
        self.pool = nn.AvgPool2d(3)
        self.head = nn.Linear(256, classes)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Compute logits, shape ``(batch, 2)``, of images, shape ``(batch, 3, 96, 96)``."""
        result: Tensor = self.head(torch.flatten(self.pool(self.features(x)), 1))
        return result


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Conv2d(inputs, outputs, 1, stride=stride) if stride > 1 else nn.Identity()
        )

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Add the result of two convolutions to a shortcut."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet8(nn.Module):
    """Residual network for image classification of MLPerf Tiny."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(
            _Residual(16, 16, 1), _Residual(16, 32, 2), _Residual(32, 64, 2)
        )
        self.head = nn.Linear(64, classes)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Compute logits, shape ``(batch, 10)``, of images, shape ``(batch, 3, 32, 32)``."""
        y = F.adaptive_avg_pool2d(self.blocks(self.stem(x)), (1, 1))
        result: Tensor = self.head(y.view(y.size(0), -1))
        return result


def _autoencoder() -> nn.Module:
    """Make the fully connected autoencoder for anomaly detection of MLPerf Tiny."""
    sizes = (640, 128, 128, 128, 128, 8, 128, 128, 128, 128)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 640))


#: Networks by the name that rows and the command line use.
VISION: dict[str, ForeignModule] = {
    "mobilenetv3": ForeignModule(
        "MobileNetV3 small",
        "timm",
        _mobilenetv3,
        lambda: _images(3, 64, 64),
        classification(100, smoothing=0.1),
        warmup_steps=40,
    ),
    "resnet18": ForeignModule(
        "ResNet-18", "timm", _resnet18, _images, classification(100), learning_rate=3e-4
    ),
    "mobilenet_v2": ForeignModule(
        "MobileNetV2",
        "torchvision",
        _mobilenet_v2,
        lambda: _images(3, 64, 64),
        classification(100, smoothing=0.1),
        warmup_steps=40,
    ),
    "unet": ForeignModule(
        "U-Net, transposed convolutions",
        "written out",
        lambda: UNet(is_bilinear=False),
        _images,
        regression,
    ),
    "unet_bilinear": ForeignModule(
        "U-Net, bilinear resizing",
        "written out",
        lambda: UNet(is_bilinear=True),
        _images,
        regression,
    ),
    "ds_cnn": ForeignModule(
        "MLPerf Tiny: DS-CNN",
        "written out",
        DSCNN,
        lambda: _images(1, 49, 10),
        classification(12),
        programs=with_features(lambda net, images: net.features(images)),
        learning_rate=3e-4,
    ),
    "mobilenet_v1": ForeignModule(
        "MLPerf Tiny: MobileNetV1 0.25",
        "written out",
        MobileNetV1,
        lambda: _images(3, 96, 96),
        classification(2, smoothing=0.1),
        programs=with_features(lambda net, images: net.features(images)),
        warmup_steps=40,
    ),
    "resnet8": ForeignModule(
        "MLPerf Tiny: ResNet8",
        "written out",
        ResNet8,
        _images,
        classification(10),
        programs=with_features(lambda net, images: net.blocks(net.stem(images))),
        learning_rate=3e-4,
        warmup_steps=40,
        range_margin=0.25,
    ),
    "autoencoder": ForeignModule(
        "MLPerf Tiny: autoencoder",
        "written out",
        _autoencoder,
        lambda: (torch.randn(16, 640),),
        regression,
    ),
}
