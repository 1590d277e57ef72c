"""Two ranks, one run of which the deepspeed launcher starts: against one rank, and resumed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import forked_ranks
from commands import environment, free_port
from fastdit import checkpoint

SUPPORT = Path(__file__).parent.parent / "support"
TINY = [
    "model.preset=test/4",
    "train.precision=bf16",
    "train.schedule=constant",
    "train.lr=1e-3",
    "train.warmup_steps=2",
    "train.log_steps=3",
    "train.save_steps=4",
    "train.sample_steps=0",
]


def succeeded(done, expect=0):
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def command(ranks, out, *overrides):
    return ["fastdit.cli", "train", *TINY, f"train.out={out}", "train.name=r", f"train.batch_size={8 // ranks}", *overrides]


def train(ranks, out, *overrides, expect=0):
    return succeeded(forked_ranks.run(ranks, ["-m", *command(ranks, out, *overrides)]), expect)


def losses(out):
    lines = map(json.loads, (out / "r" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize(
    ("ranks", "stage", "precision"),
    [
        (2, 2, "bf16"),
        (1, 2, "bf16"),
        pytest.param(2, 1, "bf16", marks=pytest.mark.slow),
        pytest.param(2, 3, "bf16", marks=pytest.mark.slow),
        pytest.param(2, 2, "fp32", marks=pytest.mark.slow),
        pytest.param(1, 2, "fp32", marks=pytest.mark.slow),
        pytest.param(1, 3, "bf16", marks=pytest.mark.slow),
    ],
)
def test_engine(ranks, stage, precision, tmp_path):
    """The EMA equals a plain fp32 one; dtypes, overlap and host reads are right: see rank_worker.py.

    DeepSpeed compiles nothing at start: its build folder is not made.
    """
    extensions = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    done = succeeded(forked_ranks.run(ranks, [SUPPORT / "rank_worker.py", stage, precision], **extensions))
    assert "all checks passed" in done.stdout
    assert not (tmp_path / "extensions").exists()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Eight steps on two ranks, uninterrupted, started by the deepspeed launcher."""
    out = tmp_path_factory.mktemp("two")
    launcher = [Path(sys.executable).with_name("deepspeed"), "--no_local_rank", "--master_port", free_port(), "--num_gpus", 2]
    words = [sys.executable, *launcher, "--module", *command(2, out, "train.total_steps=8")]
    succeeded(subprocess.run([*map(str, words)], env=environment(), capture_output=True, text=True, timeout=300, check=False))
    return out


def test_one_rank_has_the_same_losses(two_ranks, tmp_path):
    train(1, tmp_path, "train.total_steps=8", "train.accumulation=2", "train.batch_size=4")
    one, two = losses(tmp_path), losses(two_ranks)
    assert list(one) == list(two) == [3, 6, 8]
    # Images, noise and labels are the same, but bf16 gradients are summed in another order. Each is off by half a bf16 ulp (2^-9),
    # and Adam moves a weight by at most lr = 1e-3 whatever the gradient, so eight steps shift the loss by far less than 1 %.
    for step, loss in one.items():
        assert loss == pytest.approx(two[step], rel=1e-2), step


def test_resumed_run_equals_the_uninterrupted_one(two_ranks, tmp_path):
    train(2, tmp_path, "train.total_steps=6")
    assert checkpoint.find(tmp_path / "r").path.name == "step_00000006"
    (tmp_path / "r/checkpoints/step_00000006/weights_rank_0001.safetensors").write_bytes(b"cut")  # as after a power loss
    assert checkpoint.find(tmp_path / "r").path.name == "step_00000004"
    train(2, tmp_path, "train.total_steps=8")  # from step 4, between two log lines
    assert losses(tmp_path) == losses(two_ranks)  # to the last bit, each line once
    names = [f"weights_rank_{rank:04d}.safetensors" for rank in (0, 1)]
    for name in names:
        uninterrupted, resumed = (out / "r/checkpoints/step_00000008" / name for out in (two_ranks, tmp_path))
        assert uninterrupted.read_bytes() == resumed.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_with_the_switches_of_sit_resumes_to_the_bit(tmp_path, stage):
    """GELU, biases in the attention, fixed positions, another epsilon: two ranks, whole and in two parts."""
    words = ["mlp=gelu", "linear_bias=true", "positions=sincos", "qk_norm=none", "norm_eps=1e-6", "time_frequency=1"]
    words = [*(f"model.{word}" for word in words), f"zero.stage={stage}", "train.log_steps=1"]
    for name, totals in (("whole", [6]), ("parts", [4, 6])):
        for total in totals:
            train(2, tmp_path / name, *words, f"train.total_steps={total}")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    for name in [f"weights_rank_{rank:04d}.safetensors" for rank in (0, 1)]:
        whole, parts = (tmp_path / out / "r/checkpoints/step_00000006" / name for out in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()


SPARSE = ["model.depth=3", "model.positions=rope_2d", "model.dense_blocks=[1,1]", "model.keep_tokens=0.25", "model.path_drop=0.3"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_sparse_run_resumes_to_the_bit_and_has_one_ranks_losses(tmp_path, stage):
    """On two ranks, cut between two log lines. One rank with two micro-steps sums fp32 gradients in another order: each loss is
    off by a few ulp (6e-8) of the weights' gradients, which Adam turns into at most lr per step."""
    words = [*SPARSE, f"zero.stage={stage}", "train.total_steps=8", "train.precision=fp32", "train.dense_steps=2"]
    train(2, tmp_path / "whole", *words)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    last = tmp_path / "parts/r/checkpoints/step_00000008"
    (last / "weights_rank_0001.safetensors").write_bytes(b"cut")
    assert "from step 4 to 8" in train(2, tmp_path / "parts", *words).stderr
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    for name in [f"weights_rank_{rank:04d}.safetensors" for rank in (0, 1)]:
        assert (last / name).read_bytes() == (tmp_path / "whole/r/checkpoints/step_00000008" / name).read_bytes()
    if stage != 2:  # one rank has nothing to shard
        return
    train(1, tmp_path / "one", *words, "train.accumulation=2", "train.batch_size=4")
    for step, loss in losses(tmp_path / "one").items():
        assert loss == pytest.approx(losses(tmp_path / "whole")[step], rel=1e-5), step


def test_recorded_steps_are_the_steps_without_graphs(two_ranks, tmp_path):
    """ZeRO 2 with overlap, whose hooks take each block's gradients while the others are replayed."""
    done = train(2, tmp_path, "train.total_steps=8", "train.compile=graphs")
    assert "CUDA graphs" in done.stdout + done.stderr and losses(tmp_path) == losses(two_ranks)
    for name in [f"weights_rank_{rank:04d}.safetensors" for rank in (0, 1)]:
        plain, recorded = (out / "r/checkpoints/step_00000008" / name for out in (two_ranks, tmp_path))
        assert plain.read_bytes() == recorded.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "bf16")])
