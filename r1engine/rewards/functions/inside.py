"""The child side of a reward function: loads the user's file, and calls the function with what it asks for."""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

# What a function may ask for, by the names of its parameters.
FIELDS = (
    "question",
    "answer",
    "completion",
    "thoughts",
    "final_answer",
    "prompt",
    "num_tokens",
    "truncated",
    "language",
    "tests",
    "columns",
)
RECORDS = "records"  # the only parameter of a function of all completions of a question


@dataclass(frozen=True)
class Loaded:
    """A function of a user's file."""

    function: Callable[..., Any]
    takes: tuple[str, ...] | None  # the fields that it asks for; None: records

    def values(self, records: list[dict[str, Any]]) -> list[tuple[float | None, str]]:
        """(value, "") or (None, why there is none) of each record.

        Raises:
            ValueError: a function of records returns no list, or one of another length.
            Exception:  what the function raises.
        """
        if self.takes is not None:
            return [_value(self.function(**{name: record[name] for name in self.takes})) for record in records]
        found = self.function(records=records)
        if isinstance(found, str | bytes | dict) or not hasattr(found, "__len__"):
            raise ValueError(f"it returned a {type(found).__name__}, required a list of {len(records)} numbers")
        if len(found) != len(records):
            raise ValueError(f"it returned {len(found)} values, required {len(records)}: one a record")
        return [_value(value) for value in found]


@cache
def load(path: str, name: str) -> Loaded:
    """The function `name` of a Python file, which is imported as a module of its own.

    Files beside it can be imported; they come last on the path, so that none hides a package.

    Raises:
        ValueError: there is no such function, or it has parameters that no record fills.
        Exception:  what the file raises.
    """
    sys.path.append(os.path.dirname(path))
    module_name = os.path.splitext(os.path.basename(path))[0]
    spec = importlib.util.spec_from_file_location(f"reward_function_{module_name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise ValueError(f"{path}: found no function '{name}', only {', '.join(there) or 'none'}")
    return Loaded(function, _takes(function, f"{path}:{name}"))


def _takes(function: Callable[..., Any], where: str) -> tuple[str, ...] | None:
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"{where}: found an async function, required a plain one")
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    if [p.name for p in parameters if p.default is p.empty] == [RECORDS]:
        return None
    strange = [p.name for p in named if p.name not in FIELDS and p.default is p.empty]
    strange += [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if strange:
        raise ValueError(
            f"{where}: found the parameter {', '.join(strange)}, required some of {', '.join(FIELDS)}; "
            f"or {RECORDS} alone, a list of dicts with all of them"
        )
    return tuple(p.name for p in named if p.name in FIELDS) if len(named) == len(parameters) else FIELDS


def _value(found: Any) -> tuple[float | None, str]:
    if found is None:
        return None, "it returned None"
    if isinstance(found, str | bytes) or not hasattr(found, "__float__"):
        return None, f"it returned a {type(found).__name__} ({found!r:.40}), required a number or None"
    value = float(found)
    return (value, "") if math.isfinite(value) else (None, f"it returned {value}")


def work(item: dict[str, Any]) -> Any:
    """The values of `records`; without any, whether the function takes all completions of a question at once."""
    loaded = load(item["path"], item["name"])
    return loaded.values(item["records"]) if item["records"] else loaded.takes is None
