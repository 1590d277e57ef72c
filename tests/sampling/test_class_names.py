"""Class names to ids."""

import pytest

from fastdit.config import InputError
from fastdit.data import imagenet
from fastdit.sampling import class_names


def test_class_names_are_accepted():
    names = imagenet.imagenet_names()
    assert class_names.parse_classes("golden retriever, Otter,0,tinca tinca", 1000, names) == [207, 360, 0, 0]
    for text, message in [
        ("crane", r"names classes 134 and 517: give the id"),
        ("golden retreiver", r"did you mean 'golden retriever'"),
        ("1000", r"out of range"),
    ]:
        with pytest.raises(InputError, match=message):
            class_names.parse_classes(text, 1000, names)
    with pytest.raises(InputError, match=r"must be 'all' or class ids"):
        class_names.parse_classes("otter", 10)
