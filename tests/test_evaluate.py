"""Evaluation of a tiny run: the same numbers by every way, bad input, validation while training, the sweep."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import autoencoders
from benchmarks import photographs
from commands import environment
from fastdit import autoencoder, cli, files
from fastdit.config import InputError, parse
from fastdit.data.builtin import mnist5k
from fastdit.distributed import World
from fastdit.evaluation import features, image_sets, metrics
from fastdit.sampling import sampler
from fastdit.training.loop import train
from fastdit.training.validation import _held_out

TINY = [
    "model.preset=test/4", "train.batch_size=8", "train.warmup_steps=1", "train.lr=1e-3", "train.log_steps=2",
    "train.save_steps=2", "train.sample_steps=0", "sample.steps=2", "sample.solver=euler", "train.total_steps=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Four steps, validated after every second, with FID on the digits' features."""
    out = tmp_path_factory.mktemp("runs")
    validation = ["validate.steps=2", "validate.images=20", "validate.features=digits", "validate.samples=20"]
    train(parse(None, [*TINY, *validation, f"train.out={out}", "train.name=r"]))
    return out / "r"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Statistics of the held-out digits."""
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    words = ["--features", "digits", "--reference", "mnist5k", "--split", "val", "--save-reference", str(path)]
    assert cli.main(["evaluate", *words]) == 0
    return path


def run(source, reference, out, *words, expect=0):
    command = ["evaluate", str(source), "--features", "digits", "--reference", str(reference), "--out", str(out), *words]
    assert cli.main(command) == expect
    return json.loads(Path(out).read_text()) if expect == 0 else None


def numbers(result):
    by_class = {f"accuracy of {i}": share for i, share in enumerate(result["metrics"]["accuracy_by_class"])}
    return {key: value for key, value in result["metrics"].items() if key != "accuracy_by_class"} | by_class


class Inception(nn.Module):
    """The interface of inception-2015-12-05.pt in small: features by convolutions, one inside a named block."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        self.layers.add_module("conv", nn.Conv2d(3, 4, 3, stride=8))
        self.layers.add_module("mixed", nn.Sequential(nn.Conv2d(4, 9, 3, stride=4), nn.ReLU()))
        self.output = nn.Linear(width, 5)
        self.scale = nn.Parameter(torch.linspace(0.5, 1, width))

    def forward(self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        x = images.float() / 255
        spread = torch.stack([x.mean((1, 2, 3)), x[:, 0].std((1, 2)), x[:, :, :4].mean((1, 2, 3)), x[:, 1].amax((1, 2))], 1)
        features = torch.cat((spread, spread[:, :2].square()), 1) * self.scale
        if return_features:
            return features
        return self.output(features).softmax(1)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "inception.pt"
    torch.jit.script(Inception()).save(str(path))
    return path


def test_a_checkpoint_and_its_npz_give_the_same(trained, reference, tmp_path, monkeypatch):
    fp32 = ["--dtype", "fp32", "--samples", "40"]
    streamed = run(trained, reference, tmp_path / "a.json", *fp32, "--seed", "7")
    npz = tmp_path / "samples.npz"
    assert cli.main(["sample", "--checkpoint", str(trained), "--per-class", "4", "--seed", "7", "--seed-per-sample",
                     "--dtype", "fp32", "--npz", str(npz), "--out", str(tmp_path / "grid.png")]) == 0  # fmt: skip
    from_file = run(npz, reference, tmp_path / "b.json")
    assert numbers(from_file) == pytest.approx(numbers(streamed), rel=1e-9)
    assert {"fid", "kid", "inception_score", "precision", "recall", "accuracy", "accuracy_by_class"} == set(streamed["metrics"])
    monkeypatch.setattr(sampler, "BATCH", 13)
    other_batches = run(trained, reference, tmp_path / "c.json", *fp32, "--seed", "7")
    assert other_batches["metrics"]["fid"] == pytest.approx(streamed["metrics"]["fid"], rel=1e-3)
    another = run(trained, reference, tmp_path / "d.json", *fp32, "--seed", "8")
    assert another["metrics"]["fid"] != pytest.approx(streamed["metrics"]["fid"], rel=1e-3)


def test_the_result_says_what_it_is_of_and_its_command_repeats_it(trained, reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--samples", "30", "--labels", "random", "--guidance", "0.5", "--weights", "raw"]
    result = run(trained, reference, "first.json", *words)
    of = result["samples"]
    assert of["weights"] == "raw" and of["step"] == 4 and of["labels"] == "random" and of["images"] == 30 and of["seed"] == 0
    assert of["sampler"]["guidance"] == 0.5 and of["sampler"]["solver"] == "euler" and of["sampler"]["steps"] == 2
    assert of["guidance_scale"] == 1.5 and len(of["sha256"]) == len(result["features"]["sha256"]) == 64
    assert result["reference"]["sha256"] == files.sha256(reference) and result["reference"]["images"] == 500
    assert result["features"]["tf32"] is False and result["versions"]["torch"] == torch.__version__
    assert any("30 samples for features of width 128" in warning for warning in result["warnings"])
    command = result["command"].split()
    assert command[0] == "fastdit" and "--steps" in command
    assert cli.main(command[1:]) == 0
    assert json.loads(Path("evaluation.json").read_text())["metrics"] == result["metrics"]


@pytest.mark.parametrize("native", [True, False])
def test_dtype_is_the_runs_where_it_is_fast(trained, reference, tmp_path, monkeypatch, capsys, native):
    """As `fastdit sample` chooses; the result and the command that repeats it name it."""
    config = json.loads(next(trained.glob("checkpoints/step_*4/config.json")).read_text())
    monkeypatch.setattr(sampler, "native_bf16", lambda device: native)
    result = run(trained, reference, tmp_path / "a.json", "--samples", "20")
    dtype = config["train"]["precision"] if native else "fp32"
    assert result["samples"]["dtype"] == dtype and f"--dtype {dtype}" in result["command"]
    assert f"model: {dtype} on " in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_give_the_same(trained, reference, tmp_path):
    fp32 = ["--dtype", "fp32", "--samples", "30"]  # in bf16 another batch size rounds otherwise
    alone = run(trained, reference, tmp_path / "a.json", *fp32)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fastdit.cli"]
    words = ["--features", "digits", "--reference", str(reference), *fp32, "--out", str(tmp_path / "b.json")]
    ranks = lambda source: subprocess.run(
        [*torchrun, "evaluate", str(source), *words], env=environment(), capture_output=True, text=True, timeout=200, check=False
    )
    done = ranks(trained)
    assert done.returncode == 0, done.stderr
    both = json.loads((tmp_path / "b.json").read_text())
    assert both["ranks"] == 2 and numbers(both) == pytest.approx(numbers(alone), rel=1e-3)
    lost = ranks(tmp_path)
    assert lost.returncode != 0 and lost.stderr.count("holds no checkpoint and no images") == 1


def test_real_digits_are_near_and_recognised(reference, tmp_path):
    itself = run("mnist5k", reference, tmp_path / "a.json", "--split", "val")
    assert abs(itself["metrics"]["fid"]) < 1e-6 and itself["metrics"]["precision"] == itself["metrics"]["recall"] == 1
    assert itself["metrics"]["accuracy"] > 0.96
    images, labels = mnist5k("val")
    inverted = tmp_path / "inverted.npz"
    np.savez(inverted, arr_0=255 - images, arr_1=labels)
    far = run(inverted, reference, tmp_path / "b.json")
    assert far["metrics"]["fid"] > 1 and far["metrics"]["precision"] < 0.5 and far["metrics"]["accuracy"] < 0.9


def test_a_torchscript_network_on_a_folder_and_adms_reference(inception, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    cuts = [np.asarray(image.resize((48, 48))) for image in photographs.crops(23)]
    for i, pixels in enumerate(cuts):
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    np.savez(tmp_path / "ref.npz", arr_0=np.stack(cuts[:15]))
    net = torch.jit.load(str(inception))
    with torch.no_grad():
        x = net(torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2), return_features=True)
    one, two = (part.double().numpy() for part in (x, x[:15]))
    np.savez(tmp_path / "adm.npz", mu=two.mean(0), sigma=np.cov(two, rowvar=False), arr_0=np.stack(cuts[:15]))
    found = []
    for file in ("ref.npz", "adm.npz"):
        words = ["--features", str(inception), "--reference", str(tmp_path / file), "--out", str(tmp_path / "a.json")]
        assert cli.main(["evaluate", str(folder), *words]) == 0
        found.append(json.loads((tmp_path / "a.json").read_text())["metrics"])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0]["recall"] > 0.8
    gap = ((one.mean(0) - two.mean(0)) ** 2).sum()
    roots = np.linalg.eigvals(np.cov(one, rowvar=False) @ np.cov(two, rowvar=False)).real.clip(0)
    wanted = gap + np.trace(np.cov(one, rowvar=False)) + np.trace(np.cov(two, rowvar=False)) - 2 * np.sqrt(roots).sum()
    assert found[0]["fid"] == pytest.approx(wanted, rel=1e-3)
    spatial = ["--features", str(inception), "--reference", str(tmp_path / "ref.npz"), "--spatial", "layers.mixed.0"]
    assert cli.main(["evaluate", str(folder), *spatial, "--out", str(tmp_path / "s.json")]) == 0
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["metrics"]["sfid"] > 0 and "unverified" in result["sfid"]


def test_spatial_input_is_resized_as_tensorflow_1_did():
    """Output pixel i shows input position i·S/299, between its neighbours."""
    images = torch.arange(0, 250, 10, dtype=torch.uint8).expand(1, 3, 25, 25)
    row = features._resized(images)[0, 0, 7] * 128 + 128
    position = torch.arange(299) * 25 / 299
    assert torch.allclose(row, (position * 10).clamp(max=240), atol=1e-2)
    assert torch.allclose(features._resized(images.mT)[0, 0, :, 7] * 128 + 128, row, atol=1e-2)


def test_the_network_runs_in_fp32_on_batches_of_one_shape(monkeypatch):
    """And what it says of an image does not depend on its place or on what fills the batch."""
    seen = []
    network = features.load("digits", torch.device("cpu"))
    compute = network._compute

    def watched(images):
        flags = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        seen.append((tuple(images.shape), images.dtype, *flags))
        return compute(images)

    network._compute = watched
    torch.set_float32_matmul_precision("high")
    try:
        network.probe((32, 32, 1))
        images = mnist5k("val")[0][:230]
        whole = torch.cat([part.features for part in network(images)])
        parts = torch.cat([part.features for at in range(0, 230, 41) for part in network(images[at : at + 41])])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {((features.BATCH, 1, 32, 32), torch.uint8, "highest", False)}
    assert len(whole) == 230 and torch.allclose(whole, parts, rtol=1e-5, atol=1e-6)


def test_labels():
    balanced = image_sets.evaluation_labels("balanced", 40, 10, 0)
    assert balanced.bincount().tolist() == [4] * 10
    drawn = image_sets.evaluation_labels("random", 4000, 10, 0)
    assert torch.equal(drawn[:100], image_sets.evaluation_labels("random", 100, 10, 0)) and drawn.max() == 9
    assert ((drawn.bincount() - 400).abs() < 5 * 400**0.5).all() and len(set(drawn.bincount().tolist())) > 1
    assert not torch.equal(drawn, image_sets.evaluation_labels("random", 4000, 10, 1))


def small_folder(path):
    path.mkdir()
    for i, size in enumerate((32, 32, 31)):
        Image.fromarray(np.full((size, size), i, np.uint8)).save(path / f"{i}.png")
    return path


def test_bad_input_is_one_sentence(trained, reference, inception, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "corrupt.npz").write_bytes(reference.read_bytes()[:3000])
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((4, 32, 32, 1)))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(6), sigma=np.eye(6))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(128), sigma=np.eye(127))
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 32, 32, 1), np.uint8))
    np.savez(tmp_path / "labels.npz", arr_0=np.zeros((2, 32, 32, 1), np.uint8), arr_1=np.array([3, 12]))
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((2, 33, 33, 1), np.uint8))
    np.savez(tmp_path / "good.npz", arr_0=np.zeros((6, 32, 32, 1), np.uint8))
    with np.load(reference) as found:
        about = json.loads(str(found["about"]))
        about["features"]["sha256"] = "0" * 64
        np.savez(tmp_path / "foreign.npz", mu=found["mu"], sigma=found["sigma"], about=json.dumps(about))
    data = bytearray((tmp_path / "good.npz").read_bytes())
    data[200] ^= 255  # a byte of the images: the checksum tells
    (tmp_path / "flipped.npz").write_bytes(data)
    mixed = small_folder(tmp_path / "mixed")
    good, digits = tmp_path / "good.npz", ["--features", "digits"]
    cases = [
        ([good, *digits, "--feature-sha256", "ab" * 32], "has SHA-256"),
        ([good, "--features", tmp_path / "none.pt", "--reference", reference], "nor a file"),
        ([good, "--features", good, "--reference", reference], "nor a TorchScript file"),
        ([good, "--features", inception], "--reference is needed"),
        ([good, *digits, "--reference", tmp_path / "narrow.npz"], "width 6, but digits makes 128"),
        ([good, *digits, "--reference", tmp_path / "odd.npz"], "no sigma of 128 x 128"),
        ([good, *digits, "--reference", tmp_path / "foreign.npz"], "another feature network"),
        ([good, *digits, "--reference", tmp_path / "corrupt.npz"], "corrupt.npz cannot be read"),
        ([tmp_path / "corrupt.npz", *digits, "--reference", reference], "corrupt.npz cannot be read"),
        ([tmp_path / "flipped.npz", *digits, "--reference", reference], "flipped.npz cannot be read"),
        ([tmp_path / "empty", *digits], "no images"),
        ([tmp_path / "nowhere", *digits], "is not there"),
        ([tmp_path / "floats.npz", *digits], "not uint8"),
        ([tmp_path / "one.npz", *digits, "--reference", reference], "at least 2"),
        ([tmp_path / "labels.npz", *digits, "--reference", reference], "labels up to 12"),
        ([tmp_path / "large.npz", *digits, "--reference", reference], "fails on images of 33x33x1"),
        ([mixed, *digits, "--reference", reference], "must be of one size"),
        ([trained, *digits, "--samples", 15, "--reference", reference], "--samples 15 is no multiple of the 10 classes: use 10"),
        ([trained, *digits, "--samples", 20, "--weights", "ema_0.5"], "holds no ema_0.5 weights"),
        ([trained, *digits, "--samples", 20, "--steps", 0], "sample.steps=0"),
        ([*digits], "nothing to do"),
        ([good, "--features", inception, "--reference", good, "--spatial", "layers.mixed_6.conv"], "has no mixed_6 there"),
    ]
    for words, message in cases:
        assert cli.main(["evaluate", *map(str, words), "--out", str(tmp_path / "out.json")]) == 2, words
        error = capsys.readouterr().err.strip().split("\n")[-1]
        assert error.startswith("fastdit: ") and message in error, (words, error)
    assert not (tmp_path / "out.json").exists()


