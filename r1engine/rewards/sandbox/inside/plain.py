"""Values as JSON, the only form in which they enter or leave the sandbox.

None, bool, str, small int, finite float and list are themselves. The rest is an object with one key: {"int": hex},
{"float": "nan"}, {"bytes": hex}, {"complex": [re, im]}, {"tuple": [...]}, {"set": [...]}, {"frozenset": [...]},
{"dict": [[key, value], ...]}. Only these exact types come out of `decode`: no subclass, no method of the sender's.
"""

from __future__ import annotations

import json
import math
from typing import Any

_EXACT = 2**53


def dumps(value: Any) -> str:
    """JSON text of a value.

    Raises:
        ValueError: it is or holds something other than the types above, or is nested too deeply.
    """
    try:
        return json.dumps(encode(value), separators=(",", ":"))
    except RecursionError:
        raise ValueError("the value is nested too deeply") from None


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not one that `dumps` writes.
    """
    try:
        return decode(json.loads(text))
    except (RecursionError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"not a value: {type(error).__name__}") from None


def encode(value: Any) -> Any:
    """What `json` can write; subclasses lose what they add."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value) if -_EXACT < value < _EXACT else {"int": int.__format__(value, "x")}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": float.__repr__(value)}
    if isinstance(value, list):
        return [encode(item) for item in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    raise ValueError(f"found {type(value).__name__}, required a plain value")


def decode(found: Any) -> Any:
    """Inverse of `encode`."""
    if isinstance(found, list):
        return [decode(item) for item in found]
    if not isinstance(found, dict):
        return found
    (kind, inner), *more = found.items()
    if more:
        raise ValueError("not a value: an object of several keys")
    if kind == "dict":
        return {decode(key): decode(item) for key, item in inner}
    if kind in ("int", "float", "bytes"):
        return {"int": lambda: int(inner, 16), "float": lambda: float(inner), "bytes": lambda: bytes.fromhex(inner)}[
            kind
        ]()
    if kind == "complex":
        return complex(*map(decode, inner))
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind]([decode(item) for item in inner])
