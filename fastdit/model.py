"""The diffusion transformer: patches in, velocity (or data: flow.prediction) out, adaLN-Zero modulation (DiT, arXiv:2212.09748),
written on fastdit.kernels.

Shapes:
    B  batch size          T  tokens, (h/p)·(w/p) in row-major order    F  hidden width of the MLP
    C  latent channels     H  width                                     L  blocks
    h  latent rows         N  heads                                     U  distinct classes of a batch
    w  latent columns      D  head dim, H/N                             p  side of a patch
    K  tokens of an image that are kept

All widths come from ModelConfig. No block holds a Python scalar that differs between layers: each would cost a recompile.
"""

import functools
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdit import kernels
from fastdit.attention import attention
from fastdit.config import ModelConfig

ROPE_THETA = 10_000.0
QK_EPS = torch.finfo(torch.float32).eps  # 1.19e-7, as in the base model
TIME_FEATURES = 256  # sinusoids of the timestep that its MLP reads, as in DiT


def rope_tables(config: ModelConfig, device: torch.device | None = None) -> tuple[Tensor, Tensor] | None:
    """Return the rotary tables of a config: cos and sin, fp32 [T,D/2], for half-split rotation; None for other positions.

    rope_1d rotates by the token index (arXiv:2104.09864); rope_2d gives the first half of the frequencies to the row and the
    second to the column, counted in tokens. Computed in fp64 on the CPU: the angles reach T, where fp32 powers lose digits.
    """
    side = config.input_size // config.patch_size
    pairs = config.width // config.heads // 2
    if config.positions not in ("rope_1d", "rope_2d"):
        return None
    if config.positions == "rope_1d":
        frequencies = ROPE_THETA ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        angles = torch.arange(side * side, dtype=torch.float64)[:, None] * frequencies
    else:
        frequencies = ROPE_THETA ** -(torch.arange(pairs // 2, dtype=torch.float64) / (pairs // 2))
        line = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
        rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
        angles = torch.cat((rows, columns), dim=-1).flatten(0, 1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def sincos_positions(side: int, width: int) -> Tensor:
    """Return a 2-D sine-cosine table, fp32 [side², width]: the first half of the width for the row, the second for the column."""
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    line = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat((line.sin(), line.cos()), dim=-1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1).float()


def fixed_positions(config: ModelConfig, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return the position table of DiT, MAE and SiT, [T,H], which has the column's half first; None for other positions."""
    if config.positions != "sincos":
        return None
    table = sincos_positions(config.input_size // config.patch_size, config.width)
    return table.roll(config.width // 2, dims=1).to(device, dtype)


class TimeEmbedding(nn.Module):
    """Timesteps t fp32 [B] in (0,1] to vectors [B,H].

    The features are computed in fp32 whatever the parameters' dtype: bf16 would merge neighbouring timesteps.
    """

    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.base = config.time_embedding == "base"
        self.largest = config.time_frequency
        H = config.width
        if self.base:
            self.map = nn.Linear(H, H, bias=False)
        else:
            self.map = nn.Sequential(nn.Linear(TIME_FEATURES, H), nn.SiLU(), nn.Linear(H, H))
        self.register_buffer("frequencies", self.make_frequencies(), persistent=False)

    def make_frequencies(self) -> Tensor:
        """Return the frequencies, fp32 on the CPU: geometric from time_frequency down to 1/10,000 of it, [TIME_FEATURES/2], or the
        base model's table 10000^(2i/H), [H], which grows with i.

        The base table must come from fp32 `pow` on the CPU: arguments reach 1e8, where any other rounding is another model. PyTorch
        computes the elements that do not fill a pair of vectors one by one, which rounds differently; a pair has 32 elements with
        AVX-512, where the base model was run, and 16 with AVX2. Hence the split here.
        """
        if self.base:
            H = cast(nn.Linear, self.map).in_features
            exponents = 2 * torch.arange(H, device="cpu") / H
            in_pairs = H // 32 * 32
            parts = exponents[:in_pairs], *exponents[in_pairs:].split(1)
            return torch.cat([torch.tensor(10_000, device="cpu") ** part for part in parts])
        half = TIME_FEATURES // 2
        return self.largest * 10_000.0 ** -(torch.arange(half, device="cpu") / half)

    def features(self, t: Tensor) -> Tensor:
        """Return the sinusoids of t fp32 [B]: fp32 [B,TIME_FEATURES], or [B,H] of the base model."""
        angles = t.float()[:, None] * self.frequencies
        if not self.base:
            return torch.cat((angles.cos(), angles.sin()), dim=-1)
        angles = angles.double()
        return torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), dim=-1).flatten(1).float()

    def forward(self, t: Tensor) -> Tensor:
        """t fp32 [B] -> [B,H] in the dtype of the parameters."""
        # by `base`, not by the class: the fast path replaces every Linear
        first = cast(nn.Linear, self.map if self.base else cast(nn.Sequential, self.map)[0])
        return self.map(self.features(t).to(first.weight.dtype))


class ClassEmbedding(nn.Module):
    """Class ids int64 [B] to vectors [B,H]; id num_classes is the null class of classifier-free guidance."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.num_classes + 1, config.class_width or config.width)
        self.map = nn.Linear(config.class_width, config.width) if config.class_width else nn.Identity()

    def forward(self, labels: Tensor) -> Tensor:
        """labels int64 [B] -> [B,H]."""
        return self.map(self.table(labels))


class Attention(nn.Module):
    """Self-attention with RMSNorm and rotary positions on queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, D = config.width, config.width // config.heads
        self.heads = config.heads
        self.full_width = config.qk_norm == "full_width"
        self.kind = config.attention
        self.qkv = nn.Linear(H, 3 * H, bias=config.linear_bias)
        self.out = nn.Linear(H, H, bias=config.linear_bias)
        size = {"head": D, "full_width": H, "none": None}[config.qk_norm]
        self.q_weight = nn.Parameter(torch.ones(size)) if size else None
        self.k_weight = nn.Parameter(torch.ones(size)) if size else None

    def forward(self, y: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """y [B,T,H] -> [B,T,H]; cos and sin fp32 [T,D/2] or [B,T,D/2], None: no rotation."""
        qkv, q_weight, k_weight = self.qkv(y), self.q_weight, self.k_weight
        if self.full_width:  # the oldest base checkpoints: RMSNorm before the split into heads, with eps = H
            q, k, v = qkv.chunk(3, dim=-1)
            H = q.shape[-1]
            qkv = torch.cat((F.rms_norm(q, (H,), q_weight, H), F.rms_norm(k, (H,), k_weight, H), v), dim=-1)
            q_weight = k_weight = None
        q, k, v = kernels.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, self.heads, QK_EPS)
        return self.out(attention(q, k, v, self.kind))


# Activation checkpointing: keep only the inputs; recompute the function in the backward pass, stopping at the last tensor needed.
recomputed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def gelu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return gelu(x) @ weightᵀ by GELU's tanh form (arXiv:1606.08415). x [..,F], weight [H,F] -> [..,H]."""
    return F.linear(F.gelu(x, approximate="tanh"), weight)


class Mlp(nn.Module):
    """down(swiglu(up(y))), or down(gelu(up(y))), without down's bias.

    The ops after the matmuls add the biases, because they can sum the biases' gradients from values that they have loaded anyway:
    up's in swiglu, down's in the residual add of the block.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gelu = config.mlp == "gelu"
        self.up = nn.Linear(config.width, config.hidden if self.gelu else 2 * config.hidden)  # SwiGLU's: (value | gate)
        self.down = nn.Linear(config.hidden, config.width)
        self.light = False  # whether the activation's output is recomputed in the backward pass

    def forward(self, y: Tensor) -> Tensor:
        """y [B,T,H] -> [B,T,H]."""
        if self.gelu:
            hidden = F.linear(y, self.up.weight, self.up.bias)
            run = functools.partial(recomputed, gelu_linear) if self.light and self.training else gelu_linear
            return run(hidden, self.down.weight)
        packed = F.linear(y, self.up.weight)
        return kernels.swiglu_linear(packed, self.down.weight, self.up.bias, recompute=self.light and self.training)


class Block(nn.Module):
    """Both halves of a DiT block, attention and MLP.

    The norm before a half is fused with the residual add of the half before it, so a block takes its first input normed (y) and
    returns the next block's y: it is given that block's first shift and scale.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = Mlp(config)
        self.eps = config.norm_eps

    def forward(
        self, x: Tensor, y: Tensor, modulation: tuple[Tensor, ...], cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return x and y for the next block.

        x: the residual stream [B,T,H]; y: its modulated norm [B,T,H]; modulation: six of [B,H]: gate of attention, shift, scale and
        gate of the MLP, shift and scale of the next block's attention; cos and sin as in Attention.
        """
        gate1, shift2, scale2, gate2, next_shift, next_scale = modulation
        x, y = kernels.gated_residual_modulate(x, self.attention(y, cos, sin), gate1, shift2, scale2, self.eps)
        return kernels.gated_residual_modulate(x, self.mlp(y), gate2, next_shift, next_scale, self.eps, self.mlp.down.bias)


class Subset(NamedTuple):
    """What the blocks between the dense ones see of a training batch."""

    rows: Tensor | None  # int64 [B·K], the kept tokens of the batch as rows of [B·T]; None: all
    tables: tuple[Tensor | None, Tensor | None]  # cos and sin of these tokens, fp32 [B,K,D/2], [T,D/2] if all are kept
    dropped: Tensor  # bool [B], whether a sample leaves these blocks out

    def take(self, x: Tensor) -> Tensor:
        """Return the kept tokens [B,K,H] of x [B,T,H]."""
        return x if self.rows is None else x.flatten(0, 1).index_select(0, self.rows).view(len(x), -1, x.shape[-1])


class Fusion(nn.Module):
    """Joins the stream of the first dense blocks with that of the blocks after them (SPRINT, arXiv:2510.21986): one Linear on both
    side by side, as two halves, so that only tokens that were kept are multiplied by the sparse half. Elsewhere a mask token, which
    is learned, takes their place."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width, bias=False)
        self.sparse = nn.Linear(config.width, config.width, bias=False)
        self.mask = nn.Parameter(torch.empty(config.width))

    @torch.no_grad()
    def initialize(self) -> None:
        """Initialise in place: the dense stream as it is, none of the sparse one, and a N(0, 0.02) mask token.

        In 300 steps on the built-in digits (keep_tokens=0.25, one seed) the validation loss was 0.249, 0.252 with Xavier's
        initialisation and 0.254 with the mean of both streams.
        """
        nn.init.eye_(self.dense.weight)
        nn.init.zeros_(self.sparse.weight)
        nn.init.normal_(self.mask, std=0.02)

    def forward(self, x: Tensor, sparse: Tensor, subset: Subset | None) -> Tensor:
        """Return the joined stream [B,T,H]. x: stream of the dense blocks [B,T,H]; sparse: of the blocks after them, of the kept
        tokens [B,K,H], or of the first samples of a batch, if the others leave these blocks out."""
        B, T, H = x.shape
        mask, sparse = self.sparse(self.mask[None]), self.sparse(sparse)
        if subset is not None:
            sparse = torch.where(subset.dropped[:, None, None], mask, sparse)
            if subset.rows is not None:
                sparse = mask.expand(B * T, H).index_copy(0, subset.rows, sparse.flatten(0, 1)).view(B, T, H)
        elif len(sparse) < B:
            sparse = torch.cat((sparse, mask.expand(B - len(sparse), T, H)))
        return self.dense(x) + sparse


class DiT(nn.Module):
    """Class-conditional velocity model v(x_t, t, class)."""

    cos: Tensor | None
    sin: Tensor | None
    positions: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        H, L, p = config.width, config.depth, config.patch_size
        side = config.input_size // p
        self.patch_embedding = nn.Linear(config.in_channels * p * p, H)
        self.time_embedding = TimeEmbedding(config)
        self.class_embedding = ClassEmbedding(config)
        if config.positions == "absolute":  # learned, so that it lives in the checkpoint and survives a cast with its fp32 master
            self.positions = nn.Parameter(torch.empty(side * side, H))
        else:
            self.register_buffer("positions", fixed_positions(config), persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(L))
        self.fusion = Fusion(config) if config.dense_blocks else None
        # All modulations from few large Linears; order in a block: shift, scale and gate of attention, then of the MLP.
        self.modulation = nn.ModuleList(nn.Linear(H, 6 * blocks * H) for blocks in config.group_sizes)
        self.final_modulation = nn.Linear(H, 2 * H)
        self.output = nn.Linear(H, config.in_channels * p * p)
        tables = rope_tables(config)
        self.register_buffer("cos", tables and tables[0], persistent=False)
        self.register_buffer("sin", tables and tables[1], persistent=False)
        self.set_recompute("none")
        self.initialize()

    def set_recompute(self, mode: str) -> None:
        """Set what training recomputes in the backward pass: "none" | "light" (the MLP's activations) | "full" (blocks)."""
        self.recompute = mode
        for module in self.modules():
            if isinstance(module, Mlp):
                module.light = mode == "light"

    def initialize(self) -> None:
        """Initialise the parameters in place.

        With zero_init_gates: Xavier-uniform Linears with zero bias, a N(0, class_std²) class table, and zeros in the modulation and
        the output (adaLN-Zero; DiT, section 3.2). Without: PyTorch's own initialisation, as in the base model.
        """
        if isinstance(self.positions, nn.Parameter):
            with torch.no_grad():
                self.positions.copy_(sincos_positions(int(len(self.positions) ** 0.5), self.config.width))
        if self.fusion is not None:
            self.fusion.initialize()
        if not self.config.zero_init_gates:
            return
        fusion = () if self.fusion is None else (self.fusion.dense, self.fusion.sparse)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in fusion:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_embedding.table.weight, std=self.config.class_std)
        for linear in (*self.modulation, self.final_modulation, self.output):
            nn.init.zeros_(linear.get_parameter("weight"))

    def _apply(self, fn, recurse: bool = True):
        """Compute the tables again when the module is cast or moved: .bfloat16() must not round angles or frequencies, and fixed
        positions have the dtype of the parameters."""
        super()._apply(fn, recurse)
        device = self.output.weight.device
        if not isinstance(self.positions, nn.Parameter):
            self.positions = fixed_positions(self.config, device, self.output.weight.dtype)
        tables = rope_tables(self.config, device)
        if tables:
            self.cos = tables[0]
            self.sin = tables[1]
        self.time_embedding.frequencies = self.time_embedding.make_frequencies().to(device)
        return self

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def embed_classes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Embed each distinct class of labels int64 [B] once, for all steps of sampling.

        Returns class vectors [U,H] and the row of each sample in them, int64 [B].
        """
        distinct, rows = labels.unique(return_inverse=True)
        return self.class_embedding(distinct), rows

    def modulations(self, t: Tensor, classes: Tensor | None, rows: Tensor | None = None) -> list[Tensor]:
        """Return the 6·L+2 modulation vectors, each [B,H], in the order of use.

        t: timesteps fp32 [B]; classes: class vectors [B,H], or None. With rows int64 [B], t (fp32 [1] or [U]) and classes [U,H] are
        of distinct classes and sample i is modulated by row rows[i]. Vectors are split off by one `unbind`: slices would cost a
        zero-fill and an add of the whole tensor per vector in the backward pass.
        """
        y = self.time_embedding(t)
        if classes is not None:
            y = y + classes
        if self.config.time_embedding == "sinusoidal":  # the base model has no SiLU here
            y = F.silu(y)
        vectors: list[Tensor] = []
        for linear in (*self.modulation, self.final_modulation):
            packed = linear(y) if rows is None else linear(y).index_select(0, rows)
            vectors.extend(packed.unflatten(-1, (-1, self.config.width)).unbind(1))
        return vectors

    def patchify(self, x: Tensor) -> Tensor:
        """Return the tokens [B,T,C·p·p] of x [B,C,h,w], each the (channel, row, column) elements of its patch."""
        p = self.config.patch_size
        return x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Invert `patchify`: tokens [B,T,C·p·p] -> [B,C,h,w]."""
        p, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        x = tokens.unflatten(2, (-1, p, p)).unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5)
        return x.flatten(4).flatten(2, 3)

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None, tokens: Tensor | None = None, dropped: Tensor | None = None
    ) -> Tensor:
        """Return the velocity at (x, t), [B,C,h,w] in the dtype of the parameters.

        x [B,C,h,w] of any float dtype; t fp32 [B] in (0,1], 1 is noise; labels int64 [B] in 0..num_classes, the last is the
        null class, or None: no class input at all. tokens int64 [B,K] and dropped bool [B], from flow.choose_tokens: what the
        blocks between the dense ones see in training; None: all tokens of all samples.
        """
        x, y, *modulation = self.embed(x, t, labels)
        subset = None if tokens is None or dropped is None else self.subset(tokens, dropped)
        return self._run_blocks(x, y, modulation, subset)

    def velocity(self, x: Tensor, t: Tensor, classes: Tensor, rows: Tensor, deep: int | None = None) -> Tensor:
        """Return the velocity of samples that share a timestep: as `forward`, with t fp32 [], and classes [U,H] and rows int64 [B]
        from `embed_classes`. The time embedding is computed once and the modulation once per class. deep: number of first samples
        that pass through the blocks between the dense ones; the others leave them out."""
        x, y, *modulation = self._enter(x, self.modulations(t.reshape(1), classes, rows))
        return self._run_blocks(x, y, modulation, deep=deep)

    def embed(self, x: Tensor, t: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
        """Return the input of the first block: the residual stream x and its modulated norm y, both [B,T,H], and the 6·L modulation
        vectors of the blocks, each [B,H]. Arguments as in `forward`."""
        classes = None if labels is None else self.class_embedding(labels)
        return self._enter(x, self.modulations(t, classes))

    def _enter(self, x: Tensor, modulation: list[Tensor]) -> tuple[Tensor, ...]:
        """Embed the patches of x [B,C,h,w] and apply the first norm, which uses up two of the modulation vectors."""
        x = self.patch_embedding(self.patchify(x.to(self.output.weight.dtype)))
        if self.positions is not None:
            x = x + self.positions
        return x, kernels.modulate(x, modulation[0], modulation[1], self.config.norm_eps), *modulation[2:]

    def subset(self, tokens: Tensor, dropped: Tensor) -> Subset:
        """Return what the blocks between the dense ones see: of each sample the tokens int64 [B,K]; dropped bool [B]."""
        B, K = tokens.shape
        T = self.config.tokens
        if K == T:
            return Subset(None, (self.cos, self.sin), dropped)
        take = lambda table: None if table is None else table.index_select(0, tokens.flatten()).view(B, K, -1)
        rows = tokens + T * torch.arange(B, device=tokens.device)[:, None]
        return Subset(rows.flatten(), (take(self.cos), take(self.sin)), dropped)

    @property
    def between(self) -> range:
        """Numbers of the blocks between the dense ones."""
        first, last = self.config.dense_blocks or (len(self.blocks), 0)
        return range(first, len(self.blocks) - last)

    def run_block(
        self, block: nn.Module, x: Tensor, y: Tensor, modulation: tuple[Tensor, ...], subset: Subset | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run one of self.blocks, under activation checkpointing if blocks are recomputed. subset: of the tokens of x and y."""
        run = functools.partial(recomputed, block) if self.recompute == "full" and self.training else block
        cos, sin = subset.tables if subset else (self.cos, self.sin)
        return run(x, y, modulation, cos, sin)

    def join(
        self, x: Tensor, sparse: Tensor, modulation: tuple[Tensor, ...], subset: Subset | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return x and y for the first of the last dense blocks. x, sparse: as in Fusion.forward; modulation: six of [B,H], of
        the block before it."""
        assert self.fusion is not None  # there are blocks between
        x = self.fusion(x, sparse, subset)
        return x, kernels.modulate(x, modulation[4], modulation[5], self.config.norm_eps)

    def _run_blocks(
        self, x: Tensor, y: Tensor, modulation: list[Tensor], subset: Subset | None = None, deep: int | None = None
    ) -> Tensor:
        between, dense = self.between, x
        for i, block in enumerate(self.blocks):
            vectors = tuple(modulation[6 * i : 6 * i + 6])
            if i not in between:
                x, y = self.run_block(block, x, y, vectors)
                continue
            if i == between.start:
                dense = x
                x, y = (subset.take(t) if subset else t[:deep] for t in (x, y))
            x, y = self.run_block(block, x, y, vectors if deep is None else tuple(v[:deep] for v in vectors), subset)
            if i + 1 == between.stop:
                x, y = self.join(dense, x, vectors, subset)
        return self.project(y)

    def project(self, y: Tensor) -> Tensor:
        """Return the velocity [B,C,h,w] of the last block's y [B,T,H]."""
        return self.unpatchify(self.output(y))
