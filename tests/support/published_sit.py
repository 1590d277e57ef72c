"""The network of SiT (arXiv:2401.08740) and of REPA in plain PyTorch, written for the tests, with the published names of tensors.

B batch, T tokens, H width, C channels, h rows and columns of a latent. Its outputs were compared once with those of the public code
of SiT and REPA, on the same random weights of SiT-S/2: at most 2e-6 apart.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn


def table_of_positions(side: int, width: int) -> Tensor:
    """Return the table of positions [1,side²,width]: sines and cosines of the column, then of the row."""
    table = np.empty((side, side, 2, 2, width // 4))
    for k in range(width // 4):
        angles = np.arange(side) / 10_000 ** (k / (width / 4))
        for axis, of_token in enumerate((np.tile(angles, (side, 1)), np.tile(angles[:, None], (1, side)))):
            table[:, :, axis, 0, k] = np.sin(of_token)
            table[:, :, axis, 1, k] = np.cos(of_token)
    return torch.tensor(table.reshape(1, side * side, width), dtype=torch.float32)


def layer_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x [B,T,H] with mean 0 and variance 1 per token, scaled by 1 + scale and shifted, both [B,H]."""
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return normed * (1 + scale[:, None]) + shift[:, None]


def modulation(width: int, vectors: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, vectors * width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.adaLN_modulation = modulation(width, 6)

    def attention(self, x: Tensor) -> Tensor:
        B, T, H = x.shape
        q, k, v = self.attn["qkv"](x).view(B, T, 3, self.heads, H // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(H // self.heads)).softmax(dim=-1)
        return self.attn["proj"]((weights @ v).transpose(1, 2).reshape(B, T, H))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        H = x.shape[-1]
        vectors = self.adaLN_modulation(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = (vectors[:, i * H : (i + 1) * H] for i in range(6))
        x = x + gate1[:, None] * self.attention(layer_norm(x, shift1, scale1))
        hidden = self.mlp["fc1"](layer_norm(x, shift2, scale2))
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        return x + gate2[:, None] * self.mlp["fc2"](hidden)


class PublishedSiT(nn.Module):
    """A published network: called with x [B,C,h,h], t [B] and classes [B], of which the last is the null class."""

    def __init__(
        self, width: int, depth: int, heads: int, patch: int, size: int, classes: int, doubled: bool = True, projectors: int = 0
    ) -> None:
        """size: h. doubled: 8 output channels, of which 4 are returned, as in SiT. projectors: REPA's, number of networks."""
        super().__init__()
        self.patch = patch
        self.outputs = 8 if doubled else 4
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(4, width, patch, stride=patch)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.pos_embed = nn.Parameter(table_of_positions(size // patch, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict(
            {"linear": nn.Linear(width, patch * patch * self.outputs), "adaLN_modulation": modulation(width, 2)}
        )
        if projectors:
            layers = lambda: nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 32))
            self.projectors = nn.ModuleList(layers() for _ in range(projectors))

    def forward(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        tokens = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        angles = t[:, None] * torch.exp(torch.arange(128) * (-math.log(10_000) / 128))
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        condition = self.t_embedder["mlp"](features) + self.y_embedder["embedding_table"](classes)
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.final_layer["adaLN_modulation"](condition).chunk(2, dim=1)
        pixels = self.final_layer["linear"](layer_norm(tokens, shift, scale))
        image = torch.empty(len(x), self.outputs, *x.shape[2:])
        side, p = x.shape[-1] // self.patch, self.patch
        for token in range(side * side):
            row, column = token // side * p, token % side * p
            patch = pixels[:, token].view(len(x), p, p, self.outputs)
            image[:, :, row : row + p, column : column + p] = patch.permute(0, 3, 1, 2)
        return image[:, :4]


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw every tensor but the positions, with gates and outputs far from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed":
                fan_in = p[0].numel() if p.ndim > 1 else 16
                p.copy_(torch.randn(p.shape, generator=generator) * (1 if "embedding_table" in name else 0.7 / math.sqrt(fan_in)))


def euler(model: nn.Module, noise: Tensor, classes: Tensor, steps: int, scale: float, data_at: int) -> Tensor:
    """Return the samples after Euler steps from noise to data, guided by null + scale·(class − null) on all channels."""
    null = torch.full_like(classes, model.y_embedder["embedding_table"].num_embeddings - 1)
    x, dt = noise, (2 * data_at - 1) / steps
    for i in range(steps):
        t = torch.full((len(x),), (1 - data_at) + i * dt)
        unguided = model(x, t, null)
        x = x + dt * (unguided + scale * (model(x, t, classes) - unguided))
    return x
