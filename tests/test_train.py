"""Training on one rank, in this process: logs, checkpoints, pictures, latents of an autoencoder, and every kind of bad input."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import autoencoders
import hot_loop
from commands import complains, environment
from fastdit import checkpoint, cli, flow
from fastdit.config import FlowConfig, InputError, parse
from fastdit.data.order import Order
from fastdit.distributed import World
from fastdit.model import DiT
from fastdit.training import loop, saver, telemetry
from fastdit.training.loop import train

TINY = [
    "model.preset=test/4", "train.precision=bf16", "train.batch_size=4", "train.warmup_steps=1", "train.lr=1e-3",
    "train.log_steps=2", "train.save_steps=2", "train.sample_steps=4", "train.schedule=cosine",
    "sample.steps=2", "sample.solver=euler",
]  # fmt: skip


def settings(out, *overrides):
    return [*TINY, f"train.out={out}", "train.name=r", *overrides]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps, with wandb offline."""
    out = tmp_path_factory.mktemp("runs")
    os.environ["WANDB_SILENT"] = "true"
    train(parse(None, settings(out, "train.total_steps=4", "train.keep_checkpoints=1", "train.wandb=offline")))
    return out / "r"


def snapshot(folder):
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_run_leaves_what_it_should(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    phases = {f"{phase}_s" for phase in telemetry.PHASES}
    told = {"loss", "loss_by_t", "lr", "grad_norm", "skipped", "peak_memory_gb", "images_per_s", "tflops", "time"}
    assert set(lines[0]) == {"step", "epoch"} | told | phases
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


def test_log_lines_after_the_checkpoint_are_cut(trained, tmp_path):
    config = parse(None, settings(tmp_path, "train.total_steps=3"))
    train(config)
    log = tmp_path / "r/metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 4, "loss": 9}) + "\n" + '{"step": 5, "lo')
    train(parse(None, settings(tmp_path, "train.total_steps=4")))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4] and lines[-1]["loss"] != 9


def test_export_samples_the_same_pictures(trained, tmp_path, capsys):
    words = ["--class", "3,7", "--per-class", "2"]
    file = tmp_path / "model.safetensors"
    for weights in ("raw", "ema"):
        assert cli.main(["export", str(trained), "--out", str(file), "--weights", weights]) == 0
        for source, picture in ((trained, "a.png"), (file, "b.png")):
            out = ["--out", str(tmp_path / picture), "--weights", weights]
            assert cli.main(["sample", "--checkpoint", str(source), *words, *out]) == 0
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "model.json", "model.safetensors"]
    complains(capsys, ["sample", "--checkpoint", str(file), "--weights", "raw"], "holds the ema weights")
    complains(capsys, ["export", str(trained), "--out", str(tmp_path / "model.pt")], "must end in .safetensors")
    complains(capsys, ["export", str(tmp_path), "--out", str(file)], "no whole checkpoint")
    (tmp_path / "model.json").unlink()
    complains(capsys, ["sample", "--checkpoint", str(file)], "not what `fastdit export` writes")


def test_samples_from_the_command_line(trained, tmp_path):
    words = ["sample", "--checkpoint", str(trained), "--class", "3,7", "--per-class", "12", "--out", str(tmp_path / "g.png")]
    assert cli.main([*words, "--npz", str(tmp_path / "s.npz")]) == 0
    assert Image.open(tmp_path / "g.png").size == (10 * 34 + 2, 2 * 34 + 2)
    arrays = np.load(tmp_path / "s.npz")
    assert arrays["arr_0"].shape == (24, 32, 32, 1) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [3] * 12 + [7] * 12
    first = arrays["arr_0"]
    assert cli.main([*words, "--npz", str(tmp_path / "t.npz"), "--weights", "raw"]) == 0
    assert (np.load(tmp_path / "t.npz")["arr_0"] != first).any()
    assert cli.main([*words, "--npz", str(tmp_path / "u.npz")]) == 0
    assert np.array_equal(np.load(tmp_path / "u.npz")["arr_0"], first)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.png", "s.npz", "t.npz", "u.npz"]


@pytest.fixture(scope="module")
def tiny_autoencoder(tmp_path_factory):
    return autoencoders.tiny(tmp_path_factory.mktemp("vae"))


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
        trainer.engine, trainer._settle = SimpleNamespace(module=DiT(config.model)), lambda: None
        model = loop.Trainer._averaged_model(trainer)
        assert {(p.dtype, p.device.type) for p in model.parameters()} == {(dtype, name)}
        assert model.time_embedding.frequencies.dtype == torch.float32


