"""fastdit: train flow-matching diffusion transformers on ImageNet at the speed of the hardware, and sample from them fast.

The Python API, of which each name is imported when it is first used:

    from fastdit import Sampler, evaluate, train
    from fastdit.config import parse
    from fastdit.evaluation.command import EvaluationRequest

    run = train(parse("launch/configs/quickstart.yaml", ["train.name=mine"]))  # a Config in, the folder of the run out
    images = Sampler(run).images("3,7", count=8, guidance=2.0)  # uint8 [16,S,S,C]: 8 images of each class
    fid = evaluate(EvaluationRequest(source=str(run), features="digits", reference="mnist5k"))["metrics"]["fid"]

Bad input raises fastdit.config.InputError. `fastdit --help` shows the same as commands.
"""

from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdit.evaluation.command import evaluate
    from fastdit.sampling.sampler import Sampler
    from fastdit.training.loop import train

__all__ = ["Sampler", "evaluate", "train"]

if find_spec("fastdit.kernels") is None:
    raise ImportError(
        "fastdit.kernels is not found, because Python took fastdit/ of a clone that is not installed: "
        "run `pip install --no-build-isolation -e .` in the clone, or start Python in another folder"
    )

__version__ = metadata.version("fastdit")

_MODULES = {"Sampler": "fastdit.sampling.sampler", "evaluate": "fastdit.evaluation.command", "train": "fastdit.training.loop"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'fastdit' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
