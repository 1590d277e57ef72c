"""Small pictures in files, for tests that care where they lie."""

import io
import os
from pathlib import Path

from PIL import Image


def encoded(number: int = 0, size: tuple[int, int] = (40, 48), form: str = "JPEG") -> bytes:
    """Return an encoded picture of one color; other numbers have other colors."""
    file = io.BytesIO()
    Image.new("RGB", size, (40 * number % 256, 20 * number // 256 % 256, 90)).save(file, form)
    return file.getvalue()


def write(root: Path, *names: str | bytes) -> Path:
    """Write a JPEG per name, a path below `root` with any suffix. Returns root."""
    for number, name in enumerate(names):
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(encoded(number))
    return root
