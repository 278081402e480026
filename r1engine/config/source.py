"""Reads a YAML file with line numbers and `key=value` overrides, and makes a section of it.

It knows nothing of which keys exist: the class is handed in.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from r1engine.config.words import explain, show

KeyPath = tuple[str, ...]
ModelT = TypeVar("ModelT", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key, what was found and what is required."""

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        head = "" if len(self.problems) == 1 else f"{len(self.problems)} problems in the config:\n  "
        super().__init__(head + "\n  ".join(self.problems))

    @classmethod
    def of(cls, error: Exception) -> ConfigError:
        """What is wrong with an input that could not be read or used, in a line."""
        if isinstance(error, cls):
            return error
        if isinstance(error, OSError) and error.filename is not None:
            return cls(f"{error.filename2 or error.filename}: {error.strerror}")
        return cls(str(error))


@dataclass(frozen=True)
class Source:
    """Plain values and, for each key path, where it was written ("run.yaml:7" or "override 'seed=1'")."""

    data: dict[Any, Any]
    where: dict[KeyPath, str]

    def origin(self, path: KeyPath) -> str:
        """Where the key, or the innermost enclosing one that was written, stands; "" if nowhere."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.where:
                return self.where[path[:end]] + ": "
        return ""


def read_source(path: Path, overrides: list[str]) -> Source:
    """Values of a YAML 1.2 file with `key.sub=value` overrides applied in order (the last one wins).

    Raises:
        ConfigError: the file is missing, empty, not YAML, not a mapping or repeats a key, or an override is malformed.
    """
    source = _read_file(path)
    for override in overrides:
        _apply_override(source, override)
    return source


def read_overrides(overrides: list[str]) -> Source:
    """Values of `key.sub=value` overrides alone.

    Raises:
        ConfigError: one is malformed.
    """
    source = Source({}, {})
    for override in overrides:
        _apply_override(source, override)
    return source


def validate(model: type[ModelT], source: Source, others: Mapping[str, type[BaseModel]] | None = None) -> ModelT:
    """The values as an instance of `model`.

    Args:
        model:  a section.
        source: its values.
        others: kind -> class of the other kinds of stage, to say whose key an unknown one is.

    Raises:
        ConfigError: unknown keys or wrong values; every problem is listed, each with its origin and dotted key.
    """
    try:
        return model.model_validate(source.data)
    except ValidationError as error:
        problems = [
            source.origin(path) + line
            for item in error.errors()
            for path, line in explain(item, model, source.data, others or {})
        ]
    raise ConfigError(list(dict.fromkeys(problems)))  # a union reports once per alternative


def write_yaml(data: Mapping[str, Any]) -> str:
    """YAML 1.2 text of plain values, keys in the given order."""
    from io import StringIO

    yaml = YAML(typ="rt")
    yaml.representer.add_representer(types.NoneType, lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    yaml.width = 4096  # a long path stays on its line
    text = StringIO()
    yaml.dump(data, text)
    return text.getvalue()


# ---- reading ---------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> Source:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        found = "a folder" if isinstance(error, IsADirectoryError) else "no such file"
        raise ConfigError(f"{path}: found {found}, required a YAML config file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    data, lines = _parse(text, str(path))
    if data is None:
        raise ConfigError(f"{path}: found an empty file, required a mapping of config keys")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: found {show(data)} at the top level, required a mapping of config keys")
    return Source(data, {key: f"{path}:{line}" for key, line in lines.items()})


def _parse(text: str, name: str) -> tuple[Any, dict[KeyPath, int]]:
    """(values, line of each key path, from 1) of one YAML document."""
    try:
        root = YAML(typ="safe", pure=True).compose(text)
        if root is None:
            return None, {}
        entries = list(_entries(root, (), ()))
        lines: dict[KeyPath, int] = {}
        repeated = []
        for path, line in entries:
            if path in lines:
                repeated.append(f"{name}:{line}: duplicate key {'.'.join(path)}, first on line {lines[path]}")
            lines.setdefault(path, line)
        if repeated:
            raise ConfigError(repeated)
        return YAML(typ="safe", pure=True).load(text), lines
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}" if mark else name
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{place}: not valid YAML: {reason}") from error


def _entries(node: Node, path: KeyPath, enclosing: tuple[int, ...]) -> Iterator[tuple[KeyPath, int]]:
    """(path, line) of every mapping key below `node`, repeated keys repeatedly."""
    if id(node) in enclosing:
        raise ConfigError(f"line {node.start_mark.line + 1}: an anchor contains itself, required finite values")
    if isinstance(node, MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            yield here, key.start_mark.line + 1
            yield from _entries(value, here, (*enclosing, id(node)))
    elif isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            yield from _entries(value, (*path, str(index)), (*enclosing, id(node)))


def _apply_override(source: Source, override: str) -> None:
    name = f"override '{override}'"
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ConfigError(f"{name}: required the form key.sub=value")
    if not text.strip():
        raise ConfigError(f"{name}: found no value, required one (key=null unsets)")
    value, _ = _parse(text, name)

    section = source.data
    for depth, part in enumerate(path[:-1], start=1):
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise ConfigError(f"{name}: {'.'.join(path[:depth])} is {show(section)}, required a mapping")
    section[path[-1]] = value
    for stale in [known for known in source.where if known[: len(path)] == path]:
        del source.where[stale]
    source.where[path] = name
