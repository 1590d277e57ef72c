"""Checks of settings and other input: InputError, and functions that raise it.

Other modules import InputError and `nearest` from fastdit.config.
"""

import difflib
import math
import os
import reprlib
import types
import typing
import unicodedata


class InputError(Exception):
    """Bad input from the user, in one sentence: the command line prints it and exits with code 2."""


def at_least(section: str, config: object, key: str, limit: float) -> None:
    """Raise InputError if field `key` of a section's dataclass is below `limit`."""
    value = getattr(config, key)
    if not value >= limit:  # NaN fails too
        raise InputError(f"{section}.{key}={value} must be at least {limit}")


def at_most(section: str, config: object, key: str, limit: int) -> None:
    """Raise InputError if field `key` of a section's dataclass is above `limit`."""
    value = getattr(config, key)
    if value > limit:
        raise InputError(f"{section}.{key}={value} must be at most {limit}")


def usable(key: str, value: object) -> None:
    """Raise InputError for what no setting can be: empty text, control characters, infinity, a count that int32 cannot hold."""
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"{key}={value!r} is empty: give a value, or leave {key} out")
        if any(unicodedata.category(letter) == "Cc" for letter in value):
            raise InputError(f"{key}={value!r} holds a control character, such as NUL or a line break: leave it out")
    elif isinstance(value, list | tuple):
        for each in value:
            usable(key, each)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key}={value} must be finite")
    elif isinstance(value, int) and value >= 2**31 and key != "train.seed":
        raise InputError(f"{key}={value} must be below 2^31")


def one_of(section: str, config: object, key: str, choices: tuple) -> None:
    """Raise InputError if field `key` of a section's dataclass is not one of `choices`."""
    value = getattr(config, key)
    if value not in choices:
        raise InputError(f"{section}.{key}={value} is unknown: {nearest(str(value), [str(c) for c in choices])}")


def nearest(name: str, choices: list[str]) -> str:
    """Return the end of an error sentence: the choice that is closest to `name`, or all of them."""
    close = difflib.get_close_matches(name, choices, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(choices)}"


def shown(value: object) -> str:
    """Return a value as error sentences show it: long ones are cut."""
    return repr(value) if isinstance(value, str) and len(value) <= 300 else reprlib.repr(value)


def convert(key: str, value: object, hint: object) -> object:
    """Return a value from YAML or JSON as the type `hint` of the field `key`. Raises InputError."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in allowed:
        return None
    kind = allowed[0]
    if (sequence := typing.get_origin(kind)) in (list, tuple):
        each_kind = typing.get_args(kind)[0]
        if not isinstance(value, list | tuple):
            raise InputError(f"{key}={shown(value)} must be a list, such as {'[0.999,0.9999]' if each_kind is float else '[2,2]'}")
        return sequence(convert(key, each, each_kind) for each in value)
    if kind is str and isinstance(value, str):
        return os.path.expanduser(value) if value.startswith("~/") else str(value)  # the shell does not expand it behind a =
    if isinstance(value, str) and type(value) is not str:  # yaml12.Plain
        from fastdit.yaml12 import scalar

        value = scalar(value)
    if kind is str and type(value) is bool:
        value = str(value).lower()  # data.resident
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    if kind is float and type(value) is float and not math.isfinite(value):
        raise InputError(f"{key}={value} must be finite")
    if type(value) is not kind:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text (in quotes, if need be)"}[kind]
        raise InputError(f"{key}={shown(value)} must be {wanted}")
    return value
