"""The checkpoint format: what opening one reads, damaged and incomplete folders, exported files."""

import hashlib
import json
import re
import shutil

import pytest
import torch

from commands import complains, settings, snapshot, trained_run
from fastdit import checkpoint, cli, files
from fastdit.config import InputError, from_dict, parse
from fastdit.model import DiT
from fastdit.sampling.sampler import Sampler
from fastdit.training.loop import train


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
    hashed, sha256 = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda file: hashed.append(file.name) or sha256(file))
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


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the trained run with its checkpoint under steps 2 and 4. Returns the folder of its checkpoints."""
    folder = tmp_path / "r/checkpoints"
    for step in (2, 4):
        shutil.copytree(trained / "checkpoints/step_00000004", folder / checkpoint.folder_name(step))
    return folder


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


MANIFESTS = [
    b"[]", b'"text"', b"{}", b'{"files": []}', b'{"files": {}}', b'{"files": {"config.json": 3}}', b"\xff", b"{", b"[" * 100_000,
    b'{"files": {"config.json": {}}}', b'{"files": {"a": {"bytes": "x", "sha256": ""}}}',
    b'{"files": {"../x": {"bytes": 0, "sha256": ""}}}',
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "harm", "words"),
    [
        ("weights_rank_0000.safetensors", cut, r"weights_rank_0000.safetensors has \d+ bytes, not \d+;"),
        ("weights_rank_0000.safetensors", flip_a_bit, "weights_rank_0000.safetensors has other contents"),
        ("state.json", lambda file: file.unlink(), "state.json is missing"),
        ("manifest.json", lambda file: file.unlink(), "manifest.json: No such file"),
        ("manifest.json", lambda file: file.unlink() or file.mkdir(), "manifest.json: Is a directory"),
        *(
            ("manifest.json", lambda file, data=data: file.write_bytes(data), "manifest.json is not|x is missing")
            for data in MANIFESTS
        ),
    ],
)
def test_of_damaged_checkpoints_the_newest_whole_one_is_used_and_said(copy, tmp_path, capsys, file, harm, words):
    newest, older = copy / "step_00000004", copy / "step_00000002"
    harm(newest / file)
    assert checkpoint.find(tmp_path / "r").path == older
    said = capsys.readouterr().err
    assert said.startswith(f"fastdit: warning: checkpoint {newest} is damaged: ") and re.search(words, said), said
    assert said.endswith(f"; {older} is used instead\n") and said.count("\n") == 1
    harm(older / file)
    with pytest.raises(InputError, match="there is no whole one") as error:
        checkpoint.find(tmp_path / "r")
    assert str(newest) in str(error.value) and str(older) in str(error.value)


@pytest.mark.parametrize("command", ["sample", "export", "evaluate", "train"])
def test_every_command_says_that_it_uses_an_older_checkpoint(copy, tmp_path, capsys, command):
    run = tmp_path / "r"
    cut(copy / "step_00000004/weights_rank_0000.safetensors")
    words = {
        "sample": ["--checkpoint", str(run), "--class", "1", "--out", str(tmp_path / "a.png")],
        "export": [str(run), "--out", str(tmp_path / "m.safetensors")],
        "evaluate": [str(run), "--features", "digits", "--samples", "10", "--out", str(tmp_path / "e.json")],
        "train": settings(tmp_path, "train.total_steps=4"),
    }[command]
    assert cli.main([command, *words]) == 0
    warned = capsys.readouterr().err
    assert f"warning: checkpoint {copy / 'step_00000004'} is damaged: " in warned and f"{copy / 'step_00000002'} is used" in warned
    cut(copy / "step_00000002/weights_rank_0000.safetensors")
    before = snapshot(run)
    complains(capsys, [command, *words], "step_00000002", "step_00000004", "no whole one")
    assert snapshot(run) == before


def test_a_damaged_checkpoint_stays_when_its_step_is_saved_again(tmp_path):
    path, _ = make(tmp_path / "run")
    (path / "state.json").write_text("damaged")
    again, _ = make(tmp_path / "run")
    assert again == path and checkpoint.find(tmp_path / "run").path == path
    assert (path.with_name(f"{path.name}.damaged") / "state.json").read_text() == "damaged"


def test_other_names_beside_the_checkpoints_are_left_alone(trained, copy, tmp_path):
    for name in ("step_00000004.bak", "step_x", "step_00000009 (copy)", "step_", "notes"):
        shutil.copytree(copy / "step_00000004", copy / name)
    for name in ("step_00000007", "step_00000008.tar"):
        (copy / name).write_text("a file")
    names = {path.name for path in copy.iterdir()}
    assert checkpoint.find(tmp_path / "r").path == copy / "step_00000004"
    train(parse(None, settings(tmp_path, "train.total_steps=6", "train.keep_checkpoints=1", "train.sample_steps=0")))
    assert {path.name for path in copy.iterdir()} == names - {"step_00000002", "step_00000004"} | {"step_00000006"}


@pytest.mark.parametrize(
    "state",
    [b"[]", b'"text"', b"\xff", b'{"step": "x"}', b'{"class_names": 3}', b'{"ranks": null}', b'{"ranks": 9}', b"[" * 100_000],
)
def test_a_state_of_another_shape_is_one_sentence(copy, capsys, state):
    """Of a checkpoint whose manifest agrees with it."""
    (copy / "step_00000004/state.json").write_bytes(state)
    manifest = json.loads((copy / "step_00000004/manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    (copy / "step_00000004/manifest.json").write_text(json.dumps(manifest))
    complains(capsys, ["sample", "--checkpoint", str(copy / "step_00000004"), "--class", "1"], str(copy / "step_00000004"))


@pytest.mark.parametrize(
    "data", [b"[]", b'"text"', b"3", b"{}", b'{"config": [], "state": {}}', b'{"config": {}, "state": []}', b"\xff\xfe", b"{"]
)
def test_an_export_of_another_shape_is_one_sentence(tmp_path, capsys, data):
    make(tmp_path / "run")
    checkpoint.export(tmp_path / "run", "ema", tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_bytes(data)
    complains(capsys, ["sample", "--checkpoint", str(tmp_path / "model.safetensors")], "not what `fastdit export` writes")
