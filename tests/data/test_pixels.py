"""Encoded images: hidden names, headers, orientation, transparency, depth."""

import pytest

from fastdit.data import pixels


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "._x.jpg", "@eaDir", "__MACOSX", "#recycle", "lost+found", "Thumbs.db"])
def test_hidden_and_system_names(name):
    assert pixels.is_hidden(name)


@pytest.mark.parametrize("name", ["a.jpg", "macosx", "_cache", "x.", "ähnlich", "@ea"])
def test_names_of_data(name):
    assert not pixels.is_hidden(name)
