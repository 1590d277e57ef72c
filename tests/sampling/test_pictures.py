"""Grids and animations hold the images that they were made of."""

import numpy as np
import pytest
from PIL import Image

from fastdit.sampling.pictures import grid, save_animation, save_picture


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_images_row_after_row_on_white(channels):
    images = np.random.default_rng(0).integers(0, 255, (5, 8, 8, channels), np.uint8)
    picture = grid(images, columns=3, gap=2)
    assert picture.size == (3 * 10 + 2, 2 * 10 + 2) and picture.mode == ("RGB" if channels == 3 else "L")
    pixels = np.asarray(picture).reshape(22, 32, channels)
    for i, image in enumerate(images):
        y, x = 2 + i // 3 * 10, 2 + i % 3 * 10
        assert np.array_equal(pixels[y : y + 8, x : x + 8], image)
    assert (pixels[:2] == 255).all() and (pixels[12:, 22:] == 255).all()  # the border and the sixth cell


def test_a_picture_is_written_without_loss_and_without_traces(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    save_picture(grid(images, 1, gap=0), tmp_path / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), images[0])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_repeats_and_rests_on_its_last_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(4)]
    path = tmp_path / f"a.{suffix}"
    save_animation(frames, path, fps=5)
    animation = Image.open(path)
    assert animation.n_frames == 4 and animation.info["loop"] == 0
    durations = []
    for i in range(4):
        animation.seek(i)
        animation.load()
        durations.append(animation.info["duration"])
        assert animation.convert("RGB").getpixel((4, 4)) == (60 * i, 0, 0)
    assert durations == [200, 200, 200, 1000]
