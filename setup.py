"""The packages and the C++ extension; metadata and version are in pyproject.toml.

fastdit/ is the package `fastdit`, kernels/ is `fastdit.kernels` (a PyPI package owns the name `kernels`), csrc/ is
`fastdit.kernels._cpp`, the C++ kernels for CPUs. The extension is built if torch and a compiler are installed. With
FASTDIT_BUILD_EXT=1 a build that is not possible or fails is an error; 0 leaves the extension out. FASTDIT_BUILD_ISAS=native builds
only the best instruction set of this machine and the one of any machine.
"""

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# The instruction set is chosen at run time: what is built on one machine runs on another. From the least one on, as in ops.cpp.
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bf16", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
    ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512"], "-mamx-tile", "-mamx-bf16"]
ISAS = list(ISA_FLAGS)
CPUINFO = Path("/proc/cpuinfo")
if os.environ.get("FASTDIT_BUILD_ISAS") == "native" and CPUINFO.exists():
    has = CPUINFO.read_text().split()
    names = {"avx2": "avx2", "avx512": "avx512_bf16", "amx": "amx_bf16"}  # the flag of Linux that tells of each
    ISAS = ["baseline", *[isa for isa in ISAS if names.get(isa) in has][-1:]]
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
            define_macros=[
                ("TORCH_TARGET_VERSION", "0x020b000000000000"),
                ("FASTDIT_ISAS", str(sum(1 << i for i, isa in enumerate(ISA_FLAGS) if isa in ISAS))),
            ],
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
                jobs = [(s, isa) for s in sources for isa in (["baseline"] if s.endswith("ops.cpp") else ISAS)]
                return [file for files in pool.map(lambda job: compile_one(*job, **options), jobs) for file in files]

        self.compiler.compile = compile_all
        super().build_extension(extension)


setup(
    packages=[*find_packages(include=["fastdit", "fastdit.*"]), "fastdit.kernels"],
    package_dir={"fastdit.kernels": "kernels"},
    package_data={"fastdit.evaluation": ["digit_classifier.safetensors"], "fastdit.data": ["imagenet_classes.txt"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
)
