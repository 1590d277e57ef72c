"""Codecs: their contract, what each class of diffusers computes, and files that are not whole or of another class."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import autoencoders
from commands import complains
from fastdit import autoencoder, cli
from fastdit.checkpoint import RunState
from fastdit.config import DataConfig, InputError, ModelConfig
from fastdit.data import prepare

CPU = torch.device("cpu")
SIZE = 32  # pixels
KINDS = {
    "KL": autoencoders.tiny, "f16d32": autoencoders.f16d32, "DC": autoencoders.dc, "Tiny": autoencoders.distilled,
    "RAE": autoencoders.representation,
}  # fmt: skip


def saved(kind, folder):
    """Save an autoencoder of a kind; AutoencoderRAE needs a package that fastdit does not require."""
    if kind == "RAE":
        pytest.importorskip("transformers")
    return KINDS[kind](folder)


def create(folder, size=SIZE):
    return autoencoder.create(str(folder), size, 3, CPU)


def refused(folder, *expected):
    """The sentence of the InputError that reading the folder raises; it holds the expected texts."""
    with pytest.raises(InputError) as caught:
        create(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence and all(text in sentence for text in expected), sentence
    return sentence


@pytest.fixture
def codec(tmp_path):
    return autoencoder.KL(str(autoencoders.tiny(tmp_path)), 32, CPU)


def test_a_compiled_decoder_sees_one_shape(codec, monkeypatch):
    """It is compiled by the first call of many images, and then the last part is filled up; before, few are decoded as they are."""
    shapes, compiled = [], []
    decoder = codec.for_decoding(torch.float32).vae.decoder
    assert not codec.may_compile_decoder  # on a CPU
    latents = torch.randn(66, 4, 16, 16)
    wanted = codec.decode(latents)
    monkeypatch.setattr(codec, "may_compile_decoder", True)
    monkeypatch.setattr(decoder, "compile", lambda **options: compiled.append(options))
    decoder.register_forward_pre_hook(lambda module, inputs: shapes.append(len(inputs[0])))
    torch.testing.assert_close(codec.decode(latents[:3]), wanted[:3])
    assert shapes == [3] and not compiled
    torch.testing.assert_close(codec.decode(latents), wanted)
    assert shapes[1:] == [8] * 9 and compiled == [{"dynamic": False}]
    torch.testing.assert_close(codec.decode(latents[:2]), wanted[:2])
    torch.testing.assert_close(codec.decode(latents[:64]), wanted[:64])
    assert set(shapes[1:]) == {8} and len(compiled) == 1


def test_the_hash_is_of_the_weights_as_they_were_loaded(codec, tmp_path):
    loaded = autoencoder.KL(str(tmp_path), 32, CPU).sha256()
    assert codec.for_encoding(torch.bfloat16).sha256() == loaded
    assert codec.for_decoding(torch.bfloat16).sha256() == loaded and codec.vae.dtype == torch.bfloat16


def test_latents_are_a_posterior_sample_times_the_scaling_factor(codec):
    assert (codec.channels, codec.size) == (4, 16)
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    noise = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        posterior = codec.vae.encode(images.repeat(1, 3, 1, 1)).latent_dist
        z = codec.posterior_sample(codec.encode(images), noise)
        torch.testing.assert_close(z, 0.5 * (posterior.mean + posterior.std * noise))
        torch.testing.assert_close(codec.decode(z), codec.vae.decode(z / 0.5).sample.clamp(-1, 1))


@pytest.mark.parametrize("kind", ["pixels", *KINDS])
def test_every_codec_keeps_the_contract(tmp_path, kind):
    """Every member of Codec, and shapes and dtypes from images to latents and back."""
    codec = autoencoder.Pixels(1, SIZE) if kind == "pixels" else create(saved(kind, tmp_path))
    members = {*autoencoder.Codec.__annotations__, *(name for name in vars(autoencoder.Codec) if name[0] != "_")}
    assert len(members) == 12 and all(hasattr(codec, name) for name in members)
    assert codec.image_channels == (1 if kind == "pixels" else 3)
    assert codec.about()["autoencoder_sha256"] == codec.sha256() and json.loads(json.dumps(codec.about())) == codec.about()
    assert codec.needs_noise == (kind in ("KL", "f16d32"))
    images = torch.rand(2, codec.image_channels, SIZE, SIZE) * 2 - 1
    noise = torch.randn(2, codec.channels, codec.size, codec.size) if codec.needs_noise else None
    latents = codec.for_encoding(torch.float32).posterior_sample(codec.encode(images), noise)
    assert latents.shape == (2, codec.channels, codec.size, codec.size) and latents.dtype == torch.float32
    decoded = codec.for_decoding(torch.float32).decode(10 * latents)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32 and decoded.abs().max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_images_are_those_of_diffusers(tmp_path, kind):
    """Of each class, against its own encode and decode and the scale that the pipelines apply between them."""
    folder = saved(kind, tmp_path)
    codec, images = create(folder), torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    vae, noise = codec.vae, torch.randn(2, codec.channels, codec.size, codec.size)
    with torch.no_grad():
        if kind == "RAE":  # images in [0,1]; it scales its latents itself
            wanted = vae.encode((images + 1) / 2).latent
            decoded = vae.decode(wanted).sample * 2 - 1
        elif kind == "DC":
            wanted = vae.encode(images).latent * 0.4
            decoded = vae.decode(wanted / 0.4).sample
        elif kind == "Tiny":
            wanted = vae.encode(images).latents
            decoded = vae.decode(wanted).sample
        elif kind == "KL":
            posterior = vae.encode(images).latent_dist
            wanted = (posterior.mean + posterior.std * noise) * 0.5
            decoded = vae.decode(wanted / 0.5).sample
        else:  # as pipeline_stable_diffusion_xl_img2img.py encodes and pipeline_stable_diffusion_xl.py decodes
            posterior = vae.encode(images).latent_dist
            mean, std = (torch.tensor(vae.config[key]).view(1, 32, 1, 1) for key in ("latents_mean", "latents_std"))
            wanted = (posterior.mean + posterior.std * noise - mean) * vae.config.scaling_factor / std
            decoded = vae.decode(wanted * std / vae.config.scaling_factor + mean).sample
    latents = codec.posterior_sample(codec.encode(images), noise)
    torch.testing.assert_close(latents, wanted)
    torch.testing.assert_close(codec.decode(latents), decoded.clamp(-1, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "size", "channels", "latent"), [("f16d32", 256, 32, 16), ("DC", 64, 8, 32), ("Tiny", 64, 4, 32)])
def test_the_downsampling_factor_is_the_classs(tmp_path, kind, size, channels, latent):
    codec = create(saved(kind, tmp_path), size)
    assert (codec.channels, codec.size) == (channels, latent)
    with pytest.raises(InputError, match=f"data.image_size={size + 1} must be a multiple of {size // latent}"):
        create(tmp_path, size + 1)


def test_deep_compression_by_32(tmp_path):
    codec = create(autoencoders.dc(tmp_path, depth=6, latent_channels=32), 256)
    assert (codec.channels, codec.size) == (32, 8) and codec.encode(torch.zeros(1, 3, 256, 256)).shape == (1, 32, 8, 8)


def test_a_representation_autoencoder_has_one_size(tmp_path):
    with pytest.raises(InputError, match=r"data\.image_size=64 must be 32"):
        create(saved("RAE", tmp_path), 64)


def test_a_representation_autoencoder_needs_transformers(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderRAE"}')
    (tmp_path / autoencoders.WEIGHTS).write_bytes(b"")
    monkeypatch.setattr(autoencoder.importlib.util, "find_spec", lambda name: None)
    refused(tmp_path, "AutoencoderRAE", "transformers", "pip install")


def test_the_folder_kernels_is_no_package_of_transformers(monkeypatch):
    """In a checkout, whose root is on sys.path under `python -m`, transformers would import it and load the ops twice."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    assert importlib.util.find_spec("kernels")
    autoencoder.import_diffusers()
    assert not importlib.util.find_spec("kernels")


