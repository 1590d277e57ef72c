"""Where an autoencoder's files are: folders, pipelines, the Hub's cache, downloads, and the sentence if there is no internet."""

import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

import autoencoders
from commands import environment
from fastdit.autoencoder_files import HubId, absolute, locate, moved, relative
from fastdit.config import InputError

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of huggingface_hub, and no internet."""

    def no_name(*arguments, **options):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    return tmp_path / "cache"


def put(cache, repository, subfolder="", ref="main"):
    """Put an autoencoder into the cache as a download of the repository's branch `ref` does, and return its folder."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(REVISION)
    return autoencoders.tiny(folder / "snapshots" / REVISION / subfolder)


def refusal(source):
    with pytest.raises(InputError) as caught:
        locate(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("stabilityai/sd-vae-ft-ema", ("stabilityai/sd-vae-ft-ema", "", None)),
        ("owner/name/vae", ("owner/name", "vae", None)),
        ("owner/na.me-1/a/b@main", ("owner/na.me-1", "a/b", "main")),
        ("owner/name@refs/pr/1", ("owner/name", "", "refs/pr/1")),
        *[(text, None) for text in ("name", "/owner/name", "./a", "../a", "~/a", "owner/name/", "owner/name@", "a//b", "")],
        ("https://huggingface.co/owner/name", None),
    ],
)  # fmt: skip
def test_hub_ids(text, parts):
    assert HubId.parse(text) == parts


def test_a_folder_or_a_pipelines(tmp_path, monkeypatch):
    """Its own comes first, but not in a pipeline's folder."""
    vae = autoencoders.tiny(tmp_path / "pipe" / "vae")
    assert locate(str(tmp_path / "pipe"))[0] == locate(str(vae))[0] == vae
    autoencoders.tiny(tmp_path / "pipe")
    assert locate(str(tmp_path / "pipe"))[0] == tmp_path / "pipe"
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    assert locate(str(tmp_path / "pipe"))[0] == vae
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/pipe/vae")[0] == vae


def test_what_is_no_autoencoder_is_one_sentence(tmp_path, cache):
    (tmp_path / "empty").mkdir()
    assert "has no config.json and no vae/config.json" in refusal(str(tmp_path / "empty"))
    (tmp_path / "file.safetensors").write_bytes(b"")
    assert "is a file: give the folder" in refusal(str(tmp_path / "file.safetensors"))
    assert "OWNER/NAME[/SUBFOLDER][@REVISION]" in refusal(str(tmp_path / "nowhere"))
    for odd in ("a\0b", "x" * 5000, ""):
        assert "OWNER/NAME" in refusal(odd)


def test_the_cache_is_read_without_a_connection(cache):
    plain = put(cache, "owner/plain")
    assert locate("owner/plain")[0] == plain == locate(f"owner/plain@{REVISION}")[0]
    pipeline = put(cache, "owner/pipeline", "vae")
    assert locate("owner/pipeline")[0] == pipeline == locate("owner/pipeline/vae")[0]
    branch = put(cache, "owner/branch", "deep/er", ref="refs/pr/1")
    assert locate("owner/branch/deep/er@refs/pr/1")[0] == branch
    assert "could not be downloaded" in refusal("owner/branch/deep/er")  # main is another revision
    (plain / autoencoders.WEIGHTS).unlink()
    assert "could not be downloaded" in refusal("owner/plain")  # a half of it was downloaded


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("owner/name", "hf download owner/name --include 'config.json' --include 'diffusion_pytorch_model*' --include 'vae/*'"),
        ("owner/name/a/b@v1", "hf download owner/name --revision v1 --include 'a/b/*'"),
    ],
)
def test_without_internet_the_sentence_has_the_command(cache, source, command):
    sentence = refusal(source)
    assert f"`{command}`" in sentence and "login node" in sentence and "name resolution" in sentence
    words = shlex.split(command)
    tool = [str(Path(sys.executable).with_name("hf")), *words[1:]]
    tried = subprocess.run(tool, env=environment(HF_HUB_OFFLINE="1"), capture_output=True, text=True)
    assert "ffline" in tried.stdout + tried.stderr, tried  # it understands the command, and then has no connection


