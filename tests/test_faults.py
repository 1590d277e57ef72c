"""Runs of two ranks that are killed, stopped or fed NaN; ZeRO stages and numbers of ranks against one another."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands import environment, free_port
from fastdit import checkpoint

WORKER = Path(__file__).parent / "support" / "fault_worker.py"
ENVIRONMENT = environment()
TINY = [
    "model.preset=test/4", "train.precision=bf16", "train.schedule=constant", "train.lr=1e-3", "train.warmup_steps=2",
    "train.log_steps=3", "train.save_steps=2", "train.sample_steps=0", "train.name=r", "train.keep_checkpoints=2",
]  # fmt: skip


def launch(out, fault="none", victim=0, ranks=2, overrides=(), total=12, **options):
    words = [*TINY, f"train.out={out}", f"train.batch_size={8 // ranks}", f"train.total_steps={total}", *overrides]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks, WORKER, fault, victim, out / "losses"]
    out.mkdir(exist_ok=True)
    return subprocess.Popen(
        [str(word) for word in [*command, "train", *words]], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True, **options,
    )  # fmt: skip


def run(out, *arguments, expect=0, **options):
    process = launch(out, *arguments, **options)
    said, problems = process.communicate(timeout=120)
    if expect is not None:
        assert (process.returncode == 0) == (expect == 0), f"{process.returncode}\n{said[-2000:]}\n{problems[-6000:]}"
    return problems


def losses(out, ranks=2):
    """{(rank, step): loss in hex}; a step that was taken again must have the same."""
    found = {}
    for rank in range(ranks):
        for line in (out / f"losses.{rank}").read_text().splitlines():
            step, loss = line.split()
            assert found.setdefault((rank, int(step)), loss) == loss, (rank, step)
    return found


def logged(out):
    lines = map(json.loads, (out / "r" / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in ("step", "loss", "grad_norm", "lr")} for line in lines if "loss" in line]


def weights(out, kind="raw"):
    return checkpoint.open_checkpoint(out / "r").load_model(kind, torch.device("cpu")).state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Twelve steps on two ranks, uninterrupted."""
    out = tmp_path_factory.mktemp("whole")
    run(out)
    return out