def test_validation_is_logged_drawn_and_deterministic(trained, tmp_path):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in found] == [2, 4] and all(len(line["val_losses"]) == 8 for line in found)
    assert all(line["val_loss"] == pytest.approx(np.mean(line["val_losses"])) for line in found)
    assert found[1]["val_loss"] < found[0]["val_loss"] and found[0]["fid"] > 1 and "accuracy" in found[0]
    assert Image.open(trained / "validation.png").size == (1620, 480)
    # the same training once more, without FID: the same losses to the bit
    out = tmp_path / "runs"
    again = [f"train.out={out}", "train.name=r", "train.total_steps=2", "validate.steps=2", "validate.images=20"]
    train(parse(None, [*TINY, *again]))
    lines = [json.loads(line) for line in (out / "r/metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if "val_loss" in line]
    assert line["val_losses"] == found[0]["val_losses"] and "fid" not in line


def test_sweep(trained, reference, tmp_path, capsys):
    out = tmp_path / "sweep.csv"
    words = ["--features", "digits", "--reference", str(reference), "--samples", "20", "--out", str(out)]
    assert cli.main(["sweep", str(trained), "guidance=0,3", "weights=ema,raw", *words]) == 0
    rows = out.read_text().splitlines()
    assert rows[0].startswith("guidance,weights,fid,kid") and len(rows) == 5
    values = [row.split(",") for row in rows[1:]]
    assert [value[:2] for value in values] == [["0.0", "ema"], ["0.0", "raw"], ["3.0", "ema"], ["3.0", "raw"]]
    fids = [float(value[2]) for value in values]
    assert [value[-1] for value in values].index("1") == fids.index(min(fids)) and len(set(fids)) == 4
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("*")]
    assert len(printed) == 1 and f"{min(fids):.6g}" in printed[0]
    picture = Image.open(out.with_suffix(".png"))
    assert picture.height == 4 * 36 and picture.width > 10 * 34
    alone = run(trained, reference, tmp_path / "a.json", "--samples", "20", "--guidance", "3", "--weights", "raw")
    assert alone["metrics"]["fid"] == pytest.approx(fids[3], rel=1e-5)
    for word in ("guidance", "guidanse=1", "steps=1,x"):
        assert cli.main(["sweep", str(trained), word, *words]) == 2


@pytest.mark.slow
def test_held_out_images_of_an_index_and_of_its_latents(tmp_path, capsys):
    """The same latents to fp16, on one rank or shared by two; and an index as a reference."""
    train_tar, val_tar, devkit = photographs.imagenet(tmp_path / "archives")
    index, latents, vae = tmp_path / "index", tmp_path / "val", autoencoders.tiny(tmp_path / "vae")
    prepared = ["prepare", str(train_tar), "--val", str(val_tar), "--devkit", str(devkit), "--out", str(index)]
    encoded = ["encode", str(index), "--split", "val", "--out", str(latents), "--autoencoder", str(vae), "--image-size", "32"]
    for words in (prepared, [*encoded, "--dtype", "fp32"]):
        assert cli.main(words) == 0
    settings = [
        *TINY, f"data.source={index}", f"data.autoencoder={vae}", "model.in_channels=4", "model.input_size=16", "validate.steps=2",
        "validate.images=8",
    ]  # fmt: skip
    config = parse(None, settings)
    cpu = torch.device("cpu")
    codec = autoencoder.load(config.data, config.model, 3, cpu)
    ids, x0, labels = _held_out(config, index, codec, World(0, 1, cpu, None))
    assert ids.tolist() == list(range(8)) and x0.shape == (8, 4, 16, 16)
    of_latents = parse(None, [*settings, f"validate.source={latents}"])
    for rank in range(2):
        mine, cached, cached_labels = _held_out(of_latents, index, codec, World(rank, 2, cpu, None))
        assert torch.allclose(cached, x0[mine], atol=5e-3) and torch.equal(cached_labels, labels[mine])
        assert mine.tolist() == list(range(rank, 8, 2))
    with pytest.raises(InputError, match=r"set validate\.source to those of"):
        _held_out(config, latents, codec, World(0, 1, cpu, None))
    with pytest.raises(InputError, match="another autoencoder"):
        _held_out(of_latents, index, autoencoder.Pixels(4, 16), World(0, 1, cpu, None))
    reference = ["--reference", str(index), "--image-size", "32", "--save-reference", str(tmp_path / "ref.npz")]
    torch.jit.script(Inception()).save(str(tmp_path / "net.pt"))
    assert cli.main(["evaluate", "--features", str(tmp_path / "net.pt"), *reference]) == 0
    found = metrics.load(tmp_path / "ref.npz")
    assert found.about["kind"] == "index" and len(found.features) == found.about["images"] > 20
    reference = ["--reference", str(index), "--save-reference", str(tmp_path / "other.npz")]
    assert cli.main(["evaluate", "--features", str(tmp_path / "net.pt"), *reference]) == 2
    assert "--image-size" in capsys.readouterr().err
