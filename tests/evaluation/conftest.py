"""A tiny run to evaluate, and the reference that its samples are compared with."""

import pytest

from fastdit import cli
from fastdit.config import parse
from fastdit.training.loop import train
from runs import TINY_RUN


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Four training steps."""
    out = tmp_path_factory.mktemp("runs")
    train(parse(None, [*TINY_RUN, f"train.out={out}", "train.name=r"]))
    return out / "r"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Statistics of the held-out digits."""
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    words = ["--features", "digits", "--reference", "mnist5k", "--split", "val", "--save-reference", str(path)]
    assert cli.main(["evaluate", *words]) == 0
    return path
