"""Convolutional networks with GroupNorm, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a shortcut (He et al., arXiv 1512.03385; stride at 3x3)."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.norm1 = nn.GroupNorm(32, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = nn.GroupNorm(32, width)
        self.conv3 = nn.Conv2d(width, outside, 1, bias=False)
        self.norm3 = nn.GroupNorm(32, outside)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inside == outside
            else nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.GroupNorm(32, outside)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet of bottlenecks; depths (3, 4, 6, 3) at width 64 are ResNet-50."""

    def __init__(self, depths: Sequence[int], width: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.norm = nn.GroupNorm(32, width)
        blocks, inside = [], width
        for stage, depth in enumerate(depths):
            for position in range(depth):
                stride = 2 if stage and position == 0 else 1
                blocks.append(Bottleneck(inside, width * 2**stage, stride))
                inside = 4 * width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


class WideBlock(nn.Module):
    """A pre-activation block of two 3x3 convolutions."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(16, inside)
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.norm2 = nn.GroupNorm(16, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        changes = stride != 1 or inside != width
        self.shortcut = nn.Conv2d(inside, width, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.norm2(self.conv1(y)))) + kept


class WideResNet(nn.Module):
    """Widths (64, 128, 256) are WRN-16-4.

    So De et al. (arXiv 2204.13650) train it on CIFAR-10, with 16 groups.
    """

    def __init__(self, widths: Sequence[int], classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        blocks, inside = [], 16
        for stage, width in enumerate(widths):
            for stride in (2 if stage else 1, 1):
                blocks.append(WideBlock(inside, width, stride))
                inside = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(16, inside)
        self.head = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.blocks(self.conv(x)))).mean((2, 3)))