OTHERS = [
    "AutoencoderKLFlux2", "AutoencoderKLTemporalDecoder", "AutoencoderKLQwenImage", "AutoencoderKLWan", "AsymmetricAutoencoderKL",
    "ConsistencyDecoderVAE", "VQModel", "UNet2DConditionModel",
    "FlaxAutoencoderKL", "StableDiffusionPipeline", "Nonsense", "", 5, None, [],
]  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_class_is_refused_by_name(tmp_path, name):
    """FLUX.2's has batch-norm statistics besides encode and decode; others are of videos, of discrete codes, or no autoencoder."""
    autoencoders.tiny(tmp_path)
    autoencoders.configure(tmp_path, _class_name=name)
    refused(tmp_path, f"is of the class {name}", "AutoencoderKL, AutoencoderDC, AutoencoderTiny, AutoencoderRAE")


def test_a_class_that_this_diffusers_lacks(tmp_path, monkeypatch):
    autoencoders.tiny(tmp_path)
    autoencoders.configure(tmp_path, _class_name="AutoencoderOfTomorrow")
    monkeypatch.setitem(autoencoder.CODECS, "AutoencoderOfTomorrow", autoencoder.KL)
    refused(tmp_path, "AutoencoderOfTomorrow", "diffusers 0.", "install a newer one")


