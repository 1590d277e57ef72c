"""An evaluation that was killed: the same numbers to the last bit, from batches that are not drawn again, and only its own."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from commands import complains, environment, free_port
from fastdit import cli
from fastdit.evaluation.kept import Kept
from fastdit.sampling.sampler import Sampler

WORKER = Path(__file__).parent.parent / "support" / "evaluate_worker.py"


def command(run, reference, out, samples):
    words = ["--features", "digits", "--reference", reference, "--samples", samples, "--steps", 1, "--out", out]
    return ["evaluate", *map(str, [run, *words])]


def numbers(out):
    """The result without what a clock says and the command."""
    return {key: value for key, value in json.loads(out.read_text()).items() if key not in ("seconds", "command")}


def test_an_interrupted_evaluation_resumes(trained, reference, tmp_path, monkeypatch, capsys):
    drawn, write, decode = [], Kept._write, Sampler.decode

    def interrupted(self, path, ids, outputs):
        write(self, path, ids, outputs)
        if path.name.endswith("_000001.npz"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Sampler, "decode", lambda self, latents: drawn.append(len(latents)) or decode(self, latents))
    words = command(trained, reference, tmp_path / "e.json", 350)
    assert cli.main([*words[:-1], str(tmp_path / "whole.json")]) == 0 and drawn == [100, 100, 100, 50]
    monkeypatch.setattr(Kept, "_write", interrupted)
    assert cli.main(words) == 130 and not (tmp_path / "e.json").exists() and drawn[4:] == [100, 100]
    monkeypatch.setattr(Kept, "_write", write)
    folder = tmp_path / ".e.json.parts"
    for more in (["--seed", 1], ["--guidance", 3], ["--samples", 400], ["--weights", "raw"]):
        complains(capsys, [*words, *more], "unfinished evaluation", "e.json was begun with", f"delete {folder}")
    assert drawn[6:] == []
    damaged = folder / "0000_000001.npz"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-50])
    complains(capsys, words, f"{damaged} is damaged")
    damaged.write_bytes(data)
    assert cli.main(words) == 0 and drawn[6:] == [100, 50]
    assert numbers(tmp_path / "e.json") == numbers(tmp_path / "whole.json") and not folder.exists()
    images = ["evaluate", "mnist5k", "--split", "val", *words[2:6], "--out", str(tmp_path / "real.json")]
    assert cli.main(images) == 0 and not list(tmp_path.glob(".*.parts"))  # nothing is kept of images that are only read


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 5), (2, 2)])
def test_an_evaluation_killed_at_random_equals_the_uninterrupted_one(trained, reference, tmp_path, ranks, kills):
    seed = int(os.environ.get("FASTDIT_TEST_SEED") or random.randrange(10**6))
    chosen = random.Random(seed)

    def start(kill, moment, out):
        words, port, processes = command(trained, reference, out, 1200), str(free_port()), []
        for rank in range(ranks):
            launched = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            env = environment(**(launched | {"MASTER_PORT": port} if ranks > 1 else {}))
            ends = kill if rank == victim else 0
            processes.append(subprocess.Popen([sys.executable, str(WORKER), str(ends), moment, *words], env=env))
        codes = [processes[victim].wait(timeout=200)]
        for process in processes[:victim] + processes[victim + 1 :]:
            if kill:
                process.kill()  # a rank that waits for the one that was killed
            codes.append(process.wait(timeout=200))
        return codes

    victim = 0
    assert start(0, "after", tmp_path / "whole.json") == [0] * ranks
    for _ in range(kills):
        victim = chosen.randrange(ranks)
        kill, moment = chosen.choice((1, 2)), chosen.choice(("before", "inside", "after"))
        assert start(kill, moment, tmp_path / "e.json")[0] == -signal.SIGKILL, seed
    assert start(0, "after", tmp_path / "e.json") == [0] * ranks, seed
    assert numbers(tmp_path / "e.json") == numbers(tmp_path / "whole.json"), seed
    assert not (tmp_path / ".e.json.parts").exists()
