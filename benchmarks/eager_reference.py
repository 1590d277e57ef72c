"""The eager reference that every speed-up is measured against: the base model and its train step in plain, unfused PyTorch.

It does what the public base script does, written anew: separate q/k/v projections, six small modulation Linears in each block,
interleaved rotary pairs, RMSNorm per head, bf16 autocast over fp32 weights (none in fp32), SDPA, torch's AdamW, the loss read at
every step, and for `bench_end_to_end` images decoded by Pillow and encoded by the fp32 autoencoder in every step. Left out, each at
most 1 % of a step: its gradient scaler (bf16 needs none) and its EMA on the CPU every 100 steps. Two differences make it the same
function as fastdit's model to the last parameter: the two linear maps of its patch embedding are one, and the null class is a row
of the class table.

Shapes: B batch, C/h/w the latent, p patch, T tokens, H width, N heads, D head dim. Parameter names are the base checkpoints'.
"""

import io
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.config import ModelConfig
from fastdit.convert.base import MODULATION, convert
from fastdit.model import DiT


def comparable(width: int, depth: int, heads: int, hidden: int, class_width: int | None) -> ModelConfig:
    """Return the ModelConfig that both sides compute: the base model's positions, norms and timestep embedding, 4x32x32 latents."""
    return ModelConfig(
        preset="base/2", width=width, depth=depth, heads=heads, hidden=hidden, patch_size=2, in_channels=4, input_size=32,
        num_classes=1000, class_width=class_width, positions="rope_1d", time_embedding="base", zero_init_gates=False,
    )  # fmt: skip


class Norm(nn.Module):
    """LayerNorm without affine, then scale and shift from two Linears of the condition."""

    def __init__(self, H: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H, elementwise_affine=False)
        self.c_shift = nn.Linear(H, H)
        self.c_scale = nn.Linear(H, H)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(x) * (1 + self.c_scale(y)[:, None]) + self.c_shift(y)[:, None]


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2j, 2j+1) of x [B,N,T,D] in fp32. cos, sin: fp32 [T,D], each angle twice."""
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, H: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_proj = nn.Linear(H, H, bias=False)
        self.key_proj = nn.Linear(H, H, bias=False)
        self.value_proj = nn.Linear(H, H, bias=False)
        self.out_proj = nn.Linear(H, H, bias=False)
        self.q_norm = nn.RMSNorm(H // heads)
        self.k_norm = nn.RMSNorm(H // heads)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.query_proj, self.key_proj, self.value_proj)
        )
        q, k = rotate_interleaved(self.q_norm(q), cos, sin), rotate_interleaved(self.k_norm(k), cos, sin)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v.to(q.dtype)).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, H: int, hidden: int) -> None:
        super().__init__()
        self.lin_up = nn.Linear(H, 2 * hidden)
        self.lin_down = nn.Linear(hidden, H)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.lin_up(x).chunk(2, dim=-1)
        return self.lin_down(value * F.silu(gate))


class Block(nn.Module):
    def __init__(self, H: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = Norm(H)
        self.norm2 = Norm(H)
        self.attn = Attention(H, heads)
        self.MLP = MLP(H, hidden)
        self.scale1 = nn.Linear(H, H)
        self.scale2 = nn.Linear(H, H)

    def forward(self, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x, y), cos, sin) * self.scale1(y)[:, None]
        return x + self.MLP(self.norm2(x, y)) * self.scale2(y)[:, None]


class EagerDiT(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        H, p, classes = config.width, config.patch_size, config.num_classes
        self.pos_enc = nn.ModuleDict({"proj": nn.Conv2d(config.in_channels, H, p, p)})
        self.t_emb2 = nn.Linear(H, H, bias=False)
        self.c_emb = nn.Linear(classes + 1, config.class_width or H, bias=False)
        self.cond_MLP = nn.Linear(config.class_width, H) if config.class_width else nn.Identity()
        self.blocks = nn.ModuleList(Block(H, config.heads, config.hidden) for _ in range(config.depth))
        self.out_norm = Norm(H)
        self.out_proj = nn.Linear(H, config.in_channels * p * p)
        D, side = H // config.heads, config.input_size // p
        angles = torch.arange(side * side)[:, None] * 10_000.0 ** -(torch.arange(0, D, 2) / D)
        angles = angles.repeat_interleave(2, dim=1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("frequencies", torch.tensor(10_000) ** (2 * torch.arange(H) / H), persistent=False)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the velocity [B,C,h,w] at x [B,C,h,w], t fp32 [B], labels int64 [B] (num_classes is the null class)."""
        angles = (t.float()[:, None] * self.frequencies).double()
        time = torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), dim=-1).flatten(1).float()
        y = self.t_emb2(time) + self.cond_MLP(self.c_emb(F.one_hot(labels, self.config.num_classes + 1).float()))
        x = self.pos_enc["proj"](x)
        rows = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, y, self.cos, self.sin)
        p = self.config.patch_size
        x = self.out_proj(self.out_norm(x, y)).unflatten(-1, (-1, p, p)).unflatten(1, rows)
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def fastdit_model(eager: EagerDiT) -> DiT:
    """Return fastdit's model of the same function with copies of the same weights, fp32."""
    state = dict(eager.state_dict())
    H, classes = eager.config.width, eager.config.num_classes
    state["patch_emb.weight"], state["patch_emb.bias"] = torch.eye(H), state["pos_enc.proj.bias"]
    model = DiT(eager.config)
    if not eager.config.class_width:
        state |= {"cond_MLP.weight": None, "cond_MLP.bias": None}
    weights = convert(state | {"c_emb.weight": state["c_emb.weight"][:, :classes]}, eager.config)
    weights["class_embedding.table.weight"] = state["c_emb.weight"].T
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Invert base_checkpoint.half_split."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


