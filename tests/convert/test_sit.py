"""SiT's and REPA's format: the velocities, gradients and samples of an independent implementation, and files that are none."""

import argparse
import json
import pickle
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import inception
from autoencoders import Enlarged
from commands import complains
from fastdit import autoencoder, checkpoint, cli, kernels
from fastdit.config import Config, InputError, from_dict
from fastdit.convert import sit
from fastdit.convert.base import PUBLISHED_VAE
from fastdit.flow import Stream
from fastdit.model import DiT
from fastdit.sampling.sampler import Sampler
from fastdit.training import saver
from published_sit import PublishedSiT, euler, randomise

FILE = Path("weights.pt")  # only named

CLASSES, SIZE = 20, 8  # of the small cases
SMALL = dict(width=384, depth=12, heads=6, patch=2, size=SIZE, classes=CLASSES)  # SiT-S/2
BASE = dict(width=768, depth=12, heads=12, patch=4, size=SIZE, classes=CLASSES)  # SiT-B/4


def published(**shape):
    model = PublishedSiT(**{**SMALL, **shape})
    randomise(model)
    return model


@pytest.fixture(scope="module")
def repa():
    return published(doubled=False, projectors=1)


def load(monkeypatch, contents, data_at=None):
    """The conversion of what a file holds, without the file."""
    monkeypatch.setattr(sit.files, "read", lambda file: contents)
    return sit.load(FILE, data_at)


def without_projectors(network):
    return {name: t for name, t in network.state_dict().items() if "projectors" not in name}


def of_weights(imported):
    model = DiT(imported.config)
    model.load_state_dict(imported.weights)
    return model


class Case:
    """A published network, the file that holds it, and its conversion."""

    def __init__(self, folder, form, data_at, **shape):
        self.network = published(**shape)
        self.data_at = data_at
        state = self.network.state_dict()
        arguments = argparse.Namespace(model="SiT-S/2", path_type="Linear", prediction="velocity", image_size=64)
        other = {name: t + 1 for name, t in state.items()}
        contents = {
            "bare": state,
            "ema": {"ema": state},
            "training": {"ema": state, "model": other, "opt": {"state": {}}, "args": arguments, "steps": 7},
        }
        self.file = folder / "weights.pt"
        torch.save(contents[form], self.file)
        self.imported = sit.load(self.file)
        self.model = of_weights(self.imported)

    def batch(self):
        g = torch.Generator().manual_seed(1)
        x, wanted = torch.randn(2, 4, 4, SIZE, SIZE, generator=g).unbind()
        return x, torch.tensor([1.0, 0.7, 0.31, 0.001]), torch.tensor([0, 7, CLASSES - 1, CLASSES]), wanted


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("bare", 1, SMALL), id="SiT-S/2"),
        pytest.param(("ema", 1, BASE), id="SiT-B/4", marks=pytest.mark.slow),
        pytest.param(("training", 0, {**SMALL, "doubled": False, "projectors": 2}), id="REPA-S/2"),
    ],
)
def case(request, tmp_path_factory):
    form, data_at, shape = request.param
    return Case(tmp_path_factory.mktemp("sit"), form, data_at, **shape)


def test_velocity_and_every_gradient(case):
    """Within 1e-5 of the published network's at the same point; ours is noise − data at t = 1 − theirs, or theirs as it is."""
    x, t, classes, wanted = case.batch()
    network, flip = case.network, case.data_at == 1
    network.zero_grad()
    theirs = (-1 if flip else 1) * network(x, 1 - t if flip else t, classes)
    F.mse_loss(theirs, wanted).backward()
    v = case.model(x, t, classes)
    assert theirs.std() > 0.1 and (v - theirs).abs().max() < 1e-5
    # The conversion is a linear function of the published tensors: gradients go back through it.
    state = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters() if "projectors" not in name}
    converted = sit.convert(state, case.imported.config, case.data_at)
    F.mse_loss(torch.func.functional_call(case.model, converted, (x, t, classes)), wanted).backward()
    for name, p in network.named_parameters():
        if "projectors" not in name and name != "pos_embed":
            assert p.grad is not None and p.grad.abs().max() > 1e-6, name
            assert (state[name].grad - p.grad).abs().max() < 1e-5, name


