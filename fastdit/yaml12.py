"""YAML as people write it in settings: plain scalars stay text until the type of their key is known, and no key is given twice.

YAML 1.1, which PyYAML implements, reads 010 as 8, 1:30 as 90 and no as false, and keeps the last of two equal keys. `scalar` reads
a plain scalar by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), and 400_000 as YAML 1.1 and Python do.
"""

import re
from typing import Any

import yaml

NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LONGEST = 400  # characters of a number; Python refuses to read integers of more than 4300


class Plain(str):
    """The text of a scalar without quotes."""


def scalar(text: str) -> bool | int | float | str:
    """Return the value of a plain scalar that is not null: true, false, a number, or else the text itself."""
    if text in _BOOLS:
        return _BOOLS[text]
    if len(text) <= _LONGEST and _INT.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if len(text) <= _LONGEST and _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return str(text)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, for which no plain scalar but << means more than its text."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the node of a mapping. Raises yaml.YAMLError if a key is given twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"the key in line {line} is not text")
            if key.value in lines:
                raise yaml.YAMLError(f"{key.value!r} is given twice, in lines {lines[key.value]} and {line}: keep one of them")
            lines[key.value] = line
        return node


def _construct_text(loader: _Loader, node: yaml.ScalarNode) -> str | None:
    if node.style is not None:
        return node.value
    return None if node.value in NULLS else Plain(node.value)


_Loader.yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}
_Loader.add_constructor("tag:yaml.org,2002:str", _construct_text)


def load(text: str) -> object:
    """Return the value of a YAML document, with plain scalars as Plain and null as None. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Loader)
    except (ValueError, TypeError, RecursionError) as error:  # !!int x, !!set 3; a document nested a thousand deep
        raise yaml.YAMLError(str(error) or type(error).__name__) from error
