"""`fastdit sample`: files that it writes, and every kind of bad input."""

import numpy as np
import pytest
import torch
from PIL import Image

from commands import RANK_VARIABLES, complains, trained_run
from fastdit import cli


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps."""
    return trained_run(tmp_path_factory.mktemp("runs"))


def test_samples_from_the_command_line(trained, tmp_path):
    words = ["sample", "--checkpoint", str(trained), "--class", "3,7", "--per-class", "12", "--out", str(tmp_path / "g.png")]
    assert cli.main([*words, "--npz", str(tmp_path / "s.npz")]) == 0
    assert Image.open(tmp_path / "g.png").size == (10 * 34 + 2, 2 * 34 + 2)
    arrays = np.load(tmp_path / "s.npz")
    assert arrays["arr_0"].shape == (24, 32, 32, 1) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [3] * 12 + [7] * 12
    first = arrays["arr_0"]
    assert cli.main([*words, "--npz", str(tmp_path / "t.npz"), "--weights", "raw"]) == 0
    assert (np.load(tmp_path / "t.npz")["arr_0"] != first).any()
    assert cli.main([*words, "--npz", str(tmp_path / "u.npz")]) == 0
    assert np.array_equal(np.load(tmp_path / "u.npz")["arr_0"], first)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.png", "s.npz", "t.npz", "u.npz"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--class", "10"], ["--class 10", "0 to 9"]),
        (["--class=-2"], ["--class -2"]),
        (["--class", "cat"], ["'cat'"]),
        (["--per-class", "0"], ["--per-class 0"]),
        (["--seed", "-2"], ["--seed -2"]),
        (["--at-once", "0"], ["--at-once 0"]),
        (["--solver", "eular"], ["'euler'"]),
        (["--guidance-low", "0.5", "--guidance-high", "0.2"], ["guidance_low=0.5", "low <= high"]),
        (["--time-shift", "0"], ["sample.time_shift=0"]),
        (["--gif", "a.mp4"], ["a.mp4", ".gif or .webp"]),
        (["--gif", "a.gif", "--gif-of", "1,10"], ["--gif-of '10'", "0 to 9"]),
        (["--gif", "a.gif", "--gif-fps", "0"], ["--gif-fps 0"]),
        pytest.param(
            ["--device", "cuda"],
            ["--device cuda", "no GPU"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there"),
        ),
        (["--folder", "/proc/nowhere"], ["/proc/nowhere", "cannot be made"]),
        (["--steps", "0"], ["sample.steps=0"]),
        (["--guidance", "nan"], ["sample.guidance=nan"]),
        (["--checkpoint", "nowhere"], ["nowhere"]),
        (["--out", "/proc/nowhere/g.png"], ["/proc/nowhere/g.png", "cannot be written"]),
        (["--out", "."], ["is a folder"]),
    ],
)
def test_bad_sampling_input_leaves_nothing_behind(trained, tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    for name in RANK_VARIABLES:  # the run of this process set them
        monkeypatch.delenv(name, raising=False)
    complains(capsys, ["sample", "--checkpoint", str(trained), *words], *expected)
    assert not list(tmp_path.iterdir())