@torch.no_grad()
def test_five_guided_euler_steps(case):
    """From the same noise to the same latents, in the published direction of time and with the papers' scale of guidance."""
    sampler = Sampler.of_model(of_weights(case.imported), Config(model=case.imported.config), None)
    labels = torch.tensor([3, 0, 11])
    ((_, latents),) = sampler.latents(labels, seed=5, settings=sampler.settings(steps=5, solver="euler", guidance=3.0))
    noise = kernels.counter_normal(5, Stream.SAMPLE, torch.arange(3), (4, SIZE, SIZE))
    expected = euler(case.network, noise, labels, 5, scale=4.0, data_at=case.data_at)
    assert expected.std() > 0.5 and (latents - expected).abs().max() < 1e-4


def test_a_run_like_any_other(case, tmp_path, capsys, monkeypatch):
    """Imported, sampled from, evaluated and exported by the command line; it names SiT's autoencoder and cannot be resumed."""
    run, out = tmp_path / "run", tmp_path / "latents.npz"
    assert cli.main(["import", str(case.file), "--format", "sit", "--out", str(run)]) == 0
    printed = capsys.readouterr().out
    assert f"{case.imported.config.preset} for 64 pixels and 20 classes, data at t = {case.data_at}" in printed
    assert ("left out: 12 tensors of REPA's projectors" in printed) == (case.data_at == 0)
    opened = checkpoint.open_checkpoint(run)
    assert (opened.config.data.autoencoder, opened.config.data.image_size) == (PUBLISHED_VAE, 64)
    assert (opened.state.step, opened.state.origin) == (7 if case.data_at == 0 else 0, "weights.pt")
    with pytest.raises(InputError, match="can be sampled from, not continued"):
        saver.check(opened, opened.config, None)
    assert cli.main(["export", str(run), "--out", str(tmp_path / "e.safetensors")]) == 0
    sampled = []
    for source in (run, tmp_path / "e.safetensors"):
        words = ["--class", "3", "--steps", "2", "--solver", "euler", "--latents", str(out)]
        assert cli.main(["sample", "--checkpoint", str(source), *words]) == 0
        sampled.append(np.load(out)["latents"])
    assert np.array_equal(*sampled) and np.isfinite(sampled[0]).all()
    monkeypatch.setattr(autoencoder, "load", lambda *_, **__: Enlarged(SIZE))
    np.savez(tmp_path / "ref.npz", arr_0=np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8))
    network = inception.save(tmp_path / "net.pt")
    words = ["--features", network, "--reference", tmp_path / "ref.npz", "--samples", 4, "--labels", "random", "--steps", 1]
    assert cli.main([str(word) for word in ["evaluate", run, *words, "--out", tmp_path / "e.json"]]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["metrics"]["fid"] > 0
    complains(capsys, ["import", case.file, "--format", "sit", "--out", run], "holds checkpoints already")


def tensors(**shape):
    """The published tensors by name, as shapes without values."""
    with torch.device("meta"):
        return dict(PublishedSiT(**{**SMALL, **shape}).state_dict())


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads"),
    [("S", 384, 12, 6), ("B", 768, 12, 12), ("L", 1024, 24, 16), ("XL", 1152, 28, 16)],
)
def test_published_sizes(name, width, depth, heads):
    """256 and 512 pixels and all patches: what pos_embed and the patch embedding say."""
    for size, patch in ((32, 2), (64, 2), (32, 4), (32, 8)):
        shape = dict(width=width, depth=depth, heads=heads, patch=patch, size=size, classes=1000)
        config, outputs = sit.model_config(tensors(**shape), FILE)
        assert (config.preset, config.width, config.depth, config.heads) == (f"sit-{name}/2", width, depth, heads)
        assert (config.input_size, config.patch_size, config.num_classes, outputs) == (size, patch, 1000, 8)
        assert config.hidden == 4 * width


