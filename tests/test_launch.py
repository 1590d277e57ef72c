"""The launch scripts: restarts for real, Slurm's commands as stubs."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from commands import environment, free_port

ROOT = Path(__file__).parent.parent
VENV = Path(sys.executable).parent.parent
ENVIRONMENT = environment(VENV=str(VENV))
PORT = free_port()
TINY = [
    "model.preset=test/4",
    "train.total_steps=4",
    "train.sample_steps=0",
    "train.save_steps=2",
    "train.batch_size=4",
    "train.name=r",
]


def script(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run(command, variables=ENVIRONMENT):
    return subprocess.run([str(c) for c in command], env=variables, capture_output=True, text=True, timeout=120, check=False)


def fake_launcher(folder, codes):
    """A `deepspeed` that writes its arguments down and ends with one code after the other."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)
    lines = [
        "#!/bin/bash",
        f'echo "$@" >> {folder}/calls',
        f"codes=({' '.join(map(str, codes))})",
        f"exit ${{codes[$(wc -l < {folder}/calls) - 1]}}",
    ]
    text = "\n".join(lines)
    script(folder / "bin" / "deepspeed", text)
    return {**ENVIRONMENT, "VENV": str(folder), "MASTER_PORT": PORT}


PYTHON = """#!/bin/bash
case "$*" in
    *'version("torch")'*) [ -n "$HAS" ] && echo "$HAS" ;;
    *'requires("torch")'*) exit "$OWN_TRITON" ;;
    *"--quiet --constraint"*) { echo "$@"; cat "$7"; } >> "$VENV/calls" ;;
esac
"""


@pytest.mark.parametrize(
    ("asked", "has", "own_triton", "torch", "triton"),
    [
        ("", "", 0, "torch==2.13.0", True),  # a CPU build
        ("", "", 1, "torch==2.13.0", False),
        ("2.11.0", "", 1, "torch==2.11.0", False),
        ("", "2.11.0+cu130", 1, "torch==2.11.0+cu130", False),
    ],
)
def test_install_sh_asks_for_one_torch_and_its_triton(tmp_path, asked, has, own_triton, torch, triton):
    """The torch of FASTDIT_TORCH, else the one that is there, else that of constraints.txt; a triton where torch names none."""
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin/python", PYTHON)
    variables = ENVIRONMENT | {"VENV": str(tmp_path), "FASTDIT_TORCH": asked, "HAS": has, "OWN_TRITON": str(own_triton)}
    done = run([ROOT / "launch/install.sh"], variables)
    assert done.returncode == 0, done.stderr
    first, second, _ = (tmp_path / "calls").read_text().split("-m pip")[1:]
    for part, with_triton in ((first, False), (second, triton)):
        lines = part.splitlines()
        assert [line for line in lines if line.startswith("torch==")] == [torch]
        assert any(line.startswith("triton==") for line in lines) is with_triton
    assert run([ROOT / "launch/install.sh"], variables).stdout == ""  # up to date


def test_test_sh_says_what_its_options_need():
    for option in ("--torch", "--cuda-host"):
        done = run([ROOT / "launch/test.sh", option])
        assert done.returncode != 0 and f"{option} needs" in done.stderr


@pytest.mark.parametrize(
    ("restarts", "codes", "calls", "code"), [(2, [1, 247, 0], 3, 0), (1, [1, 1, 0], 2, 1), (0, [1, 0], 1, 1), (3, [2, 0], 1, 2)]
)
def test_train_sh_restarts_a_bounded_number_of_times(tmp_path, restarts, codes, calls, code):
    variables = fake_launcher(tmp_path, codes)
    done = run([ROOT / "launch/train.sh", "--restarts", restarts, "c.yaml", "train.name=x"], variables)
    assert done.returncode == code, done.stderr
    made = (tmp_path / "calls").read_text().splitlines()
    assert made == [f"-q --no_local_rank --master_port {PORT} --num_gpus 1 --module fastdit.cli train c.yaml train.name=x"] * calls
    assert done.stderr.count("restart") == calls - 1


def test_train_sh_takes_a_hostfile_and_says_how_it_is_used(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=8\n")
    variables = {**fake_launcher(tmp_path, [0]), "HOSTFILE": str(hosts)}
    assert run([ROOT / "launch/train.sh", "c.yaml"], variables).returncode == 0
    assert (
        (tmp_path / "calls")
        .read_text()
        .startswith(f"-q --no_local_rank --master_port {PORT} --hostfile {hosts} --module fastdit.cli train")
    )
    done = run([ROOT / "launch/train.sh"], variables)
    assert done.returncode == 2 and "launch/train.sh [--restarts N] CONFIG.yaml" in done.stdout


@pytest.mark.slow
def test_train_sh_trains(tmp_path):
    done = run([ROOT / "launch/train.sh", *TINY, f"train.out={tmp_path}"], {**ENVIRONMENT, "GPUS": "2", "MASTER_PORT": PORT})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "r/checkpoints/step_00000004").exists()
    done = run([ROOT / "launch/train.sh", "--restarts", 3, *TINY, f"train.out={tmp_path}", "train.nonsense=1"])
    assert done.returncode == 2 and done.stderr.count("fastdit: ") == 1


SRUN = """#!/bin/bash
shift
for i in 0 1; do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit ${code:-0}
"""


@pytest.mark.slow
@pytest.mark.parametrize("stops", [False, True])
def test_slurm_starts_the_ranks_and_queues_again_after_sigterm(tmp_path, stops):
    """With stubs of srun and scontrol that start two ranks here."""
    (tmp_path / "stubs").mkdir()
    told = (
        "(for i in {1..600}; do [ -s $OUT/r/metrics.jsonl ] && break; sleep 0.1; done; pkill -TERM -f bin/fastdit.train.*$OUT) &\n"
        if stops
        else ""
    )
    script(tmp_path / "stubs/srun", SRUN.replace("shift\n", f"shift\n{told}", 1))
    script(tmp_path / "stubs/scontrol", f'#!/bin/bash\n[ "$1" = show ] && echo 127.0.0.1 || echo "$@" > {tmp_path}/scontrol\n')
    variables = {
        "SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_CPUS_PER_TASK": "1", "PATH": f"{tmp_path}/stubs:{VENV}/bin:{os.environ['PATH']}", "USER": "test", "OUT": tmp_path,
    }  # fmt: skip
    variables = ENVIRONMENT | {key: str(value) for key, value in variables.items()}
    words = [*TINY, f"train.out={tmp_path}", "train.log_steps=2", "train.device=cpu"]
    if stops:
        words.append("train.total_steps=100000")
    done = run(["bash", ROOT / "launch/slurm.sbatch", *words], variables)
    assert done.returncode == (75 if stops else 0), done.stderr[-3000:]
    if stops:
        assert (tmp_path / "scontrol").read_text() == "requeue 7\n" and "told to stop by SIGTERM" in done.stderr
    else:
        assert (tmp_path / "r/checkpoints/step_00000004").exists() and not (tmp_path / "scontrol").exists()
