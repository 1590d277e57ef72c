"""Training on one rank, in this process: what a run writes, resuming, skipped steps, and every kind of bad input."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import autoencoders
import hot_loop
from commands import TINY, complains, environment, free_port, lines_of, settings, snapshot, trained_run
from fastdit import checkpoint, cli, flow
from fastdit.config import parse
from fastdit.data.order import Order
from fastdit.distributed import World
from fastdit.flops import walk
from fastdit.model import DiT
from fastdit.training import loop, telemetry
from fastdit.training.loop import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps, with wandb offline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        return trained_run(tmp_path_factory.mktemp("runs"), "train.wandb=offline")


@pytest.fixture(scope="module")
def tiny_autoencoder(tmp_path_factory):
    return autoencoders.tiny(tmp_path_factory.mktemp("vae"))


def test_a_run_leaves_what_it_should(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    phases = {f"{phase}_s" for phase in telemetry.PHASES}
    values = {"loss", "loss_by_t", "lr", "grad_norm", "skipped", "peak_memory_gb", "images_per_s", "tflops", "time"}
    assert set(lines[0]) == {"step", "epoch"} | values | phases
    assert (
        all(0 <= lines[0][phase] < 60 for phase in phases)
        and lines[0]["forward_backward_s"] > 0
        and 0.1 < lines[0]["peak_memory_gb"] < 100
    )
    assert lines[0]["lr"] == 1e-3 and 0.5 < lines[0]["loss"] < 5 and lines[0]["grad_norm"] > 0
    assert [p.name for p in (trained / "checkpoints").glob("step_*")] == ["step_00000004"]
    assert not list(trained.rglob(".tmp*"))
    assert Image.open(trained / "curves.png").size == (1080, 480)
    assert Image.open(trained / "samples/step_00000004.png").size == (8 * 34 + 2, 10 * 34 + 2)
    assert json.loads((trained / "config.json").read_text())["model"]["width"] == 64
    assert list((trained / "wandb").glob("offline-run-*/*.wandb"))
    state = json.loads((trained / "checkpoints/step_00000004/state.json").read_text())
    assert state["wandb_id"] and state["versions"]["torch"] == torch.__version__


def test_a_finished_run_has_nothing_to_do(trained, capsys):
    before = snapshot(trained)
    assert cli.main(["train", *settings(trained.parent, "train.total_steps=4")]) == 0
    assert "already trained to step 4" in capsys.readouterr().out
    assert snapshot(trained) == before


def test_training_on_latents(tiny_autoencoder, tmp_path):
    latents = [f"data.autoencoder={tiny_autoencoder}", "model.in_channels=4", "model.input_size=16", "train.total_steps=2"]
    run = train(parse(None, settings(tmp_path, *latents)))
    assert Image.open(run / "samples/step_00000002.png").mode == "RGB"
    assert cli.main(["sample", "--checkpoint", str(run), "--class", "1", "--out", str(tmp_path / "g.png")]) == 0


def test_the_averaged_model_has_the_runs_precision_on_a_gpu(monkeypatch):
    """On a CPU it is fp32. The meta device stands in for the GPU."""
    config = parse(None, TINY)
    weights = {name: p.detach() for name, p in DiT(config.model).named_parameters()}
    for name, dtype in (("cpu", torch.float32), ("meta", torch.bfloat16)):
        device = torch.device(name)
        monkeypatch.setattr(loop, "gather", lambda *_, device=device: {k: p.to(device) for k, p in weights.items()})
        trainer = SimpleNamespace(config=config, world=World(0, 1, device, None), ema=None, shapes=None)
        trainer.engine = SimpleNamespace(module=DiT(config.model))
        trainer._finish_step = lambda: None
        model = loop.Trainer._averaged_model(trainer)
        assert {(p.dtype, p.device.type) for p in model.parameters()} == {(dtype, name)}
        assert model.time_embedding.frequencies.dtype == torch.float32


@pytest.mark.parametrize(("device", "expected"), [("cpu", []), ("cuda", [torch.bfloat16])])
def test_the_encoder_is_set_up_for_training_on_a_gpu(monkeypatch, device, expected):
    dtypes = []
    codec = SimpleNamespace(for_encoding=lambda dtype: dtypes.append(dtype))
    monkeypatch.setattr(loop.data, "load", lambda *_: SimpleNamespace(channels=3, manifest=None))
    monkeypatch.setattr(loop.autoencoder, "load", lambda *_: codec)
    loop.open_data(parse(None, TINY), World(0, 1, torch.device(device), None))
    assert dtypes == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.preset=XXL/2"], ["XXL/2"]),
        (["data.source=imagenet.tar"], ["imagenet.tar", "mnist5k"]),
        (["train.resume=nowhere"], ["train.resume=nowhere"]),
        (["model.num_classes=3"], ["model.num_classes=3"]),
        (["data.autoencoder=./nowhere"], ["./nowhere", "AutoencoderKL"]),
        (["model.in_channels=4"], ["model.in_channels=1"]),
        (["train.batch_size=9999"], ["9999"]),
    ],
)
def test_bad_training_input_leaves_nothing_behind(tmp_path, capsys, overrides, expected):
    complains(capsys, ["train", *settings(tmp_path / "out", *overrides)], *expected)
    assert not (tmp_path / "out").exists()


def test_run_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    complains(capsys, ["train", *settings(tmp_path / "file" / "out")], "cannot be made", "train.out")
    complains(capsys, ["train", *settings("/proc/nowhere")], "/proc/nowhere", "train.out")


def test_loss_of_a_run_that_is_resumed_past_its_end(tmp_path):
    """The line after a short last interval is the mean of the steps since that line."""
    single = train(
        parse(None, settings(tmp_path, "train.total_steps=8", "train.log_steps=1", "train.name=single", "train.schedule=constant"))
    )
    for total in (5, 8):
        run = train(parse(None, settings(tmp_path, f"train.total_steps={total}", "train.log_steps=4", "train.schedule=constant")))
    single, grouped = lines_of(single), lines_of(run)
    assert list(grouped) == [4, 5, 8]
    assert grouped[8]["loss"] == pytest.approx(sum(single[s]["loss"] for s in (6, 7, 8)) / 3, rel=1e-6)


def test_a_run_with_the_switches_of_sit_is_the_same_in_parts_and_recomputed(tmp_path):
    words = ["mlp=gelu", "linear_bias=true", "positions=sincos", "qk_norm=none", "norm_eps=1e-6", "time_frequency=1"]
    words = [*(f"model.{word}" for word in words), "train.schedule=constant", "train.sample_steps=0"]
    runs = {"whole": [4], "parts": [2, 4], "light": [4]}
    for name, totals in runs.items():
        for total in totals:
            more = [f"train.total_steps={total}", f"train.name={name}", f"train.recompute={'light' if name == 'light' else 'none'}"]
            train(parse(None, settings(tmp_path, *words, *more)))
    whole, parts, light = (load_file(tmp_path / name / "checkpoints/step_00000004/weights_rank_0000.safetensors") for name in runs)
    assert "raw/blocks.0.attention.qkv.bias@0" in whole and not any("positions" in key for key in whole)
    assert whole["raw/blocks.0.attention.out.bias@0"].abs().max() > 0  # trained: biases start at zero
    for other in (parts, light):
        assert whole.keys() == other.keys() and all(torch.equal(t, other[key]) for key, t in whole.items())


def test_a_sparse_run_is_the_same_in_parts_recorded_and_recomputed(tmp_path):
    """Five steps of which the last two are dense, resumed before, at and after the first of these."""
    sparse = ["depth=3", "positions=rope_2d", "dense_blocks=[1,1]", "keep_tokens=0.25", "path_drop=0.3"]
    words = [*(f"model.{word}" for word in sparse), "train.dense_steps=2", "train.total_steps=5", "train.sample_steps=0"]
    words += ["train.log_steps=1", "train.save_steps=1", "train.keep_checkpoints=5"]
    runs = {"whole": [], "graphs": ["train.compile=graphs"], "full": ["train.recompute=full"], "2": [], "3": [], "4": []}
    model, found = parse(None, settings(tmp_path, *words)).model, {}
    counts = [sum(walk(each, 1, torch.float32, "none")[:2]) for each in (model, replace(model, keep_tokens=1.0))]
    for name, more in runs.items():
        if name.isdecimal():  # as if the run had been killed after that step
            shutil.copytree(tmp_path / "whole", tmp_path / name)
            for step in range(int(name) + 1, 6):
                shutil.rmtree(tmp_path / name / f"checkpoints/step_{step:08d}")
        run = train(parse(None, settings(tmp_path, *words, f"train.name={name}", *more)))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        weights = load_file(run / "checkpoints/step_00000005/weights_rank_0000.safetensors")
        found[name] = [(line["step"], line["loss"]) for line in lines], weights
        per_image = [line["tflops"] * 1e12 / line["images_per_s"] for line in lines]
        assert per_image[:3] == pytest.approx([counts[0]] * 3, rel=1e-2) and per_image[3:] == pytest.approx(
            [counts[1]] * 2, rel=1e-2
        )
    losses, weights = found["whole"]
    assert len(losses) == 5 and "raw/fusion.sparse.weight@0" in weights
    for name, (others, same) in found.items():
        assert others == losses and all(torch.equal(t, same[key]) for key, t in weights.items()), name


def test_a_run_from_another_runs_checkpoint(trained, tmp_path, capsys):
    """It starts from there with a wandb id of its own, and then resumes from its own checkpoints."""
    resume = f"train.resume={trained}"
    assert cli.main(["train", *settings(tmp_path, resume, "train.total_steps=4")]) == 0
    assert "already trained to step 4" in capsys.readouterr().out and not (tmp_path / "r").exists()
    for total in (6, 8):
        run = train(parse(None, settings(tmp_path, resume, f"train.total_steps={total}", "train.sample_steps=0")))
    assert list(lines_of(run)) == [6, 8]
    assert checkpoint.open_checkpoint(run).state.wandb_id is None


def test_two_processes_cannot_train_in_one_folder(tmp_path, capsys):
    (tmp_path / "r").mkdir()
    with (tmp_path / "r/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        complains(capsys, ["train", *settings(tmp_path, "train.total_steps=2")], "another process trains in")
    train(parse(None, settings(tmp_path, "train.total_steps=2", "train.sample_steps=0")))


def test_a_backend_that_cannot_run_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastdit.kernels.dispatch.EXTENSION", None)  # as if there had been no compiler
    for name in ("cpp", "cuda"):
        monkeypatch.setattr("fastdit.kernels.dispatch._setting", name)
        monkeypatch.setenv("FASTDIT_KERNELS", name)
        complains(capsys, ["train", *settings(tmp_path / "out")], f"FASTDIT_KERNELS={name}")
        complains(capsys, ["info"], f"FASTDIT_KERNELS={name}")
    assert not (tmp_path / "out").exists()


def test_the_loop_reads_nothing_on_the_host(tmp_path):
    """Three more steps without a log line or a checkpoint add no host reads."""
    syncs = []
    for total in (2, 5):
        quiet = ["train.log_steps=99", "train.save_steps=99", "train.sample_steps=0", f"train.name=n{total}"]
        with hot_loop.HotLoopGuard() as guard:
            train(parse(None, settings(tmp_path, f"train.total_steps={total}", *quiet)))
        syncs.append(guard.syncs)
    assert syncs[1] == syncs[0]


def test_a_profile_and_the_same_losses_compiled_as_one_graph(tmp_path, monkeypatch):
    """train.profile traces the named steps. train.compile=model, here without code generation, has the losses of the eager run."""
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="aot_eager", **options))
    losses = {}
    for name, words in {"eager": [], "model": ["train.compile=model", "train.profile=2-3"]}.items():
        quiet = ["train.save_steps=99", "train.sample_steps=0", f"train.name={name}", "train.precision=fp32"]
        run = train(parse(None, settings(tmp_path, "train.total_steps=4", *quiet, *words)))
        losses[name] = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses["model"] == pytest.approx(losses["eager"], rel=1e-6)
    events = json.loads((tmp_path / "model/profile/steps_2-3.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#1", "ProfilerStep#2"}  # it counts from 0
    assert not (tmp_path / "eager/profile").exists()


def test_checkpoints_are_not_replaced_by_weights_that_diverged(tmp_path):
    diverging = ["train.clip=0", "train.precision=fp32", "train.log_steps=8", "train.save_steps=1", "train.sample_steps=0"]
    with pytest.raises(FloatingPointError, match="not finite"):
        train(parse(None, settings(tmp_path, "train.total_steps=8", "train.lr=1e30", *diverging)))
    # weights of 1e30 after the first step are finite and saved; later ones are not
    opened = checkpoint.open_checkpoint(tmp_path / "r")
    model, state = opened.load_model("raw", torch.device("cpu")), opened.state
    assert state.step < 8 and all(torch.isfinite(p).all() for p in model.parameters())


def test_steps_that_are_not_finite_are_skipped_and_then_stop_the_run(tmp_path):
    wild = ["train.lr=1e30", "train.clip=0", "train.precision=fp32", "train.max_skipped_steps=2", "train.log_steps=2"]
    with pytest.raises(FloatingPointError, match=r"3 steps in a row, up to step 4, were not finite: stopped, there is no"):
        train(parse(None, settings(tmp_path, "train.total_steps=9", "train.save_steps=9", *wild)))
    lines = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_in_a_row"] for line in lines if "skipped_in_a_row" in line] == [1, 2, 3]
    assert [line["step"] for line in lines] == [2, 2, 3, 4] and len(lines[0]["images_of_ranks"][0]) == 4


@pytest.mark.parametrize(("precision", "compiled"), [("bf16", "none"), ("fp32", "none"), ("bf16", "graphs")])
def test_one_step_with_nan_is_skipped(tmp_path, monkeypatch, precision, compiled):
    losses = flow.losses

    def faulty(model, x0, labels, ids, config, **named):
        result = losses(model, x0, labels, ids, config, **named)
        return result._replace(total=result.total * torch.nan) if int(ids[0] >> 32) == 2 else result

    monkeypatch.setattr(flow, "losses", faulty)
    # by step, the images that are logged; the loader does not ask for them: it slices a permutation on the device
    named, images = {}, Order.images
    monkeypatch.setattr(Order, "images", lambda self, step, micro: named.setdefault(step, images(self, step, micro)))
    words = ["train.total_steps=6", "train.sample_steps=0", f"train.precision={precision}", f"train.compile={compiled}"]
    run = train(parse(None, settings(tmp_path, *words)))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines if "loss" in line] == [0, 1, 0] and all(line.get("loss", 1) < 5 for line in lines)
    (skipped,) = (line for line in lines if "skipped_in_a_row" in line)
    assert skipped["step"] == 3 and list(named) == [2] and skipped["images_of_ranks"] == [named[2][0].tolist()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6]  # the skip is known late, but written before the next log line
    opened = checkpoint.open_checkpoint(run)
    model, state = opened.load_model("raw", torch.device("cpu")), opened.state
    assert state.optimizer_steps == 5 and all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 75, "told to stop"),
        pytest.param(signal.SIGINT, 130, "interrupted: saved step", marks=pytest.mark.slow),
    ],
)
def test_sigterm_and_ctrl_c_save_and_end_the_run(tmp_path, number, code, said):
    """The same command then resumes to the same losses."""
    words = ["train.total_steps=100", "train.log_steps=3", "train.save_steps=1000", "train.sample_steps=0"]
    uninterrupted = train(parse(None, settings(tmp_path, *words, "train.name=uninterrupted")))
    command = [sys.executable, "-W", "ignore", "-m", "fastdit.cli", "train", *settings(tmp_path, *words)]
    threads = str(torch.get_num_threads())
    process = subprocess.Popen(
        command, env=environment(OMP_NUM_THREADS=threads), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "r/metrics.jsonl"
    while not log.exists() or not log.read_text():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and said in errors.splitlines()[-1] and "Traceback" not in errors, errors[-3000:]
    step = int(checkpoint.find(tmp_path / "r").path.name[-8:])
    assert 0 < step < 100 and step % 3 == 0
    run = train(parse(None, settings(tmp_path, *words)))
    resumed, wanted = ([(step, line["loss"]) for step, line in lines_of(folder).items()] for folder in (run, uninterrupted))
    assert resumed == wanted


def started(tmp_path, launcher, *words):
    """Start a run of many steps in a session of its own. Returns its process."""
    few = ["train.total_steps=100000", "train.save_steps=100000", "train.sample_steps=0", *words]
    command = [sys.executable, "-W", "ignore", "-m", *launcher, "train", *settings(tmp_path, *few)]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_until(process, condition):
    while not condition():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.05)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """Without waiting for a log line. Two within a second are one, which a launcher passed on."""
    process = started(tmp_path, ["fastdit.cli"], "train.log_steps=100000")
    caught = lambda: int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1], 16)
    wait_until(process, lambda: caught() >> (signal.SIGTERM - 1) & 1)  # the loop's handler is there, for Ctrl-C too
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    time.sleep(3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    last = errors.splitlines()[-1]
    assert process.returncode == 130 and last.startswith("fastdit: interrupted; the same command continues"), errors
    assert "Traceback" not in errors and not list((tmp_path / "r/checkpoints").iterdir())


@pytest.mark.slow
def test_ctrl_c_under_a_launcher_saves_once_and_is_one_line(tmp_path):
    """The terminal sends it to all processes, and torchrun to its ranks again. The launcher's own traceback is not ours."""
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), "-m", "fastdit.cli"]
    process = started(tmp_path, launcher, "train.log_steps=2")
    log = tmp_path / "r/metrics.jsonl"
    wait_until(process, lambda: log.exists() and log.read_text())
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert [line for line in errors.splitlines() if line.startswith("fastdit: ")] == [
        f"fastdit: interrupted: saved step {checkpoint.find(tmp_path / 'r').state.step}, the same command continues"
    ]
    assert "fastdit/training" not in errors


@pytest.mark.parametrize(
    ("words", "ranks", "native", "expected"),
    [
        (["train.compile=model", "train.precision=fp32"], 2, False, ["no communication is hidden"]),
        (["train.compile=model", "train.precision=bf16"], 1, False, ["bf16 matmuls are emulated"]),
        (["train.compile=blocks", "train.precision=bf16"], 2, True, []),
    ],
)
def test_a_run_says_what_makes_it_slow(monkeypatch, words, ranks, native, expected):
    monkeypatch.setattr(loop, "native_bf16", lambda device: native)
    notes = loop._notes(parse(None, words), World(0, ranks, torch.device("cpu"), None))
    assert len(notes) == len(expected) and all(text in note for text, note in zip(expected, notes, strict=True))