def replaced(name, tensor):
    return lambda state: state.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.clear(), ["not a SiT", "x_embedder.proj.weight"]),
        (lambda state: state.pop("pos_embed"), ["pos_embed"]),
        (lambda state: state.pop("blocks.4.attn.proj.bias"), ["not a sit-S/2", "no tensor blocks.4.attn.proj.bias"]),
        (lambda state: [state.pop(name) for name in list(state) if name.startswith("blocks.11.")], ["11 blocks", "12 of 384"]),
        (lambda state: state.update({"blocks.12.attn.qkv.weight": torch.empty(1)}), ["13 blocks of width 384"]),
        (replaced("blocks.0.attn.q_norm.weight", torch.empty(64)), ["no tensor 'blocks.0.attn.q_norm.weight'"]),
        (replaced(f"blocks.{'9' * 5000}.attn", torch.empty(64)), ["no tensor 'blocks.999"]),
        (replaced("a\nb", torch.empty(64)), ["no tensor 'a\\nb'"]),
        (replaced("blocks.2.mlp.fc1.weight", torch.empty(1024, 384)), ["blocks.2.mlp.fc1.weight", "[1024, 384]", "[1536, 384]"]),
        (replaced("pos_embed", torch.empty(1, 15, 384)), ["pos_embed", "[1, 15, 384]"]),
        (replaced("pos_embed", torch.empty(16, 384)), ["pos_embed", "3 dimensions"]),
        (replaced("x_embedder.proj.weight", torch.empty(384, 16, 2, 2)), ["16 channels", "4"]),
        (replaced("x_embedder.proj.weight", torch.empty(384, 4, 2, 1)), ["x_embedder.proj.weight", "[384, 4, 2, 1]"]),
        (replaced("x_embedder.proj.weight", torch.empty(384, 16)), ["x_embedder.proj.weight", "4 dimensions"]),
        (replaced("y_embedder.embedding_table.weight", torch.empty(1, 384)), ["num_classes=0"]),
        (replaced("final_layer.linear.bias", torch.empty(12)), ["final_layer.linear"]),
    ],
    ids=range(16),
)
def test_other_networks_are_one_sentence(change, words):
    state = tensors()
    change(state)
    with pytest.raises(InputError) as error:
        sit.model_config(state, FILE)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


class Code:
    def __reduce__(self):
        return print, ("the pickle's code ran",)


def test_other_files_are_one_sentence_and_write_nothing(tmp_path, capsys):
    file, cut, out = tmp_path / "w.pt", tmp_path / "cut.pt", tmp_path / "run"
    words = ["import", file, "--format", "sit", "--out", out]
    complains(capsys, words, "w.pt", "No such file")
    complains(capsys, ["import", tmp_path, "--format", "sit", "--out", out], "cannot be read")
    fake = torch.zeros(1).expand(1152, 4, 10_000, 10_000)  # terabytes in a file of a kilobyte
    contents = [
        b"", b"PK\3\4", b"no pickle", pickle.dumps({"w": Code()}, 2), pickle.dumps({"ema": {"w": Code()}}, 4), [1, 2], {}, None,
        {"ema": 3}, {"model": {"w": torch.zeros(2)}}, {"w": torch.zeros(2, dtype=torch.int64)}, {3: torch.zeros(2)},
        {"w": torch.zeros(2).to_sparse()}, {"x_embedder.proj.weight": fake}, {"ema": {"decoder_blocks": torch.zeros(2)}},
    ]  # fmt: skip
    for content in contents:
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        assert cli.main([str(word) for word in words]) == 2
        printed = capsys.readouterr()
        assert not printed.out and printed.err.startswith("fastdit: ") and "w.pt" in printed.err and printed.err.count("\n") == 1
    for new in (True, False):
        torch.save({"w": torch.zeros(1000)}, file, _use_new_zipfile_serialization=new)
        cut.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        complains(capsys, ["import", cut, "--format", "sit", "--out", out], "damaged")
    assert not out.exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("data", range(4))