def test_offline_mode_is_named(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode" in refusal("owner/name")


def test_a_hub_that_does_not_answer_takes_no_five_seconds(cache, monkeypatch):
    """Neither name resolution, which nothing bounds, nor a connection."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: time.sleep(30))
    began = time.monotonic()
    assert "no answer in 4 s" in refusal("owner/name")
    assert time.monotonic() - began < 5


def on_the_hub(monkeypatch, *names):
    """Make the Hub hold a repository of these files; returns the list of what is downloaded."""
    downloaded = []

    def download(repository, revision, allow_patterns, etag_timeout):
        downloaded.append((repository, revision, allow_patterns))
        return f"/cache/{repository}"

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repository, revision, timeout: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return downloaded


STEM = "diffusion_pytorch_model"
PIPELINE = ["model_index.json", "unet/config.json", f"unet/{STEM}.safetensors", "vae/config.json"]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["config.json", f"{STEM}.bin", f"{STEM}.safetensors", "README.md"], ["config.json", f"{STEM}.safetensors"]),
        ([*PIPELINE, f"vae/{STEM}.fp16.safetensors", f"vae/{STEM}.bin"], ["vae/config.json", f"vae/{STEM}.bin"]),
        ([*PIPELINE, f"vae/{STEM}.fp16.safetensors"], ["vae/config.json", f"vae/{STEM}.fp16.safetensors"]),
        (
            ["config.json", f"{STEM}.safetensors.index.json", *(f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2))],
            ["config.json", f"{STEM}.safetensors.index.json", *(f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2))],
        ),
    ],
)
def test_only_what_is_read_is_downloaded(cache, monkeypatch, names, wanted):
    downloaded = on_the_hub(monkeypatch, *names)
    folder, files = locate("owner/name")
    assert downloaded == [("owner/name", None, wanted)] and files.names == wanted
    assert str(folder) == ("/cache/owner/name/vae" if "vae/config.json" in wanted else "/cache/owner/name")


def test_what_the_hub_does_not_hold(cache, monkeypatch):
    on_the_hub(monkeypatch, "README.md", "vae/config.json", "ema.ckpt")
    assert "no weights vae/diffusion_pytorch_model.safetensors" in refusal("owner/name")
    assert "owner/name has no other/config.json on the Hub" in refusal("owner/name/other")

    def raising(kind):
        def ask(self, repository, revision, timeout):
            raise kind(
                "401 Client Error\n\nRepository Not Found", response=SimpleNamespace(headers={}, request=None, status_code=401)
            )

        return ask

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raising(errors.RepositoryNotFoundError))
    assert "check the name, or run `hf auth login`" in refusal("owner/name")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raising(errors.GatedRepoError))
    assert "check the name, or run `hf auth login`" in refusal("owner/name")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", raising(errors.RevisionNotFoundError))
    assert "owner/name has no revision v9" in refusal("owner/name@v9")


def test_a_path_is_absolute_and_moves_with_the_run(tmp_path, monkeypatch):
    vae, run = tmp_path / "here" / "vae", tmp_path / "here" / "runs" / "r"
    vae.mkdir(parents=True)
    run.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert absolute("vae") == str(vae) and absolute("owner/name") == "owner/name" and absolute("pixels") == "pixels"
    path = relative(str(vae), run)
    assert path == os.path.join("..", "..", "vae") and relative("owner/name", run) is None
    assert moved(str(vae), path, run) == str(vae)
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    assert moved(str(vae), path, tmp_path / "there" / "runs" / "r") == str(tmp_path / "there" / "vae")
    assert moved(str(vae), path, tmp_path / "elsewhere" / "r") == str(vae)  # there is none: the saved path is what is named
    (tmp_path / "there" / "runs" / "r" / "name").mkdir()
    assert moved("owner/name", None, tmp_path / "there" / "runs" / "r") == "owner/name"
    (tmp_path / "there" / "runs" / "r" / "autoencoder").mkdir()  # of fastdit import-base
    assert moved("/gone/autoencoder", None, tmp_path / "there" / "runs" / "r") == str(tmp_path / "there/runs/r/autoencoder")