@pytest.mark.slow
def test_ten_kills_leave_no_trace(tmp_path):
    """The same command after every kill: per-step losses of each rank in hex, the log and the weights of the uninterrupted run."""
    whole, killed, seed = tmp_path / "whole", tmp_path / "killed", random.randrange(1000)
    print("seed", seed)
    run(whole, total=40)
    rng = random.Random(seed)
    kills = [("step:3", 1), ("own", 0), ("manifest", 0), ("rename", 0), ("renamed", 0), ("pruned", 0), *[("random", 0)] * 4]
    for fault, victim in kills:
        found = checkpoint.find(killed / "r")
        step = found.state.step if found else 0
        if fault == "random":
            fault, victim = f"step:{step + rng.randrange(5)}", rng.randrange(2)
        run(killed, fault, victim, total=40, expect=1)
        print(f"from step {step}: {fault} of rank {victim} -> {checkpoint.find(killed / 'r')}")  # None: before the first save's end
    run(killed, total=40)
    assert losses(killed) == losses(whole) and len(losses(whole)) == 80
    assert logged(killed) == logged(whole)
    for kind in ("raw", "ema"):
        ours, wanted = weights(killed, kind), weights(whole, kind)
        assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert not list((killed / "r/checkpoints").glob(".tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "victim"), [("own", 1), ("rename", 0)])
def test_a_kill_in_a_save_leaves_the_one_before(whole, tmp_path, fault, victim):
    run(tmp_path, fault, victim, expect=1)
    assert checkpoint.find(tmp_path / "r").path.name == "step_00000002"
    run(tmp_path)
    assert losses(tmp_path) == losses(whole) and logged(tmp_path) == logged(whole)


def test_nan_on_one_rank_is_skipped_on_both(whole, tmp_path):
    problems = run(tmp_path, "nan:4,5", 1)
    assert "step 5: the loss or a gradient is not finite: skipped, 1 in a row" in problems and "2 in a row" in problems
    lines = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped_in_a_row" in line] == [5, 6]
    images = lines[1]["images_of_ranks"]
    assert len(images) == 2 and len(images[0]) == len(images[1]) == 4 and not set(images[0]) & set(images[1])
    assert [line["skipped"] for line in lines if "loss" in line] == [0, 2, 0, 0]
    ours, wanted = losses(tmp_path), losses(whole)
    assert all(ours[rank, step] == wanted[rank, step] for rank in (0, 1) for step in range(4))
    # step 6 begins with the weights of step 4: two updates fewer, so another loss than the whole run's, but a finite one
    assert all(torch.isfinite(p).all() for p in weights(tmp_path).values())
    state = checkpoint.open_checkpoint(tmp_path / "r").state
    assert state.step == 12 and state.optimizer_steps == 10


@pytest.mark.slow
def test_nan_again_and_again_ends_the_run(tmp_path):
    problems = run(tmp_path, "nan:3,4,5,6,7,8", 0, overrides=["train.max_skipped_steps=4"], expect=1)
    assert "5 steps in a row, up to step 8, were not finite: stopped, the last good checkpoint is" in problems
    assert all(torch.isfinite(p).all() for p in weights(tmp_path).values())
    assert checkpoint.open_checkpoint(tmp_path / "r").state.optimizer_steps == 3


def processes_with(text):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if text in (entry / "cmdline").read_text() and int(entry.name) != os.getpid():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_dead_rank_ends_the_job(tmp_path, launcher):
    """Within 60 s, with a non-zero exit code and no process left behind."""
    if launcher == "torchrun":
        process = launch(tmp_path, total=100_000)
    else:
        words = [*TINY, f"train.out={tmp_path}", "train.batch_size=4", "train.total_steps=100000"]
        launcher = Path(sys.executable).with_name("deepspeed")
        options = ["--no_local_rank", "--master_port", free_port(), "--num_gpus", "2"]
        command = [launcher, *options, "--module", "fastdit.cli", "train"]
        process = subprocess.Popen(
            [sys.executable, *map(str, command), *words], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    log = tmp_path / "r" / "metrics.jsonl"
    while not log.exists() or not log.read_text():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)
    ranks = [pid for pid in processes_with(str(tmp_path)) if "RANK=1\0" in Path(f"/proc/{pid}/environ").read_text()]
    os.kill(ranks[-1], signal.SIGKILL)
    start = time.monotonic()
    process.communicate(timeout=60)
    print(f"{launcher}: exit code {process.returncode} after {time.monotonic() - start:.1f} s")
    assert process.returncode != 0 and not processes_with(str(tmp_path))


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job(tmp_path):
    """SIGSTOP in step 3, as a hung GPU would look to the others: after train.timeout_s one says where it waits, and all end."""
    process = launch(tmp_path, "stop:3", 1, total=100, overrides=["train.timeout_s=20"])
    start = time.monotonic()
    _, problems = process.communicate(timeout=180)
    print(f"exit code {process.returncode} after {time.monotonic() - start:.0f} s")
    assert process.returncode != 0 and "Timeout (0:00:20)!" in problems and "in all_reduce" in problems, problems[-3000:]
    assert not processes_with(str(tmp_path)) and checkpoint.find(tmp_path / "r").path.name == "step_00000002"


@pytest.mark.slow
def test_stages_and_ranks_agree(tmp_path):
    """ZeRO 1, 2, 3 on 1 and 2 ranks: the same global batch and micro-batches of 4 images.

    fp32: gradients are sums of the same four-image means, in another order: 1e-5 of the loss after 12 steps of Adam at 1e-3. bf16:
    each gradient is rounded to 2^-9 before the sum, as in test_distributed.py: 1e-2.
    """
    for precision, bound in (("fp32", 1e-5), ("bf16", 1e-2)):
        found = {}
        for stage in (1, 2, 3):
            for ranks in (1, 2):
                out = tmp_path / f"{precision}{stage}{ranks}"
                micro = ["train.batch_size=4", "train.accumulation=2"] if ranks == 1 else []
                run(out, ranks=ranks, overrides=[f"zero.stage={stage}", f"train.precision={precision}", *micro])
                found[stage, ranks] = [line["loss"] for line in logged(out)]
                for kind in ("raw", "ema"):  # one file of whole parameters, whatever the stage and the ranks
                    file = out / f"{kind}.safetensors"
                    checkpoint.export(out / "r", kind, file)
                    exported, wanted = load_file(file), weights(out, kind)
                    assert list(exported) and all(torch.equal(exported[name], wanted[name]) for name in wanted)
        for key, ours in found.items():
            largest = max(abs(a - b) / b for a, b in zip(ours, found[2, 2], strict=True))
            print(precision, key, f"{largest:.1e}")
            assert largest < bound, (precision, key)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [((1, 2), (3, 2)), ((3, 2), (2, 1)), ((2, 1), (1, 2)), ((3, 1), (3, 2))])
def test_another_stage_and_number_of_ranks_go_on(tmp_path, first, then):
    """(stage, ranks): after the hand-over the losses are those of an uninterrupted run within 1e-5."""
    micro = lambda ranks: ["train.batch_size=4", "train.accumulation=2"] if ranks == 1 else []
    fp32 = "train.precision=fp32"
    options = lambda stage, ranks: {"ranks": ranks, "overrides": [f"zero.stage={stage}", fp32, *micro(ranks)]}
    run(tmp_path / "whole", **options(*first))
    run(tmp_path / "a", total=6, **options(*first))
    run(tmp_path / "a", total=12, **options(*then))
    wanted, found = ([line["loss"] for line in logged(tmp_path / name)] for name in ("whole", "a"))
    assert len(found) == 4
    assert max(abs(a - b) / b for a, b in zip(found, wanted, strict=True)) < 1e-5
