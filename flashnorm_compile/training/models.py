"""The digits classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))


class DigitsNet(nn.Module):
    """Fixed oriented edges, one learned convolution, and a linear read-out.

    DP-SGD's noise grows with the number of parameters, so what is known about images is built in
    rather than learned (Tramèr and Boneh, "Differentially private learning needs better
    features", ICLR 2021). Group norm in place of batch norm keeps samples apart; tanh bounds
    the activations (Papernot et al., "Tempered sigmoid activations", AAAI 2021).

    Args:
        channels: outputs of the learned convolution.
        classes: number of classes.
    """

    edges: torch.Tensor

    def __init__(self, channels: int = 24, classes: int = 10) -> None:
        super().__init__()
        self.register_buffer("edges", _edge_filters(), persistent=False)
        self.convolution = nn.Conv2d(5, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(1, channels)
        self.read_out = nn.Linear(channels * 4 * 4, classes)
        nn.init.zeros_(self.read_out.weight)
        nn.init.zeros_(self.read_out.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [B, classes] of images [B, 1, 8, 8] in [0, 1]."""
        edges = torch.sqrt(F.relu(F.conv2d(images, self.edges, padding=1)) + 1e-4)
        maps = torch.cat([F.avg_pool2d(edges, 2), F.avg_pool2d(images, 2)], dim=1)
        hidden = torch.tanh(self.norm(self.convolution(2 * (maps - 0.3))))
        logits: torch.Tensor = self.read_out(hidden.flatten(1))
        return logits


def _edge_filters() -> torch.Tensor:
    """Return Sobel filters in four directions, [4, 1, 3, 3]."""
    horizontal = torch.tensor(_SOBEL) / 4
    vertical = horizontal.T
    return torch.stack([horizontal, vertical, -horizontal, -vertical]).unsqueeze(1)
