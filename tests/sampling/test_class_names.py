"""Class ids from ids, names and -1."""

import pytest

from fastdit.config import InputError
from fastdit.data.imagenet import imagenet_names
from fastdit.sampling.class_names import parse_classes

NAMES = ["tench, Tinca tinca", "crane", "otter", "crane"]


def test_ids_and_names_in_the_order_given():
    assert parse_classes("all", 4) == [0, 1, 2, 3]
    assert parse_classes("3, 0,3", 4) == [3, 0, 3]
    assert parse_classes("Tinca tinca,OTTER,1", 4, NAMES) == [0, 2, 1]


def test_a_random_class_depends_on_the_seed_and_its_position():
    draws = [parse_classes("-1,-1", 10, seed=seed) for seed in range(20)]
    assert draws == [parse_classes("-1,-1", 10, seed=seed) for seed in range(20)]
    assert len({c for draw in draws for c in draw}) > 5 and any(a != b for a, b in draws)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", "--class 4 is out of range: this model's classes are 0 to 3"),
        ("-2", "--class -2 is out of range"),
        ("crane", "it names classes 1 and 3: give the id"),
        ("ottre", "did you mean 'otter'"),
    ],
)
def test_another_class_is_refused(text, message):
    with pytest.raises(InputError) as error:
        parse_classes(text, 4, NAMES)
    assert message in str(error.value)


def test_names_need_a_model_that_has_some():
    with pytest.raises(InputError, match="must be 'all' or class ids"):
        parse_classes("otter", 4)


def test_names_of_imagenet():
    names = imagenet_names()
    assert parse_classes("golden retriever, Otter,0,tinca tinca", 1000, names) == [207, 360, 0, 0]
    with pytest.raises(InputError, match="names classes 134 and 517: give the id"):
        parse_classes("crane", 1000, names)
    with pytest.raises(InputError, match="did you mean 'golden retriever'"):
        parse_classes("golden retreiver", 1000, names)