@pytest.mark.parametrize("text", [b"{", b"[]", b"{}", b"\xff", b"null"])
def test_a_config_that_names_no_class(tmp_path, text):
    autoencoders.tiny(tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    refused(tmp_path, "config.json does not name a class")


def without(*keys):
    return lambda weights: {name: tensor for name, tensor in weights.items() if name not in keys}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_comes_from_the_file(tmp_path, kind):
    """One is missing, one is left over, one has another shape: each is an error that names it, and none is filled in at random."""
    folder = saved(kind, tmp_path)
    weights = create(folder).vae.state_dict()
    name = max(weights, key=lambda name: (weights[name].ndim == 4, name))
    for change, expected in (
        (without(name), ["is not whole", "lacks", name]),
        (lambda weights: weights | {"model_ema.decay": torch.zeros(1)}, ["is not whole", "holds model_ema.decay"]),
        (lambda weights: weights | {name: torch.zeros(3)}, ["cannot be loaded", name, "[3]"]),
    ):
        copy = folder.parent / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        autoencoders.change_weights(copy, change)
        refused(copy, *expected)


def test_names_of_old_versions_of_diffusers_are_read(tmp_path):
    """SD-VAE's own file has them: the attention was named query, key, value and proj_attn."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights):
        renamed = {}
        for name, tensor in weights.items():
            for new, before in old.items():
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
            renamed[name] = tensor
        assert renamed.keys() != weights.keys()
        return renamed

    wanted = create(autoencoders.tiny(tmp_path)).sha256()
    autoencoders.change_weights(tmp_path, rename)
    assert create(tmp_path).sha256() == wanted


def test_files_of_every_kind(tmp_path):
    """One safetensors file, shards, pickled tensors; of fp16 if there is nothing else."""
    wanted = create(autoencoders.tiny(tmp_path / "one")).sha256()
    vae = create(tmp_path / "one").vae
    vae.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert not (tmp_path / "shards" / autoencoders.WEIGHTS).exists()
    vae.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    for kind in ("shards", "pickle"):
        assert create(tmp_path / kind).sha256() == wanted, kind
    vae.half().save_pretrained(tmp_path / "half", variant="fp16")
    vae.save_pretrained(tmp_path / "half_shards", variant="fp16", max_shard_size="5KB")
    halves = [create(tmp_path / kind) for kind in ("half", "half_shards")]
    assert halves[0].dtype == torch.float32 and halves[0].sha256() == halves[1].sha256() != wanted
    shutil.copy(tmp_path / "one" / autoencoders.WEIGHTS, tmp_path / "half")
    assert create(tmp_path / "half").sha256() == wanted  # fp32 is preferred


def test_damaged_files_are_one_sentence(tmp_path):
    autoencoders.tiny(tmp_path / "one")
    create(tmp_path / "one").vae.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    create(tmp_path / "one").vae.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    path = tmp_path / "one" / autoencoders.WEIGHTS
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"version https://git-lfs.github.com/spec/v1", b"\xff" * 100):
        path.write_bytes(damaged)
        refused(tmp_path / "one", "cannot be loaded", "download it again")
    path.unlink()
    refused(tmp_path / "one", "no weights diffusion_pytorch_model.safetensors")
    max((tmp_path / "shards").glob("*-of-*")).unlink()
    refused(tmp_path / "shards", "cannot be loaded")
    path = tmp_path / "pickle" / "diffusion_pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:1000])
    refused(tmp_path / "pickle", "cannot be loaded")
    path.write_bytes(b"cbuiltins\nprint\n(S'run'\ntR.")  # a pickle that calls a function
    refused(tmp_path / "pickle", "cannot be loaded")
    autoencoders.configure(tmp_path / "pickle", block_out_channels="wide")
    refused(tmp_path / "pickle", "cannot be loaded")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"latents_mean": [0.0] * 4}, "latents_std=None"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1}, "shift_factor=0.1"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "3 latents_mean and 3 latents_std for 4 channels"),
        ({"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4}, "not finite and above 0"),
        ({"scaling_factor": 0}, "not finite and above 0"),
        ({"scaling_factor": "0.2"}, "not finite and above 0"),
        ({"latents_mean": "0000", "latents_std": [1.0] * 4}, "not finite and above 0"),
    ],
)
def test_a_scale_that_is_no_scale_is_refused(tmp_path, settings, expected):
    autoencoders.tiny(tmp_path)
    autoencoders.configure(tmp_path, **settings)
    refused(tmp_path, expected)


def test_means_of_a_class_that_ignores_them_are_applied(tmp_path):
    """AutoencoderDC has no latents_mean: diffusers only warns of it."""
    plain = create(autoencoders.dc(tmp_path))
    autoencoders.configure(tmp_path, latents_mean=[1.0] * 8, latents_std=[2.0] * 8)
    codec, images = create(tmp_path), torch.rand(1, 3, SIZE, SIZE)
    moments = plain.encode(images)
    assert torch.equal(codec.encode(images), moments)
    torch.testing.assert_close(codec.posterior_sample(moments, None), (moments - 1) * 0.4 / 2)
    assert codec.about()["latents_std"] == [2.0] * 8


def test_images_of_other_channels_or_sizes_are_refused(tmp_path):
    autoencoders.tiny(tmp_path / "grey", in_channels=1, out_channels=1)
    refused(tmp_path / "grey", "images of 1 channels")
    given = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in (("layers_per_block", [1, 1]),)}
    given |= {"encoder_qkv_multiscales": [[], []], "decoder_qkv_multiscales": [[], [], []], "decoder_layers_per_block": [1, 1, 1]}
    given |= {"encoder_block_out_channels": [8, 16], "decoder_block_out_channels": [8, 8, 16]}
    autoencoders.save("AutoencoderDC", tmp_path / "uneven", latent_channels=8, attention_head_dim=8, **given)
    refused(tmp_path / "uneven", "8x16x16 latents of 3x32x32 images, but 3x64x64 images")


def test_one_rank_downloads(monkeypatch):
    """World.together(everywhere=False) runs it on rank 0 and raises its error everywhere."""
    calls = []

    class Ranks:
        def together(self, work, everywhere=True):
            calls.append((work(), everywhere))

    monkeypatch.setattr(autoencoder, "locate", lambda source: calls.append(source))
    autoencoder.download("pixels", Ranks())
    autoencoder.download("owner/name", Ranks())
    assert calls == ["owner/name", (None, False)]


def test_the_docs_list_every_class():
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    assert [line.split("`")[1] for line in page.splitlines() if line.startswith("| `Autoencoder")] == list(autoencoder.CODECS)


def test_another_scale_or_other_weights_are_a_difference(tmp_path):
    codec = create(autoencoders.f16d32(tmp_path))
    about = codec.about()
    assert autoencoder.difference(codec, about) is None
    assert autoencoder.difference(codec, {"autoencoder_sha256": None}) is None  # it was not kept
    for key, value in (("autoencoder_sha256", "0" * 64), ("scaling_factor", 2.0), ("shift", 1.0), ("latents_mean", [0.0] * 32)):
        assert autoencoder.difference(codec, about | {key: value}).startswith(f"{key} ")
    manifest = {**about, "autoencoder": "elsewhere", "latents_std": [1.0] * 32}
    model = ModelConfig(in_channels=32, input_size=2, patch_size=1)
    with pytest.raises(InputError, match=r"not the one that the latents were made with, elsewhere .*latents_std"):
        autoencoder.load(DataConfig(autoencoder=str(tmp_path), image_size=SIZE), model, 3, CPU, manifest)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with an autoencoder in vae/, and pictures in ../data/."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 36), (60 * i, 99, 10 * i)).save(tmp_path / "data" / name / f"{i}.png")
    autoencoders.tiny(Path("vae"))
    return tmp_path / "here"


TRAIN = [
    "train", "model.preset=test/4", "model.in_channels=4", "model.input_size=16", "model.num_classes=2", "data.autoencoder=vae",
    "data.image_size=32", "train.batch_size=4", "train.warmup_steps=1", "train.sample_steps=0", "train.precision=fp32",
    "train.out=runs", "train.name=r", "train.log_steps=1", "train.schedule=constant",
]  # fmt: skip


def sample(run, out):
    return ["sample", "--checkpoint", str(run), "--class", "0", "--steps", "2", "--out", str(out)]


def test_a_run_finds_its_autoencoder_from_any_folder(here, tmp_path, monkeypatch):
    """data.autoencoder=vae is that of the folder where it was trained; another vae/ where one stands is not taken. The run may
    move together with it, also to be continued."""
    source = f"data.source={prepare.prepare([tmp_path / 'data'], tmp_path / 'index')}"
    assert cli.main([*TRAIN, source, "train.total_steps=2"]) == 0
    assert cli.main(sample("runs/r", tmp_path / "wanted.png")) == 0
    (tmp_path / "other").mkdir()
    autoencoders.tiny(tmp_path / "other" / "vae", seed=1)
    monkeypatch.chdir(tmp_path / "other")
    assert cli.main(sample(here / "runs" / "r", "elsewhere.png")) == 0
    there = here.rename(tmp_path / "there")
    assert cli.main(sample(there / "runs" / "r", "moved.png")) == 0
    assert Path("elsewhere.png").read_bytes() == Path("moved.png").read_bytes() == (tmp_path / "wanted.png").read_bytes()
    monkeypatch.chdir(there)
    for autoencoder_then in ("vae", str(here / "vae")):  # the same command where it is now, and the path as it was
        assert cli.main([*TRAIN, source, f"data.autoencoder={autoencoder_then}", "train.total_steps=3"]) == 0


def test_a_run_refuses_other_weights_in_the_same_folder(here, tmp_path, capsys):
    """When it samples, draws for an evaluation and resumes; a checkpoint that did not keep the hash does not."""
    source = f"data.source={prepare.prepare([tmp_path / 'data'], tmp_path / 'index')}"
    assert cli.main([*TRAIN, source, "train.total_steps=2"]) == 0
    assert cli.main(["export", "runs/r", "--out", "r.safetensors"]) == 0
    shutil.move("vae", "vae_before")
    shutil.copytree("vae_before", "vae")
    autoencoders.configure(Path("vae"), scaling_factor=0.25)
    expected = ["was trained with another autoencoder", str(here / "vae"), "put the files of that one back"]
    complains(capsys, sample("runs/r", "x.png"), *expected, "scaling_factor 0.5 there, 0.25 here")
    shutil.rmtree("vae")
    autoencoders.tiny(Path("vae"), seed=1)
    for path in ("runs/r", "r.safetensors"):
        complains(capsys, sample(path, "x.png"), *expected, "autoencoder_sha256")
    drawn = ["--samples", "4", "--features", "digits", "--reference", "mnist5k"]
    complains(capsys, ["evaluate", "runs/r", *drawn, "--steps", "2"], *expected)
    complains(capsys, ["sweep", "runs/r", "steps=2", *drawn, "--out", "sweep.csv"], *expected)
    complains(capsys, [*TRAIN, source, "train.total_steps=3"], *expected)
    assert not Path("x.png").exists()
    complains(capsys, [*TRAIN, source, "data.autoencoder=pixels", "train.total_steps=3"], "pixels")
    assert cli.main([*TRAIN, source, "data.autoencoder=vae_before", "train.total_steps=3"]) == 0  # another path, the same weights
    (state,) = Path("runs/r/checkpoints").glob("step_*3/state.json")
    kept = json.loads(state.read_text())
    assert kept["autoencoder_path"] == "../../vae_before" and kept["autoencoder_scale"] == {"scaling_factor": 0.5, "shift": 0.0}
    old = RunState.from_dict({key: value for key, value in kept.items() if not key.startswith("autoencoder")})
    autoencoder.check(create("vae"), old.autoencoder, Path("runs/r"), "vae")
