"""fastdit/ is the package `fastdit`, kernels/ is `fastdit.kernels` (a PyPI package owns the name `kernels`), csrc/ is
`fastdit.kernels._cpp`, the C++ kernels for CPUs: built when torch and a compiler are there; FASTDIT_BUILD_EXT=1 makes a build that
fails an error, 0 leaves it out.
"""

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# Which one runs is chosen when it runs: what is built on one machine runs on another.
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bf16", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
    ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512"], "-mamx-tile", "-mamx-bf16"]
WANTED = os.environ.get("FASTDIT_BUILD_EXT", "auto")
if WANTED not in ("0", "1", "auto"):
    sys.exit(f"FASTDIT_BUILD_EXT={WANTED} must be 0, 1 or unset")


def extensions() -> list[Extension]:
    """The C++ kernels on torch's stable ABI (2.11 and newer), so that one build serves every Python and torch."""
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:  # build isolation hides torch
        if WANTED == "1":
            sys.exit("FASTDIT_BUILD_EXT=1 needs torch at build time: pip install torch first, then use --no-build-isolation")
        return []
    compiler = os.environ.get("CXX", "c++").split()[0]
    if WANTED == "0" or (WANTED == "auto" and not shutil.which(compiler)):
        return []
    return [
        Extension(
            "fastdit.kernels._cpp",
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            library_dirs=library_paths(),
            libraries=["torch_cpu", "c10"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
            # psabi: vectors as wide as these pass by value only where they are inlined
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-g0",
                "-fno-math-errno",
                "-Wshadow",
                *(f"-isystem{path}" for path in include_paths()),  # no warnings of torch's headers
                "-Wno-psabi",
                "-Wno-maybe-uninitialized",
                "-Wno-uninitialized",
            ],
            language="c++",
            optional=WANTED == "auto",
            py_limited_api=True,
        )
    ]


class BuildExtension(build_ext):
    """Compiles every file of kernels once for each instruction set, files side by side, one on each core."""

    def build_extension(self, extension: Extension) -> None:
        compile_file = self.compiler.compile

        def compile_one(source: str, isa: str, output_dir: str, extra_postargs: list[str], **options) -> list[str]:
            flags = [f"-DFASTDIT_ISA={isa}", *ISA_FLAGS[isa], *extra_postargs]
            return compile_file([source], output_dir=f"{output_dir}/{isa}", extra_postargs=flags, **options)

        def compile_all(sources: list[str], **options) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = [(s, isa) for s in sources for isa in (["baseline"] if s.endswith("ops.cpp") else ISA_FLAGS)]
                return [file for files in pool.map(lambda job: compile_one(*job, **options), jobs) for file in files]

        self.compiler.compile = compile_all
        super().build_extension(extension)


setup(
    name="fastdit",
    version="0.1.0",
    description="Train and sample flow-matching diffusion transformers on ImageNet at the speed of the hardware",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["fastdit", "fastdit.*"]), "fastdit.kernels"],
    package_dir={"fastdit.kernels": "kernels"},
    package_data={"fastdit.evaluation": ["digit_classifier.safetensors"], "fastdit.data": ["imagenet_classes.txt"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "deepspeed>=0.19.8",  # older ones race under overlap_comm + compile
        "diffusers>=0.36",
        "nvidia-dali-cuda130>=2.4; platform_system == 'Linux'",
        "wandb>=0.20",
        "safetensors",
        "numpy",
        "scipy",  # reads ImageNet's meta.mat
        "torchdiffeq",  # the adaptive solver of `fastdit sample`
        "pillow",
        "matplotlib",
        "pyyaml",
        "tqdm",
    ],
    extras_require={
        "flash": ["flash-attn"],
        # pytest-benchmark 5.3 installs a fork over the files of py-cpuinfo, which deepspeed needs
        # scikit-image and scikit-learn carry the photographs that the tests make archives of, nbclient and ipykernel run the
        # notebook
        "test": [
            "pytest",
            "pytest-xdist",
            "pytest-benchmark<5.3",
            "ruff==0.17.6",
            "wheel",
            "scikit-image",
            "scikit-learn",
            "nbclient",
            "ipykernel",
        ],
    },
    entry_points={"console_scripts": ["fastdit = fastdit.cli:main"]},
)
