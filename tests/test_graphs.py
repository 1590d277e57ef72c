"""Recorded training steps. Here a recorded piece is called again instead of replayed; all else is what runs on CUDA."""

import json

import pytest
import torch

import cuda_graphs
from fastdit import distributed, flow, graphs
from fastdit.config import InputError, from_dict, parse
from fastdit.graphs import record_training, release_recorded
from fastdit.model import DiT
from fastdit.training import engine
from fastdit.training.loop import train

TINY = [
    "model.preset=test/4", "train.batch_size=8", "train.lr=1e-3", "train.warmup_steps=1", "train.log_steps=2", "train.save_steps=2",
    "train.sample_steps=6", "sample.steps=2",
]  # fmt: skip


def make(recompute="none", **model):
    torch.manual_seed(0)
    made = DiT(from_dict({"model": {"preset": "test/4", "depth": 3, **model}}).model)
    made.set_recompute(recompute)
    with torch.no_grad():  # adaLN-Zero starts with gates of zero, which would hide most gradients
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def batch(model, step, size=3):
    g = torch.Generator().manual_seed(step)
    c = model.config
    x = torch.randn(size, c.in_channels, c.input_size, c.input_size, generator=g)
    labels = torch.randint(0, c.num_classes + 1, (size,), generator=g)
    return x, torch.rand(size, generator=g), labels, *flow.choose_tokens(c, step, torch.arange(size), dense=False)


def steps(model, count=3):
    """Velocities and gradients of a few steps of gradient descent."""
    found = []
    for step in range(count):
        v = model(*batch(model, step))
        (v.float() * batch(model, 100 + step)[0]).sum().backward()
        found.append([v.detach().clone(), *(p.grad.clone() for p in model.parameters())])
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(1e-3 * p.grad)
                p.grad = None
    return found


@pytest.mark.parametrize("per_block", [False, True])
@pytest.mark.parametrize("recompute", ["none", "light", "full"])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"positions": "absolute", "class_width": 24, "modulation_groups": 2},
        {"positions": "rope_2d", "depth": 4, "dense_blocks": (1, 1), "keep_tokens": 0.3, "path_drop": 0.5},
        {"positions": "sincos", "qk_norm": "none", "mlp": "gelu", "linear_bias": True, "norm_eps": 1e-6, "time_frequency": 1.0},
    ],
    ids=str,
)
def test_velocities_and_gradients_are_those_without_graphs_to_the_bit(variant, recompute, per_block):
    plain, recorded = make(recompute, **variant), make(recompute, **variant)
    record_training(recorded, per_block)
    for wanted, found in zip(steps(plain), steps(recorded), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("per_block", [False, True])
@pytest.mark.parametrize("recompute", ["none", "light", "full"])
@pytest.mark.parametrize(
    "model", [{}, {"positions": "rope_2d", "dense_blocks": (1, 1), "keep_tokens": 0.3, "path_drop": 0.5}], ids=str
)
def test_what_is_captured_is_the_whole_step(monkeypatch, recompute, per_block, model):
    """With a stand-in for CUDA graphs that repeats the operators of a capture: what was not captured, or read memory that is not
    the graphs' own, would be of the first batch."""
    plain, recorded = make(recompute, **model), make(recompute, **model)
    wanted = steps(plain)
    captures = cuda_graphs.install(monkeypatch)
    monkeypatch.setattr(graphs, "graph_pool", lambda device: torch.cuda.graph_pool_handle())
    record_training(recorded, per_block)
    for a, b in zip(wanted, steps(recorded), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert len(captures) == (1 + 5 if per_block else 2)  # the forward pass; embedding, three blocks, output
    assert len({pool for pool, _ in captures}) == 1 and {mode for _, mode in captures} == {"thread_local"}


def test_bf16_is_recorded_as_it_is():
    plain, recorded = make().bfloat16(), make().bfloat16()
    record_training(recorded, True)
    for wanted, found in zip(steps(plain), steps(recorded), strict=True):
        assert found[0].dtype == torch.bfloat16
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_gradients_arrive_block_by_block_in_memory_that_stays():
    """Hooks of a block's parameters run before the part before it is replayed, as ZeRO's overlap needs; and a gradient is the
    recorded memory itself: a copy of each would cost as many launches as there are parameters."""
    model = make()
    record_training(model, per_block=True)
    order, replay = [], graphs.Recorded.replay
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: order.append(name))
    model(*batch(model, 0)).sum().backward()
    addresses = [p.grad.data_ptr() for p in model.parameters()]
    order.clear()
    for p in model.parameters():
        p.grad = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs.Recorded, "replay", lambda self: (order.append("replay"), replay(self))[1])
        model(*batch(model, 1)).sum().backward()
    assert [p.grad.data_ptr() for p in model.parameters()] == addresses
    parts, rest = [], order[1:]  # the first replay is the forward pass
    while rest:
        end = next((i for i, what in enumerate(rest[1:], 1) if what == "replay"), len(rest))
        parts.append(set(rest[1:end]))
        rest = rest[end:]
    names = lambda prefix: {name for name, _ in model.named_parameters() if name.startswith(prefix)}
    blocks = [names(f"blocks.{i}.") for i in range(3)]
    assert parts == [
        names("output."),
        *reversed(blocks),
        {n for n, _ in model.named_parameters()} - names("output.") - names("blocks."),
    ]


