"""The published base model's format: the same velocities, loss, gradients and samples from its own tiny checkpoints."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from fastdit import base_checkpoint, checkpoint, cli, kernels, samplers
from fastdit.config import InputError
from fastdit.model import DiT

FIXTURES = Path(__file__).parent / "fixtures"
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
        self.config, weights, self.vae = base_checkpoint.load(self.pickle, self.json)
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
    converted = base_checkpoint.convert({**base, **wanted}, case.config)
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


@torch.no_grad()
def test_samples(case):
    e = case.expected
    for solver in ("euler", "heun"):
        x = torch.randn(e["sample_batch"], 4, 32, 32, generator=torch.Generator().manual_seed(e["sample_seed"]))
        labels = torch.full((len(x),), e["sample_class"])
        velocity = samplers.guided(case.model, labels, case.config.num_classes, e["sample_guidance"])
        *_, latent = samplers.SOLVERS[solver](velocity, x, e["sample_steps"])
        assert (latent - e["samples"][solver]).abs().max() < 1e-4, solver


def test_import_and_sample_from_the_command_line(case, tmp_path, capsys):
    """The converted run gives the same model; without VAE weights it names the published autoencoder."""
    run = tmp_path / "run"
    assert cli.main(["import-base", str(case.pickle), "--out", str(run)]) == 0
    model, config, state = checkpoint.load_model(run, "ema", torch.device("cpu"))
    e = case.expected
    assert (model(case.x_t, e["t"], case.labels) - e["v"]).abs().max() < 1e-5
    assert config.data.autoencoder == base_checkpoint.PUBLISHED_VAE and state["step"] == 10
    assert cli.main(["import-base", str(case.pickle), "--out", str(run)]) == 2
    assert "holds checkpoints already" in capsys.readouterr().err
    with pytest.raises(InputError, match="holds no raw weights"):
        checkpoint.load_model(run, "raw", torch.device("cpu"))
    with pytest.raises(InputError, match="can be sampled from, not continued"):
        checkpoint.check(checkpoint.find(run), config, None)


class Code:
    def __reduce__(self):
        return print, ("the pickle's code ran",)


def test_bad_files_are_one_sentence(case, tmp_path, capsys):
    def complains(*words, file=case.pickle, parameters=case.json):
        with pytest.raises(InputError) as error:
            base_checkpoint.load(file, parameters)
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
    del other["dim"]
    wider.write_text(json.dumps(other))
    complains("wider.json", "dim", parameters=wider)
