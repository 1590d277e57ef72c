"""The files of an autoencoder: in a local folder, in the cache of the Hugging Face Hub, or downloaded to it.

An autoencoder is named by a folder, its own or a pipeline's that holds it as vae/, or by a Hub id,
OWNER/NAME[/SUBFOLDER][@REVISION].
"""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from fastdit import hub
from fastdit.config import InputError


def absolute(source: str) -> str:
    """Return the absolute path of an autoencoder's folder, as a run saves it. Other text, such as a Hub id, stays as it is."""
    path = os.path.expanduser(source)
    return os.path.abspath(path) if os.path.isdir(path) else source


def relative(source: str, run: Path) -> str | None:
    """Return the path of an autoencoder's folder relative to a run's, None if `source` is not an existing folder."""
    path = os.path.expanduser(source)
    return os.path.relpath(path, run) if os.path.isdir(path) else None


def moved(source: str, relative_path: str | None, run: Path) -> str:
    """Return where an autoencoder's folder is that a run saved as `source`.

    It is `source`, unless there is no such folder and there is one at `relative_path` from the run's folder `run`: they were moved
    together. relative_path: from `relative` when the run was saved; None: the folder of the same name inside of the run's.
    """
    if not os.path.isabs(source):  # a Hub id, or a path as runs kept it before
        return source
    path = os.path.normpath(run.absolute() / (relative_path or os.path.basename(source)))
    return path if not os.path.isdir(source) and os.path.isdir(path) else source


class Files(NamedTuple):
    """The files of an autoencoder in a repository or a pipeline's folder, by their names there."""

    folder: str  # "" | "vae" | a subfolder
    names: list[str]  # config.json and the weights
    variant: str | None  # of from_pretrained
    safetensors: bool  # False: pickled tensors, which diffusers loads with weights_only


def _choose(names: Collection[str], folder: str) -> Files:
    """Return the files of the autoencoder among `names`. folder: where it lies; "" also looks into a pipeline's vae/.

    Raises InputError, the predicate of a sentence, if there is none.
    """
    is_pipeline = "model_index.json" in names or "config.json" not in names
    if not folder and is_pipeline and "vae/config.json" in names:
        folder = "vae"
    prefix = f"{folder}/" if folder else ""
    if f"{prefix}config.json" not in names:
        raise InputError(f"has no {prefix}config.json" + ("" if folder else " and no vae/config.json"))
    for variant in (None, "fp16"):
        for suffix in ("safetensors", "bin"):
            stem, end = f"{prefix}diffusion_pytorch_model", f".{variant}" if variant else ""
            index = f"{stem}.{suffix}.index{end}.json"
            shard = re.compile(rf"{re.escape(stem)}{re.escape(end)}-\d+-of-\d+\.{suffix}")
            whole = f"{stem}{end}.{suffix}"
            weights = [index, *sorted(filter(shard.fullmatch, names))] if index in names else [whole]
            if weights[0] in names:
                return Files(folder, [f"{prefix}config.json", *weights], variant, suffix == "safetensors")
    raise InputError(f"has {prefix}config.json, but no weights {prefix}diffusion_pytorch_model.safetensors (or .bin)")


def _local_files(folder: Path) -> Files:
    """Return the files of the autoencoder in a local folder. Raises InputError as `_choose` does."""
    names = {path.relative_to(folder).as_posix() for pattern in ("*", "vae/*") for path in folder.glob(pattern)}
    return _choose(names, "")


class HubId(NamedTuple):
    """The parts of a Hub id."""

    repository: str  # OWNER/NAME
    subfolder: str  # "" if none is given
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> "HubId | None":
        """Return the parts of OWNER/NAME[/SUBFOLDER][@REVISION], None if `text` is not of this form."""
        match = re.fullmatch(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?P<subfolder>(/\w[\w.-]*)*)(@(?P<revision>[\w./-]+))?", text)
        return cls(match["repository"], match["subfolder"][1:], match["revision"]) if match else None

    @property
    def download_command(self) -> str:
        """The command that puts the autoencoder into the cache of a machine with internet."""
        wanted = [f"{self.subfolder}/*"] if self.subfolder else ["config.json", "diffusion_pytorch_model*", "vae/*"]
        includes = " ".join(f"--include '{pattern}'" for pattern in wanted)
        return f"hf download {self.repository} {f'--revision {self.revision} ' if self.revision else ''}{includes}"


def locate(source: str) -> tuple[Path, Files]:
    """Return the folder that holds the config.json of an autoencoder, and which its files are.

    source: a local folder, an autoencoder's or a pipeline's, or a Hub id, whose files are downloaded if they are not in the cache
    of huggingface_hub. Raises InputError if there is no such autoencoder, or within about hub.TIMEOUT_S if the Hub does not answer.
    """
    path = os.path.expanduser(source)
    hub_id = HubId.parse(source)
    if os.path.isdir(path):
        try:
            files = _local_files(Path(path))
            return Path(path) / files.folder, files
        except InputError as error:
            raise InputError(f"autoencoder {source} {error}: give the folder of an autoencoder such as an AutoencoderKL") from error
    if os.path.exists(path):
        raise InputError(f"autoencoder {source} is a file: give the folder that holds its config.json and weights")
    if hub_id is None:
        raise InputError(
            f"autoencoder {source} is neither 'pixels', nor an existing folder of a diffusers autoencoder such as an "
            "AutoencoderKL, nor a Hub id OWNER/NAME[/SUBFOLDER][@REVISION]"
        )
    return _cached(hub_id) or _download(source, hub_id)


def _cached(hub_id: HubId) -> tuple[Path, Files] | None:
    """Return what `locate` does if all files are in the cache, else None."""
    from huggingface_hub import try_to_load_from_cache

    for folder in [hub_id.subfolder] if hub_id.subfolder else ["", "vae"]:
        config = try_to_load_from_cache(hub_id.repository, f"{folder}/config.json".lstrip("/"), revision=hub_id.revision)
        if isinstance(config, str):
            path = Path(config).parent
            try:
                files = _local_files(path)
                return path / files.folder, files
            except InputError:  # only a part of it was downloaded
                continue
    return None


def _download(source: str, hub_id: HubId) -> tuple[Path, Files]:
    """Download the files of an autoencoder to the cache. Raises InputError."""
    from huggingface_hub import errors, snapshot_download

    repository, subfolder, revision = hub_id
    try:
        siblings = hub.model_info(repository, revision).siblings or []
        files = _choose([sibling.rfilename for sibling in siblings], subfolder)
        path = snapshot_download(repository, revision=revision, allow_patterns=files.names, etag_timeout=hub.TIMEOUT_S)
    except InputError as error:
        raise InputError(f"autoencoder {source}: {repository} {error} on the Hub: give an autoencoder of diffusers") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"autoencoder {source} is neither an existing folder nor a repository of the Hugging Face Hub that you may read: "
            "check the name, or run `hf auth login` for a private or gated one"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"autoencoder {source}: {repository} has no revision {revision} on the Hub") from error
    except Exception as error:  # of two HTTP libraries, by version of huggingface_hub; OSError if the disk is full
        raise InputError(
            f"there is no folder {source}, and the autoencoder of this id is not in the cache and could not be downloaded from "
            f"the Hugging Face Hub ({hub.first_line(error)}): run `{hub_id.download_command}` on a machine with internet, such as "
            "a login node, that shares HF_HOME with this one"
        ) from error
    return Path(path) / files.folder, files
