"""fastdit/ is the package `fastdit`, kernels/ is `fastdit.kernels` (a PyPI package owns the name `kernels`)."""

from setuptools import setup

setup(
    name="fastdit",
    version="0.1.0",
    description="Train and sample flow-matching diffusion transformers on ImageNet at the speed of the hardware",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["fastdit", "fastdit.data", "fastdit.kernels"],
    package_dir={"fastdit.kernels": "kernels"},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "deepspeed>=0.19.8",  # older ones race under overlap_comm + compile
        "diffusers>=0.36",
        "nvidia-dali-cuda130>=2.4; platform_system == 'Linux'",
        "wandb>=0.20",
        "safetensors",
        "numpy",
        "pillow",
        "matplotlib",
        "pyyaml",
        "tqdm",
    ],
    extras_require={
        "flash": ["flash-attn"],
        # pytest-benchmark 5.3 installs a fork over the files of py-cpuinfo, which deepspeed needs
        "test": ["pytest", "pytest-benchmark<5.3", "ruff==0.17.6", "wheel"],
    },
    entry_points={"console_scripts": ["fastdit = fastdit.cli:main"]},
)
