"""VGG-16 (Simonyan and Zisserman 2014), ResNet-50 (He et al. 2015, stride in the 3x3) and MobileNetV2 (Sandler et al.
2018), as torchvision has them."""

import torch
from torch import nn

CLASSES = 1000


def vgg16() -> nn.Module:
    """[N, 3, 224, 224] to logits."""
    layers: list[nn.Module] = []
    channels = 3
    for width, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    head: list[nn.Module] = [nn.AdaptiveAvgPool2d(7), nn.Flatten()]
    for features in (512 * 7 * 7, 4096):
        head += [nn.Linear(features, 4096), nn.ReLU(inplace=True), nn.Dropout()]
    return nn.Sequential(nn.Sequential(*layers), *head, nn.Linear(4096, CLASSES))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with four times the width, and the input added."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(
            *_conv_norm(channels, width, 1),
            nn.ReLU(inplace=True),
            *_conv_norm(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_conv_norm(width, 4 * width, 1),
        )
        changes = stride != 1 or channels != 4 * width
        self.shortcut = nn.Sequential(*_conv_norm(channels, 4 * width, 1, stride)) if changes else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.relu(self.residual(input) + self.shortcut(input))


def resnet50() -> nn.Module:
    """[N, 3, 224, 224] to logits."""
    layers = [*_conv_norm(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, repeats, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(repeats):
            layers.append(Bottleneck(channels, width, stride if i == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class InvertedResidual(nn.Module):
    """1x1 to ``expansion`` times the width, depthwise 3x3, 1x1; the input is added where it has the output's shape."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int):
        super().__init__()
        wide = channels * expansion
        widen = [*_conv_norm(channels, wide, 1), nn.ReLU6(inplace=True)] if expansion > 1 else []
        self.residual = nn.Sequential(
            *widen,
            *_conv_norm(wide, wide, 3, stride, groups=wide),
            nn.ReLU6(inplace=True),
            *_conv_norm(wide, width, 1),
        )
        self.adds_input = stride == 1 and channels == width

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input + self.residual(input) if self.adds_input else self.residual(input)


def mobilenet_v2() -> nn.Module:
    """[N, 3, 224, 224] to logits."""
    layers: list[nn.Module] = [*_conv_norm(3, 32, 3, 2), nn.ReLU6(inplace=True)]
    channels = 32
    blocks = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, width, repeats, stride in blocks:
        for i in range(repeats):
            layers.append(InvertedResidual(channels, width, stride if i == 0 else 1, expansion))
            channels = width
    layers += [*_conv_norm(channels, 1280, 1), nn.ReLU6(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(1280, CLASSES))


def _conv_norm(channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(width)]


NETWORKS = {"vgg16": vgg16, "resnet50": resnet50, "mobilenet_v2": mobilenet_v2}
