"""`fastdit info`."""

import torch

from fastdit import __version__, cli, kernels


def test_it_names_versions_and_the_backend_of_every_op(capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = dict(line.split(maxsplit=1) for line in lines if len(line.split()) > 1)
    assert (rows["fastdit"], rows["torch"]) == (__version__, torch.__version__)
    assert {rows[op] for op in kernels.OPS} == {kernels.backend_in_use(torch.device("cpu"))}