@torch.no_grad()
def eager_model(model: DiT) -> EagerDiT:
    """Return the eager model of the same function with copies of fastdit's weights, fp32: the inverse of `fastdit_model`."""
    config, weights = model.config, {name: p.detach().clone() for name, p in model.named_parameters()}
    H, p, C = config.width, config.patch_size, config.in_channels
    state = {
        "pos_enc.proj.weight": weights["patch_embedding.weight"].view(H, C, p, p),
        "pos_enc.proj.bias": weights["patch_embedding.bias"], "t_emb2.weight": weights["time_embedding.map.weight"],
        "c_emb.weight": weights["class_embedding.table.weight"].T,
    }  # fmt: skip
    if config.class_width:
        state |= {f"cond_MLP.{part}": weights[f"class_embedding.map.{part}"] for part in ("weight", "bias")}
    vectors = [f"blocks.{i}.{v}" for i in range(config.depth) for v in MODULATION] + ["out_norm.c_shift", "out_norm.c_scale"]
    for part in ("weight", "bias"):
        state[f"out_proj.{part}"] = weights[f"output.{part}"]
        packed = [weights[f"modulation.{i}.{part}"] for i in range(len(config.group_sizes))] + [weights[f"final_modulation.{part}"]]
        state |= {f"{v}.{part}": rows for v, rows in zip(vectors, torch.cat(packed).split(H), strict=True)}
    for i in range(config.depth):
        block = f"blocks.{i}."
        q, k, v = weights[block + "attention.qkv.weight"].split(H)
        for name, rows in (("query", interleaved(q, config.heads)), ("key", interleaved(k, config.heads)), ("value", v)):
            state[block + f"attn.{name}_proj.weight"] = rows
        for name in "qk":
            state[block + f"attn.{name}_norm.weight"] = interleaved(weights[block + f"attention.{name}_weight"], 1)
        state[block + "attn.out_proj.weight"] = weights[block + "attention.out.weight"]
        for part in ("weight", "bias"):
            state[block + f"MLP.lin_up.{part}"] = weights[block + f"mlp.up.{part}"]
            state[block + f"MLP.lin_down.{part}"] = weights[block + f"mlp.down.{part}"]
    eager = EagerDiT(config)
    eager.load_state_dict(state)
    return eager


def train_step(
    model: EagerDiT, optimizer: torch.optim.Optimizer, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor, precision: str
) -> float:
    """Take one step as the base script does, on given timesteps and noise, and return the loss.

    x0, noise: [B,C,h,w]; labels: int64 [B]; t: fp32 [B]; precision: "bf16" for autocast, or "fp32".
    """
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=precision == "bf16"):
        t4 = t[:, None, None, None]
        v = model((1 - t4) * x0 + t4 * noise, t, labels)
        loss = F.mse_loss(v, noise - x0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def pixels(jpeg: bytes, resize: int, crop: int) -> Tensor:
    """Return an image as the base script reads it, fp32 [3,crop,crop] in [-1,1]: shorter side to `resize`, bicubic; center crop."""
    import numpy as np  # here: kernels and train steps need only torch
    from PIL import Image

    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    w, h = image.size
    w, h = (resize, int(resize * h / w)) if w < h else (int(resize * w / h), resize)
    left, top = round((w - crop) / 2), round((h - crop) / 2)
    image = image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + crop, top + crop))
    return torch.from_numpy(np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1)


@torch.no_grad()
def encode(vae: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
    """Return scaled posterior samples of images [B,3,S,S] by a diffusers AutoencoderKL in fp32. noise: fp32 [B,c,s,s]."""
    posterior = vae.encode(images).latent_dist
    return (posterior.mean + posterior.std * noise) * vae.config.scaling_factor


@torch.no_grad()
def euler(
    model: EagerDiT, latent: Tensor, labels: Tensor, steps: int, guidance: float, decode: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Sample latents [B,C,h,w] as the base script does: fp32, (1+w)·v(class) − w·v(null), both halves in one batch at every step.

    guidance: w; decode: called after each step, as in that script; the last step's images are returned then.
    """
    null = torch.full_like(labels, model.config.num_classes)
    for t in torch.linspace(1, 1 / steps, steps).to(latent.device):  # as the CPU rounds it
        both = model(latent.repeat(2, 1, 1, 1), t.expand(2 * len(latent)), torch.cat((labels, null)))
        v, v_null = both.chunk(2)
        latent = latent - ((1 + guidance) * v - guidance * v_null) / steps
        image = decode(latent) if decode else None
    return image if decode else latent
