"""Grids of images, animations and folders of images, in memory and in files."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fastdit.config import InputError
from fastdit.files import lock, replacing, writing


class Format(NamedTuple):
    """A format of pictures.

    name: Pillow's, with what is lost in words; options: of Pillow's `save`; largest: height and width in pixels, at most.
    """

    name: str
    about: str
    options: dict[str, Any]
    largest: int


JPEG = Format("JPEG", "JPEG, quality 95: not lossless", {"quality": 95}, 65_535)
FORMATS = {  # by suffix
    ".png": Format("PNG", "PNG", {}, 2**31 - 1),
    ".jpg": JPEG,
    ".jpeg": JPEG,
    ".webp": Format("WEBP", "WebP, lossless", {"lossless": True}, 16_383),
    ".gif": Format("GIF", "GIF, 256 colours", {}, 65_535),
}
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
ANIMATIONS = (".gif", ".webp")


def check_suffix(flag: str, path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise InputError unless the file that the option `flag` names ends in one of `suffixes`."""
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{flag} {path} must end in {' or '.join(suffixes)}")


def grid_size(images: int, size: int, columns: int, gap: int = 2) -> tuple[int, int]:
    """Return width and height in pixels of a `grid`."""
    return columns * (size + gap) + gap, -(-images // columns) * (size + gap) + gap


def check_size(flag: str, path: Path, width: int, height: int) -> None:
    """Raise InputError if the format of `path` does not hold a picture of this size."""
    form = FORMATS[path.suffix.lower()]
    if max(width, height) > form.largest:
        raise InputError(f"{flag} {path} would be {width} x {height} pixels, {form.name} holds {form.largest}: show fewer images")


def grid(images: np.ndarray, columns: int, gap: int = 2) -> Image.Image:
    """Return images uint8 [n,S,S,1 or 3] as one picture, `columns` per row, on white with `gap` pixels between them."""
    n, size, _, channels = images.shape
    width, height = grid_size(n, size, columns, gap)
    step = size + gap
    sheet = np.full((height, width, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * step, gap + i % columns * step
        sheet[y : y + size, x : x + size] = image
    return Image.fromarray(sheet if channels == 3 else sheet[..., 0])


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format of its suffix, one of PICTURES, completely or not at all."""
    form = FORMATS[path.suffix.lower()]
    with replacing(path) as temporary:
        picture.save(temporary, format=form.name, **form.options)


def save_animation(frames: list[Image.Image], path: Path, fps: float) -> None:
    """Write a GIF or WebP (by the suffix) of `fps` frames per second that shows the last frame for a second and repeats."""
    durations = [1000 / fps] * (len(frames) - 1) + [max(1000, 1000 / fps)]
    with replacing(path) as temporary:
        frames[0].save(
            temporary, format=FORMATS[path.suffix.lower()].name, save_all=True, append_images=frames[1:],
            duration=[round(d) for d in durations], loop=0, lossless=True,
        )  # fmt: skip


class PictureFolder:
    """A folder of PNG files, which are written into a hidden folder in it and moved at the end: it never holds a part of them.

    It holds nothing else, so that whoever evaluates it evaluates these images. Several ranks may write.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        """names: of all files, in the order of the images."""
        self.folder = folder
        self.names = names
        self.hidden = folder / ".unfinished"
        self.made = False

    def begin(self) -> None:
        """Make the folder. Raises InputError if it cannot be written, if it holds other files, or if another command writes it."""
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise InputError(f"--folder {self.folder} is no folder: choose another path")
        try:
            self.made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            others = {name for name in os.listdir(self.folder) if not name.startswith(".")}.difference(self.names)
            if others:
                raise InputError(
                    f"--folder {self.folder} holds other files, such as {min(others)!r}, that would be mixed with the samples: "
                    "give an empty folder, or delete them"
                )
            self.lock = lock(self.folder / ".lock", f"another command writes {self.folder}: wait for it, or use another folder")
            shutil.rmtree(self.hidden, ignore_errors=True)  # of a command that was killed
            self.hidden.mkdir()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"--folder {self.folder} cannot be made: {reason}: choose another folder") from error

    def write(self, i: int, image: np.ndarray) -> None:
        """Write image i, uint8 [S,S,1 or 3]."""
        with writing(self.folder):
            grid(image[None], 1, gap=0).save(self.hidden / self.names[i], format="PNG")

    def finish(self) -> None:
        """Move the files of all ranks to the folder."""
        with writing(self.folder):
            for name in self.names:
                (self.hidden / name).replace(self.folder / name)

    def close(self) -> None:
        """Remove what is not finished, and the folder if `begin` made it and nothing is in it."""
        shutil.rmtree(self.hidden, ignore_errors=True)
        (self.folder / ".lock").unlink(missing_ok=True)
        self.lock.close()
        if self.made:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
