"""`fastdit train`: its settings."""

from commands import settings
from fastdit import cli
from fastdit.config import parse


def test_dry_run_prints_a_config_that_reads_back(tmp_path, capsys):
    first, *others = settings(tmp_path)
    assert cli.main(["train", first, "--dry-run", *others]) == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert parse(tmp_path / "c.yaml") == parse(None, settings(tmp_path))
    assert not (tmp_path / "r").exists()
