"""Grids of images and animations, in memory and in files."""

from pathlib import Path

import numpy as np
from PIL import Image

from fastdit.files import replacing


def grid(images: np.ndarray, columns: int, gap: int = 2) -> Image.Image:
    """Return images uint8 [n,S,S,1 or 3] as one picture, `columns` per row, on white with `gap` pixels between them."""
    n, size, _, channels = images.shape
    rows = -(-n // columns)
    step = size + gap
    sheet = np.full((rows * step + gap, columns * step + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * step, gap + i % columns * step
        sheet[y : y + size, x : x + size] = image
    return Image.fromarray(sheet if channels == 3 else sheet[..., 0])


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, completely or not at all."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def save_animation(frames: list[Image.Image], path: Path, fps: float) -> None:
    """Write a GIF or WebP (by the suffix) of `fps` frames per second that shows the last frame for a second and repeats."""
    durations = [1000 / fps] * (len(frames) - 1) + [max(1000, 1000 / fps)]
    with replacing(path) as temporary:
        frames[0].save(
            temporary, format=path.suffix[1:], save_all=True, append_images=frames[1:], duration=[round(d) for d in durations],
            loop=0, lossless=True,
        )  # fmt: skip