def test_damaged_bytes_never_end_in_a_traceback(tmp_path, data):
    """A small file of either form with random bytes in it: read, or one sentence."""
    rng, file = np.random.default_rng(data), tmp_path / "w.pt"
    torch.save(
        {"ema": {"w": torch.randn(3, 2)}, "args": argparse.Namespace(a=1)}, file, _use_new_zipfile_serialization=data % 2 == 0
    )
    whole = np.frombuffer(file.read_bytes(), np.uint8)
    for _ in range(150):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), rng.integers(1, 8))] = rng.integers(0, 256)
        file.write_bytes(damaged.tobytes())
        with pytest.raises(InputError):
            sit.load(file)


def test_the_options_of_other_formats_are_refused(tmp_path, capsys):
    out = ["--out", tmp_path / "run"]
    complains(capsys, ["import", FILE, *out], "--format base or sit")
    complains(capsys, ["import-base", FILE, "--format", "sit", *out], "use fastdit import")
    complains(capsys, ["import", FILE, "--format", "sit", "--params", "p.json", *out], "--params is not for --format sit")
    complains(capsys, ["import", FILE, "--format", "base", "--data-at", "1", *out], "--data-at is not for --format base")


SETTINGS = [
    ({"model": "DiT-XL/2"}, "model=DiT-XL/2"),
    ({"model": "SiT-XL/2", "path_type": "GVP"}, "path_type=GVP"),
    ({"path_type": "cosine"}, "path_type=cosine"),
    ({"prediction": "noise"}, "prediction=noise"),
]


@pytest.mark.parametrize(("arguments", "named"), SETTINGS, ids=str)
def test_saved_settings_of_another_model_or_path_are_refused(monkeypatch, repa, arguments, named):
    contents = {"ema": repa.state_dict(), "args": argparse.Namespace(**arguments)}
    with pytest.raises(InputError, match=f"{named}, but only SiT models with linear paths"):
        load(monkeypatch, contents, data_at=1)


def test_what_may_be_sit_or_repa_is_asked(monkeypatch, repa):
    """Four channels and no projectors: SiT's code can make that, and REPA's weights for inference are that."""
    network, state = repa, without_projectors(repa)
    with pytest.raises(InputError, match="--data-at 1 if its data are at t = 1, as in SiT, or --data-at 0"):
        load(monkeypatch, state)
    x, t, classes = torch.randn(1, 4, SIZE, SIZE), torch.tensor([0.3]), torch.tensor([2])
    for data_at, theirs in ((1, lambda: -network(x, 1 - t, classes)), (0, lambda: network(x, t, classes))):
        model = of_weights(load(monkeypatch, state, data_at))
        assert (model(x, t, classes) - theirs()).abs().max() < 1e-5


def test_older_names_of_repa_averaged_positions_and_bf16(monkeypatch, repa):
    """REPA's first blocks and the others by two names; positions that are off as an average in fp32 is; half of the bytes."""
    state = repa.state_dict()
    old = {name: t.bfloat16() for name, t in state.items()}
    for name in list(old):
        number = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        if number >= 8:
            old[name.replace(f"blocks.{number}.", f"decoder_blocks.{number - 8}.")] = old.pop(name)
    old["pos_embed"] = state["pos_embed"] - 3e-4
    imported = load(monkeypatch, {"ema": old})
    assert imported.config.positions == "sincos" and "positions" not in imported.weights
    rounded = {name: t.bfloat16().float() for name, t in state.items()}
    wanted = sit.convert(rounded, imported.config, 0)
    assert imported.weights.keys() == wanted.keys()
    assert all(torch.equal(imported.weights[name], t) for name, t in wanted.items())


def test_learned_positions_stay(monkeypatch):
    network = published()
    with torch.no_grad():
        network.pos_embed.add_(torch.randn_like(network.pos_embed))
    imported = load(monkeypatch, network.state_dict())
    assert imported.config.positions == "absolute" and any("learned" in note for note in imported.notes)
    model = of_weights(imported)
    x, t, classes = torch.randn(1, 4, SIZE, SIZE), torch.tensor([0.3]), torch.tensor([2])
    assert (model(x, t, classes) + network(x, 1 - t, classes)).abs().max() < 1e-5


