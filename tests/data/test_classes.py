"""The table of classes: what prepare, train and sample print."""

import os

import pytest

from fastdit.data.classes import LINES, WIDTH, class_table, printable


def test_a_line_per_class():
    assert class_table(["cat", "dog"], None, [8, 1200]).split("\n") == [
        "id  class  images",
        " 0  cat         8",
        " 1  dog     1,200",
    ]
    assert class_table(["n01", "n02"], ["tench", "goldfish, Carassius"], [3, 0]).split("\n") == [
        "id  class  name                 images",
        " 0  n01    tench                     3",
        " 1  n02    goldfish, Carassius       0",
    ]
    assert class_table([], None, []) == "id  class  images"


def test_long_tables_and_names_are_cut():
    few = class_table([str(i) for i in range(LINES)], None, [1] * LINES).split("\n")
    assert len(few) == 1 + LINES and "more" not in few[-1]
    many = class_table([f"c{i}" for i in range(1000)], None, [1] * 1000).split("\n")
    assert len(many) == 1 + LINES and many[-1] == f"… {1000 - LINES + 1} more"
    assert class_table(["x" * 100], None, [1]).split("\n")[1].split()[1] == "x" * (WIDTH - 1) + "…"


@pytest.mark.parametrize(
    ("raw", "shown"),
    [(b"caf\xe9", "caf\\xe9"), ("café".encode(), "café"), (b"a\nb\x1b[31m", "a\\nb\\x1b[31m"), ("٣".encode(), "٣")],
)
def test_names_of_any_bytes_can_be_printed(raw, shown):
    assert printable(os.fsdecode(raw)) == shown
    class_table([os.fsdecode(raw), "\ud800"], None, [1, 1]).encode()
