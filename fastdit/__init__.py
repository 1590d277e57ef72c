"""fastdit: train flow-matching diffusion transformers on ImageNet at the speed of the hardware, and sample from them fast."""

from importlib.util import find_spec

__version__ = "0.1.0"

if find_spec("fastdit.kernels") is None:
    raise ImportError(
        "fastdit.kernels is not found, because Python took fastdit/ of a clone that is not installed: "
        "run `pip install --no-build-isolation -e .` in the clone, or start Python in another folder"
    )
