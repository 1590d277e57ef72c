"""The published base model's format: the same velocities, loss, gradients and samples from its own tiny checkpoints."""

import json
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import base_files
import inception
from autoencoders import Enlarged
from commands import complains
from fastdit import autoencoder, checkpoint, cli, files, kernels
from fastdit.config import InputError
from fastdit.convert.base import PUBLISHED_VAE, convert, load
from fastdit.model import DiT
from fastdit.training import saver

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAMES = ["base_rope", "base_absolute_legacy"]


class Case:
    """A base checkpoint, its conversion, and what the base model made of it."""

    def __init__(self, name, folder):
        shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
        self.pickle, self.json = folder / "model_10s.pkl", folder / "model_params_10s.json"
        self.base = torch.load(self.pickle, weights_only=True)
        if "pos_enc.pos_embed_centre" in self.base:  # the 256 x 256 table is kept as its centre, to stay small
            centre = self.base.pop("pos_enc.pos_embed_centre")
            table = torch.full((256, 256, centre.shape[-1]), torch.nan)
            table[120:136, 120:136] = centre
            self.base["pos_enc.pos_embed"] = table.view(1, 256 * 256, -1)
            torch.save(self.base, self.pickle)
        self.config, weights, self.vae = load(self.pickle, self.json)
        self.model = DiT(self.config)
        self.model.load_state_dict(weights)
        self.expected = e = torch.load(folder / "expected.pt", weights_only=True)
        self.gradients = torch.load(folder / "gradients.pt", weights_only=True)
        self.labels = torch.where(e["null"], self.config.num_classes, e["c"])
        self.x_t = kernels.flow_interpolate(e["x"], e["eps"], e["t"])


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def test_forward_and_loss(case):
    v = case.model(case.x_t, case.expected["t"], case.labels)
    assert (v - case.expected["v"]).abs().max() < 1e-5
    loss = kernels.flow_matching_loss(v, case.expected["x"], case.expected["eps"]).mean()
    assert abs(loss - case.expected["loss"]) < 1e-6


def test_gradients_of_every_parameter(case):
    model, base, wanted = case.model, case.base, case.gradients
    model.zero_grad()
    v = model(case.x_t, case.expected["t"], case.labels)
    kernels.flow_matching_loss(v, case.expected["x"], case.expected["eps"]).mean().backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    # The conversion only permutes and joins all but the patch embedding and the class table, so it carries gradients too. Those
    # two follow by the chain rule: patches = E·conv(x) + E·positions, and the null row is no parameter of the base model.
    converted = convert({**base, **wanted}, case.config)
    special = {"patch_embedding.weight", "patch_embedding.bias", "positions", "class_embedding.table.weight"}
    for name in got.keys() - special:
        torch.testing.assert_close(got[name], converted[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    embed, conv = base["patch_emb.weight"], base["pos_enc.proj.weight"].flatten(1)
    d_embed = got["patch_embedding.weight"] @ conv.T
    if "positions" in got:
        side = case.config.input_size // 2
        table = base["pos_enc.pos_embed"].view(256, 256, -1)[120 : 120 + side, 120 : 120 + side].flatten(0, 1)
        d_embed = d_embed + got["positions"].T @ table
    pairs = {
        "patch_emb.weight": d_embed,
        "patch_emb.bias": got["patch_embedding.bias"],
        "pos_enc.proj.weight": (embed.T @ got["patch_embedding.weight"]).view_as(base["pos_enc.proj.weight"]),
        "c_emb.weight": got["class_embedding.table.weight"][:-1].T,
    }
    for name, gradient in pairs.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("solver", ["euler", "euler_stochastic", "heun"])
def test_samples_by_the_base_commands_flags(case, tmp_path, capsys, monkeypatch, solver):
    """The latents of the base script, from its own file; no autoencoder is asked for."""
    e, out = case.expected, tmp_path / "latents.npz"
    monkeypatch.setattr(autoencoder, "load", lambda *_, **__: pytest.fail("an autoencoder was loaded"))
    flags = {
        "loadDir": case.pickle.parent, "loadFile": case.pickle.name, "loadDefFile": case.json.name, "device": "cpu",
        "num_steps": e["sample_steps"], "class_label": e["sample_class"], "sampler": solver, "guidance": e["sample_guidance"],
        "seed": e["sample_seed"], "batch_size": e["sample_batch"], "latents": out,
    }  # fmt: skip
    assert cli.main(["sample", *(str(word) for flag, value in flags.items() for word in (f"--{flag}", value))]) == 0
    arrays = np.load(out)
    assert arrays.files == ["latents"] and arrays["latents"].dtype == np.float32
    assert (torch.from_numpy(arrays["latents"]) - e["samples"][solver]).abs().max() < 1e-4
    assert "fp32 on" in capsys.readouterr().out


def test_import_and_sample_from_the_command_line(case, tmp_path, capsys):
    """The converted run gives the same model; without VAE weights it names the published autoencoder."""
    run = tmp_path / "run"
    assert cli.main(["import-base", str(case.pickle), "--out", str(run)]) == 0
    opened = checkpoint.open_checkpoint(run)
    model, config, state = opened.load_model("ema", torch.device("cpu")), opened.config, opened.state
    e = case.expected
    assert (model(case.x_t, e["t"], case.labels) - e["v"]).abs().max() < 1e-5
    assert config.data.autoencoder == PUBLISHED_VAE and state.step == 10
    assert config.train.precision == "fp32"
    words = ["--class", "3", "--steps", "2", "--solver", "euler"]
    for source, out in ((run, "a.npz"), (case.pickle, "b.npz")):
        assert cli.main(["sample", "--checkpoint", str(source), *words, "--latents", str(tmp_path / out)]) == 0
    imported, direct = (np.load(tmp_path / out)["latents"] for out in ("a.npz", "b.npz"))
    assert np.array_equal(imported, direct)
    assert cli.main(["import-base", str(case.pickle), "--out", str(run)]) == 2
    assert "holds checkpoints already" in capsys.readouterr().err
    with pytest.raises(InputError, match="holds no raw weights"):
        opened.load_model("raw", torch.device("cpu"))
    with pytest.raises(InputError, match="can be sampled from, not continued"):
        saver.check(opened, config, None)


def test_a_pickle_is_evaluated_and_swept_as_its_import_is(case, tmp_path, monkeypatch):
    """The same numbers; the result says which file the weights are of."""
    monkeypatch.setattr(autoencoder, "load", lambda *_, **__: Enlarged(32))
    network, folder, out = inception.save(tmp_path / "net.pt"), tmp_path / "run", tmp_path / "out.json"
    np.savez(tmp_path / "ref.npz", arr_0=np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), np.uint8))
    assert cli.main(["import-base", str(case.pickle), "--out", str(folder)]) == 0
    words = ["--features", str(network), "--reference", str(tmp_path / "ref.npz"), "--samples", "4", "--labels", "random"]
    results = []
    for source in (folder, case.pickle):
        assert cli.main(["evaluate", str(source), *words, "--steps", "1", "--solver", "euler", "--out", str(out)]) == 0
        results.append(json.loads(out.read_text()))
    imported, direct = results
    assert direct["metrics"] == imported["metrics"] and direct["metrics"]["fid"] > 0
    of = direct["samples"]
    assert of["path"] == str(case.pickle) and of["sha256"] == files.sha256(case.pickle) and of["step"] == 10
    assert (of["weights"], of["ema_decay"], of["dtype"]) == ("ema", None, "fp32") and imported["samples"]["ema_decay"] is None
    table = tmp_path / "sweep.csv"
    assert cli.main(["sweep", str(case.pickle), "steps=1,2", "solver=euler", *words, "--out", str(table)]) == 0
    assert float(table.read_text().splitlines()[1].split(",")[2]) == pytest.approx(direct["metrics"]["fid"], rel=1e-5)


