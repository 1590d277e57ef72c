"""Loss sums by timestep, the clock of a step's phases, and the lines of metrics.jsonl."""

import errno
import io
import json
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from commands import complains, environment, settings
from fastdit import checkpoint, cli, files, flow
from fastdit.config import FlowConfig, InputError, parse
from fastdit.device import versions
from fastdit.distributed import World
from fastdit.flow import Losses
from fastdit.training import telemetry
from fastdit.training.loop import train


def test_versions_name_the_build_of_torch(monkeypatch):
    """The metadata of PyPI's CUDA builds say 2.14.1, torch.__version__ says 2.14.1+cu130."""
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    assert versions()["torch"] == "2.14.1+cu130"


def test_loss_sums_by_bins_of_t():
    g = torch.Generator().manual_seed(0)
    losses, t = torch.rand(37, generator=g), torch.rand(37, generator=g)
    t[:3] = torch.tensor([0.125, 1.0, 1e-9])  # edges of bins, and both ends
    sums = telemetry.loss_sums(Losses(losses, t, {"flow": losses}))
    bins = [min(int(x * telemetry.TIME_BINS), telemetry.TIME_BINS - 1) for x in t.tolist()]
    assert bins[:3] == [1, 7, 0]
    wanted = [sum(loss for loss, b in zip(losses.tolist(), bins, strict=True) if b == k) for k in range(telemetry.TIME_BINS)]
    torch.testing.assert_close(sums, torch.tensor([losses.sum(), *wanted, *[bins.count(k) for k in range(telemetry.TIME_BINS)]]))


def test_a_cpus_phases_are_timed_by_the_host():
    clock = telemetry.StepClock(torch.device("cpu"))
    for _ in range(2):
        with clock.phase("ema"):
            time.sleep(0.02)
    seconds = clock.read()
    assert set(seconds) == set(telemetry.PHASES)
    assert 0.04 <= seconds["ema"] < 1 and seconds["optimizer"] == 0
    assert clock.read()["ema"] == 0


def test_a_gpus_phases_are_timed_by_events_and_the_data_wait_by_the_host(monkeypatch):
    """The events are 100 ms apart. Reading one before `read` would make the host wait."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = len(recorded) * 100.0
            recorded.append(self)

        def elapsed_time(self, end):
            asked.append(self)
            return end.time - self.time

    recorded = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = telemetry.StepClock(torch.device("cuda"))
    for _ in range(3):
        with clock.phase("data_wait", on_host=True):
            pass
        with clock.phase("forward_backward"):
            pass
    assert not asked and len(recorded) == 6
    seconds = clock.read()
    assert seconds["forward_backward"] == pytest.approx(0.3) and seconds["data_wait"] < 0.1 and seconds["ema"] == 0


@pytest.mark.parametrize(("name", "mfu"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA H100 PCIe", False), ("AMD EPYC", False)])
def test_a_log_line_has_each_devices_flops_and_mfu_where_the_peak_is_known(monkeypatch, tmp_path, capsys, name, mfu):
    """Two ranks, 8 images per step. XL/2 needs 0.71 TFLOP per image, forward and backward, as published."""
    monkeypatch.setattr(telemetry, "device_name", lambda device: name)
    words = ["model.preset=XL/2", "model.in_channels=4", "model.num_classes=1000", "train.precision=bf16", "train.batch_size=4"]
    log = telemetry.Log(tmp_path, parse(None, words), World(0, 2, torch.device("cpu"), None), 0, None)
    log.line_time -= 0.01  # 10 steps in 10 ms: high enough that rounding the MFU does not matter
    log.write(10, loss=1.0, loss_by_t=[])
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["tflops"] == pytest.approx(line["images_per_s"] / 2 * 0.71, rel=0.01)
    assert ("mfu" in line) == mfu == ("MFU is relative to 989.4 TFLOP/s: H100 SXM, bf16" in capsys.readouterr().err)
    if mfu:
        assert line["mfu"] == pytest.approx(line["tflops"] / 989.4, rel=0.01)


def test_log_lines_after_the_checkpoint_are_cut(tmp_path):
    config = parse(None, settings(tmp_path, "train.total_steps=3"))
    train(config)
    log = tmp_path / "r/metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 4, "loss": 9}) + "\n" + '{"step": 5, "lo')
    train(parse(None, settings(tmp_path, "train.total_steps=4")))
    lines = [line for line in map(json.loads, log.read_text().splitlines()) if "changed" not in line]
    assert [line["step"] for line in lines] == [2, 3, 4] and lines[-1]["loss"] != 9


def test_the_mean_of_the_bins_is_the_loss(tmp_path):
    """Eight images per line: the counter RNG's timesteps give the count of each bin, so the mean of the bins must be the loss."""
    run = train(parse(None, settings(tmp_path, "train.total_steps=4", "train.sample_steps=0")))
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        ids = torch.cat([flow.sample_ids(step, 0, 4, torch.device("cpu")) for step in (line["step"] - 2, line["step"] - 1)])
        counts = torch.bincount(
            (flow.sample_timesteps(FlowConfig(), 0, ids) * telemetry.TIME_BINS).long(), minlength=telemetry.TIME_BINS
        )
        assert [mean is None for mean in line["loss_by_t"]] == [count == 0 for count in counts.tolist()]
        total = sum(mean * n for mean, n in zip(line["loss_by_t"], counts.tolist(), strict=True) if n)
        assert total / 8 == pytest.approx(line["loss"], abs=1e-5)


