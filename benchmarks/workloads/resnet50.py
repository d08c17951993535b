"""ResNet-50 (25.6 M parameters and the statistics of its 53 batch norms), fused SGD with momentum, 8 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from workloads import Workload

# Blocks, width within them, and stride of each of the four stages.
STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))
CLASSES, IMAGES, PIXELS = 1000, 8, 128


def convolved(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution and its batch norm."""
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 to four times the width, and a way around them."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.narrow, self.middle = convolved(inputs, width, 1), convolved(width, width, 3, stride)
        self.wide = convolved(width, 4 * width, 1)
        is_same = stride == 1 and inputs == 4 * width
        self.around = nn.Identity() if is_same else convolved(inputs, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.wide(relu(self.middle(relu(self.narrow(x))))) + self.around(x))


def resnet50() -> nn.Sequential:
    """161 parameters and 159 buffers."""
    blocks, inputs = [], 64
    for count, width, stride in STAGES:
        for index in range(count):
            blocks.append(Bottleneck(inputs, width, stride if index == 0 else 1))
            inputs = 4 * width
    stem = (convolved(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


def make() -> Workload:
    model = resnet50()
    images, classes = torch.randn(IMAGES, 3, PIXELS, PIXELS), torch.randint(CLASSES, (IMAGES,))
    return Workload(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True),
        lambda: cross_entropy(model(images), classes),
    )
