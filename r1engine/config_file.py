"""Reads a YAML config with line numbers and `key=value` overrides, and words what is wrong with it.

It knows nothing of which keys exist: the pydantic model is handed in. Imports no torch.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

KeyPath = tuple[str, ...]
ModelT = TypeVar("ModelT", bound=BaseModel)

_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
_TYPE_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    types.NoneType: "null",
}


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key, what was found and what is required."""

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        head = "" if len(self.problems) == 1 else f"{len(self.problems)} problems in the config:\n  "
        super().__init__(head + "\n  ".join(self.problems))


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


def validate(model: type[ModelT], source: Source) -> ModelT:
    """The values as an instance of `model`.

    Raises:
        ConfigError: unknown keys or wrong values; every problem is listed, each with its origin and dotted key.
    """
    try:
        return model.model_validate(source.data)
    except ValidationError as error:
        problems = [line for item in error.errors() for line in _explain(item, model, source)]
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


def commented_defaults(model: type[BaseModel]) -> str:
    """Every key with its default and the comment that stands beside it in the source, as YAML."""
    lines = _default_lines(model)
    return "\n".join(lines) + "\n"


def _default_lines(model: type[BaseModel]) -> list[str]:
    bases = [kind for kind in reversed(model.__mro__) if issubclass(kind, BaseModel) and kind is not BaseModel]
    sources = "".join(map(inspect.getsource, bases))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", sources, re.MULTILINE))
    lines = []
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is None:
            value = str(field.default) if isinstance(field.default, Path) else field.default
            shown = "(required)" if field.is_required() else _show(value)
            lines.append(f"{name}: {shown}" + (f"  # {comments[name]}" if name in comments else ""))
            continue
        about = f"  # {inspect.cleandoc(section.__doc__)}" if "__doc__" in section.__dict__ and section.__doc__ else ""
        # An optional section is off by default: its keys are shown, but as comments.
        lead = "# " if field.default is None else ""
        lines += [f"{lead}{name}:{about}", *(f"{lead}  {line}" for line in _default_lines(section))]
    return lines


# ---- reading ---------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> Source:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise ConfigError(f"{path}: found {found}, required a YAML config file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    data, lines = _parse(text, str(path))
    if data is None:
        raise ConfigError(f"{path}: found an empty file, required a mapping of config keys")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: found {_show(data)} at the top level, required a mapping of config keys")
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
            raise ConfigError(f"{name}: {'.'.join(path[:depth])} is {_show(section)}, required a mapping")
    section[path[-1]] = value
    for stale in [known for known in source.where if known[: len(path)] == path]:
        del source.where[stale]
    source.where[path] = name


# ---- wording ---------------------------------------------------------------------------------------------------


def _explain(item: Any, model: type[BaseModel], source: Source) -> list[str]:
    """One pydantic error in our words."""
    loc = tuple(str(part) for part in item["loc"])
    if item["type"] == "value_error":  # a check of ours, already worded; one problem a line
        return [source.origin(loc) + line for line in str(item["ctx"]["error"]).splitlines()]
    if item["type"] in ("extra_forbidden", "invalid_key"):
        return [source.origin(loc) + _unknown_key(loc, model)]
    path, field = _field_at(loc, model)
    found = _value_at(source.data, path)
    what = "nothing" if item["type"] == "missing" else _show(found)
    return [f"{source.origin(path)}{'.'.join(path)}: found {what}, required {requirement(field)}"]


def _field_at(loc: KeyPath, model: type[BaseModel]) -> tuple[KeyPath, FieldInfo]:
    """The innermost field on the way to `loc`; pydantic appends union branches and mapping keys to a location."""
    section: type[BaseModel] | None = model
    for depth, part in enumerate(loc, start=1):
        field = section.model_fields[part]
        section = section_of(field)
        if section is None or depth == len(loc):
            return loc[:depth], field
    raise ValueError(f"_field_at: empty location in {model.__name__}")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section class a field holds, also when it may be null; None for a plain value."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def requirement(field: FieldInfo) -> str:
    """What a field takes, in words: "a number > 0 and <= 1"."""
    return _words(field.annotation, field.metadata)


def _words(kind: Any, metadata: list[Any]) -> str:
    if hasattr(kind, "__metadata__"):  # Annotated[kind, Field(...)]
        inner = [bound for item in kind.__metadata__ for bound in getattr(item, "metadata", [item])]
        return _words(kind.__origin__, inner)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(_show(value) for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(arg, []) for arg in args)
    if origin is list:
        return f"a list, each {_words(args[0], [])}"
    if origin is dict:
        return f"a mapping from {_words(args[0], [])} to {_words(args[1], [])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a mapping (leave the key out to take the defaults)"
    bounds = [f"{sign} {getattr(m, name)}" for m in metadata for name, sign in _BOUNDS if hasattr(m, name)]
    return " ".join([_TYPE_WORDS[kind], " and ".join(bounds)]).strip()


def _unknown_key(loc: KeyPath, model: type[BaseModel]) -> str:
    section: type[BaseModel] = model
    for part in loc[:-1]:
        section = section_of(section.model_fields[part]) or section
    names, key = list(section.model_fields), loc[-1]
    close = difflib.get_close_matches(key, names, n=1)
    elsewhere = [path for path in _leaves(model, ()) if path[-1] == key]
    if not close:
        close = [".".join(path) for path in elsewhere]
    message = f"unknown key {'.'.join(loc)}"
    if close:
        return f"{message}; did you mean {' or '.join(repr(name) for name in close)}?"
    owner = ".".join(loc[:-1]) or "the config"
    return f"{message}; the keys of {owner} are {', '.join(names)}"


def _leaves(model: type[BaseModel], path: KeyPath) -> Iterator[KeyPath]:
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is None:
            yield (*path, name)
        else:
            yield from _leaves(section, (*path, name))


def _value_at(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _show(value: Any) -> str:
    """A value as it would stand in YAML, cut to one short line."""
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {_show(item)}" for key, item in value.items()) + "}"
    else:
        text = (
            {None: "null", True: "true", False: "false"}.get(value)
            if value is None or value is True or value is False
            else repr(value)
        )
    return text if len(text) <= 80 else text[:77] + "..."
