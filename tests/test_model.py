"""The model: shapes, published sizes, adaLN-Zero, positions, dtypes, and what it must not do to a compiler or a GPU."""

import math

import pytest
import torch
import torch._dynamo.testing

import hot_loop
from fastdit import flow, kernels
from fastdit.config import from_dict
from fastdit.model import DiT, TimeEmbedding, rope_tables, sincos_positions


def config(**model):
    return from_dict({"model": {"preset": "test/4", **model}}).model


def randomised(**model):
    """A model whose every parameter matters: nothing is left at zero, and the weights of norms lie around one."""
    torch.manual_seed(0)
    m = DiT(config(**model))
    with torch.no_grad():
        for name, p in m.named_parameters():
            is_norm = name.endswith(("q_weight", "k_weight"))
            p.copy_(torch.randn_like(p) * (0.5 / math.sqrt(p.shape[-1])) + (1 if is_norm else 0))
    return m


def inputs(m, batch=3):
    c = m.config
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, c.in_channels, c.input_size, c.input_size, generator=g)
    return x, torch.rand(batch, generator=g), torch.randint(0, c.num_classes + 1, (batch,), generator=g)


VARIANTS = [
    {"positions": "absolute"},
    {"positions": "rope_1d", "qk_norm": "none"},
    {"positions": "rope_2d", "class_width": 24, "modulation_groups": 2},
    {"positions": "absolute", "qk_norm": "full_width", "time_embedding": "base", "zero_init_gates": False},
    {"positions": "rope_1d", "time_embedding": "base", "in_channels": 4, "patch_size": 2, "input_size": 16},
    {"preset": "sit-S/2", "width": 64, "depth": 2, "heads": 2, "hidden": 96, "input_size": 8},
    {"mlp": "gelu", "positions": "rope_2d", "norm_eps": 0.1, "time_frequency": 1000.0},
    {"linear_bias": True, "qk_norm": "full_width", "positions": "sincos"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_shapes_and_that_every_parameter_gets_a_gradient(variant):
    m = randomised(**variant)
    x, t, labels = inputs(m)
    v = m(x, t, labels)
    assert v.shape == x.shape and v.dtype == torch.float32
    v.square().mean().backward()
    for name, p in m.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name


SPARSE = {"depth": 5, "dense_blocks": (1, 2), "keep_tokens": 0.25, "path_drop": 0.4, "positions": "rope_2d"}


def chosen_tokens(m, batch=3):
    return flow.choose_tokens(m.config, 0, torch.arange(batch), dense=False)


def plain_sparse(m, x, t, labels, tokens, dropped):
    """The forward pass of one sample after another, each from textbook formulas, with the tokens in a Python list."""
    c, H, N = m.config, m.config.width, m.config.heads
    rms = lambda z, w: z / (z.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt() * w
    norm = lambda z, shift, scale: torch.nn.functional.layer_norm(z, (H,), eps=c.norm_eps) * (1 + scale) + shift

    def rotate(z, places):
        a, b = z.chunk(2, -1)
        cos, sin = (table.to(z.dtype)[places][:, None] for table in (m.cos, m.sin))
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def block(z, places, i, shift1, scale1, gate1, shift2, scale2, gate2):
        b = m.blocks[i]
        q, k, v = b.attention.qkv(norm(z, shift1, scale1)).unflatten(-1, (3, N, -1)).unbind(1)
        q, k = rotate(rms(q, b.attention.q_weight), places), rotate(rms(k, b.attention.k_weight), places)
        scores = torch.einsum("qnd,knd->nqk", q, k) / (H // N) ** 0.5
        z = z + gate1 * b.attention.out(torch.einsum("nqk,knd->qnd", scores.softmax(-1), v).flatten(1))
        value, gate = b.mlp.up(norm(z, shift2, scale2)).chunk(2, -1)
        return z + gate2 * b.mlp.down(value * torch.nn.functional.silu(gate))

    outputs = []
    for s in range(len(x)):
        vectors = m.modulations(t[s : s + 1], m.class_embedding(labels[s : s + 1]))
        run = lambda z, places, i, vectors=vectors: block(z, places, i, *(v[0] for v in vectors[6 * i : 6 * i + 6]))
        everywhere = list(range(c.tokens))
        dense = run(m.patch_embedding(m.patchify(x[s : s + 1]))[0], everywhere, 0)
        places = tokens[s].tolist()
        sparse = dense[places]
        for i in (1, 2):
            sparse = run(sparse, places, i)
        both = []
        for place in everywhere:
            seen = place in places and not dropped[s]
            both.append(torch.cat((dense[place], sparse[places.index(place)] if seen else m.fusion.mask)))
        z = torch.stack(both) @ torch.cat((m.fusion.dense.weight, m.fusion.sparse.weight), 1).T
        for i in (3, 4):
            z = run(z, everywhere, i)
        outputs.append(m.unpatchify(m.output(norm(z, vectors[-2][0], vectors[-1][0]))[None]))
    return torch.cat(outputs)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_sparse_blocks_are_the_plain_formula_in_fp64(backend):
    """Velocities and all gradients; one of the samples leaves the sparse blocks out."""
    m = randomised(**SPARSE).double()
    x, t, labels = inputs(m)
    tokens, dropped = chosen_tokens(m)
    assert tokens.shape == (3, 16) and dropped.tolist() == [True, False, False]
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with kernels.backend("reference"):
        wanted = plain_sparse(m, x.double(), t, labels, tokens, dropped)
        (wanted * probe).sum().backward()
    gradients = [p.grad.clone() for p in m.parameters()]
    assert all(g.abs().max() > 0 for g in gradients)
    m.zero_grad()
    if backend == "auto":
        m, probe = m.float(), probe.float()
    with kernels.backend(backend):
        v = m(x, t, labels, tokens, dropped)
        (v * probe).sum().backward()
    # fp32 rounds some 200 times on the way through five blocks: 1e-4 of the largest is 800 ulp
    limit = 1e-4 if backend == "auto" else 1e-11
    for a, b in zip((v, *(p.grad for p in m.parameters())), (wanted, *gradients), strict=True):
        assert (a.double() - b).abs().max() <= limit * b.abs().max()


def test_without_chosen_tokens_all_blocks_see_all_and_the_dense_stream_is_the_start():
    m = randomised(**SPARSE)
    x, t, labels = inputs(m)
    everything = torch.arange(64).expand(3, -1), torch.zeros(3, dtype=torch.bool)
    assert torch.equal(m(x, t, labels), m(x, t, labels, *everything))
    fresh = DiT(config(**SPARSE))
    stream, other = torch.randn(2, 2, 64, 64)
    assert torch.equal(fresh.fusion(stream, other, None), stream)


@torch.no_grad()
def test_samples_that_leave_the_blocks_between_out_cost_nothing_there():
    """And have the velocity that path drop trains."""
    m, seen = randomised(**SPARSE).eval(), []
    for block in m.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2]))
    x, t, labels = inputs(m, batch=4)
    v = m.velocity(x, t[0], *m.embed_classes(labels), 2)
    assert seen == [(4, 64), (2, 64), (2, 64), (4, 64), (4, 64)]
    everything = torch.arange(64).expand(4, -1)
    torch.testing.assert_close(v, m(x, t[:1].expand(4), labels, everything, torch.tensor([False, False, True, True])))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_samples_of_a_batch_do_not_mix(variant):
    m = randomised(**variant).double()
    x, t, labels = inputs(m)
    with kernels.backend("reference"):  # the only one in fp64
        together = m(x, t, labels)
        for i in range(3):
            alone = m(x[i : i + 1], t[i : i + 1], labels[i : i + 1])
            torch.testing.assert_close(alone, together[i : i + 1], atol=1e-10, rtol=1e-10)


SIZES = {"S/2": 33, "B/2": 130, "L/2": 458, "XL/2": 675}  # millions of parameters of DiT and SiT


@pytest.mark.parametrize(
    ("preset", "millions"), [*SIZES.items(), *((f"sit-{size}", n) for size, n in SIZES.items()), ("base/2", 452)]
)
def test_published_sizes(preset, millions):
    with torch.device("meta"):
        m = DiT(config(preset=preset, in_channels=4, num_classes=1000))
    assert m.num_parameters / 1e6 == pytest.approx(millions, rel=0.01)


def test_adaln_zero_starts_as_the_zero_velocity_with_identity_blocks():
    m = DiT(config())
    x, t, labels = inputs(m)
    assert m(x, t, labels).abs().max() == 0
    stream = m.patch_embedding(m.patchify(x)) + m.positions
    zeros = torch.zeros(3, 64)
    y = kernels.modulate(stream, zeros, zeros)
    out, _ = m.blocks[0](stream, y, tuple(m.modulations(t, m.class_embedding(labels))[2:8]), None, None)
    assert torch.equal(out, stream)


def test_without_zero_init_the_start_is_not_zero():
    torch.manual_seed(0)
    m = DiT(config(zero_init_gates=False))
    assert m(*inputs(m)).abs().max() > 0.01


def test_patches_are_channel_row_column_in_row_major_order():
    m = DiT(config(in_channels=2, patch_size=4, input_size=8))
    x = torch.arange(2 * 8 * 8.0).view(1, 2, 8, 8)
    tokens = m.patchify(x)
    for token in range(4):
        r, c = token // 2 * 4, token % 2 * 4
        assert torch.equal(tokens[0, token], x[0, :, r : r + 4, c : c + 4].flatten())
    assert torch.equal(m.unpatchify(tokens), x)


def test_rope_1d_is_the_published_formula():
    cos, sin = rope_tables(config(positions="rope_1d"))
    D, T = 32, 64
    for position in (0, 1, 63):
        for j in (0, 5, 15):
            angle = position * 10_000 ** (-2 * j / D)
            assert cos[position, j].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[position, j].item() == pytest.approx(math.sin(angle), abs=1e-6)
    assert cos.shape == (T, D // 2) and cos.dtype == torch.float32


def test_rope_2d_depends_on_the_offset_in_rows_and_columns_alone():
    cos, sin = (t.double() for t in rope_tables(config(positions="rope_2d")))
    q, k = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def rotate(x, position):
        a, b = x.chunk(2)
        c, s = cos[position], sin[position]
        return torch.cat((a * c - b * s, b * c + a * s))

    def score(row1, column1, row2, column2):
        return (rotate(q, row1 * 8 + column1) @ rotate(k, row2 * 8 + column2)).item()

    assert score(1, 2, 3, 7) == pytest.approx(score(2, 0, 4, 5), abs=1e-6)
    assert score(1, 2, 3, 7) != pytest.approx(score(1, 2, 7, 3), abs=1e-2)  # rows and columns are told apart


def test_sincos_table_tells_all_places_apart():
    table = sincos_positions(8, 64)
    assert torch.cdist(table, table).fill_diagonal_(1).min() > 0.1


def test_fixed_positions_are_the_published_table():
    """Of DiT, from MAE: column first, sines before cosines; neither trained nor saved, and rounded from fp32 by each cast."""
    model = DiT(config(positions="sincos", width=16, input_size=32, patch_size=4))
    for token in range(64):
        for half, position in enumerate((token % 8, token // 8)):
            for i in range(4):
                angle = position / 10_000 ** (i / 4)
                assert model.positions[token, 8 * half + i].item() == pytest.approx(math.sin(angle), abs=1e-6)
                assert model.positions[token, 8 * half + 4 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert "positions" not in model.state_dict() and "positions" not in dict(model.named_parameters())
    table = model.positions.clone()
    assert torch.equal(model.bfloat16().positions, table.bfloat16()) and torch.equal(model.float().positions, table)


def test_the_switches_are_the_published_formulas():
    """The MLP, the biases, the norms' epsilon and the timestep's features, beside PyTorch's own modules."""
    m = randomised(mlp="gelu", linear_bias=True, norm_eps=0.3, time_frequency=1.0, qk_norm="none", positions="sincos")
    y, block = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)), m.blocks[0]
    up, gelu, down = torch.nn.Linear(64, 128), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(128, 64)
    up.load_state_dict(block.mlp.up.state_dict())
    down.load_state_dict(block.mlp.down.state_dict())
    torch.testing.assert_close(block.mlp(y) + down.bias, down(gelu(up(y))))
    attention = torch.nn.MultiheadAttention(64, 2, batch_first=True)
    attention.load_state_dict(
        {
            "in_proj_weight": block.attention.qkv.weight, "in_proj_bias": block.attention.qkv.bias,
            "out_proj.weight": block.attention.out.weight, "out_proj.bias": block.attention.out.bias,
        }
    )  # fmt: skip
    torch.testing.assert_close(block.attention(y, None, None), attention(y, y, y)[0])
    zeros = torch.zeros(2, 64)
    x, y = block(torch.zeros_like(y), y, (zeros + 1, zeros, zeros, zeros, zeros, zeros), None, None)
    torch.testing.assert_close(y, torch.nn.LayerNorm(64, eps=0.3, elementwise_affine=False)(x))
    stream, *_ = m.embed(*inputs(m))
    torch.testing.assert_close(m.embed(*inputs(m))[1], kernels.modulate(stream, *m.modulations(*embedded(m))[:2], 0.3))
    (features,) = m.time_embedding.features(torch.tensor([0.7])).double()
    for i in (0, 5, 127):
        angle = 0.7 * 10_000 ** (-i / 128)
        assert features[i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert features[128 + i].item() == pytest.approx(math.sin(angle), abs=1e-6)


def embedded(m):
    """The timesteps and class vectors of `inputs`."""
    _, t, labels = inputs(m)
    return t, m.class_embedding(labels)


def test_base_time_features_are_the_published_formula():
    embedding = TimeEmbedding(config(width=16, time_embedding="base"))
    t = torch.linspace(1, 1 / 7, 7)
    got = embedding.features(t)
    table = torch.cat([torch.tensor(10_000) ** (2 * i / 16) for i in torch.arange(16).split(1)])  # as where vectors are long
    for b in range(7):
        for i in range(16):
            angle = (t[b] * table[i]).double()
            expected = torch.sin(angle) if i % 2 == 0 else torch.cos(angle)
            assert got[b, i].item() == pytest.approx(expected.item(), abs=1e-7)


def test_tables_stay_fp32_under_casts_and_are_not_in_the_checkpoint():
    m = DiT(config(positions="rope_2d"))
    before = m.cos.clone(), m.time_embedding.frequencies.clone()
    m.bfloat16()
    assert m.cos.dtype == m.sin.dtype == m.time_embedding.frequencies.dtype == torch.float32
    assert torch.equal(m.cos, before[0]) and torch.equal(m.time_embedding.frequencies, before[1])
    assert not any("cos" in key or "frequencies" in key for key in m.state_dict())


def test_bf16_features_of_close_times_differ():
    m = DiT(config()).bfloat16()
    a, b = m.time_embedding.features(torch.tensor([0.5, 0.501]))
    assert (a - b).abs().max() > 0.01


def test_no_labels_means_no_class_input():
    m = randomised()
    x, t, labels = inputs(m)
    with torch.no_grad():
        m.class_embedding.table.weight.zero_()
    torch.testing.assert_close(m(x, t, None), m(x, t, labels))


def test_full_width_norm_is_the_old_base_formula():
    m = randomised(qk_norm="full_width", positions="absolute")
    a = m.blocks[0].attention
    y = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    q, k, v = a.qkv(y).chunk(3, dim=-1)
    q = q / (q.square().mean(-1, keepdim=True) + 64.0).sqrt() * a.q_weight
    k = k / (k.square().mean(-1, keepdim=True) + 64.0).sqrt() * a.k_weight
    heads = [x.view(2, 64, 2, 32).transpose(1, 2) for x in (q, k, v)]
    expected = a.out(torch.softmax(heads[0] @ heads[1].transpose(-1, -2) / 32**0.5, -1).matmul(heads[2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(a(y, None, None), expected, atol=1e-5, rtol=1e-5)


def test_modulation_backward_never_slices_the_large_tensor():
    m = randomised(depth=8)
    guard = hot_loop.HotLoopGuard(columns=6 * 4 * 64)
    with guard:
        m(*inputs(m)).sum().backward()
    assert guard.large_slices == []
    assert guard.counts["aten.unbind"] >= 3  # two groups and the final norm


def kept_by_a_forward(recompute, dtype, mlp="swiglu"):
    """Widths of activations that a token and block keep for the backward pass, and the gradients of that."""
    torch.manual_seed(0)
    B, L, H = 2, 4, 128
    m = DiT(config(depth=L, width=H, heads=2, hidden=3 * H, input_size=64, patch_size=4, mlp=mlp)).to(dtype).train()
    m.set_recompute(recompute)
    x, t, labels = torch.randn(B, 1, 64, 64), torch.rand(B), torch.tensor([1, 2])
    m(x, t, labels).sum().backward()
    m.zero_grad()
    with torch.profiler.profile(profile_memory=True) as profile:
        v = m(x, t, labels)
    kept = sum(event.self_cpu_memory_usage for event in profile.events())
    v.square().mean().backward()
    return kept / (L * B * 256 * H * dtype.itemsize), [p.grad for p in m.parameters()]


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize(("dtype", "none"), [(torch.float32, 22.6), (torch.bfloat16, 26.7)])
def test_recomputing_keeps_less_and_changes_no_bit(dtype, none, mlp):
    """fp32: x, y, qkv 3, q 1, k 1, attention 1, …; bf16 on a CPU also keeps the attention's probabilities."""
    none -= 3 * (mlp == "gelu")  # its input is 3 widths here, SwiGLU's 6
    kept, wanted = kept_by_a_forward("none", dtype, mlp)
    assert kept == pytest.approx(none, abs=0.1)
    for recompute, expected in (("light", none - 3), ("full", 2.35)):  # the MLP's activation is 3 widths; a block's inputs are 2
        kept, gradients = kept_by_a_forward(recompute, dtype, mlp)
        assert kept == pytest.approx(expected, abs=0.1), recompute
        assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


def bytes_kept(compiled, recompute):
    """What autograd keeps of a forward besides the parameters: of compiled graphs, what theirs hand to their backward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    m = DiT(config(depth=3, zero_init_gates=False)).train()
    m.set_recompute(recompute)
    for part in {"none": [], "blocks": m.blocks, "model": [m]}[compiled]:
        part.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    found = {}
    own = {p.untyped_storage().data_ptr() for p in (*m.parameters(), *m.buffers())}

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        v = m(*inputs(m))
    v.square().sum().backward()
    return sum(size for size, _ in found.values()), [p.grad for p in m.parameters()]


@pytest.mark.skipif(kernels.backend_in_use(torch.device("cpu")) == "reference", reason="references keep more")
@pytest.mark.parametrize("compiled", ["none", "blocks", pytest.param("model", marks=pytest.mark.slow)])
def test_light_recomputes_in_compiled_graphs_too(compiled):
    """It frees SwiGLU's outputs and nothing else, on every torch: torch.utils.checkpoint was without effect in graphs of 2.11."""
    (kept, gradients), (less, again) = (bytes_kept(compiled, recompute) for recompute in ("none", "light"))
    model = config(depth=3)
    assert kept - less == model.depth * 3 * (model.input_size // model.patch_size) ** 2 * model.hidden * 4
    assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))


SIT_BLOCKS = {"positions": "sincos", "qk_norm": "none", "mlp": "gelu", "linear_bias": True, "norm_eps": 1e-6}


@pytest.mark.parametrize("recompute", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_sparse_blocks_share_one_graph_more(recompute):
    """Blocks of all tokens, of the kept ones, and the last one."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    m = DiT(config(**{**SPARSE, "depth": 16, "width": 16, "heads": 1, "hidden": 16}))
    m.set_recompute(recompute)
    for block in m.blocks:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(2):
            m(*inputs(m), *chosen_tokens(m)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]


@pytest.mark.parametrize(
    ("recompute", "model"),
    [("none", {}), ("light", {}), ("none", SIT_BLOCKS), ("light", SIT_BLOCKS), pytest.param("full", {}, marks=pytest.mark.slow)],
)
def test_one_graph_serves_all_blocks_in_training_and_sampling(recompute, model):
    """28 blocks that are compiled one by one must share their graphs: more than eight would silently run eager."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    m = DiT(config(depth=28, width=16, heads=1, hidden=16, input_size=8, patch_size=4, **model))
    m.set_recompute(recompute)
    for block in m.blocks:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        m(*inputs(m)).sum().backward()
        m(*inputs(m)).sum().backward()
        # one graph for all but the last block, whose next norm comes from the final modulation: other strides
        assert counters["stats"]["unique_graphs"] == 2
        with torch._dynamo.config.patch(error_on_recompile=True):
            m(*inputs(m)).sum().backward()
        with torch.no_grad():
            m(*inputs(m, batch=5))
    assert counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]


def test_a_block_dispatches_few_operations(record_property):
    """On a GPU each costs the host microseconds, and S/2 has some 3 ms of work per step. Per block: at most 40 and 80."""
    counts = {}
    for depth in (2, 4):
        m = DiT(config(depth=depth, width=32, heads=2, hidden=32, input_size=8, patch_size=4, modulation_groups=1))
        with hot_loop.HotLoopGuard() as forward:
            loss = m(*inputs(m)).sum()
        with hot_loop.HotLoopGuard() as backward:
            loss.backward()
        counts[depth] = torch.tensor([sum(guard.counts.values()) for guard in (forward, backward)])
    a_block = (counts[4] - counts[2]) / 2
    record_property("operations per block, forward and backward", a_block.tolist())
    assert (a_block <= torch.tensor([40, 80])).all()
