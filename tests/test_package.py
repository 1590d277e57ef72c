"""The wheel carries fastdit.kernels, and importing kernels pulls in only torch."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python(code, cwd, *flags, **environment):
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def test_wheel_has_the_kernels(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code, out = python("import fastdit.kernels as k; print(k.__file__)", tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert code == 0 and str(tmp_path / "site/fastdit/kernels") in out, out


def test_a_clone_that_is_not_installed_says_what_to_do(tmp_path):
    (tmp_path / "fastdit").mkdir()
    (tmp_path / "fastdit/__init__.py").write_text((ROOT / "fastdit/__init__.py").read_text())
    code, out = python("import fastdit", tmp_path, "-S")  # -S: without installed packages
    assert code == 1 and "pip install --no-build-isolation -e ." in out.splitlines()[-1]


def test_kernels_need_torch_alone(tmp_path):
    heavy = "deepspeed diffusers nvidia.dali wandb yaml PIL matplotlib safetensors"
    code, out = python(f"import sys, fastdit.kernels; print([m for m in '{heavy}'.split() if m in sys.modules])", tmp_path)
    assert code == 0 and out.strip() == "[]", out
