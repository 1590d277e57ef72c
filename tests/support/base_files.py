"""A checkpoint of the base model's format and full size with random weights: rotary positions, its autoencoder under VAE.*."""

import json
from pathlib import Path

import torch
from torch import Tensor

WIDTH, DEPTH, HEADS, CLASS_WIDTH, HIDDEN = 1088, 17, 17, 2048, 4352


def full_size(folder: Path) -> Path:
    """model_7s.pkl and model_params_7s.json in `folder`, 2.3 GB; the first's path."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    H, base = WIDTH, {}

    def linear(name: str, outputs: int, inputs: int, bias: bool = True, kernel: tuple[int, ...] = ()) -> None:
        base[f"{name}.weight"] = torch.empty(outputs, inputs, *kernel).uniform_(-(inputs**-0.5), inputs**-0.5)
        if bias:
            base[f"{name}.bias"] = torch.zeros(outputs)

    def norm(name: str) -> None:
        linear(f"{name}.c_shift", H, H)
        linear(f"{name}.c_scale", H, H)

    linear("t_emb2", H, H, bias=False)
    linear("c_emb", CLASS_WIDTH, 1000, bias=False)
    linear("cond_MLP", H, CLASS_WIDTH)
    linear("pos_enc.proj", H, 4, bias=False, kernel=(2, 2))
    linear("patch_emb", H, H)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        for name in ("query_proj", "key_proj", "value_proj", "out_proj"):
            linear(f"{block}.attn.{name}", H, H, bias=False)
        base[f"{block}.attn.q_norm.weight"] = base[f"{block}.attn.k_norm.weight"] = torch.ones(H // HEADS)
        base[f"{block}.attn.rotary_emb.freqs"] = 10_000.0 ** -(torch.arange(0, H // HEADS, 2) / (H // HEADS))
        norm(f"{block}.norm1")
        norm(f"{block}.norm2")
        linear(f"{block}.scale1", H, H)
        linear(f"{block}.scale2", H, H)
        linear(f"{block}.MLP.lin_up", 2 * HIDDEN, H)
        linear(f"{block}.MLP.lin_down", H, HIDDEN)
    norm("out_norm")
    linear("out_proj", 16, H)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    weights: dict[str, Tensor] = base | {f"VAE.{name}": tensor for name, tensor in vae.state_dict().items()}
    parameters = {
        "inCh": 4, "num_classes": 1000, "patch_size": 2, "dim": H, "c_dim": CLASS_WIDTH, "hidden_scale": HIDDEN / H,
        "num_heads": HEADS, "num_blocks": DEPTH, "positional_encoding": "RoPE", "device": "gpu", "start_step": 7, "wandb_id": None,
        "legacy_norm": False,
    }  # fmt: skip
    (folder / "model_params_7s.json").write_text(json.dumps(parameters))
    torch.save(weights, folder / "model_7s.pkl")
    return folder / "model_7s.pkl"