def test_a_validation_line_reaches_the_log_and_wandb(tmp_path):
    log = telemetry.Log(tmp_path, parse(None, ["train.precision=fp32"]), World(0, 1, torch.device("cpu"), None), 0, None)
    sent = []
    log.sinks = [SimpleNamespace(log=lambda step, values: sent.append((step, values)), close=lambda: None)]
    line = {"val_loss": 2.0, "val_losses": [1.0, 3.0], "fid": 5.0}
    log.write_validation(4, (0.25, 0.75), line)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 4, **line}
    losses = {"validation/val_loss_t0.25": 1.0, "validation/val_loss_t0.75": 3.0}
    assert sent == [(4, {"validation/val_loss": 2.0, "validation/fid": 5.0} | losses)]


GARBAGE = [
    b"\xff\xfe\x00garbage\n",
    b"\xff",
    b"[" * 100_000 + b"\n",
    b"[1]\n",
    b'"text"\n',
    b'{"step": "x"}\n',
    b"\n\n",
    b'{"no": 1}\n',
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_in_the_log_is_moved_aside(tmp_path, capsys, garbage):
    """As a crash of the machine leaves it. Whole lines stay, and the garbage is kept in a file of its own."""
    lines = [json.dumps({"step": step}).encode() + b"\n" for step in (1, 2, 3)]
    data = [lines[0], garbage if garbage.endswith(b"\n") else garbage + b"\n", lines[1], lines[2], garbage]
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        path.write_bytes(b"".join(data))
        log = telemetry.Log(tmp_path, parse(None, ["train.precision=fp32"]), World(0, 1, torch.device("cpu"), None), 2, None)
        log.event({"step": 3, "new": 1})
        log.close()
        kept = [line for line in path.read_bytes().splitlines(keepends=True) if garbage.strip() not in line or not garbage.strip()]
        assert kept == [lines[0], lines[1], b'{"step": 3, "new": 1}\n'] and path.read_bytes() == b"".join(kept)
    moved = (tmp_path / "metrics.unreadable").read_bytes() if (tmp_path / "metrics.unreadable").exists() else b""
    assert moved.count(garbage.strip() or b"x") == (4 if garbage.strip() else 0)
    assert ("metrics.unreadable" in capsys.readouterr().err) == bool(garbage.strip())


def test_a_last_line_without_its_end_is_kept_if_it_is_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    log = telemetry.Log(tmp_path, parse(None, ["train.precision=fp32"]), World(0, 1, torch.device("cpu"), None), 2, None)
    log.event({"step": 3})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_log_that_is_a_folder_is_one_sentence(tmp_path, capsys):
    (tmp_path / "r/metrics.jsonl").mkdir(parents=True)
    complains(capsys, ["train", *settings(tmp_path, "train.total_steps=2")], "metrics.jsonl cannot be written: Is a directory")


def test_lines_wait_for_space_on_the_disk(tmp_path, capsys, monkeypatch):
    """A part of a line that was written is taken back; at the end, lines that are lost are an error."""
    log = telemetry.Log(tmp_path, parse(None, ["train.precision=fp32"]), World(0, 1, torch.device("cpu"), None), 0, None)
    log.event({"step": 1})
    opened, full = Path.open, []

    def open_(path, mode="r", *arguments, **options):
        file = opened(path, mode, *arguments, **options)
        if full and path == log.path and mode == "ab":
            file.write(b"half a li")
            file.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return file

    monkeypatch.setattr(Path, "open", open_)
    full.append(1)
    log.event({"step": 2})
    assert log.path.read_text() == '{"step": 1}\n' and "No space left on device: its new lines wait" in capsys.readouterr().err
    full.clear()
    log.event({"step": 3})
    assert log.path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    full.append(1)
    log.event({"step": 4})
    with pytest.raises(InputError, match=r"last lines of .* cannot be written: No space left"):
        log.close()


def test_a_full_disk_leaves_pictures_out(tmp_path, capsys, monkeypatch):
    """Curves, grids and the validation's picture; the run ends well, and its checkpoints are whole."""

    @contextmanager
    def full(path):
        yield path
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    for module in (telemetry, "fastdit.training.validation", "fastdit.sampling.pictures"):
        replacing = full
        if module is telemetry:
            replacing = lambda path: full(path) if path.suffix == ".png" else files.replacing(path)
        monkeypatch.setattr(f"{module}.replacing" if isinstance(module, str) else "fastdit.training.telemetry.replacing", replacing)
    words = settings(tmp_path, "train.total_steps=2", "validate.steps=2", "validate.images=4")
    assert cli.main(["train", *words]) == 0
    said = capsys.readouterr().err
    assert said.count("a picture is left out") == 3 and said.count("No space left on device") == 3, said
    assert checkpoint.find(tmp_path / "r").state.step == 2


def scalars(run):
    """The scalars of a run in TensorBoard, as (step, value) by name, as its interface shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, events


def test_tensorboard_has_what_the_log_has_and_no_step_twice(tmp_path):
    """Also after a run that was killed behind its newest checkpoint."""
    words = ["train.tensorboard=true", "validate.steps=2", "validate.images=4", "train.sample_steps=2", "train.keep_checkpoints=9"]
    run = train(parse(None, settings(tmp_path, "train.total_steps=6", *words)))
    shutil.rmtree(run / "checkpoints/step_00000006")  # as if it had been killed before
    time.sleep(1.1)  # the names of the event files hold the second
    train(parse(None, settings(tmp_path, "train.total_steps=8", *words)))
    logged, events = scalars(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "changed" not in line]  # of settings, which have a learning rate too
    for name in ("loss", "lr", "grad_norm", "images_per_s", "epoch"):
        assert [step for step, _ in logged[name]] == [2, 4, 6, 8], name
        assert dict(logged[name]) == pytest.approx(
            {line["step"]: line[name] for line in lines if name in line and "changed" not in line}, rel=1e-6
        ), name
    assert [step for step, _ in logged["loss"]] == [2, 4, 6, 8]
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert dict(logged["validation/val_loss"]) == pytest.approx(losses)
    assert {f"loss_by_t/bin_{i}" for i in range(telemetry.TIME_BINS)} >= {tag for tag in logged if "bin" in tag} != set()
    grids = events.Images("samples")
    assert [grid.step for grid in grids] == [2, 4, 6, 8]
    shown = Image.open(io.BytesIO(grids[-1].encoded_image_string)).convert("RGB")
    assert shown.tobytes() == Image.open(run / "samples/step_00000008.png").convert("RGB").tobytes()


def test_tensorboard_without_its_package_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    complains(capsys, ["train", *settings(tmp_path, "train.tensorboard=true")], "train.tensorboard=true", "pip install tensorboard")
    assert not (tmp_path / "r").exists()


def test_wandb_keys_are_checked_without_the_network(tmp_path):
    """Each in a process that is forked after the import of wandb, which takes seconds."""
    code = (
        "import os, socket, sys, wandb; socket.socket.connect = socket.getaddrinfo = None; from fastdit.training import telemetry\n"
        "from fastdit.config import parse\n"
        "for key in sys.argv[1:]:\n"
        "    if not os.fork():\n"
        "        os.environ['WANDB_API_KEY'] = key\n"
        "        sys.exit(telemetry.check_packages(parse(None, ['train.wandb=online'])))\n"
        "    print(os.wait()[1], flush=True)"
    )
    keys = ["a" * 40, "wandb_v1_" + "b" * 77, "short", ""]
    variables = environment(HOME=str(tmp_path), WANDB_SILENT="true")
    done = subprocess.run([sys.executable, "-c", code, *keys], env=variables, capture_output=True, text=True, check=False)
    assert [int(status) == 0 for status in done.stdout.split()] == [True, True, False, False], done.stdout + done.stderr
    assert sum(line.startswith("fastdit.checks.InputError: train.wandb=online") for line in done.stderr.splitlines()) == 2
