"""What the wheel holds, the Python API, and that importing kernels needs only torch."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastdit

ROOT = Path(__file__).parent.parent


def python(code, cwd, *flags, **environment):
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_holds_every_package_and_data_file(tmp_path):
    """Every file below fastdit/ and kernels/ that is not built, hidden or a README, and nothing from elsewhere."""
    source = tmp_path / "source"  # a copy: setuptools takes what earlier builds left behind in build/
    for name in ("fastdit", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path)]
    environment = {**os.environ, "FASTDIT_BUILD_EXT": "0"}
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(f"fastdit-{fastdit.__version__}.dist-info/")}
    files = [file.relative_to(ROOT) for top in ("fastdit", "kernels") for file in (ROOT / top).rglob("*") if file.is_file()]
    wanted = {file for file in files if file.suffix not in (".pyc", ".so", ".md") and file.name[0] != "."}
    assert names == {str(Path("fastdit" if path.parts[0] == "kernels" else "") / path) for path in wanted}
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code, out = python("import fastdit.kernels as k; print(k.__file__)", tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert code == 0 and str(tmp_path / "site/fastdit/kernels") in out, out


def test_the_version_is_that_of_pyproject():
    """Which an editable installation has from its last `pip install`."""
    assert f'\nversion = "{fastdit.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


def test_the_python_api():
    for name in fastdit.__all__:
        assert name in dir(fastdit) and callable(getattr(fastdit, name)) and getattr(fastdit, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fastdit.nonsense


def test_importing_fastdit_imports_no_torch(tmp_path):
    code, out = python("import sys, fastdit; print('torch' in sys.modules)", tmp_path)
    assert code == 0 and out.strip() == "False", out


def test_a_clone_that_is_not_installed_says_what_to_do(tmp_path):
    (tmp_path / "fastdit").mkdir()
    (tmp_path / "fastdit/__init__.py").write_text((ROOT / "fastdit/__init__.py").read_text())
    code, out = python("import fastdit", tmp_path, "-S")  # -S: without installed packages
    assert code == 1 and "pip install --no-build-isolation -e ." in out.splitlines()[-1]


def test_kernels_need_only_torch(tmp_path):
    heavy = "deepspeed diffusers nvidia.dali wandb yaml PIL matplotlib safetensors"
    code, out = python(f"import sys, fastdit.kernels; print([m for m in '{heavy}'.split() if m in sys.modules])", tmp_path)
    assert code == 0 and out.strip() == "[]", out
