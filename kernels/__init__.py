"""The fused ops of fastdit: one op, one file, one public function and one `<op>_reference` in plain PyTorch.

Importing this package needs only torch and triton; it knows nothing of the trainer. Shapes: B batch, T tokens, H width,
N heads, D head dim, F SwiGLU hidden width, C/h/w the latent's channels, rows and columns.
"""

from .adamw import BYTES as ADAMW_BYTES
from .adamw import AdamWTensors, adamw_step, adamw_step_reference
from .counter_random import BYTES as COUNTER_RANDOM_BYTES
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
from .flow_interpolate import BYTES as FLOW_INTERPOLATE_BYTES
from .flow_interpolate import flow_interpolate, flow_interpolate_reference
from .flow_matching_loss import BYTES as FLOW_MATCHING_LOSS_BYTES
from .flow_matching_loss import flow_matching_loss, flow_matching_loss_reference
from .gated_residual import BYTES as GATED_RESIDUAL_BYTES
from .gated_residual import gated_residual, gated_residual_reference
from .gated_residual_modulate import BYTES as GATED_RESIDUAL_MODULATE_BYTES
from .gated_residual_modulate import gated_residual_modulate, gated_residual_modulate_reference
from .modulate import BYTES as MODULATE_BYTES
from .modulate import modulate, modulate_reference
from .qk_norm_rope import BYTES as QK_NORM_ROPE_BYTES
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from .swiglu import BYTES as SWIGLU_BYTES
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

# Bytes that an op must read and write in bf16, (forward, backward) per element; which element and what tensors, its file says. Left
# out are vectors of modulation and statistics, 1/T and 1/H of it.
BYTES = {
    "modulate": MODULATE_BYTES,
    "gated_residual": GATED_RESIDUAL_BYTES,
    "gated_residual_modulate": GATED_RESIDUAL_MODULATE_BYTES,
    "qk_norm_rope": QK_NORM_ROPE_BYTES,
    "swiglu": SWIGLU_BYTES,
    "flow_interpolate": FLOW_INTERPOLATE_BYTES,
    "flow_matching_loss": FLOW_MATCHING_LOSS_BYTES,
    "counter_normal": COUNTER_RANDOM_BYTES,
    "counter_uniform": COUNTER_RANDOM_BYTES,
    "adamw_step": ADAMW_BYTES,
}

__all__ = [
    "BACKENDS",
    "BYTES",
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