@pytest.mark.parametrize("per_block", [False, True])
def test_accumulated_gradients_are_sums(per_block):
    plain, recorded = make(), make()
    record_training(recorded, per_block)
    for model in (plain, recorded):
        for step in range(3):
            model(*batch(model, step)).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), recorded.parameters(), strict=True))


@pytest.mark.parametrize("per_block", [False, True])
def test_accumulated_gradients_outlive_the_next_forward_pass(monkeypatch, per_block):
    """In a pool of CUDA graphs a gradient lies where activations have been: the next forward pass writes there."""
    plain, recorded = make(), make()
    record_training(recorded, per_block)
    replay = graphs.Recorded.replay

    def overwriting(self):
        if self is recorded.forward.forward:
            for part in recorded.forward.backward:
                for gradient in part.results:
                    gradient.fill_(torch.nan)
        replay(self)

    monkeypatch.setattr(graphs.Recorded, "replay", torch.no_grad()(overwriting))
    for model in (plain, recorded):
        for step in range(3):
            model(*batch(model, step)).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), recorded.parameters(), strict=True))


def test_a_backward_pass_after_another_forward_pass_is_refused():
    model = make()
    record_training(model, per_block=False)
    first, _ = model(*batch(model, 0)), model(*batch(model, 1))
    with pytest.raises(RuntimeError, match="must come before the next forward pass"):
        first.sum().backward()


@pytest.mark.parametrize("per_block", [False, True])
def test_what_is_released_is_recorded_again(per_block):
    """Between steps, and with gradients left in .grad."""
    plain, recorded = make(), make()
    record_training(recorded, per_block)
    for model in (plain, recorded):
        for step in range(3):
            model(*batch(model, step)).sum().backward()
            release_recorded(model)
            release_recorded(model)
    assert not recorded.forward.recorded
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), recorded.parameters(), strict=True))


def test_a_recording_that_fails_is_begun_again(monkeypatch):
    model, plain = make(), make()
    record_training(model, per_block=True)
    with monkeypatch.context() as patch:
        patch.setattr(graphs.TrainingGraphs, "_backward", lambda self, i: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(*batch(model, 0))
    for wanted, found in zip(steps(plain), steps(model), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_what_does_not_train_runs_as_before_and_another_batch_is_refused():
    model = make()
    record_training(model, per_block=False)
    with torch.no_grad():
        model(*batch(model, 0, size=5))
    model.eval()
    model(*batch(model, 0, size=4))
    model.train()
    model(*batch(model, 0))
    with pytest.raises(ValueError, match=r"recorded for batches of \[3, 1, 32, 32\] is given \[4, 1, 32, 32\]"):
        model(*batch(model, 0, size=4))


@pytest.mark.parametrize(("device", "stage", "wanted"), [("cuda", 2, "graphs"), ("cuda", 3, "none"), ("cpu", 2, "none")])
def test_auto_is_graphs_where_they_can_be(device, stage, wanted):
    world = distributed.World(0, 1, torch.device(device), None)
    assert engine.compiles(parse(None, [f"zero.stage={stage}"]), world) == wanted
    assert engine.compiles(parse(None, ["train.compile=blocks"]), world) == "blocks"


def test_full_recomputation_of_a_compiled_model_needs_a_torch_that_can(monkeypatch):
    config, cpu = parse(None, ["train.recompute=full", "train.compile=model"]), torch.device("cpu")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.0"))
    engine.resolve_precision(config, cpu)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.1+cu130"))
    with pytest.raises(InputError, match=r"recomputes nothing on torch 2\.12\.1\+cu130: use train\.compile=graphs or blocks"):
        engine.resolve_precision(config, cpu)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            ["train.precision=bf16", "train.recompute=light", "validate.steps=3", "validate.images=8"], marks=pytest.mark.slow
        ),
        ["train.precision=fp32", "train.accumulation=2", "train.batch_size=4", "train.deterministic=true"],
        ["train.precision=bf16", "train.accumulation=2", "train.batch_size=4", "train.profile=2-3"],
    ],
    ids=lambda words: " ".join(words),
)
def test_a_run_by_graphs_is_the_run_without(tmp_path, words):
    """Log, checkpoint and samples of six steps, stopped and continued after four."""
    kept = {}
    for how in ("none", "graphs"):
        settings = [*TINY, *words, f"train.out={tmp_path}", f"train.name={how}", f"train.compile={how}"]
        train(parse(None, [*settings, "train.total_steps=4"]))
        run = train(parse(None, [*settings, "train.total_steps=6"]))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        weights = next((run / "checkpoints/step_00000006").glob("weights*")).read_bytes()
        shown = [(line["loss"], line["grad_norm"], line["loss_by_t"]) for line in lines if "loss" in line]
        kept[how] = shown, weights, (run / "samples/step_00000006.png").read_bytes()
    assert kept["graphs"] == kept["none"] and len(kept["none"][0]) == 3
