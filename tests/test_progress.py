"""Progress bars on a terminal and in a log."""

import io
import sys

import pytest

from fastdit.progress import progress_bar, warn


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize(("terminal", "interval"), [(True, 0.5), (False, 20)])
def test_a_log_gets_few_lines(monkeypatch, terminal, interval):
    monkeypatch.setattr(sys, "stderr", Stream(terminal))
    with progress_bar(10, initial=4, description="scan", unit="image") as bar:
        assert (bar.total, bar.n, bar.unit, bar.mininterval) == (10, 4, "image", interval)
        for _ in range(6):
            bar.update()
    assert "scan" in sys.stderr.getvalue() and sys.stderr.getvalue().count("\r") <= 3


def test_lines_stand_above_the_bars(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(True))
    with progress_bar(10, description="scan"):
        warn("look")
    assert "\nfastdit" not in sys.stderr.getvalue() and "\rfastdit: warning: look\n" in sys.stderr.getvalue()
