"""The wheel carries fastdit.kernels, the README's commands parse, and importing kernels pulls in torch alone."""

import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

from fastdit import cli
from fastdit.config import parse

ROOT = Path(__file__).parent.parent

# The documented parameters of the base model's script: each needs a key of ours.
BASE_PARAMETERS = """
    totalSteps batchSize inCh num_classes patch_size num_blocks dim c_dim hidden_scale num_heads device wandb_name log_steps
    p_uncond lr use_lr_scheduler ema_update_freq ema_decay warmup_steps positional_encoding numSaveSteps saveDir loadModel
"""


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


def test_commands_of_the_readme_parse():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^(?:python -m )?(fastdit [a-z].*)$", "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)), re.M)
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        arguments = cli.make_parser(words[0]).parse_args(words)
        if arguments.command == "train":
            files = [w for w in arguments.settings if "=" not in w]
            parse(ROOT / files[0] if files else None, [w for w in arguments.settings if "=" in w])


def test_quickstart_spells_out_the_defaults():
    assert parse(ROOT / "launch/quickstart.yaml", ["validate.steps=0"]) == parse(None, ["train.name=quickstart"])


def test_every_documented_parameter_of_the_base_script_has_a_key():
    text = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\| (.+) \|$", text, re.M))
    config = parse().to_dict()
    for parameter in BASE_PARAMETERS.split():
        assert parameter in rows, parameter
        keys = re.findall(r"`(model|data|flow|train|sample|zero)\.(\w+)", rows[parameter])
        assert keys, parameter
        for section, key in keys:
            assert key in config[section], f"{section}.{key}"
