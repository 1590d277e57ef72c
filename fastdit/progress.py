"""Progress bars, and lines printed before the end of a command."""

import errno
import sys
from collections.abc import Callable

from tqdm import tqdm


class _Stderr:
    """stderr for bars and warnings: the work does not end because its log is on a full disk."""

    def write(self, text: str) -> None:
        self._ignoring_full_disks(lambda: sys.stderr.write(text))

    def flush(self) -> None:
        self._ignoring_full_disks(sys.stderr.flush)

    @staticmethod
    def _ignoring_full_disks(work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise

    def __getattr__(self, name: str) -> object:
        return getattr(sys.stderr, name)


STDERR = _Stderr()  # one object: tqdm clears the bars of a stream before it writes a line to that very stream


def progress_bar(total: int, initial: int = 0, description: str | None = None, unit: str = "step", **options) -> tqdm:
    """Return a tqdm bar; if stderr is no terminal, it prints at most one line per 20 s. options: further options of tqdm."""
    terminal = sys.stderr.isatty()
    return tqdm(
        file=STDERR,
        total=total, initial=initial, desc=description, unit=unit, dynamic_ncols=terminal, mininterval=0.5 if terminal else 20,
        maxinterval=10 if terminal else 60, **options,
    )  # fmt: skip


def say(text: str) -> None:
    """Print a line to stdout now. If its reader has gone or its disk is full, the work continues: `cli.main` says so at its end."""
    try:
        print(text, flush=True)
    except OSError:
        return


def warn(text: str) -> None:
    """Print a warning to stderr, above the progress bars."""
    tqdm.write(f"fastdit: warning: {text}", file=STDERR)
