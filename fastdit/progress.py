"""Progress bars."""

import sys

from tqdm import tqdm


def progress_bar(total: int, initial: int = 0, description: str | None = None, unit: str = "step", **options) -> tqdm:
    """A bar; where stderr is no terminal, a line every 20 s at most. options: of tqdm."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total, initial=initial, desc=description, unit=unit, dynamic_ncols=terminal, mininterval=0.5 if terminal else 20,
        maxinterval=10 if terminal else 60, **options,
    )  # fmt: skip
