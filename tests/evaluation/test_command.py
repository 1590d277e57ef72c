"""`fastdit evaluate` of a tiny run: the same numbers by every way, what the result says, bad input."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fast_paths
import forked_ranks
import inception as inception_net
from benchmarks import photographs
from commands import complains
from fastdit import cli, files
from fastdit.data.builtin import mnist5k
from fastdit.evaluation import metrics
from fastdit.sampling import sampler


def run(source, reference, out, *words, expect=0):
    command = ["evaluate", str(source), "--features", "digits", "--reference", str(reference), "--out", str(out), *words]
    assert cli.main(command) == expect
    return json.loads(Path(out).read_text()) if expect == 0 else None


def numbers(result):
    by_class = {f"accuracy of {i}": share for i, share in enumerate(result["metrics"]["accuracy_by_class"])}
    return {key: value for key, value in result["metrics"].items() if key != "accuracy_by_class"} | by_class


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    return inception_net.save(tmp_path_factory.mktemp("net") / "inception.pt")


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


def test_evaluation_takes_the_fast_path(trained, reference, tmp_path, monkeypatch):
    """It calls the fast velocity at each step of each batch; the numbers are those of the plain path as far as rounding allows."""
    features = fast_paths.recorded_features(monkeypatch)
    words = ["--dtype", "fp32", "--samples", "150", "--labels", "random"]
    plain = run(trained, reference, tmp_path / "a.json", *words)
    calls = fast_paths.install(monkeypatch)
    fast = run(trained, reference, tmp_path / "b.json", *words)
    assert calls.prepared == 1 and calls.velocity == 2 * 2  # batches of 100 and 50, two steps each
    difference = abs(plain["metrics"]["fid"] ** 0.5 - fast["metrics"]["fid"] ** 0.5)
    assert difference <= fast_paths.root_distance_bound(*features)


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
    fp32 = ["--dtype", "fp32", "--samples", "30", "--neighbours", "4"]  # in bf16 another batch size rounds otherwise
    alone = run(trained, reference, tmp_path / "a.json", *fp32)
    words = ["--features", "digits", "--reference", str(reference), *fp32, "--out", str(tmp_path / "b.json")]
    ranks = lambda source: forked_ranks.run(2, ["-m", "fastdit.cli", "evaluate", source, *words])
    done = ranks(trained)
    assert done.returncode == 0, done.stderr
    both = json.loads((tmp_path / "b.json").read_text())
    assert both["ranks"] == 2 and numbers(both) == pytest.approx(numbers(alone), rel=1e-3)
    likeness = [{key: result["neighbours"][key] for key in ("nearer", "distance", "training")} for result in (both, alone)]
    assert likeness[0] == likeness[1]  # the distance is of real digits
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.neighbours.png")) for name in "ab"]
    assert (abs(pictures[0].astype(int) - pictures[1]) > 2).mean() < 0.01  # samples are equal to rounding
    lost = ranks(tmp_path)
    assert lost.returncode != 0 and lost.stderr.count("--samples is for samples of a checkpoint") == 1


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


def test_rows_are_called_by_their_network(tmp_path, capsys):
    """With the preprocessing in the result, in the repeat command, and checked against that of a saved reference."""
    path, out = tmp_path / "tiles.pt", tmp_path / "e.json"
    net = torch.nn.Sequential(torch.nn.AvgPool2d(112), torch.nn.Flatten())
    torch.jit.trace(net, torch.zeros(2, 3, 224, 224)).save(str(path))
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 32, 32, 3), np.uint8)
    for name, part in zip("ab", images, strict=True):
        np.savez(tmp_path / f"{name}.npz", arr_0=part)
    words = ["evaluate", str(tmp_path / "a.npz"), "--features", str(path), "--preprocess", "imagenet224", "--out", str(out)]
    assert cli.main([*words, "--reference", str(tmp_path / "b.npz"), "--save-reference", str(tmp_path / "ref.npz")]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "FD (tiles) " in printed and "KD (tiles) " in printed
    assert result["features"]["preprocess"] == "imagenet224" and "--preprocess imagenet224" in result["command"]
    assert cli.main([*words, "--reference", str(tmp_path / "ref.npz")]) == 0
    assert json.loads(out.read_text())["metrics"]["fid"] == pytest.approx(result["metrics"]["fid"], rel=1e-6)
    saved = dict(np.load(tmp_path / "ref.npz"))
    saved["about"] = str(saved["about"]).replace("imagenet224", "inception")
    np.savez(tmp_path / "ref.npz", **saved)
    capsys.readouterr()
    complains(capsys, [*words, "--reference", tmp_path / "ref.npz"], "was made with --preprocess inception")


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
        ([tmp_path / "nowhere", *digits], "does not exist"),
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


def test_the_metrics_are_printed_if_no_file_takes_them(reference, tmp_path, capsys, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    np.savez(tmp_path / "good.npz", arr_0=np.random.default_rng(0).integers(0, 256, (20, 32, 32, 1), np.uint8))
    monkeypatch.setattr(files, "write_atomically", lambda path, text: full(path))
    monkeypatch.setattr(metrics, "save", lambda summary, path: full(path))
    words = ["--reference", str(reference), "--out", str(tmp_path / "o.json")]
    for more in ([], ["--save-reference", str(tmp_path / "r.npz")]):
        assert cli.main(["evaluate", str(tmp_path / "good.npz"), "--features", "digits", *words, *more]) == 2
        printed = capsys.readouterr()
        name = "r.npz" if more else "o.json"
        assert "FD (digits)" in printed.out and f"{name} cannot be written: No space left on device" in printed.err


def test_a_reference_of_another_shape_is_one_sentence(tmp_path, trained, capsys):
    mean, covariance = np.zeros(128), np.eye(128)
    np.savez(tmp_path / "good.npz", arr_0=np.zeros((6, 32, 32, 1), np.uint8))
    cases = [
        ({"mu": mean, "sigma": covariance * np.nan}, "sigma holds values that are not finite"),
        ({"mu": mean.astype(str), "sigma": covariance}, "mu is <U"),
        ({"mu": mean + 1j, "sigma": covariance}, "mu is complex128"),
        ({"mu": mean, "sigma": np.triu(np.ones((128, 128)))}, "not symmetric"),
        ({"mu": mean, "sigma": -covariance}, "negative variances"),
        ({"mu": mean[:0], "sigma": covariance[:0, :0]}, "mu of width 0"),
        ({"mu": mean, "sigma": covariance, "features": np.zeros((5, 7))}, "features [5, 7]"),
        ({"mu": mean, "sigma": covariance, "about": "[1]"}, "`about` is of another shape"),
        ({"mu": mean, "sigma": covariance, "about": '{"images": "many"}'}, "number of images is 'many'"),
        ({"foo": mean}, "arr_0"),
    ]
    words = ["evaluate", tmp_path / "good.npz", "--features", "digits", "--out", tmp_path / "o.json", "--reference"]
    for arrays, expected in cases:
        np.savez(tmp_path / "r.npz", **arrays)
        complains(capsys, [*words, tmp_path / "r.npz"], "r.npz", expected)
    complains(capsys, [*words, trained], "is a checkpoint")
    complains(capsys, [*words, ""], "--reference ''", "empty")
    complains(capsys, [*words, "mnist5k", "--guidance", 2], "--guidance is for samples of a checkpoint")
    complains(capsys, [*words, "mnist5k", "--feature-sha256", ""], "--feature-sha256 ''")
    complains(capsys, [*words, "mnist5k", "--spatial", "a"], "--spatial 'a'")
    complains(capsys, [*words[:-3], "--out", tmp_path / "good.npz"], "good.npz is read by this command")
    complains(capsys, ["evaluate", "", *words[2:-1]], "source ''")
