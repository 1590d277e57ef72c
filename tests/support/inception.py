"""A small feature network with the interface of inception-2015-12-05.pt."""

from pathlib import Path

import torch
from torch import nn


class Inception(nn.Module):
    """Features by convolutions, one of them inside a named block."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        self.layers.add_module("conv", nn.Conv2d(3, 4, 3, stride=8))
        self.layers.add_module("mixed", nn.Sequential(nn.Conv2d(4, 9, 3, stride=4), nn.ReLU()))
        self.output = nn.Linear(width, 5)
        self.scale = nn.Parameter(torch.linspace(0.5, 1, width))

    def forward(self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        x = images.float() / 255
        spread = torch.stack([x.mean((1, 2, 3)), x[:, 0].std((1, 2)), x[:, :, :4].mean((1, 2, 3)), x[:, 1].amax((1, 2))], 1)
        features = torch.cat((spread, spread[:, :2].square()), 1) * self.scale
        if return_features:
            return features
        return self.output(features).softmax(1)


def save(path: Path) -> Path:
    """Write a random network as TorchScript; returns its path."""
    torch.manual_seed(0)
    torch.jit.script(Inception()).save(str(path))
    return path
