"""Grids and animations hold the images that they were made of."""

import numpy as np
import pytest
from PIL import Image

from fastdit.config import InputError
from fastdit.sampling.pictures import PictureFolder, check_size, grid, grid_size, save_animation, save_picture


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


@pytest.mark.parametrize(("name", "form"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP")])
def test_a_picture_has_the_format_of_its_suffix(tmp_path, name, form):
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    save_picture(grid(images, 1, gap=0), tmp_path / name)
    with Image.open(tmp_path / name) as picture:
        assert picture.format == form
        assert np.array_equal(np.asarray(picture), images[0]) == (form != "JPEG")


def test_a_picture_too_large_for_its_format_is_refused(tmp_path):
    assert grid_size(7, 8, 3) == grid(np.zeros((7, 8, 8, 1), np.uint8), 3).size
    check_size("--out", tmp_path / "a.png", 10, 100_000)
    for name in ("a.webp", "a.jpg", "a.gif"):
        with pytest.raises(InputError, match=r"--out .* would be 10 x 100000 pixels, .* holds \d+: show fewer images"):
            check_size("--out", tmp_path / name, 10, 100_000)


def test_a_folder_holds_all_pictures_of_one_command_or_none(tmp_path):
    image = np.zeros((8, 8, 1), np.uint8)
    folder = PictureFolder(tmp_path / "f", ["0.png", "1.png"])
    folder.begin()
    folder.write(0, image)
    with pytest.raises(InputError, match="another command writes"):
        PictureFolder(tmp_path / "f", ["0.png", "1.png"]).begin()
    folder.close()
    assert not (tmp_path / "f").exists()
    folder.begin()
    folder.write(0, image)
    folder.write(1, image)
    folder.finish()
    folder.close()
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["0.png", "1.png"]
    PictureFolder(tmp_path / "f", ["1.png", "0.png"]).begin()  # the same files, again
    with pytest.raises(InputError, match=r"holds other files, such as '1.png', that would be mixed"):
        PictureFolder(tmp_path / "f", ["0.png"]).begin()
