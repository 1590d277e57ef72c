"""Class ids from ids, names and -1."""

import pytest

from fastdit.config import InputError
from fastdit.data.imagenet import imagenet_names
from fastdit.sampling.class_names import parse_classes, with_images

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
        ("", "--class '' has an empty entry"),
        (" ", "has an empty entry"),
        ("1,,2", "--class '1,,2' has an empty entry"),
        ("--3", "--class '--3' is not one class"),
        ("\u0663", "is not one class"),  # 3 in Arabic digits, and in wide ones
        ("\uff13", "is not one class"),
        ("3\0", "is not one class"),
        ("9" * 5000, "--class 99999999999999999999 is out of range"),
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


def test_names_win_over_numbers():
    notes = []
    numbers = ["01", "02", "10", "7"]
    assert parse_classes("01,10", 4, numbers, say=notes.append) == [0, 2]
    assert "--class 10 is the name of class 2, not an id" in notes
    assert parse_classes("0,3", 4, numbers) == [0, 3]  # no class is called 0 or 3
    for text, name in (("1", "01"), ("2", "02"), ("007", "7")):
        with pytest.raises(InputError, match=f"may be the class called '{name}' or the class with id {text}: give its name"):
            parse_classes(text, 4, numbers)
    digits = list(map(str, range(10)))
    notes.clear()
    assert parse_classes("all", 10, digits) == parse_classes(",".join(digits), 10, digits, say=notes.append) == list(range(10))
    assert not notes


def test_names_with_commas_spaces_and_case():
    names = ["tench, Tinca tinca", "Cat", "cat", "a,b", "a", "b", "all", "Smith, A", "Smith, B"]
    assert parse_classes("tench, Tinca tinca", 9, names) == parse_classes("tench,Tinca tinca", 9, names) == [0]
    assert parse_classes("cat,Cat", 9, names) == [2, 1]
    for text, reason in (
        ("CAT", "names classes 1 and 2"),
        ("a,b", "may be one class or 2 classes"),
        ("all", "the class of that name or all"),
        ("Smith", "names classes 7 and 8"),
    ):
        with pytest.raises(InputError, match=reason):
            parse_classes(text, 9, names)
    assert parse_classes("Smith, B,4", 9, names) == [8, 4]


def test_only_classes_with_images_are_drawn_unless_they_are_named():
    notes = []
    counts, names = [4, 0, 7], ["x", "y", "z"]
    assert with_images(5, counts, names) == [0, 2] and with_images(5, None, names) == [0, 1, 2]
    assert with_images(5, None, None) == list(range(5))
    for text in ("all", None):
        assert parse_classes(text, 5, names, counts=counts, say=notes.append) == [0, 2]
        assert notes.pop() == "classes without images in training are left out: 1, 3, 4"
    drawn = {parse_classes("-1", 5, names, seed, counts)[0] for seed in range(20)}
    assert drawn == {0, 2}
    assert parse_classes("y,4,0", 5, names, counts=counts, say=notes.append) == [1, 4, 0]
    assert notes == ["warning: the model has seen no images of classes 1, 4"]
