"""The checkpoint format: what opening one reads, and how often."""

import json

import torch

from fastdit import checkpoint
from fastdit.config import from_dict
from fastdit.model import DiT
from fastdit.sampling.sampler import Sampler


def make(folder, **state):
    config = from_dict({"model": {"preset": "test/4"}})
    torch.manual_seed(0)
    weights = {name: p.detach() for name, p in DiT(config.model).named_parameters()}
    path = checkpoint.save_weights(folder / "checkpoints", weights, config, 3, "a test")
    return path, weights


def test_each_file_is_hashed_once(tmp_path, monkeypatch):
    path, _ = make(tmp_path / "run")
    hashed, sha256 = [], checkpoint.sha256
    monkeypatch.setattr(checkpoint, "sha256", lambda file: hashed.append(file.name) or sha256(file))
    opened = checkpoint.open_checkpoint(tmp_path / "run")
    Sampler(opened, device="cpu")
    assert opened.path == path and sorted(hashed) == ["config.json", "state.json", "weights_rank_0000.safetensors"]


def test_keys_of_other_versions_are_left_out(tmp_path):
    state = {"step": 7, "ranks": 2, "optimizer_steps": 5, "wandb_id": None, "something new": 1}
    assert checkpoint.RunState.from_dict(state) == checkpoint.RunState(7, ranks=2, optimizer_steps=5)
    assert checkpoint.RunState(7).to_dict().get("wandb_id", "left out") == "left out"


def test_an_exported_file_is_the_checkpoint(tmp_path):
    path, weights = make(tmp_path / "run")
    assert checkpoint.export(tmp_path / "run", "ema", tmp_path / "model.safetensors") == 3
    opened = checkpoint.open_checkpoint(tmp_path / "model.safetensors")
    assert opened.state.weights == "ema" and opened.config == checkpoint.open_checkpoint(path).config
    exported = dict(opened.load_model("ema", torch.device("cpu")).named_parameters())
    assert all(torch.equal(exported[name], tensor) for name, tensor in weights.items())
    assert json.loads((tmp_path / "model.json").read_text())["state"]["origin"] == "a test"
