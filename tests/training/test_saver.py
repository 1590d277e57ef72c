"""Checkpoints of a run: when they are written, which are kept, failures to write, and what a resumed run may change."""

import errno
import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch

from commands import complains, environment, lines_of, settings, snapshot, trained_run
from fastdit import checkpoint, cli, flow
from fastdit.config import parse
from fastdit.training import saver
from fastdit.training.loop import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps."""
    return trained_run(tmp_path_factory.mktemp("runs"))


def test_checkpoint_of_another_architecture(trained, tmp_path, capsys):
    before = snapshot(trained)
    complains(capsys, ["train", *settings(trained.parent, "train.total_steps=9", "model.depth=3")], "depth=2", "model.depth=3")
    resume = f"train.resume={trained}"
    complains(
        capsys,
        ["train", *settings(tmp_path / "out", resume, "model.width=32", "train.total_steps=9")],
        "width=64",
        "model.width=32",
    )
    complains(capsys, ["train", *settings(trained.parent, "train.resume=never")], "overwrite")
    assert snapshot(trained) == before and not (tmp_path / "out").exists()


def test_settings_that_change_when_a_run_is_resumed(tmp_path, capsys):
    """A new learning rate takes effect. Settings that would make it another run are refused before anything is written."""
    common = ["train.schedule=constant", "train.log_steps=1"]
    run = train(parse(None, settings(tmp_path, "train.total_steps=2", *common)))
    train(parse(None, settings(tmp_path, "train.total_steps=4", "train.lr=5e-2", *common)))
    assert [line["lr"] for line in lines_of(run).values()] == [1e-3, 1e-3, 5e-2, 5e-2]
    before = snapshot(run)
    for override in (
        "train.precision=fp32",
        "train.batch_size=8",
        "train.seed=3",
        "data.flip=true",
        "train.accumulation=2",
    ):
        complains(capsys, ["train", *settings(tmp_path, "train.total_steps=6", override, *common)], override.split("=")[0])
    assert snapshot(run) == before


def test_a_decay_is_a_phase_of_its_own(tmp_path):
    """From any checkpoint of a constant run, which stays; the phase is resumed like any run."""
    words = ["train.schedule=constant", "train.log_steps=1", "train.sample_steps=0", "train.keep_checkpoints=9"]
    run = train(parse(None, settings(tmp_path, *words, "train.total_steps=6")))
    start = f"train.resume={run}/checkpoints/step_00000004"
    phase = ["train.name=phase", start, "train.decay_steps=4"]
    decayed = train(parse(None, settings(tmp_path, *words, *phase, "train.total_steps=8")))
    rates = {step: line["lr"] for step, line in lines_of(decayed).items()}
    assert rates == pytest.approx({5: 1e-3, 6: 5e-4, 7: 1e-3 * (1 - 0.5**0.5), 8: 1e-3 * (1 - 0.75**0.5)})
    shutil.rmtree(decayed / "checkpoints/step_00000008")
    train(parse(None, settings(tmp_path, *words, *phase, "train.total_steps=8")))
    assert {step: line["lr"] for step, line in lines_of(decayed).items()} == rates
    assert [line["lr"] for line in lines_of(run).values()] == [1e-3] * 6


def test_another_batch_is_taken_if_the_run_says_so(tmp_path, capsys):
    """4 images per step, then 6, then 5; with a log line and a checkpoint between the changes, and killed between two of them."""
    words = [
        "train.log_steps=4",
        "train.save_steps=1",
        "train.sample_steps=0",
        "train.keep_checkpoints=99",
        "train.schedule=constant",
    ]
    stages = [(3, 4), (5, 6), (9, 5)]
    allow = "train.allow_batch_change=true"
    stage = lambda name, total, batch, *more: train(
        parse(
            None, settings(tmp_path, *words, f"train.name={name}", f"train.total_steps={total}", f"train.batch_size={batch}", *more)
        )
    )
    for total, batch in stages:
        run = stage("uninterrupted", total, batch, allow)
    before = snapshot(run)
    complains(
        capsys,
        ["train", *settings(tmp_path, *words, "train.name=uninterrupted", "train.total_steps=10", "train.batch_size=4")],
        "trained with 5 images per step, but this run has 4",
        "their product is 5",
        allow,
    )
    assert snapshot(run) == before
    for total, batch in [(2, 4), (3, 4), (4, 6), (5, 6), (6, 5), (7, 5), (9, 5)]:
        resumed = stage("resumed", total, batch, allow)
    for folder in (resumed / "checkpoints/step_00000008", resumed / "checkpoints/step_00000009"):  # once: as if killed there
        weights = (folder / "weights_rank_0000.safetensors").read_bytes()
        assert weights == (run / "checkpoints" / folder.name / "weights_rank_0000.safetensors").read_bytes()
    state = checkpoint.open_checkpoint(resumed).state
    assert state == checkpoint.open_checkpoint(run).state and state.global_batch == 5
    assert list(state.batch_since) == [5, 0, 24, 24] and state.images_seen == 3 * 4 + 2 * 6 + 4 * 5
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if "images_per_step" in line] == [
        {"step": 4, "images_per_step": [4, 6], "images_seen": 12},
        {"step": 6, "images_per_step": [6, 5], "images_seen": 24},
    ]
    assert "from step 6 on: 5 images per step, 6 before" in capsys.readouterr().err
    shutil.rmtree(resumed / "checkpoints/step_00000009")
    stage("resumed", 9, 5)  # the flag is not needed any more
    assert lines_of(resumed)[9]["loss"] == lines_of(run)[9]["loss"]


def test_a_log_line_over_two_batches_is_the_mean_over_images(tmp_path):
    words = ["train.save_steps=2", "train.sample_steps=0", "train.schedule=constant", "train.allow_batch_change=true"]
    losses = {}
    for log_steps in (1, 4):
        for total, batch in ((3, 4), (4, 6)):
            batch_words = [f"train.name=r{log_steps}", f"train.total_steps={total}", f"train.batch_size={batch}"]
            run = train(parse(None, settings(tmp_path, *words, f"train.log_steps={log_steps}", *batch_words)))
            if total == 3:  # killed after the checkpoint of step 2, which is no log line of the second run
                shutil.rmtree(run / "checkpoints/step_00000003")
        losses[log_steps] = {step: line.get("loss") for step, line in lines_of(run).items()}
    one = losses[1]
    assert losses[4][4] == pytest.approx((4 * one[1] + 4 * one[2] + 6 * one[3] + 6 * one[4]) / 20, rel=1e-6)


def test_pruning_keeps_complete_checkpoints_and_the_newest(tmp_path):
    few = ["train.sample_steps=0", "train.keep_checkpoints=1"]
    run = train(parse(None, settings(tmp_path, "train.total_steps=8", "train.sample_steps=0", "train.keep_checkpoints=9")))
    folders = lambda: sorted(p.name[-1] for p in (run / "checkpoints").glob("step_*"))
    assert folders() == ["2", "4", "6", "8"]
    (run / "checkpoints/step_00000008/weights_rank_0000.safetensors").write_bytes(b"cut")
    train(parse(None, settings(tmp_path, "train.total_steps=7", *few)))
    assert checkpoint.find(run).path.name == "step_00000007"
    assert "7" in folders() and not {"2", "4", "6"} & set(folders())


def test_every_kth_checkpoint_is_kept(tmp_path):
    few = ["train.total_steps=7", "train.save_steps=1", "train.keep_checkpoints=1", "train.keep_every=3", "train.sample_steps=0"]
    steps_of = lambda run: sorted(int(p.name[-1]) for p in (run / "checkpoints").glob("step_*"))
    assert steps_of(train(parse(None, settings(tmp_path, *few)))) == [3, 6, 7]
    four = ["train.keep_checkpoints=4", "train.keep_every=0", "train.name=four"]
    for steps, wanted in ((3, [1, 2, 3]), (7, [4, 5, 6, 7])):
        assert steps_of(train(parse(None, settings(tmp_path, *few, *four, f"train.total_steps={steps}")))) == wanted


def test_a_run_that_is_continued_takes_the_same_steps(tmp_path, monkeypatch):
    """On one rank, during the warm-up and after a skipped step: losses, norms, learning rates and weights."""
    losses = flow.losses

    def faulty(model, x0, labels, ids, config, **named):
        result = losses(model, x0, labels, ids, config, **named)
        return result._replace(total=result.total * torch.nan) if int(ids[0] >> 32) == 1 else result

    monkeypatch.setattr(flow, "losses", faulty)
    words = ["train.warmup_steps=9", "train.schedule=constant", "train.log_steps=1", "train.sample_steps=0", "train.ema_every=2"]
    results = []
    for name, totals in (("uninterrupted", [6]), ("resumed", [3, 6])):
        for total in totals:
            run = train(parse(None, settings(tmp_path, f"train.name={name}", f"train.total_steps={total}", *words)))
        lines = [line for line in lines_of(run).values() if "lr" in line]
        weights = (run / "checkpoints/step_00000006/weights_rank_0000.safetensors").read_bytes()
        results.append(([(line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in lines], weights))
    assert results[0] == results[1]
    rates = [round(rate * 9e3) for _, _, rate, _ in results[0][0]]
    assert rates == [1, 2, 2, 3, 4, 5]


def test_a_full_disk_keeps_the_checkpoints_before(tmp_path, capsys, monkeypatch):
    """If a save fails, the run prints it and continues; if the last one fails, it ends with exit code 2. The one before stays."""
    save, fails = checkpoint.save_file, []

    def full(shards, path):
        if "step_00000004" in str(path) or fails:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(shards, path)

    monkeypatch.setattr(saver, "save_file", full)
    words = settings(tmp_path, "train.total_steps=6", "train.sample_steps=0", "train.keep_checkpoints=9")
    assert cli.main(["train", *words]) == 0
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "r/checkpoints").iterdir()) == ["step_00000002", "step_00000006"]
    fails.append(1)
    before = snapshot(tmp_path / "r/checkpoints")
    complains(
        capsys,
        ["train", *settings(tmp_path, "train.total_steps=8", "train.sample_steps=0")],
        "No space left on device",
        "free some",
    )
    assert snapshot(tmp_path / "r/checkpoints") == before and checkpoint.find(tmp_path / "r").path.name == "step_00000006"


@pytest.mark.slow
def test_a_file_size_limit_keeps_the_checkpoints_before(tmp_path):
    words = [*settings(tmp_path, "train.sample_steps=0", "train.total_steps=2")]
    command = [sys.executable, "-W", "ignore", "-m", "fastdit.cli", "train", *words]
    assert subprocess.run(command, env=environment(), capture_output=True, check=False).returncode == 0
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # the weights are 2.7 MB
    done = subprocess.run(
        [*command, "train.total_steps=4"], env=environment(), preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "cannot be written" in done.stderr, done.stderr[-3000:]
    assert checkpoint.find(tmp_path / "r").path.name == "step_00000002"


@pytest.mark.parametrize(
    ("keep", "keep_every", "damaged", "expected"),
    [
        (1, 0, None, [7]),
        (2, 0, None, [7, 8]),
        (9, 0, None, [1, 2, 3, 4, 5, 6, 7, 8]),
        (1, 2, None, [2, 4, 6, 7, 8]),
        (2, 4, None, [4, 6, 7, 8]),
        (1, 0, 3, [3, 7]),
    ],
)
def test_prune_counts_from_the_checkpoint_that_was_written(tmp_path, keep, keep_every, damaged, expected):
    """Step 7 is written beside a step 8, whose contents were damaged when the run was resumed: 7 always stays."""
    for step in range(1, 9):
        folder = tmp_path / checkpoint.folder_name(step)
        folder.mkdir()
        (folder / "file").write_text("cut" if step == damaged else "complete")
        (folder / checkpoint.MANIFEST).write_text(json.dumps({"files": {"file": {"bytes": 8, "sha256": ""}}}))
    saver.prune(tmp_path / checkpoint.folder_name(7), keep, keep_every)
    assert sorted(int(path.name[-1]) for path in tmp_path.iterdir()) == expected
