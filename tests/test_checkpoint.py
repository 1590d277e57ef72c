"""The checkpoint format: what opening one reads, damaged and incomplete folders, exported files."""

import json
import shutil

import pytest
import torch

from commands import complains, trained_run
from fastdit import checkpoint, cli
from fastdit.config import InputError, from_dict
from fastdit.model import DiT
from fastdit.sampling.sampler import Sampler


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps."""
    return trained_run(tmp_path_factory.mktemp("runs"))


def make(folder):
    """Write a checkpoint of random weights. Returns its folder and the weights."""
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
    complains(capsys, ["export", str(tmp_path), "--out", str(file)], "no complete checkpoint")
    (tmp_path / "model.json").unlink()
    complains(capsys, ["sample", "--checkpoint", str(file)], "not what `fastdit export` writes")


def test_incomplete_checkpoints_do_not_count(trained, tmp_path):
    folder = tmp_path / "r/checkpoints/step_00000004"
    shutil.copytree(trained / "checkpoints/step_00000004", folder)
    assert checkpoint.find(tmp_path / "r").path == checkpoint.find(folder).path == folder
    weights = folder / "weights_rank_0000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert checkpoint.find(tmp_path / "r") is None and checkpoint.find(folder) is None
    with pytest.raises(InputError, match="no complete checkpoint"):
        checkpoint.open_checkpoint(tmp_path / "r")


def test_a_checkpoint_whose_bytes_changed_does_not_count(trained, tmp_path):
    folder = tmp_path / "r/checkpoints/step_00000004"
    shutil.copytree(trained / "checkpoints/step_00000004", folder)
    weights = folder / "weights_rank_0000.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    assert checkpoint.find(tmp_path / "r") is None and checkpoint.is_complete(folder, by_hash=False)