@pytest.mark.parametrize(("device", "expected"), [("cpu", []), ("cuda", [torch.bfloat16])])
def test_the_encoder_is_set_up_for_training_on_a_gpu(monkeypatch, device, expected):
    found = []
    codec = SimpleNamespace(for_encoding=lambda dtype: found.append(dtype))
    monkeypatch.setattr(loop.data, "load", lambda *_: SimpleNamespace(channels=3, manifest=None))
    monkeypatch.setattr(loop.autoencoder, "load", lambda *_: codec)
    loop.open_data(parse(None, TINY), World(0, 1, torch.device(device), None))
    assert found == expected


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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--class", "10"], ["--class 10", "0 to 9"]),
        (["--class=-2"], ["--class -2"]),
        (["--class", "cat"], ["'cat'"]),
        (["--per-class", "0"], ["--per-class 0"]),
        (["--seed", "-2"], ["--seed -2"]),
        (["--at-once", "0"], ["--at-once 0"]),
        (["--solver", "eular"], ["'euler'"]),
        (["--guidance-low", "0.5", "--guidance-high", "0.2"], ["guidance_low=0.5", "low <= high"]),
        (["--time-shift", "0"], ["sample.time_shift=0"]),
        (["--gif", "a.mp4"], ["a.mp4", ".gif or .webp"]),
        (["--gif", "a.gif", "--gif-of", "1,10"], ["--gif-of '10'", "0 to 9"]),
        (["--gif", "a.gif", "--gif-fps", "0"], ["--gif-fps 0"]),
        (["--device", "cuda"] if not torch.cuda.is_available() else ["--seed", "-3"], ["--"]),
        (["--folder", "/proc/nowhere"], ["/proc/nowhere", "cannot be made"]),
        (["--steps", "0"], ["sample.steps=0"]),
        (["--guidance", "nan"], ["sample.guidance=nan"]),
        (["--checkpoint", "nowhere"], ["nowhere"]),
        (["--out", "/proc/nowhere/g.png"], ["/proc/nowhere/g.png", "cannot be written"]),
        (["--out", "."], ["is a folder"]),
    ],
)
def test_bad_sampling_input_leaves_nothing_behind(trained, tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    complains(capsys, ["sample", "--checkpoint", str(trained), *words], *expected)
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_are_not_whole_do_not_count(trained, tmp_path):
    folder = tmp_path / "r/checkpoints/step_00000004"
    folder.parent.mkdir(parents=True)
    os.system(f"cp -r {trained}/checkpoints/step_00000004 {folder}")
    assert checkpoint.find(tmp_path / "r").path == checkpoint.find(folder).path == folder
    weights = folder / "weights_rank_0000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert checkpoint.find(tmp_path / "r") is None and checkpoint.find(folder) is None
    with pytest.raises(InputError, match="no whole checkpoint"):
        checkpoint.open_checkpoint(tmp_path / "r")


def lines_of(run):
    return {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def test_loss_of_a_run_that_goes_on_past_its_end(tmp_path):
    """The line after a short last interval is the mean of its own steps."""
    single = train(
        parse(None, settings(tmp_path, "train.total_steps=8", "train.log_steps=1", "train.name=single", "train.schedule=constant"))
    )
    for total in (5, 8):
        run = train(parse(None, settings(tmp_path, f"train.total_steps={total}", "train.log_steps=4", "train.schedule=constant")))
    single, grouped = lines_of(single), lines_of(run)
    assert list(grouped) == [4, 5, 8]
    assert grouped[8]["loss"] == pytest.approx(sum(single[s]["loss"] for s in (6, 7, 8)) / 3, rel=1e-6)


def test_settings_that_change_on_the_way(tmp_path, capsys):
    """Learning rate and its like take effect; what would make it another run is refused, and nothing is touched."""
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


def test_a_run_from_another_runs_checkpoint(trained, tmp_path, capsys):
    """It starts there, keeps its own wandb id, and then continues from its own checkpoints."""
    resume = f"train.resume={trained}"
    assert cli.main(["train", *settings(tmp_path, resume, "train.total_steps=4")]) == 0
    assert "already trained to step 4" in capsys.readouterr().out and not (tmp_path / "r").exists()
    for total in (6, 8):
        run = train(parse(None, settings(tmp_path, resume, f"train.total_steps={total}", "train.sample_steps=0")))
    assert list(lines_of(run)) == [6, 8]
    assert checkpoint.open_checkpoint(run).state.wandb_id is None


def test_pruning_keeps_whole_checkpoints_and_the_newest(tmp_path):
    few = ["train.sample_steps=0", "train.keep_checkpoints=1"]
    run = train(parse(None, settings(tmp_path, "train.total_steps=8", "train.sample_steps=0", "train.keep_checkpoints=9")))
    folders = lambda: sorted(p.name[-1] for p in (run / "checkpoints").glob("step_*"))
    assert folders() == ["2", "4", "6", "8"]
    (run / "checkpoints/step_00000008/weights_rank_0000.safetensors").write_bytes(b"cut")
    train(parse(None, settings(tmp_path, "train.total_steps=7", *few)))
    assert checkpoint.find(run).path.name == "step_00000007"
    assert "7" in folders() and not {"2", "4", "6"} & set(folders())


def test_two_processes_cannot_train_in_one_folder(tmp_path, capsys):
    (tmp_path / "r").mkdir()
    with (tmp_path / "r/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        complains(capsys, ["train", *settings(tmp_path, "train.total_steps=2")], "another process trains in")
    train(parse(None, settings(tmp_path, "train.total_steps=2", "train.sample_steps=0")))


def test_a_backend_that_cannot_run_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastdit.kernels.dispatch.EXTENSION", None)  # as where no compiler was
    for name in ("cpp", "cuda"):
        monkeypatch.setattr("fastdit.kernels.dispatch._setting", name)
        monkeypatch.setenv("FASTDIT_KERNELS", name)
        complains(capsys, ["train", *settings(tmp_path / "out")], f"FASTDIT_KERNELS={name}")
        complains(capsys, ["info"], f"FASTDIT_KERNELS={name}")
    assert not (tmp_path / "out").exists()


def test_the_loop_reads_nothing_on_the_host(tmp_path):
    """The same run, longer by three steps without log line or checkpoint: no more reads."""
    syncs = []
    for total in (2, 5):
        quiet = ["train.log_steps=99", "train.save_steps=99", "train.sample_steps=0", f"train.name=n{total}"]
        with hot_loop.HotLoopGuard() as guard:
            train(parse(None, settings(tmp_path, f"train.total_steps={total}", *quiet)))
        syncs.append(guard.syncs)
    assert syncs[1] == syncs[0]


def test_the_mean_of_the_bins_is_the_loss(trained):
    """Eight images a line: with the counter RNG's timesteps, the bins' counts are known, and their mean is the loss."""
    for line in map(json.loads, (trained / "metrics.jsonl").read_text().splitlines()):
        ids = torch.cat([flow.sample_ids(step, 0, 4, torch.device("cpu")) for step in (line["step"] - 2, line["step"] - 1)])
        counts = torch.bincount(
            (flow.sample_timesteps(FlowConfig(), 0, ids) * telemetry.TIME_BINS).long(), minlength=telemetry.TIME_BINS
        )
        assert [mean is None for mean in line["loss_by_t"]] == [count == 0 for count in counts.tolist()]
        total = sum(mean * n for mean, n in zip(line["loss_by_t"], counts.tolist(), strict=True) if n)
        assert total / 8 == pytest.approx(line["loss"], abs=1e-5)


def test_a_profile_and_the_same_losses_compiled_as_one_graph(tmp_path, monkeypatch):
    """train.profile traces the steps it names; train.compile=model is one graph (here without code generation) with the eager run's
    losses."""
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="aot_eager", **options))
    found = {}
    for name, words in {"eager": [], "model": ["train.compile=model", "train.profile=2-3"]}.items():
        quiet = ["train.save_steps=99", "train.sample_steps=0", f"train.name={name}", "train.precision=fp32"]
        run = train(parse(None, settings(tmp_path, "train.total_steps=4", *quiet, *words)))
        found[name] = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["model"] == pytest.approx(found["eager"], rel=1e-6)
    events = json.loads((tmp_path / "model/profile/steps_2-3.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#1", "ProfilerStep#2"}  # it counts from 0
    assert not (tmp_path / "eager/profile").exists()


def test_checkpoints_are_not_replaced_by_weights_that_diverged(tmp_path):
    diverging = ["train.clip=0", "train.precision=fp32", "train.log_steps=8", "train.save_steps=1", "train.sample_steps=0"]
    with pytest.raises(FloatingPointError, match="not finite"):
        train(parse(None, settings(tmp_path, "train.total_steps=8", "train.lr=1e30", *diverging)))
    # 1e30 is still finite after the first step, so that was saved; what came of it was not
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


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_offload_trains_resumes_and_has_the_same_losses(tmp_path, stage, monkeypatch):
    """bf16, 8 steps: 1e-3, as one optimizer's sums are in another order; on a CPU the masters are where they were."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # ZeRO 3 replaces it for the whole process
    words = ["train.log_steps=1", "train.sample_steps=0", "train.schedule=constant", f"zero.stage={stage}"]
    plain = train(parse(None, settings(tmp_path, "train.total_steps=8", "train.name=plain", *words)))
    for total in (4, 8):
        run = train(parse(None, settings(tmp_path, f"train.total_steps={total}", "zero.offload=true", *words)))
    ours, wanted = lines_of(run), lines_of(plain)
    assert all(ours[step]["loss"] == pytest.approx(wanted[step]["loss"], rel=1e-3) for step in range(1, 9))


def test_several_averages_are_kept_resumed_and_sampled(tmp_path, capsys):
    words = ["train.sample_steps=0", "train.ema_decay=0.2", "train.ema_more=[0.1,0]", "train.schedule=constant"]
    whole = train(parse(None, settings(tmp_path, "train.total_steps=6", "train.name=whole", *words)))
    for total in (2, 6):
        run = train(parse(None, settings(tmp_path, f"train.total_steps={total}", *words)))
    load = lambda run, kind: checkpoint.open_checkpoint(run).load_model(kind, torch.device("cpu")).state_dict()
    models = {kind: load(run, kind) for kind in ("raw", "ema", "ema_0.1", "ema_0")}
    for kind, weights in models.items():
        assert all(torch.equal(weights[name], tensor) for name, tensor in load(whole, kind).items())
    assert all(torch.equal(models["ema_0"][name], tensor) for name, tensor in models["raw"].items())
    assert any((models["ema_0.1"][name] != tensor).any() for name, tensor in models["ema"].items())
    assert cli.main(["sample", "--checkpoint", str(run), "--weights", "ema_0.1", "--out", str(tmp_path / "a.png")]) == 0
    complains(capsys, ["sample", "--checkpoint", str(run), "--weights", "ema_0.5"], "holds no ema_0.5", "ema, ema_0, ema_0.1, raw")
    complains(capsys, ["train", *settings(tmp_path, "train.ema_more=0.5")], "train.ema_more=0.5 must be a list")
    complains(capsys, ["train", *settings(tmp_path, "train.ema_more=[1]")], "train.ema_more=1.0")
    complains(capsys, ["train", *settings(tmp_path, "zero.offload=true", "zero.stage=1")], "zero.offload=true needs zero.stage=2")


@pytest.mark.parametrize("stage", [2, 3])
def test_recomputing_activations_has_the_same_losses(tmp_path, stage, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # ZeRO 3 replaces it for the whole process
    found = []
    for recompute in ("none", "light", "full"):
        words = ["train.total_steps=3", "train.log_steps=1", "train.sample_steps=0", f"zero.stage={stage}"]
        run = train(parse(None, settings(tmp_path, *words, f"train.recompute={recompute}", f"train.name={recompute}")))
        found.append([line["loss"] for line in lines_of(run).values()])
    assert found[0] == found[1] == found[2] and len(found[0]) == 3


@pytest.mark.parametrize(("precision", "how"), [("bf16", "none"), ("fp32", "none"), ("bf16", "graphs")])
def test_one_step_with_nan_is_skipped(tmp_path, monkeypatch, precision, how):
    losses = flow.losses

    def faulty(model, x0, labels, ids, config, **named):
        found = losses(model, x0, labels, ids, config, **named)
        return found._replace(total=found.total * torch.nan) if int(ids[0] >> 32) == 2 else found

    monkeypatch.setattr(flow, "losses", faulty)
    named, images = {}, Order.images  # by step, of what is logged: the loader slices a permutation on the device
    monkeypatch.setattr(Order, "images", lambda self, step, micro: named.setdefault(step, images(self, step, micro)))
    words = ["train.total_steps=6", "train.sample_steps=0", f"train.precision={precision}", f"train.compile={how}"]
    run = train(parse(None, settings(tmp_path, *words)))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines if "loss" in line] == [0, 1, 0] and all(line.get("loss", 1) < 5 for line in lines)
    (skipped,) = (line for line in lines if "skipped_in_a_row" in line)
    assert skipped["step"] == 3 and list(named) == [2] and skipped["images_of_ranks"] == [named[2][0].tolist()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6]  # it is known late, and written before the next log line
    opened = checkpoint.open_checkpoint(run)
    model, state = opened.load_model("raw", torch.device("cpu")), opened.state
    assert state.optimizer_steps == 5 and all(torch.isfinite(p).all() for p in model.parameters())


def test_a_run_that_is_continued_takes_the_same_steps(tmp_path, monkeypatch):
    """On one rank, in the middle of the warm-up, after a step that was skipped: losses, norms, learning rates, weights."""
    losses = flow.losses

    def faulty(model, x0, labels, ids, config, **named):
        found = losses(model, x0, labels, ids, config, **named)
        return found._replace(total=found.total * torch.nan) if int(ids[0] >> 32) == 1 else found

    monkeypatch.setattr(flow, "losses", faulty)
    words = ["train.warmup_steps=9", "train.schedule=constant", "train.log_steps=1", "train.sample_steps=0", "train.ema_every=2"]
    found = []
    for name, totals in (("whole", [6]), ("parts", [3, 6])):
        for total in totals:
            run = train(parse(None, settings(tmp_path, f"train.name={name}", f"train.total_steps={total}", *words)))
        lines = [line for line in lines_of(run).values() if "lr" in line]
        weights = (run / "checkpoints/step_00000006/weights_rank_0000.safetensors").read_bytes()
        found.append(([(line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in lines], weights))
    assert found[0] == found[1]
    rates = [round(rate * 9e3) for _, _, rate, _ in found[0][0]]
    assert rates == [1, 2, 2, 3, 4, 5]


def test_a_checkpoint_whose_bytes_changed_does_not_count(trained, tmp_path):
    folder = tmp_path / "r/checkpoints/step_00000004"
    shutil.copytree(trained / "checkpoints/step_00000004", folder)
    weights = folder / "weights_rank_0000.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    assert checkpoint.find(tmp_path / "r") is None and checkpoint.is_whole(folder, by_hash=False)


def test_every_kth_checkpoint_is_kept(tmp_path):
    few = ["train.total_steps=7", "train.save_steps=1", "train.keep_checkpoints=1", "train.keep_every=3", "train.sample_steps=0"]
    kept = lambda run: sorted(int(p.name[-1]) for p in (run / "checkpoints").glob("step_*"))
    assert kept(train(parse(None, settings(tmp_path, *few)))) == [3, 6, 7]
    four = ["train.keep_checkpoints=4", "train.keep_every=0", "train.name=four"]
    for steps, wanted in ((3, [1, 2, 3]), (7, [4, 5, 6, 7])):
        assert kept(train(parse(None, settings(tmp_path, *few, *four, f"train.total_steps={steps}")))) == wanted


def test_a_full_disk_keeps_the_checkpoints_before(tmp_path, capsys, monkeypatch):
    """At a save on the way the run reports it and goes on; at the last it ends with exit code 2; each time the one before loads."""
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


def test_sigterm_saves_and_ends_the_run(tmp_path):
    """And the same command goes on to the same end."""
    words = ["train.total_steps=300", "train.log_steps=3", "train.save_steps=1000", "train.sample_steps=0"]
    whole = train(parse(None, settings(tmp_path, *words, "train.name=whole")))
    command = [sys.executable, "-W", "ignore", "-m", "fastdit.cli", "train", *settings(tmp_path, *words)]
    threads = str(torch.get_num_threads())
    process = subprocess.Popen(
        command, env=environment(OMP_NUM_THREADS=threads), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "r/metrics.jsonl"
    while not log.exists() or not log.read_text():
        assert process.poll() is None, process.stderr.read()[-3000:]
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "told to stop" in said, said[-3000:]
    step = int(checkpoint.find(tmp_path / "r").path.name[-8:])
    assert 0 < step < 300 and step % 3 == 0
    run = train(parse(None, settings(tmp_path, *words)))
    assert {s: line["loss"] for s, line in lines_of(run).items()} == {s: line["loss"] for s, line in lines_of(whole).items()}


def test_dry_run_prints_a_config_that_reads_back(tmp_path, capsys):
    first, *others = settings(tmp_path)
    assert cli.main(["train", first, "--dry-run", *others]) == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert parse(tmp_path / "c.yaml") == parse(None, settings(tmp_path))
    assert not (tmp_path / "r").exists()


def test_info_names_the_backend_of_every_op(capsys):
    from fastdit import kernels

    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(op in out for op in kernels.OPS) and torch.__version__ in out