def test_recorded_micro_steps_add_up_under_zero(tmp_path, stage, precision):
    words = [
        "train.total_steps=3",
        "train.batch_size=2",
        "train.accumulation=2",
        f"zero.stage={stage}",
        f"train.precision={precision}",
    ]
    for compiled in ("none", "graphs"):
        train(2, tmp_path / compiled, *words, f"train.compile={compiled}")
    assert losses(tmp_path / "graphs") == losses(tmp_path / "none")


def test_checkpoint_of_two_ranks_is_one_model(two_ranks):
    opened = checkpoint.open_checkpoint(two_ranks / "r")
    assert opened == checkpoint.open_checkpoint(two_ranks / "r/checkpoints/step_00000008")
    ema, raw = (opened.load_model(weights, torch.device("cpu")) for weights in ("ema", "raw"))
    state, config = opened.state, opened.config
    assert state.step == 8 and state.ranks == 2 and config.model.preset == "test/4"
    pairs = [(p, q) for p, q in zip(ema.parameters(), raw.parameters(), strict=True)]
    assert all(torch.isfinite(p).all() for p, _ in pairs) and any((p != q).any() for p, q in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("first", [2, 1])
def test_another_number_of_ranks_resumes(two_ranks, tmp_path, first):
    """From 2 to 1 rank and from 1 to 2, at the same global batch."""
    batch = lambda ranks: [f"train.accumulation={2 // ranks}", "train.batch_size=4"]
    train(first, tmp_path, "train.total_steps=4", *batch(first))
    train(3 - first, tmp_path, "train.total_steps=8", *batch(3 - first))
    resumed = losses(tmp_path)
    assert list(resumed) == [3, 4, 6, 8]
    for step in (3, 8):
        assert resumed[step] == pytest.approx(losses(two_ranks)[step], rel=1e-2), step  # as for one rank above


def test_another_global_batch_is_refused_with_exit_code_2(two_ranks):
    before = sorted(str(p) for p in two_ranks.rglob("*"))
    done = train(1, two_ranks, "train.total_steps=10", "train.batch_size=4", expect=2)
    assert "trained with 8 images per step, but this run has 4" in done.stderr
    assert sorted(str(p) for p in two_ranks.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(2, 0), (2, 1), (2, 3), (1, 3)])
def test_a_run_from_weights_resumes_to_the_last_bit(two_ranks, tmp_path, ranks, stage):
    """Two ranks' weights, with two classes more."""
    begins = [f"train.init={two_ranks / 'r'}", "model.num_classes=12", f"zero.stage={stage}", "train.total_steps=6"]
    names = [f"weights_rank_{rank:04d}.safetensors" for rank in range(ranks)]
    for name in ("whole", "cut"):
        done = train(ranks, tmp_path / name, *begins)
        assert "10 of 12 rows by class name" in done.stderr and "from step 0 to 6" in done.stderr
    last = tmp_path / "cut/r/checkpoints/step_00000006"
    (last / names[-1]).write_bytes(b"cut")
    assert "from step 4 to 6" in train(ranks, tmp_path / "cut", *begins).stderr
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name in names:
        assert (last / name).read_bytes() == (tmp_path / "whole/r/checkpoints/step_00000006" / name).read_bytes()


@pytest.mark.slow
def test_two_ranks_of_four_images_continue_on_one_of_six(tmp_path):
    train(2, tmp_path, "train.total_steps=4")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    one = ["train.total_steps=8", "train.batch_size=6"]
    done = train(1, tmp_path, *one, expect=2)
    assert "trained with 8 images per step, but this run has 6" in done.stderr and "train.allow_batch_change=true" in done.stderr
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    train(1, tmp_path, *one, "train.allow_batch_change=true")
    lines = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert {"step": 5, "images_per_step": [8, 6], "images_seen": 32} in lines
    state = checkpoint.find(tmp_path / "r").state
    assert (state.ranks, state.global_batch, state.images_seen, list(state.batch_since)) == (1, 6, 56, [4, 0, 32, 32])
