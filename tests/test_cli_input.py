"""`fastdit train --dry-run` and `fastdit info`."""

import torch

from commands import settings
from fastdit import cli, kernels
from fastdit.config import parse


def test_dry_run_prints_a_config_that_reads_back(tmp_path, capsys):
    first, *others = settings(tmp_path)
    assert cli.main(["train", first, "--dry-run", *others]) == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert parse(tmp_path / "c.yaml") == parse(None, settings(tmp_path))
    assert not (tmp_path / "r").exists()


def test_info_names_the_backend_of_every_op(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(op in out for op in kernels.OPS) and torch.__version__ in out