def test_weights_that_are_not_finite_are_damaged(monkeypatch, repa):
    state = repa.state_dict()
    state["blocks.3.mlp.fc1.bias"] = torch.full((1536,), float("nan"))
    with pytest.raises(InputError, match="damaged: a velocity of its model is not finite"):
        load(monkeypatch, state)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flow", "diffusion"])
def test_a_trained_flow_is_told_from_a_trained_diffusion_model(kind):
    """Both networks and files are the same; one was trained on SiT's paths, one to predict the noise of 1000 steps, as DiT is."""
    torch.manual_seed(0)
    network = PublishedSiT(width=128, depth=3, heads=2, patch=2, size=4, classes=CLASSES)
    with torch.no_grad():  # adaLN-Zero
        for layers in (*(block.adaLN_modulation for block in network.blocks), network.final_layer["adaLN_modulation"]):
            layers[1].weight.zero_()
            layers[1].bias.zero_()
        network.final_layer["linear"].weight.zero_()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    means, alphas = torch.randn(CLASSES + 1, 4, 4, 4), (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    for _ in range(200):
        classes = torch.randint(0, CLASSES + 1, (32,))
        data, noise = 0.7 * means[classes] + 0.5 * torch.randn(32, 4, 4, 4), torch.randn(32, 4, 4, 4)
        t = torch.rand(32) if kind == "flow" else torch.randint(0, 1000, (32,))
        of_data = (t if kind == "flow" else alphas[t.long()]).view(-1, 1, 1, 1)
        if kind == "flow":
            x, target = of_data * data + (1 - of_data) * noise, data - noise
        else:
            x, target = of_data.sqrt() * data + (1 - of_data).sqrt() * noise, noise
        F.mse_loss(network(x, t.float(), classes), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    sizes = dict(width=128, depth=3, heads=2, hidden=512, input_size=4, num_classes=CLASSES, in_channels=4)
    config = from_dict({"model": {"preset": "sit-S/2", **sizes}}).model
    weights = {name: t.detach() for name, t in sit.convert(network.state_dict(), config, 1).items()}
    if kind == "flow":
        assert "check: " in sit.check_velocity(config, weights, 1, FILE)
    else:
        with pytest.raises(InputError, match="predicts the noise of 1000 diffusion steps"):
            sit.check_velocity(config, weights, 1, FILE)


@pytest.mark.slow
def test_a_full_size_checkpoint_is_imported_in_60_s_and_8_gb(tmp_path, record_property):
    """SiT-XL/2 at 256 pixels, 675 M random numbers, in a process of its own. The seconds are those of all its threads;
    those on the clock depend on what else runs, and are recorded."""
    shape = dict(width=1152, depth=28, heads=16, patch=2, size=32, classes=1000)
    torch.manual_seed(0)
    state = {name: torch.empty(t.shape).normal_(std=0.02) for name, t in tensors(**shape).items()}
    assert sum(t.numel() for t in state.values()) / 1e6 == pytest.approx(675, abs=1)
    state["pos_embed"] = PublishedSiT(**{**shape, "depth": 0}).pos_embed.detach()
    torch.save(state, file := tmp_path / "SiT-XL-2-256x256.pt")
    del state
    words = ["import", file, "--format", "sit", "--out", tmp_path / "run"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "fastdit.cli", *map(str, words)], capture_output=True, text=True, timeout=300, check=False
    )
    after, elapsed = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - start
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0, done.stderr[-2000:]
    peak = after.ru_maxrss * 1024  # bytes; Linux counts in KiB
    record_property("peak_gb", peak / 1e9)
    record_property("cpu_s", seconds)
    record_property("elapsed_s", elapsed)
    assert "sit-XL/2 for 256 pixels and 1000 classes" in done.stdout
    assert checkpoint.open_checkpoint(tmp_path / "run").config.data.image_size == 256
    assert seconds < 60 and peak < 8e9, (seconds, peak / 1e9)
