"""Checks of single values; tests/test_config.py has those of whole configs."""

import math
from types import SimpleNamespace

import pytest

from fastdit import checks, config
from fastdit.yaml12 import Plain


def test_limits_name_the_key_the_value_and_the_limit():
    values = SimpleNamespace(steps=3, rate=math.nan, solver="eule")
    checks.at_least("sample", values, "steps", 3)
    checks.at_most("sample", values, "steps", 3)
    for check in (
        lambda: checks.at_least("sample", values, "steps", 4),
        lambda: checks.at_most("sample", values, "steps", 2),
        lambda: checks.at_least("sample", values, "rate", 0),
        lambda: checks.one_of("sample", values, "solver", ("euler", "heun")),
    ):
        with pytest.raises(config.InputError, match=r"^sample\.(steps=3|rate=nan|solver=eule) "):
            check()


@pytest.mark.parametrize("value", ["", "  ", "a\0b", "a\nb", math.inf, 2**31, ["a", ""]])
def test_what_no_setting_can_be(value):
    with pytest.raises(config.InputError, match=r"^data\.source"):
        checks.usable("data.source", value)
    checks.usable("train.seed", 2**31)


@pytest.mark.parametrize(
    ("value", "hint", "converted"),
    [(Plain("1e-3"), float, 1e-3), (3, float, 3.0), (Plain("010"), int, 10), (True, str, "true"), (None, int | None, None),
     ([Plain("0.9")], list[float], [0.9]), (Plain("1:30"), str, "1:30")],
)  # fmt: skip
def test_values_become_the_type_of_their_key(value, hint, converted):
    result = checks.convert("key", value, hint)
    assert result == converted and type(result) is type(converted)


@pytest.mark.parametrize(("value", "hint"), [("3", int), (True, int), (3.0, int), (1, bool), (10**400, float), (0.9, list[float])])
def test_other_types_are_refused(value, hint):
    with pytest.raises(config.InputError, match=r"^key="):
        checks.convert("key", value, hint)


def test_long_values_are_cut():
    assert len(checks.shown("x" * 1000)) < 100 and len(checks.shown(list(range(1000)))) < 100
    assert checks.nearest("eule", ["euler", "heun"]) == "did you mean 'euler'?"
    assert checks.nearest("zzz", ["euler", "heun"]) == "choose one of euler, heun"
