"""The fused ops of fastdit: one op, one file, one public function and one `<op>_reference` in plain PyTorch.

Importing this package needs torch (and triton) alone; it knows nothing of the trainer. Shapes: B batch, T tokens, H width,
N heads, D head dim, F SwiGLU hidden width, C/h/w the latent's channels, rows and columns.
"""

from .adamw import AdamWTensors, adamw_step, adamw_step_reference
from .counter_random import counter_normal, counter_normal_reference, counter_uniform, counter_uniform_reference
from .dispatch import BACKENDS, backend, backend_in_use, keep_backend
from .dit_block import (
    BlockWeights,
    PackedBlockWeights,
    dit_block,
    dit_block_fits,
    dit_block_is_fast,
    dit_block_reference,
    pack_dit_block,
)
from .flow_interpolate import flow_interpolate, flow_interpolate_reference
from .flow_matching_loss import flow_matching_loss, flow_matching_loss_reference
from .gated_residual import gated_residual, gated_residual_reference
from .gated_residual_modulate import gated_residual_modulate, gated_residual_modulate_reference
from .modulate import modulate, modulate_reference
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from .swiglu import swiglu, swiglu_linear, swiglu_linear_reference, swiglu_reference

OPS = (
    "modulate",
    "gated_residual",
    "gated_residual_modulate",
    "qk_norm_rope",
    "swiglu",
    "flow_interpolate",
    "flow_matching_loss",
    "counter_normal",
    "counter_uniform",
)

__all__ = [
    "BACKENDS",
    "OPS",
    "AdamWTensors",
    "BlockWeights",
    "PackedBlockWeights",
    "adamw_step",
    "adamw_step_reference",
    "backend",
    "backend_in_use",
    "counter_normal",
    "counter_normal_reference",
    "counter_uniform",
    "counter_uniform_reference",
    "dit_block",
    "dit_block_fits",
    "dit_block_is_fast",
    "dit_block_reference",
    "flow_interpolate",
    "flow_interpolate_reference",
    "flow_matching_loss",
    "flow_matching_loss_reference",
    "gated_residual",
    "gated_residual_modulate",
    "gated_residual_modulate_reference",
    "gated_residual_reference",
    "keep_backend",
    "modulate",
    "modulate_reference",
    "pack_dit_block",
    "qk_norm_rope",
    "qk_norm_rope_reference",
    "swiglu",
    "swiglu_linear",
    "swiglu_linear_reference",
    "swiglu_reference",
]
