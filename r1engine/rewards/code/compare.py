"""Compares what a program returned or printed with what was expected; outside the sandbox, on plain JSON types.

Nothing is lower-cased, sorted or cut to the shorter side. Numbers are compared with a tolerance only where the
expected one is written as a float: an expected 5 is not 5.0 in text, and an expected 0.5 may be 0.50.
"""

from __future__ import annotations

import json
import math
import re
from itertools import zip_longest
from typing import Any

RELATIVE = ABSOLUTE = 1e-6
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_FLOAT = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?", re.ASCII)


def output_problem(found: bytes, expected: str) -> str:
    """How printed output differs from the expected, or "": line by line, then token by token.

    White space at the end of lines, empty lines at the end and the amount of white space between tokens do not count.
    """
    try:
        text = found.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"the output is not UTF-8: {error.reason} at byte {error.start}"
    for number, (line, required) in enumerate(zip_longest(_lines(text), _lines(expected)), 1):
        if line is None or required is None:
            return f"line {number}: found {_short(line)}, required {_short(required)}"
        if line != required and not _same_tokens(line.split(), required.split()):
            return f"line {number}: found {_short(line)}, required {_short(required)}"
    return ""


def is_same_value(found: Any, expected: Any) -> bool:
    """A returned value against the expected one, both as `inside.plain` encodes them.

    A tuple may stand for a list, and a number for an object's key that is its text, since JSON has no others. A bool
    is no number. An int is no float where the int is expected, and is one where the float is.
    """
    if isinstance(expected, bool) or isinstance(found, bool) or expected is None:
        return found is expected
    if isinstance(expected, float):
        return isinstance(found, (int, float)) and _is_close(float(found), expected)
    if isinstance(expected, list) and isinstance(found, dict) and list(found) == ["tuple"]:
        found = found["tuple"]
    if isinstance(expected, list):
        is_list = isinstance(found, list) and len(found) == len(expected)
        return is_list and all(map(is_same_value, found, expected))
    if isinstance(expected, dict):
        return _is_same_object(found, expected)
    return type(found) is type(expected) and found == expected


def _is_same_object(found: Any, expected: dict[str, Any]) -> bool:
    (kind, inner), *_ = expected.items()
    if not isinstance(found, dict) or list(found) != [kind]:
        return False
    if kind in ("set", "frozenset"):
        return sorted(map(json.dumps, found[kind])) == sorted(map(json.dumps, inner))
    if kind != "dict":
        return is_same_value(found[kind], inner)
    items = {_key(key): value for key, value in found["dict"]}
    required = {_key(key): value for key, value in inner}
    return items.keys() == required.keys() and all(is_same_value(items[key], required[key]) for key in required)


def _key(encoded: Any) -> str:
    return encoded if isinstance(encoded, str) else json.dumps(encoded)


def _same_tokens(found: list[str], expected: list[str]) -> bool:
    return len(found) == len(expected) and all(map(_same_token, found, expected))


def _same_token(found: str, expected: str) -> bool:
    if found == expected:
        return True
    is_float = len(found) < 400 and _FLOAT.fullmatch(expected) and _NUMBER.fullmatch(found)
    return bool(is_float) and _is_close(float(found), float(expected))


def _is_close(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _short(line: str | None) -> str:
    if line is None:
        return "the end"
    return repr(line if len(line) <= 40 else f"{line[:37]}...")