def test_a_pickle_holds_one_set_of_weights(case, tmp_path, capsys):
    words = ["--weights", "raw", "--latents", tmp_path / "l.npz"]
    complains(capsys, ["sample", "--checkpoint", case.pickle, *words], "holds no raw weights", "leave --weights out")


class Code:
    def __reduce__(self):
        return print, ("the pickle's code ran",)


def test_bad_files_are_one_sentence(case, tmp_path, capsys):
    def complains(*words, file=case.pickle, parameters=case.json):
        with pytest.raises(InputError) as error:
            load(file, parameters)
        assert all(word in str(error.value) for word in words), error.value

    complains("none.pkl", "No such file", file=tmp_path / "none.pkl")
    complains("none.json", "No such file", parameters=tmp_path / "none.json")
    cut = tmp_path / "cut.pkl"
    cut.write_bytes(case.pickle.read_bytes()[: case.pickle.stat().st_size // 2])
    complains("cut.pkl", "damaged", file=cut)
    code = tmp_path / "code.pkl"
    for protocol in (2, 4):
        code.write_bytes(pickle.dumps({"w": Code()}, protocol))
        complains("code.pkl", "not loaded", file=code)
    assert capsys.readouterr().out == ""
    other = json.loads(case.json.read_text())
    wider = tmp_path / "wider.json"
    wider.write_text(json.dumps({**other, "num_blocks": other["num_blocks"] + 1}))
    complains("does not hold the model", parameters=wider)
    other["num_classes"] += 1
    wider.write_text(json.dumps(other))
    complains("does not hold the model", "another shape", parameters=wider)
    del other["dim"]
    wider.write_text(json.dumps(other))
    complains("wider.json", "dim", parameters=wider)


def test_the_command_line_says_so_and_writes_nothing(case, tmp_path, capsys):
    cut, code = tmp_path / "cut.pkl", tmp_path / "code.pkl"
    cut.write_bytes(case.pickle.read_bytes()[: case.pickle.stat().st_size // 2])
    code.write_bytes(pickle.dumps({"w": Code()}))
    out = tmp_path / "l.npz"
    for file, expected in ((cut, "damaged"), (code, "not loaded"), (tmp_path / "none.pkl", "No such file")):
        words = ["sample", "--checkpoint", str(file), "--params", str(case.json), "--latents", str(out)]
        assert cli.main(words) == 2
        printed = capsys.readouterr()
        assert expected in printed.err and printed.err.count("\n") == 1 and "ran" not in printed.out
    assert cli.main(["sample", "--latents", str(out)]) == 2
    assert "--loadFile" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_a_full_size_checkpoint_loads_in_8_gb_and_samples(tmp_path, record_property):
    """In a process of its own, with its autoencoder, to a picture. The seconds of loading are recorded, not judged."""
    file, out = base_files.full_size(tmp_path), tmp_path / "g.png"
    try:
        words = [
            "--checkpoint",
            file,
            "--class-name",
            "otter",
            "--steps",
            "2",
            "--solver",
            "euler",
            "--guidance",
            "3",
            "--out",
            out,
        ]
        command = [sys.executable, "-m", "fastdit.cli", "sample", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    finally:
        file.unlink()  # 2.3 GB
    assert done.returncode == 0, done.stderr[-2000:]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # bytes; Linux counts in KiB
    record_property("peak_gb", peak / 1e9)
    record_property("loaded_in_s", float(done.stdout.partition("loaded in ")[2].split()[0]))
    assert "360  otter\n" in done.stdout
    assert Image.open(out).size == (256 + 4, 256 + 4)
    assert peak < 8e9
